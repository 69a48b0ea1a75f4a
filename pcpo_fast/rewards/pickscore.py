"""PickScore: a CLIP ViT-H-14 fine-tuned on users' choices (Kirstain et al., arXiv:2305.01569).

The score is the model's logit, the cosine times its learned scale of about 100, as in the authors' model card: about 17
to 24. Flow-GRPO divides it by 26, which corresponds to a weight of 1/26 here.
"""

from typing import Any, ClassVar

from torch import Tensor

from pcpo_fast.rewards.clip_scoring import ClipFeatures, load_clip, load_tokenizer
from pcpo_fast.rewards.learned import LearnedReward


class PickScore(LearnedReward):
    """Logit of image and prompt in PickScore.

    Args:
        model: folder or hub id of a CLIP model in transformers' format.
        tokenizer: folder or hub id; None: the model's own or, if it has none, the published one.
        device, dtype, batch_size: see :class:`pcpo_fast.rewards.learned.LearnedReward`.

    Raises:
        UserError: an option is invalid, or the model is missing or not a CLIP model.
    """

    name: ClassVar[str] = "pickscore"
    size: ClassVar[tuple[int, int]] = (986_109_441, 0)

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        tokenizer: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
    ) -> None:
        super().__init__(device=device, dtype=dtype, batch_size=batch_size)
        clip, prepare, folder = load_clip(self.name, "model", model)
        words = load_tokenizer(self.name, tokenizer, folder, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
        self._clip = ClipFeatures(self.name, self.keep(clip), prepare, words)

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Logits, float32 [b]."""
        return self._clip.model.logit_scale.float().exp() * self._clip.cosines(images, prompts)
