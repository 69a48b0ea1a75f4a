"""Image features of vision models, on which distances and diversity are measured."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.evaluation.metric_weights import read_weights, weights_file
from pcpo_fast.files.content import Contents, digest, part_files
from pcpo_fast.rewards.clip_scoring import check_model_type, load_pretrained
from pcpo_fast.rewards.model_files import pretrained_folder
from pcpo_fast.rewards.preprocessing import CLIP_MEAN, CLIP_STD

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DINOV2_SIZE = 224
_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


class Extractor(Protocol):
    """Features of images.

    Attributes:
        identity: everything that determines the features; part of the cache key.
    """

    identity: dict[str, Any]

    def __call__(self, images: Sequence[Tensor]) -> dict[str, Tensor]:
        """Named features, float32 [B, d] each, of B images [3, H, W] in 0..1 that may differ in size."""
        ...


def resized_batch(images: Sequence[Tensor], size: int, to_bytes: bool) -> Tensor:
    """Stretch images to size x size with the antialiased bicubic filter of Pillow and JAX; [B, 3, size, size].

    Args:
        images: [3, H, W] in 0..1 each.
        size: side length in pixels.
        to_bytes: round to 256 levels and clip, as resizing an 8-bit image does.
    """
    done = []
    for image in images:
        pixels = image[None]
        if pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True, align_corners=False)
        done.append((pixels * 255).round().clamp(0, 255) / 255 if to_bytes else pixels)
    return torch.cat(done)


def normalized(images: Tensor, constants: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """Normalize channels with (means, standard deviations)."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in constants)
    return (images - mean) / std


class DinoV2:
    """DINOv2's class token after the final layer norm; FD-DINOv2 uses that of ViT-L/14 at 224 x 224.

    As in the public code of Stein et al. (arXiv 2306.04675), images are stretched to a square, not cropped.

    Args:
        path: folder or hub id of a transformers ``Dinov2Model``.
        device: where it runs.

    Raises:
        UserError: it cannot be loaded, or is another kind of model.
    """

    PUBLISHED = "facebook/dinov2-large"

    def __init__(self, path: str, device: torch.device) -> None:
        from transformers import Dinov2Model

        self._model = _pretrained(Dinov2Model, path, "--metric fd-dinov2", "dinov2").to(device)
        self._device = device
        self.identity = {"features": "dinov2 class token", "size": DINOV2_SIZE, "weights": _identity(self._model)}

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor]) -> dict[str, Tensor]:
        """``{"dinov2": [B, d]}``."""
        batch = resized_batch([image.to(self._device) for image in images], DINOV2_SIZE, to_bytes=True)
        return {"dinov2": self._model(pixel_values=normalized(batch, IMAGENET)).pooler_output.float()}


class ClipImages:
    """CLIP's unit-length image embeddings; CMMD uses those of ViT-L/14 at 336 x 336.

    As in the public code of Jayasumana et al. (arXiv 2401.09603), images are stretched to a square in floating point.

    Args:
        path: folder or hub id of a transformers CLIP model, with or without its text tower.
        device: where it runs.

    Raises:
        UserError: it cannot be loaded, or is another kind of model.
    """

    PUBLISHED = "openai/clip-vit-large-patch14-336"

    def __init__(self, path: str, device: torch.device) -> None:
        from transformers import CLIPVisionModelWithProjection

        types = ("clip", "clip_vision_model")
        self._model = _pretrained(CLIPVisionModelWithProjection, path, "--metric cmmd", *types).to(device)
        self._device, self._size = device, int(self._model.config.image_size)
        self.identity = {"features": "clip image", "size": self._size, "weights": _identity(self._model)}

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor]) -> dict[str, Tensor]:
        """``{"clip": [B, d]}``."""
        batch = resized_batch([image.to(self._device) for image in images], self._size, to_bytes=False)
        embeddings = self._model(pixel_values=normalized(batch, (CLIP_MEAN, CLIP_STD))).image_embeds.float()
        return {"clip": F.normalize(embeddings, dim=1)}


class Inception:
    """Pooled features and class logits of FID's Inception network, as implemented in torch-fidelity.

    Args:
        weights: weights file; None: torch-fidelity downloads it (about 95 MB).
        device: where it runs.

    Raises:
        UserError: torch-fidelity or the weights are missing.
    """

    def __init__(self, weights: str | None, device: torch.device) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UserError(
                "--metric fid and --metric is need torch-fidelity, which needs torchvision: run "
                f"`pip install torch-fidelity` ({error})"
            ) from None
        file = None
        if weights is not None:
            # Checked here: torch-fidelity would unpickle whatever the file holds.
            file = weights_file(weights, f"--metric fid={weights}")
            read_weights(str(file), f"--metric fid={weights}")
        elif not (Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILE).is_file():
            print(
                f"metric fid: downloading Inception, about 95 MB, to {torch.hub.get_dir()}", file=sys.stderr, flush=True
            )
        try:
            self._model = FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=None if file is None else str(file),
            ).to(device)
        except OSError as error:
            raise UserError(
                f"--metric fid: the Inception weights could not be downloaded ({reason_of(error)}); offline, give "
                f"their file ({_INCEPTION_FILE} from torch-fidelity's releases): --metric fid=FILE"
            ) from None
        except (RuntimeError, AttributeError, TypeError):
            raise UserError(
                f"--metric fid={weights}: {file} does not hold torch-fidelity's Inception weights "
                f"({_INCEPTION_FILE} from its releases)"
            ) from None
        self._device = device
        self.identity = {"features": "inception", "weights": "published" if file is None else Contents().of_file(file)}

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor]) -> dict[str, Tensor]:
        """``{"inception": [B, 2048], "logits": [B, 1008]}``; images of different sizes are run one at a time."""
        sizes = {tuple(image.shape) for image in images}
        batches = [torch.stack(list(images))] if len(sizes) == 1 else [image[None] for image in images]
        parts = [self._model((part.to(self._device) * 255).round().clamp(0, 255).to(torch.uint8)) for part in batches]
        pools, logits = (torch.cat([part[place] for part in parts]).float() for place in (0, 1))
        return {"inception": pools, "logits": logits}


def _pretrained(kind: Any, path: str, option: str, *types: str) -> Any:
    """A transformers model with all its weights.

    Raises:
        UserError: it cannot be loaded, is of another type, or lacks weights.
    """
    where = f"{option}={path}"
    folder = pretrained_folder(where, option.removeprefix("--"), path)
    check_model_type(folder, where, *types)
    return load_pretrained(kind, folder, where, unused=("",)).requires_grad_(False).eval()


def _identity(model: Any) -> str:
    return digest(Contents().of_files(part_files(Path(model.config._name_or_path))))
