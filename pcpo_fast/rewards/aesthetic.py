"""LAION's aesthetic predictor as used in DDPO and Flow-GRPO: CLIP ViT-L/14 and linear layers.

The head of improved-aesthetic-predictor (``sac+logos+ava1-l14-linearMSE.pth``) has five linear layers without
activations between them; LAION's first head (``sa_0_4_vit_l_14_linear.pth`` of aesthetic-predictor) has one. Both were
fitted to human ratings from 1 to 10; images of current models score about 4.5 to 7.5. The prompt is not used.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pcpo_fast.rewards.checkpoints import module_of, read_checkpoint
from pcpo_fast.rewards.clip_scoring import image_features, load_clip
from pcpo_fast.rewards.learned import LearnedReward
from pcpo_fast.rewards.model_files import model_file

_WIDTHS = (1024, 128, 64, 16, 1)
_PLACES = (
    0,
    2,
    4,
    6,
    7,
)  # indices in the published head; the others are dropout layers, which have no effect in evaluation


class Aesthetic(LearnedReward):
    """Predicted rating of each image.

    Args:
        model: folder or hub id of a CLIP model in transformers' format; only its image tower is loaded.
        head: the linear layers: a file, a folder with ``aesthetic-model.pth``, or a hub id.
        device, dtype, batch_size: see :class:`pcpo_fast.rewards.learned.LearnedReward`. The head stays in float32.

    Raises:
        UserError: an option is invalid, or model or head are missing or do not match each other.
    """

    name: ClassVar[str] = "aesthetic"
    size: ClassVar[tuple[int, int]] = (303_966_208, 927_969)

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        head: str = "trl-lib/ddpo-aesthetic-predictor",
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
    ) -> None:
        super().__init__(device=device, dtype=dtype, batch_size=batch_size)
        file = model_file(self.name, "head", head, "aesthetic-model.pth")
        weights = read_checkpoint(file, f"reward {self.name}")
        clip, self._prepare, _ = load_clip(self.name, "model", model, text=False)
        self._clip = self.keep(clip)
        what = f"reward {self.name}: {file} is not the head of LAION's aesthetic predictor for {model}"
        width = clip.config.projection_dim
        single = set(weights) <= {"weight", "bias"}
        layers = module_of(lambda: nn.Linear(width, 1), weights, what) if single else None
        self._head = self.keep(layers or linear_layers(weights, width, what), torch.float32)

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Ratings, float32 [b]."""
        rating: Tensor = self._head(image_features(self._clip, self._prepare(images)))
        return rating.squeeze(1)


def linear_layers(weights: dict[str, Tensor], width: int, what: str, prefix: str = "layers.") -> nn.Sequential:
    """Five linear layers, width -> 1024 -> 128 -> 64 -> 16 -> 1, also used by ImageReward.

    Args:
        weights: exactly these layers' weights, with names like ``layers.0.weight``.
        width: width of the features.
        what: prefix of error messages: "reward x: FILE" and what it should be.
        prefix: prefix of the names.

    Raises:
        UserError: a weight is missing, unknown or of the wrong shape.
    """
    return module_of(
        lambda: nn.Sequential(*(nn.Linear(a, b) for a, b in zip((width, *_WIDTHS[:-1]), _WIDTHS, strict=True))),
        weights,
        what,
        [(rf"^{layer}\.", f"{prefix}{place}.") for layer, place in enumerate(_PLACES)],
    )
