"""LPIPS, the learned perceptual distance, from the published weight files and without torchvision.

The trunk is torchvision's AlexNet or VGG16 (``features.N.weight``) in a ``.pth`` or safetensors file; on the hub,
``timm/vgg16.tv_in1k`` holds VGG16 in this layout. The linear weights are files of the package ``lpips``
(``weights/v0.1/alex.pth`` and ``vgg.pth``, ``linN.model.1.weight``).
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pcpo_fast.errors import UserError
from pcpo_fast.evaluation.metric_weights import read_weights

_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10


class Trunk(NamedTuple):
    """A published feature extractor.

    Attributes:
        name: its name in the package ``lpips``.
        layers: (channels, kernel, stride, padding) of a convolution followed by a ReLU; None: max pooling.
        window: kernel size of the max pooling, whose stride is 2.
        taps: indices in ``features`` of the ReLUs whose outputs are compared.
        smallest: smallest supported image side in pixels.
    """

    name: str
    layers: tuple[tuple[int, int, int, int] | None, ...]
    window: int
    taps: tuple[int, ...]
    smallest: int

    def build(self) -> nn.Sequential:
        """Its ``features`` on the meta device: initializing random weights would take seconds."""
        layers: list[nn.Module] = []
        before = 3
        for layer in self.layers:
            if layer is None:
                layers.append(nn.MaxPool2d(self.window, 2))
            else:
                layers += [nn.Conv2d(before, *layer, device="meta"), nn.ReLU()]
                before = layer[0]
        return nn.Sequential(*layers)


_ALEXNET_LAYERS = ((64, 11, 4, 2), None, (192, 5, 1, 2), None, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
_VGG16_CHANNELS = (64, 64, None, 128, 128, None, 256, 256, 256, None, 512, 512, 512, None, 512, 512, 512)
ALEXNET = Trunk("alex", _ALEXNET_LAYERS, 3, (1, 4, 7, 9, 11), 31)
VGG16 = Trunk("vgg", tuple(None if n is None else (n, 3, 1, 1) for n in _VGG16_CHANNELS), 2, (3, 8, 15, 22, 29), 16)


class Lpips(nn.Module):
    """The distance (Zhang et al., arXiv 1801.03924), version 0.1.

    Args:
        backbone: file, folder or hub id of the trunk, recognized by its shapes.
        linear: file of the linear weights; None: taken from the installed package ``lpips``.

    Raises:
        UserError: a file is missing or damaged, or holds other weights.
    """

    def __init__(self, backbone: str, linear: str | None = None) -> None:
        super().__init__()
        where = f"--metric lpips={backbone}"
        weights = read_weights(backbone, where)
        first = weights.get("features.0.weight", torch.empty(0)).shape
        trunks = {torch.Size((64, 3, 11, 11)): ALEXNET, torch.Size((64, 3, 3, 3)): VGG16}
        if first not in trunks:
            raise UserError(
                f"{where}: holds neither torchvision's AlexNet nor its VGG16 (features.0.weight [64, 3, 11, 11] or "
                "[64, 3, 3, 3])"
            )
        self.trunk = trunks[first]
        self.layers = self.trunk.build()
        expected = self.layers.state_dict()
        for name, value in expected.items():
            found = weights.get(f"features.{name}")
            if found is None or found.shape != value.shape:
                has = "is missing" if found is None else f"has the shape {list(found.shape)}"
                raise UserError(f"{where}: features.{name} {has}; expected {list(value.shape)}")
        self.layers.load_state_dict({name: weights[f"features.{name}"].float() for name in expected}, assign=True)
        self.linear = nn.ParameterList(self._linear_weights(linear))
        self.requires_grad_(False).eval()

    def _linear_weights(self, linear: str | None) -> list[Tensor]:
        path = _packaged(self.trunk.name) if linear is None else linear
        weights = read_weights(path, "--metric lpips")
        found = []
        for number, tap in enumerate(self.trunk.taps):
            name, count = f"lin{number}.model.1.weight", self.layers[tap - 1].out_channels
            if name not in weights or weights[name].numel() != count:
                raise UserError(
                    f"--metric lpips: {path} does not hold the linear weights of {self.trunk.name} "
                    f"({name} [1, {count}, 1, 1])"
                )
            found.append(weights[name].reshape(-1).float())
        return found

    def features(self, images: Tensor) -> list[Tensor]:
        """Features of images [B, 3, H, W] in 0..1: for each tap [B, C, h, w], normalized to unit length over C.

        Raises:
            UserError: the images are too small for the trunk.
        """
        if min(images.shape[-2:]) < self.trunk.smallest:
            raise UserError(
                f"--metric lpips: {self.trunk.name} needs images of at least {self.trunk.smallest} pixels, "
                f"got {images.shape[-2]} x {images.shape[-1]}"
            )
        shift, scale = (torch.tensor(values, device=images.device)[:, None, None] for values in (_SHIFT, _SCALE))
        x = (2 * images - 1 - shift) / scale
        found = []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in self.trunk.taps:
                found.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON))
        return found

    def distance(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        """Distances [B] between two batches of images, given their :meth:`features`."""
        total = torch.zeros(len(first[0]), device=first[0].device)
        for a, b, weight in zip(first, second, self.linear, strict=True):
            total += torch.einsum("bchw,c->bhw", (a - b).square(), weight).mean(dim=(1, 2))
        return total


def _packaged(name: str) -> str:
    """The weights file inside the package ``lpips``, which is not imported because it needs torchvision."""
    origin = getattr(importlib.util.find_spec("lpips"), "origin", None)
    file = Path(origin).parent / "weights" / "v0.1" / f"{name}.pth" if origin else None
    if file is None or not file.is_file():
        raise UserError(
            f"--metric lpips: the linear weights of {name} are not installed; run `pip install --no-deps lpips`, or "
            "give the file: --metric lpips=BACKBONE,LINEAR"
        )
    return str(file)
