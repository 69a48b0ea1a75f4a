"""LPIPS, the learned perceptual distance, from weight files of the published layouts and without torchvision.

The trunk is torchvision's AlexNet or VGG16 (``features.N.weight``), a ``.pth`` or safetensors file; on the hub, the
repository ``timm/vgg16.tv_in1k`` holds VGG16 in this layout. The linear weights are the files of the package ``lpips``
(``weights/v0.1/alex.pth`` and ``vgg.pth``, ``linN.model.1.weight``).
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcpo_fast.errors import UserError
from pcpo_fast.evaluation.metric_weights import read_weights

_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10


class Trunk(NamedTuple):
    """A published feature extractor.

    Attributes:
        name: in the package ``lpips``.
        convolutions: (number in ``features``, in, out, kernel, stride, padding).
        pools: numbers in ``features`` of the poolings.
        window: kernel of the poolings; their stride is 2.
        taps: convolutions behind whose ReLU the features are read.
        smallest: pixels of a side below which nothing is left to read.
    """

    name: str
    convolutions: tuple[tuple[int, int, int, int, int, int], ...]
    pools: tuple[int, ...]
    window: int
    taps: tuple[int, ...]
    smallest: int


ALEXNET = Trunk(
    "alex",
    (
        (0, 3, 64, 11, 4, 2),
        (3, 64, 192, 5, 1, 2),
        (6, 192, 384, 3, 1, 1),
        (8, 384, 256, 3, 1, 1),
        (10, 256, 256, 3, 1, 1),
    ),
    (2, 5),
    3,
    (0, 3, 6, 8, 10),
    31,
)
VGG16 = Trunk(
    "vgg",
    tuple(
        (number, before, after, 3, 1, 1)
        for number, before, after in (
            (0, 3, 64),
            (2, 64, 64),
            (5, 64, 128),
            (7, 128, 128),
            (10, 128, 256),
            (12, 256, 256),
            (14, 256, 256),
            (17, 256, 512),
            (19, 512, 512),
            (21, 512, 512),
            (24, 512, 512),
            (26, 512, 512),
            (28, 512, 512),
        )
    ),
    (4, 9, 16, 23),
    2,
    (2, 7, 14, 21, 28),
    16,
)


class Lpips(nn.Module):
    """The distance (Zhang et al., arXiv 1801.03924), version 0.1.

    Args:
        backbone: file, folder or hub id of the trunk; which one it is, its shapes say.
        linear: file of the linear weights; None: from the installed package ``lpips``.

    Raises:
        UserError: a file is missing or damaged, or holds other weights.
    """

    def __init__(self, backbone: str, linear: str | None = None) -> None:
        super().__init__()
        where = f"--metric lpips={backbone}"
        weights = {
            name.removeprefix("features."): value
            for name, value in read_weights(backbone, where).items()
            if name.startswith("features.")
        }
        self.trunk = _trunk_of(weights, where)
        self.layers = nn.ModuleDict()
        for number, inside, outside, kernel, stride, padding in self.trunk.convolutions:
            # Without memory until the weights are there: drawing 15 million random ones takes seconds.
            self.layers[str(number)] = nn.Conv2d(inside, outside, kernel, stride, padding, device="meta")
        _load(self.layers, weights, where)
        shapes = {number: outside for number, _, outside, *_ in self.trunk.convolutions}
        self.linear = nn.ParameterList(torch.empty(shapes[tap]) for tap in self.trunk.taps)
        self._load_linear(linear)
        self.requires_grad_(False).eval()

    def _load_linear(self, linear: str | None) -> None:
        path = _packaged(self.trunk.name) if linear is None else linear
        found = read_weights(path, "--metric lpips")
        for number, parameter in enumerate(self.linear):
            value = found.get(f"lin{number}.model.1.weight")
            if value is None or value.numel() != parameter.numel():
                raise UserError(
                    f"--metric lpips: {path} does not hold the linear weights of {self.trunk.name} "
                    f"(lin{number}.model.1.weight [1, {parameter.numel()}, 1, 1])"
                )
            parameter.data = value.reshape(-1).float()

    def features(self, images: Tensor) -> list[Tensor]:
        """Of images [B, 3, H, W] in 0..1: for each tap, [B, C, h, w] of unit length over C.

        Raises:
            UserError: the images are too small for the trunk.
        """
        if min(images.shape[-2:]) < self.trunk.smallest:
            raise UserError(
                f"--metric lpips: {self.trunk.name} needs images of at least {self.trunk.smallest} pixels, "
                f"got {images.shape[-2]} x {images.shape[-1]}"
            )
        shift = torch.tensor(_SHIFT, device=images.device)[:, None, None]
        scale = torch.tensor(_SCALE, device=images.device)[:, None, None]
        x = (2 * images - 1 - shift) / scale
        found = []
        numbers = {number for number, *_ in self.trunk.convolutions}
        for number in range(max(numbers) + 1):
            if number in numbers:
                x = F.relu(self.layers[str(number)](x))
                if number in self.trunk.taps:
                    found.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON))
            elif number in self.trunk.pools:
                x = F.max_pool2d(x, self.trunk.window, 2)
        return found

    def distance(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        """[B] distances between images whose :meth:`features` these are."""
        total = torch.zeros(len(first[0]), device=first[0].device)
        for a, b, weight in zip(first, second, self.linear, strict=True):
            total += torch.einsum("bchw,c->bhw", (a - b).square(), weight).mean(dim=(1, 2))
        return total


def _trunk_of(weights: dict[str, Tensor], where: str) -> Trunk:
    shape = tuple(weights["0.weight"].shape) if "0.weight" in weights else ()
    for trunk in (ALEXNET, VGG16):
        _, inside, outside, kernel, *_ = trunk.convolutions[0]
        if shape == (outside, inside, kernel, kernel):
            return trunk
    raise UserError(
        f"{where}: holds neither torchvision's AlexNet nor its VGG16 (features.0.weight [64, 3, 11, 11] or "
        "[64, 3, 3, 3])"
    )


def _load(layers: nn.ModuleDict, weights: dict[str, Tensor], where: str) -> None:
    expected = layers.state_dict()
    for name, value in expected.items():
        found = weights.get(name)
        if found is None or found.shape != value.shape:
            has = "is missing" if found is None else f"has the shape {list(found.shape)}"
            raise UserError(f"{where}: features.{name} {has}; {list(value.shape)} is expected")
    layers.load_state_dict({name: weights[name].float() for name in expected}, assign=True)


def _packaged(name: str) -> str:
    """The weights within the package, which is not imported: it would ask for torchvision."""
    spec = importlib.util.find_spec("lpips")
    file = (
        None if spec is None or spec.origin is None else Path(spec.origin).parent / "weights" / "v0.1" / f"{name}.pth"
    )
    if file is None or not file.is_file():
        raise UserError(
            f"--metric lpips: the linear weights of {name} are not here; install them with `pip install --no-deps "
            "lpips`, or name the file: --metric lpips=BACKBONE,LINEAR"
        )
    return str(file)
