"""A vision-language model behind an OpenAI-compatible endpoint as a reward (docs/reward_server.md)."""

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from pydantic import PositiveInt
from torch import Tensor

from pcpo_fast.errors import UserError
from pcpo_fast.rewards.failures import RewardFailure
from pcpo_fast.rewards.in_parallel import in_parallel
from pcpo_fast.rewards.options import checked_option
from pcpo_fast.rewards.preprocessing import rows_of_bytes
from pcpo_fast.rewards.retrying_client import RetryingClient

DEFAULT_PROMPT = (
    "How well does this image show what was asked for, and how good does it look? It was asked for: {prompt}\n"
    'Answer with JSON alone: {"score": S}, where S is a number from 0 (not at all) to 10 (perfectly).'
)
NO_TEXT = "the endpoint's answer has no text"


class VisionJudge:
    """One chat completion per image; the score is parsed from its text. The range depends on the prompt.

    Args:
        url: the endpoint up to its version, like ``http://host:8000/v1``; ``/chat/completions`` is appended.
        model: name of the model at the endpoint.
        prompt: the question; ``{prompt}`` is replaced by the image's prompt, ``{metadata.NAME}`` by a value of its
            metadata. The image follows it.
        json_key: key of the score in the JSON of the answer (the outermost, if objects are nested); the default without
            ``regex`` is "score". Several different values are a failure.
        regex: the score is the first group of the last match of this regular expression.
        lowest, highest: a score outside is a failure; None: no limit.
        key_env: environment variable with the endpoint's key; a key is never an option.
        system: a system message.
        request: additional fields of the request's body, like ``{"seed": 1, "response_format": {...}}``.
        max_tokens, temperature: generation settings.
        timeout: time limit of a complete answer in seconds.
        retries: further attempts while the endpoint is unreachable or busy, with growing pauses.
        parallel: number of concurrent requests.

    Raises:
        UserError: an option is invalid.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        prompt: str = DEFAULT_PROMPT,
        json_key: str | None = None,
        regex: str | None = None,
        lowest: float | None = None,
        highest: float | None = None,
        key_env: str = "PCPO_JUDGE_KEY",
        system: str | None = None,
        request: dict[str, Any] | None = None,
        max_tokens: int = 128,
        temperature: float = 0.0,
        timeout: float = 120.0,
        retries: int = 16,
        parallel: int = 8,
    ) -> None:
        if json_key is not None and regex is not None:
            raise UserError("reward vision_judge: json_key and regex are two ways to read the score; give one of them")
        self._pattern = None if regex is None else _compiled(regex)
        self._key = "score" if json_key is None else json_key
        if "{prompt}" not in prompt and "{metadata." not in prompt:
            raise UserError(
                "reward vision_judge: prompt must contain {prompt} or {metadata.NAME}, to be replaced by the image's"
            )
        checked_option("vision_judge", "parallel", parallel, PositiveInt, "an integer of at least 1")
        self._lowest = -math.inf if lowest is None else lowest
        self._highest = math.inf if highest is None else highest
        self._prompt, self._parallel = prompt, parallel
        self._body = {"model": model, "max_tokens": max_tokens, "temperature": temperature} | (request or {})
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._client = RetryingClient("vision_judge", url, key_variable=key_env, timeout=timeout, retries=retries)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Scores float64 [B] of images [B, 3, H, W]."""
        texts = [_filled(self._prompt, *pair) for pair in zip(prompts, metadata, strict=True)]
        rows = range(len(texts))
        outcomes = in_parallel(lambda row: self._judge(images[row], texts[row]), rows, self._parallel)
        numbers = [outcome if isinstance(outcome, float) else math.nan for outcome in outcomes]
        scores = torch.tensor(numbers, dtype=torch.float64)
        problems = [(row, outcome) for row, outcome in enumerate(outcomes) if isinstance(outcome, str)]
        if problems:
            row, problem = problems[0]
            more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise RewardFailure(f"reward vision_judge: {problem}, for the prompt {_cut(prompts[row])}{more}", scores)
        return scores

    def _judge(self, image: Tensor, text: str) -> float | str:
        """The score, or what is wrong with the answer."""
        content = [
            {"type": "text", "text": text},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_png(image)}"}},
        ]
        body = self._body | {"messages": [*self._first, {"role": "user", "content": content}]}
        try:
            answer = self._client.request(
                "POST",
                "/chat/completions",
                content=json.dumps(body).encode(),
                headers={"Content-Type": "application/json"},
            )
        except RewardFailure as failure:
            if not failure.retry:
                raise  # the endpoint is unreachable, so all images fail
            return str(failure).removeprefix("reward vision_judge: ")
        said, problem = _text_of(answer)
        if problem:
            return problem
        said = said.rpartition("</think>")[2].partition("<think>")[0]  # reasoning is not part of the answer
        if self._pattern is not None:
            matches = list(self._pattern.finditer(said))
            found = [matches[-1].group(1)] if matches else []
            wanted = f"match of {self._pattern.pattern}"
        else:
            found, wanted = outermost(said, self._key), f"JSON with a number {self._key!r}"
        scores = {_number(value) for value in found}
        if len(scores) > 1:
            return f"the answer {_cut(said)} has more than one {self._key!r}: {_cut(', '.join(map(str, found)))}"
        score = next(iter(scores), None)
        if score is None:
            return f"the answer {_cut(said)} has no {wanted}"
        if not self._lowest <= score <= self._highest:
            return f"the answer {_cut(said)} is outside {self._lowest:g} to {self._highest:g}"
        return score


def _filled(template: str, prompt: str, metadata: dict[str, Any]) -> str:
    """The template with ``{prompt}`` and ``{metadata.NAME}`` replaced; other braces (JSON examples) are kept."""

    def value(match: re.Match[str]) -> str:
        name = match.group(2)
        if name is None:
            return prompt
        if name not in metadata:
            raise RewardFailure(
                f"reward vision_judge: the metadata of the prompt {_cut(prompt)} has no {name}, which the judge's "
                "prompt asks for"
            )
        found = metadata[name]
        return found if isinstance(found, str) else json.dumps(found)

    return re.sub(r"\{(prompt|metadata\.(\w+))\}", value, template)


def _png(image: Tensor) -> str:
    buffer = io.BytesIO()
    Image.fromarray(rows_of_bytes(image[None])[0]).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _text_of(answer: Any) -> tuple[str, str]:
    """The text of a chat completion, and what is wrong with it (empty if nothing)."""
    try:
        choice = answer["choices"][0]
        content = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        error = answer.get("error") if isinstance(answer, dict) else None
        words = error.get("message", error) if isinstance(error, dict) else error
        return "", f"the endpoint answers with an error: {_cut(str(words))}" if error else NO_TEXT
    if isinstance(content, list):  # a list of parts; parts of other types (thinking) are not the answer
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        content = "".join(texts) if texts else None
    reason = choice.get("finish_reason")
    if reason in ("length", "max_tokens"):
        return "", (
            f"the answer {_cut(content or '')} was cut off by its length (finish_reason {reason}); raise the reward's "
            "option max_tokens"
        )
    return (content, "") if isinstance(content, str) else ("", NO_TEXT)


def outermost(text: str, key: str) -> list[Any]:
    """The values of a key in the JSON objects and lists of a text, for each at its lowest nesting depth.

    JSON may be surrounded by other text. JSON inside braces that are not valid JSON (truncated, a trailing comma) is
    ignored, because it may be only a part of the answer.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_Pairs)
    found: list[Any] = []
    at = open_braces = 0
    while (match := re.compile(r"[{}\[]").search(text, at)) is not None:
        at = match.end()
        if match[0] == "}":
            open_braces = max(0, open_braces - 1)
            continue
        if not open_braces:
            try:
                value, at = decoder.raw_decode(text, match.start())
            except (ValueError, RecursionError):
                pass
            else:
                found += _least_deep(value, key)
                continue
        open_braces += match[0] == "{"
    return found


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as a list of pairs, in which a key may occur twice."""


def _least_deep(value: Any, key: str) -> list[Any]:
    level = [value]
    while level:
        pairs = [pair for item in level if isinstance(item, _Pairs) for pair in item]
        found = [item for name, item in pairs if name == key]
        if found:
            return found
        lists = [item for item in level if isinstance(item, list) and not isinstance(item, _Pairs)]
        level = [item for _, item in pairs] + [item for part in lists for item in part]
    return []


_DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)")


def _number(value: Any) -> float | None:
    """A finite JSON number, or a decimal number in a string; stricter than Python's ``float`` ("1_0", "nan", digits of
    other scripts)."""
    if isinstance(value, str):
        value = value.strip()
        if not _DECIMAL.fullmatch(value):
            return None
    elif isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _compiled(regex: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise UserError(f"reward vision_judge: regex {regex!r} is not a valid regular expression: {error}") from None
    if pattern.groups < 1:
        raise UserError(f"reward vision_judge: regex {regex!r} must have a group, (...), around the score")
    return pattern


def _cut(text: str | Sequence[str]) -> str:
    line = " ".join(str(text).split())
    return repr(line if len(line) <= 100 else line[:97] + "...")
