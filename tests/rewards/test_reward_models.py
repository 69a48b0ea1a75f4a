"""How rewards find their models, and how they prepare images: held against Pillow and the processors."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from PIL import Image
from torch import Tensor

from pcpo_fast.errors import UserError
from pcpo_fast.rewards.model_files import model_file, model_folder
from pcpo_fast.rewards.preprocessing import CLIP_STD, Preprocessing, clip_preprocessing, read_preprocessing

# Preparing images.

SIZES = [(37, 53), (512, 300), (64, 65), (20, 31)]
LEVEL = 1 / 255 / min(CLIP_STD)  # of a byte, after normalising


def as_files(batch: Tensor) -> list[Image.Image]:
    pixels = (batch * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(row)) for row in pixels]


def assert_like_pillow(ours: Tensor, theirs: Tensor, share: float = 0.005) -> None:
    """Pillow's filter has coefficients of 22 bits, so a value may fall on the other side of a half: one level, for the
    share of pixels that are that near to one."""
    difference = (ours - theirs).abs()
    assert ours.shape == theirs.shape
    assert difference.max() < 1.01 * LEVEL
    assert (difference > 0.5 * LEVEL).float().mean() < share


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("filter_number", [2, 3])
def test_like_the_processor_of_clip(size: tuple[int, int], filter_number: int, tmp_path: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    batch = torch.rand(2, 3, *size)
    crop = {"height": 32, "width": 32}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop, resample=filter_number)
    processor.save_pretrained(tmp_path)
    prepare = read_preprocessing(tmp_path, 32, "test")
    # Bilinear coefficients are ratios of small numbers: many sums are halves but for their rounding.
    share = 0.05 if filter_number == 2 else 0.005
    assert_like_pillow(prepare(batch), processor(as_files(batch), return_tensors="pt").pixel_values, share)


def test_like_the_processor_of_blip(tmp_path: Path) -> None:
    """One that changes the aspect ratio and does not crop."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    batch = torch.rand(2, 3, 41, 70)
    processor = BlipImageProcessorPil(size={"height": 48, "width": 48})
    settings = processor.to_dict() | {"do_center_crop": False}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    prepare = read_preprocessing(tmp_path, 48, "test")
    assert_like_pillow(prepare(batch), processor(as_files(batch), return_tensors="pt").pixel_values)


def test_old_files_and_no_file(tmp_path: Path) -> None:
    assert read_preprocessing(tmp_path, 32, "test") == clip_preprocessing(32)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 32, "crop_size": 32, "resample": 3}')
    assert read_preprocessing(tmp_path, 32, "test") == clip_preprocessing(32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"size": 32, "crop_size": 48}', "crop_size .* is larger than size"),
        ('{"size": 32, "crop_size": 32, "resample": 1}', "does not describe CLIP's image preprocessing"),
        ('{"do_normalize": false}', "do_normalize is false"),
        ('{"size": 32, "crop_size": 32, "image_mean": [0.5]}', "three channels"),
        ("[]", "does not describe CLIP's image preprocessing"),
        ("{", "does not describe CLIP's image preprocessing"),
    ],
)
def test_files_that_ask_for_something_else(settings: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(settings)
    with pytest.raises(UserError, match=rf"^test: .*{message}"):
        read_preprocessing(tmp_path, 32, "test")


def test_pixels_are_bytes_first_and_margins_are_rounded_as_told() -> None:
    plain: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    odd = torch.tensor([-0.5, 0.1, 0.2, 0.3, 1.5]).expand(1, 3, 2, 5)
    for rounding, first in ((round, 2), (int, 1)):  # a margin of 3: torchvision rounds 1.5 to 2
        pixels = Preprocessing(2, (2, 2), half_pixel=rounding, **plain)(odd)
        expected = (odd.clamp(0, 1) * 255).round()[..., first : first + 2] / 255
        torch.testing.assert_close(pixels, expected)


# Finding models.


def fake_cache(cache: Path, repository: str, **files: str) -> Path:
    """What the hub's client leaves behind after a download."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for name, text in files.items():
        (snapshot / name.replace("__", ".")).write_text(text)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_the_cache_is_used_without_a_network(cache: Path) -> None:
    whole = fake_cache(cache, "some/clip", config__json="{}", model__safetensors="")
    assert model_folder("x", "model", "some/clip") == whole
    fake_cache(cache, "some/part", config__json="{}")
    with pytest.raises(UserError, match=r"some/part is not under .* neither in the local cache nor can the hub be"):
        model_folder("x", "model", "some/part")
    index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    shards = fake_cache(cache, "some/shards", config__json="{}", one__safetensors="")
    (shards / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="some/shards is not under"):
        model_folder("x", "model", "some/shards")
    (shards / "two.safetensors").touch()
    assert model_folder("x", "model", "some/shards") == shards
    words = fake_cache(cache, "some/words", tokenizer__json="{}")
    assert model_folder("x", "tokenizer", "some/words", weights=False) == words
    file = fake_cache(cache, "some/file", weights__pt="")
    assert model_file("x", "model", "some/file", "weights.pt") == file / "weights.pt"


def test_paths(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").touch()
    assert model_file("x", "model", "weights.pt", "other.pt") == Path("weights.pt")
    assert model_file("x", "model", str(tmp_path), "weights.pt") == tmp_path / "weights.pt"
    for path in ("nothing.pt", "./some/file", "~/file", "a/b/c"):
        with pytest.raises(
            UserError, match=r"^reward x: option model: .* is neither a file, a folder nor a hub id of the"
        ):
            model_file("x", "model", path, "weights.pt")
    with pytest.raises(UserError, match=r"option model: the folder . has no config.json$"):
        model_folder("x", "model", ".")
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match=r"option model: the folder . has no model.safetensors$"):
        model_folder("x", "model", ".")
    with pytest.raises(UserError, match=r"option tokenizer: the folder . has no tokenizer$"):
        model_folder("x", "tokenizer", ".", weights=False)


def test_offline_says_what_to_do(cache: Path) -> None:
    message = (
        r"^reward x: option model: some/file/weights.pt is not under .*, and the hub model some/file is neither in the "
        r"local cache nor can the hub be reached; download it once with a network \(`hf download`\), or give a path \("
    )
    with pytest.raises(UserError, match=message):
        model_file("x", "model", "some/file", "weights.pt")


class Hub:
    """The two functions that download, without a network."""

    def __init__(self, cache: Path, files: dict[str, int]) -> None:
        self.cache, self.files = cache, files
        self.fetched: list[str] = []

    def snapshot(self, repository: str, **options: Any) -> Any:
        from huggingface_hub.utils import filter_repo_objects

        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("not here")
        wanted = filter_repo_objects(
            list(self.files), allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
        )
        if options.get("dry_run"):
            return [SimpleNamespace(filename=n, file_size=self.files[n], will_download=True) for n in wanted]
        self.fetched = list(wanted)
        return str(self.cache)

    def file(self, repository: str, name: str, dry_run: bool = False) -> Any:
        if dry_run:
            return SimpleNamespace(filename=name, file_size=self.files[name], will_download=True)
        self.fetched.append(name)
        return str(self.cache / name)


def test_a_download_is_announced_with_its_size(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "config.json": 10**6,
        "model.safetensors": 3 * 10**9,
        "pytorch_model.bin": 3 * 10**9,
        "flax_model.msgpack": 9,
    }
    hub = Hub(cache, files | {"onnx/config.json": 5, "vocab.json": 10**6, "weights.pt": 4 * 10**6})
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.file)
    assert model_folder("x", "model", "some/clip") == cache
    assert hub.fetched == ["config.json", "model.safetensors", "vocab.json"]
    assert capsys.readouterr().err == f"reward x: downloading some/clip, 3.0 GB, to {cache}\n"
    assert model_folder("x", "tokenizer", "some/clip", weights=False) == cache
    assert hub.fetched == ["config.json", "vocab.json"]
    assert model_file("x", "model", "some/file", "weights.pt") == cache / "weights.pt"
    assert capsys.readouterr().err.endswith(f"reward x: downloading some/file/weights.pt, 4.0 MB, to {cache}\n")
    monkeypatch.setenv("LOCAL_RANK", "1")  # which waits for the first rank's files and is silent
    model_file("x", "model", "some/file", "weights.pt")
    assert capsys.readouterr().err == ""


def test_old_models_without_safetensors(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(cache, {"config.json": 1, "pytorch_model.bin": 1})
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot)
    model_folder("x", "model", "some/clip")
    assert hub.fetched == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, "the hub model some/file is gated: accept its license"),
        (RepositoryNotFoundError, "the hub has no model some/file that you may read: check the spelling, and"),
        (OSError, "some/file could not be downloaded from the hub: no space left$"),
        (ConnectionError, "nor can the hub be reached"),
    ],
)
def test_what_the_hub_refuses(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str
) -> None:
    import httpx2

    def refuse(*args: Any, **options: Any) -> Any:
        if error in (OSError, ConnectionError):
            raise error("no space left")
        raise error("no", response=httpx2.Response(404, request=httpx2.Request("GET", "http://hub")))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(UserError, match=message):
        model_file("x", "model", "some/file", "weights.pt")
