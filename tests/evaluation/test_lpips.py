"""LPIPS from weight files of the published layouts, against the formula written with PyTorch's own layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pcpo_fast.errors import UserError
from pcpo_fast.evaluation.lpips import ALEXNET, VGG16, Lpips
from pcpo_fast.evaluation.metric_weights import read_weights

CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
VGG_PLAN: tuple[Any, ...] = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def alexnet() -> nn.Sequential:
    """As torchvision numbers its layers."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    )


def vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    inside = 3
    for width in VGG_PLAN:
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.utils.skip_init(nn.Conv2d, inside, width, 3, padding=1), nn.ReLU()]
            torch.nn.init.normal_(layers[-2].weight, std=(2 / (9 * inside)) ** 0.5)  # type: ignore[arg-type]
            torch.nn.init.zeros_(layers[-2].bias)  # type: ignore[arg-type]
            inside = width
    return nn.Sequential(*layers)


TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}


def reference(network: nn.Sequential, name: str, linear: list[Tensor], a: Tensor, b: Tensor) -> Tensor:
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = (((2 * image - 1) - shift[:, None, None]) / scale[:, None, None] for image in (a, b))
    total = torch.zeros(len(a))
    for number, layer in enumerate(network):
        x, y = layer(x), layer(y)
        if number in TAPS[name]:
            weight = linear[TAPS[name].index(number)]
            unit = [value / (value.norm(dim=1, keepdim=True) + 1e-10) for value in (x, y)]
            total += nn.functional.conv2d((unit[0] - unit[1]) ** 2, weight).mean(dim=(1, 2, 3))
        if number == TAPS[name][-1]:
            break
    return total


def write_linear(folder: Path, name: str) -> list[Tensor]:
    linear = [torch.rand(1, width, 1, 1) for width in CHANNELS[name]]
    torch.save({f"lin{n}.model.1.weight": value for n, value in enumerate(linear)}, folder / f"{name}.pth")
    return linear


@pytest.mark.parametrize("name", ["alex", "vgg"])
def test_distance_is_the_published_one(name: str, tmp_path: Path) -> None:
    network = {"alex": alexnet, "vgg": vgg16}[name]()
    state = {f"features.{key}": value for key, value in network.state_dict().items()}
    state["classifier.1.weight"] = torch.zeros(2, 2)
    if name == "alex":
        torch.save(state, tmp_path / "trunk.pth")
        trunk = tmp_path / "trunk.pth"
    else:
        save_file(state, tmp_path / "model.safetensors")
        trunk = tmp_path
    linear = write_linear(tmp_path, name)
    model = Lpips(str(trunk), str(tmp_path / f"{name}.pth"))
    assert model.trunk.name == name
    first, second = torch.rand(2, 2, 3, 36, 40)
    with torch.no_grad():
        found = model.distance(model.features(first), model.features(second))
        expected = reference(network, name, linear, first, second)
        assert model.distance(model.features(first), model.features(first)).tolist() == [0, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert found.min() > 0


def test_linear_weights_come_from_the_package_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "lpips"
    (package / "weights" / "v0.1").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    torch.save({f"features.{k}": v for k, v in alexnet().state_dict().items()}, tmp_path / "trunk.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="linear weights of alex are not installed"):
        Lpips(str(tmp_path / "trunk.pth"))
    linear = write_linear(package / "weights" / "v0.1", "alex")
    model = Lpips(str(tmp_path / "trunk.pth"))
    assert [tuple(value.shape) for value in model.linear] == [(n,) for n in CHANNELS["alex"]]
    torch.testing.assert_close(model.linear[2].data, linear[2].flatten())


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    state = {f"features.{key}": value for key, value in alexnet().state_dict().items()}
    torch.save(state | {"features.3.weight": torch.zeros(192, 64, 3, 3)}, tmp_path / "shape.pth")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save(state, tmp_path / "trunk.pth")
    write_linear(tmp_path, "vgg")
    (tmp_path / "damaged.pth").write_bytes(b"no weights")
    (tmp_path / "damaged.safetensors").write_bytes(b"no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    for trunk, said in (
        ("shape.pth", r"features.3.weight has the shape \[192, 64, 3, 3\]"),
        ("other.pth", "neither torchvision's AlexNet nor its VGG16"),
        ("missing.pth", "is neither a file, a folder nor a hub id"),
        ("damaged.pth", "is not a PyTorch checkpoint, or holds objects other than tensors"),
        ("damaged.safetensors", "cannot be read as a checkpoint"),
        ("list.pth", "does not hold a dictionary of tensors"),
    ):
        with pytest.raises(UserError, match=said):
            Lpips(str(tmp_path / trunk), str(tmp_path / "vgg.pth"))
    with pytest.raises(UserError, match="linear weights of alex"):
        Lpips(str(tmp_path / "trunk.pth"), str(tmp_path / "vgg.pth"))


def test_nothing_in_a_weight_file_is_executed(tmp_path: Path) -> None:
    torch.save({"x": Path}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="holds objects other than tensors, which are not loaded for safety"):
        read_weights(str(tmp_path / "code.pth"), "here")


def test_images_too_small_are_refused(tmp_path: Path) -> None:
    torch.save({f"features.{k}": v for k, v in alexnet().state_dict().items()}, tmp_path / "trunk.pth")
    write_linear(tmp_path, "alex")
    model = Lpips(str(tmp_path / "trunk.pth"), str(tmp_path / "alex.pth"))
    with pytest.raises(UserError, match="at least 31 pixels, got 16 x 24"):
        model.features(torch.rand(1, 3, 16, 24))
    assert model.features(torch.rand(1, 3, 31, 31))[-1].numel() > 0


def test_smallest_sizes_are_those_of_the_layers() -> None:
    for trunk, network in ((ALEXNET, alexnet()), (VGG16, vgg16())):
        deepest = network[: max(trunk.taps) + 1]
        deepest(torch.rand(1, 3, trunk.smallest, trunk.smallest))
        with pytest.raises(RuntimeError):
            deepest(torch.rand(1, 3, trunk.smallest - 1, trunk.smallest - 1))
