"""HPS v2.1: a CLIP ViT-H-14 fine-tuned on human preferences (Wu et al., arXiv:2306.09341).

The score is the cosine of image and prompt, as in the authors' package (hpsv2 1.2.0): about 0.2 to 0.35 for images of
current models; the range is -1..1. Papers often report it times 100. As in that package the whole image is used: its
longer side is resized to 224 pixels, and the rest of the square is black.
"""

from typing import Any, ClassVar

from torch import Tensor

from pcpo_fast.errors import UserError
from pcpo_fast.rewards.checkpoints import read_checkpoint
from pcpo_fast.rewards.clip_scoring import ClipFeatures, load_tokenizer
from pcpo_fast.rewards.learned import LearnedReward
from pcpo_fast.rewards.model_files import model_file
from pcpo_fast.rewards.open_clip import clip_from_open_clip
from pcpo_fast.rewards.options import checked_option
from pcpo_fast.rewards.preprocessing import Preprocessing


class HPSv2(LearnedReward):
    """Cosine of image and prompt in HPS v2.1.

    Args:
        model: the checkpoint (``.pt`` or ``.safetensors``), a folder with ``HPS_v2.1_compressed.pt``, or a hub id.
        tokenizer: folder or hub id of CLIP's tokenizer, which the checkpoint does not include.
        antialias: the authors use torchvision's ``Resize`` on tensors, which antialiases since torchvision 0.17; False:
            as in older versions.
        device, dtype, batch_size: see :class:`pcpo_fast.rewards.learned.LearnedReward`.

    Raises:
        UserError: an option is invalid, or the checkpoint is missing or not HPS's.
    """

    name: ClassVar[str] = "hpsv2"
    size: ClassVar[tuple[int, int]] = (986_109_441, 0)

    def __init__(
        self,
        model: str = "xswu/HPSv2",
        tokenizer: str = "openai/clip-vit-large-patch14",
        antialias: bool = True,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
    ) -> None:
        super().__init__(device=device, dtype=dtype, batch_size=batch_size)
        checked_option(self.name, "antialias", antialias, bool, "true or false")
        file = model_file(self.name, "model", model, "HPS_v2.1_compressed.pt")
        weights = read_checkpoint(file, f"reward {self.name}")
        clip = self.keep(clip_from_open_clip(weights, f"reward {self.name}: {file}"))
        words = load_tokenizer(self.name, tokenizer, None, tokenizer)
        if words.eos_token_id != clip.config.text_config.eos_token_id:
            raise UserError(
                f"reward {self.name}: the tokenizer {tokenizer} ends prompts with token {words.eos_token_id}, but "
                f"the checkpoint expects {clip.config.text_config.eos_token_id}; use CLIP's tokenizer"
            )
        size = clip.config.vision_config.image_size
        prepare = Preprocessing(size, None, on_bytes=False, antialias=antialias, pad=True)
        self._clip = ClipFeatures(self.name, clip, prepare, words)

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Cosines, float32 [b]."""
        return self._clip.cosines(images, prompts)
