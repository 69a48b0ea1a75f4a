"""Base class of rewards with a model: common options, batching, frozen networks."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from pcpo_fast.rewards.options import checked_device, checked_option

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LearnedReward(ABC):
    """A frozen model that scores images in batches.

    Every process has its own copy. The model is loaded when the reward is created; without ``device`` it moves to the
    images' device at the first call and stays there.

    Args:
        device: for example "cuda", "cuda:1" or "cpu"; None: the images' device.
        dtype: dtype of the weights: "float32", "bfloat16" or "float16". Scores are computed in float32 from features.
        batch_size: images per forward pass.

    Raises:
        UserError: an option is invalid.
    """

    name: ClassVar[str]
    size: ClassVar[tuple[int, int]]
    """Parameters of the default model: those of ``dtype``, and those that stay in float32."""

    def __init__(self, *, device: str | None, dtype: str, batch_size: int) -> None:
        self.dtype = DTYPES[checked_option(self.name, "dtype", dtype, Dtype, f"one of {', '.join(DTYPES)}")]
        self.batch_size = checked_option(self.name, "batch_size", batch_size, PositiveInt, "an integer of at least 1")
        self.device = None if device is None else checked_device(f"reward {self.name}", device)
        self.modules: list[nn.Module] = []
        self._at: torch.device | None = None

    def keep(self, module: Any, dtype: torch.dtype | None = None) -> Any:
        """Freeze and convert a network and register it, so that it moves with the reward; returns it."""
        module = module.to(dtype=self.dtype if dtype is None else dtype).eval().requires_grad_(False)
        self.modules.append(module)
        return module

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Score float32 images [B, 3, H, W] in 0..1; returns float32 [B] on the model's device."""
        device = self.device or images.device
        if device != self._at:
            for module in self.modules:
                module.to(device)
            self._at = device
        scores = [torch.zeros(0, device=device)]
        with torch.autocast(device.type, enabled=False):
            for start in range(0, len(images), self.batch_size):
                rows = slice(start, start + self.batch_size)
                scores.append(self.score(images[rows].to(device), prompts[rows], metadata[rows]).float())
        return torch.cat(scores)

    @abstractmethod
    def score(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Scores [b] of one batch; the images are on the model's device."""
