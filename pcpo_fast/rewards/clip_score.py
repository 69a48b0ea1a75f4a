"""CLIPScore (Hessel et al., arXiv:2104.08718): 2.5 max(cosine, 0) with CLIP ViT-B/32 and a fixed text prefix.

About 0.5 to 0.9 for matching images; the range is 0..2.5. Papers on text-to-image models mostly report
100 max(cosine, 0) without a prefix: ``{scale: 100, prefix: ""}``, often with ``model: openai/clip-vit-large-patch14``.
"""

from typing import Any, ClassVar

from pydantic import FiniteFloat
from torch import Tensor

from pcpo_fast.rewards.clip_scoring import ClipFeatures, load_clip, load_tokenizer
from pcpo_fast.rewards.learned import LearnedReward
from pcpo_fast.rewards.options import checked_option


class ClipScore(LearnedReward):
    """``scale`` times the cosine of image and prompt, clipped at 0.

    Args:
        model: folder or hub id of a CLIP model in transformers' format.
        tokenizer: folder or hub id; None: the model's own or, if it has none, the published one.
        scale: factor of the cosine.
        prefix: text before every prompt.
        device, dtype, batch_size: see :class:`pcpo_fast.rewards.learned.LearnedReward`.

    Raises:
        UserError: an option is invalid, or the model is missing or not a CLIP model.
    """

    name: ClassVar[str] = "clip_score"
    size: ClassVar[tuple[int, int]] = (151_277_313, 0)

    def __init__(
        self,
        model: str = "openai/clip-vit-base-patch32",
        tokenizer: str | None = None,
        scale: float = 2.5,
        prefix: str = "A photo depicts ",
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
    ) -> None:
        super().__init__(device=device, dtype=dtype, batch_size=batch_size)
        self.scale = checked_option(self.name, "scale", scale, FiniteFloat, "a finite number")
        self.prefix = checked_option(self.name, "prefix", prefix, str, "a string")
        clip, prepare, folder = load_clip(self.name, "model", model)
        words = load_tokenizer(self.name, tokenizer, folder, "openai/clip-vit-base-patch32")
        self._clip = ClipFeatures(self.name, self.keep(clip), prepare, words)

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Scaled cosines, float32 [b]."""
        return self.scale * self._clip.cosines(images, [self.prefix + prompt for prompt in prompts]).clamp(min=0)
