"""A reward on another machine: the client of ``pcpo-fast serve-reward`` (docs/reward_server.md)."""

import math
import uuid
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.rewards.failures import RewardFailure
from pcpo_fast.rewards.in_parallel import in_parallel
from pcpo_fast.rewards.options import checked_option
from pcpo_fast.rewards.preprocessing import as_bytes
from pcpo_fast.rewards.retrying_client import RetryingClient
from pcpo_fast.rewards.serving.wire import CONTENT_TYPE, PROTOCOL, TOKEN_VARIABLE, pack


class Remote:
    """Scores from a reward server; their range is that of the served reward.

    Every request has a unique identifier and is repeated with it until it is answered. A server that has already scored
    it repeats its answer, and a restarted server scores it again; in both cases one answer is used.

    Args:
        url: address of the server, ``http://host:8765``.
        token_env: environment variable with the token; a token is never an option, because options are stored.
        timeout: seconds to wait for the scores of one request.
        retries: further attempts while the server is unreachable or busy, with growing pauses; 16 are about 3.5
            minutes.
        batch_size: images per request.
        parallel: number of concurrent requests.
        pixels: ``float32`` sends the images unchanged, ``uint8`` rounds them to 256 levels (a quarter of the bytes).

    Raises:
        UserError: an option is invalid, the server cannot be reached or refuses the token, or it is not a reward
            server.
    """

    def __init__(
        self,
        url: str,
        *,
        token_env: str = TOKEN_VARIABLE,
        timeout: float = 120.0,
        retries: int = 16,
        batch_size: int = 16,
        parallel: int = 2,
        pixels: str = "float32",
    ) -> None:
        for option, value in (("batch_size", batch_size), ("parallel", parallel)):
            checked_option("remote", option, value, PositiveInt, "an integer of at least 1")
        checked_option("remote", "pixels", pixels, Literal["float32", "uint8"], "float32 or uint8")
        self.pixels, self.parallel = pixels, parallel
        self.client = RetryingClient("remote", url, key_variable=token_env, timeout=timeout, retries=retries)
        information = self.client.request("GET", "/v1/reward")
        if not isinstance(information, dict) or information.get("protocol") != PROTOCOL:
            raise UserError(f"reward remote: {self.client.url} is not a reward server of this version; check url")
        self.batch_size = min(batch_size, int(information["most_images"]))
        self.most_bytes = int(information["most_bytes"])
        self.scores_predictions = bool(information.get("scores_predictions", True))  # servers of before do not say

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Scores float64 [B] of images [B, 3, H, W]."""
        rows = [list(range(len(prompts)))[at : at + self.batch_size] for at in range(0, len(prompts), self.batch_size)]

        def score(part: list[int]) -> list[float]:
            return self._score(images[part], [prompts[row] for row in part], [metadata[row] for row in part])

        scores = [score for part in in_parallel(score, rows, self.parallel) for score in part]
        return torch.tensor(scores, dtype=torch.float64)

    def _score(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        body = pack(as_bytes(images) if self.pixels == "uint8" else images, prompts, metadata)
        if len(body) > self.most_bytes:
            if len(prompts) > 1:
                half = len(prompts) // 2
                parts = [slice(None, half), slice(half, None)]
                return [score for at in parts for score in self._score(images[at], prompts[at], metadata[at])]
            raise UserError(
                f"reward remote: an image is {counted(len(body), 'byte')}, but {self.client.url} takes "
                f"{self.most_bytes} in a request; set the reward's option pixels to uint8, or raise --most-mib of the "
                "server"
            )
        name = uuid.uuid4().hex
        headers = {"Content-Type": CONTENT_TYPE, "X-Request-Id": name}
        answer = self.client.request("POST", "/v1/score", content=body, headers=headers)
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != len(prompts) or answer.get("request") != name:
            raise RewardFailure(
                f"reward remote: {self.client.url} does not answer with {counted(len(prompts), 'score')}"
            )
        if not all(isinstance(score, int | float) and math.isfinite(score) for score in scores):
            raise RewardFailure(f"reward remote: {self.client.url} answers with scores that are not finite numbers")
        return [float(score) for score in scores]
