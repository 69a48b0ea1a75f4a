"""Image files of any origin: their order, their pixels, and what is said of those that cannot be read."""

import io
import random
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pcpo_fast.errors import UserError
from pcpo_fast.evaluation.image_sets import folder_of_images
from pcpo_fast.files.image_files import IMAGE_SUFFIXES, by_number, find_images, read_image

GREEN = (10, 200, 60)


def colors(file: Path) -> list[float]:
    """The mean of each channel, in 0..255."""
    found: list[float] = (read_image(file).mean((1, 2)) * 255).tolist()
    return found


# Pixels.


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix.upper()}"
    kind = {".jfif": "JPEG", ".jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper())
    Image.new("RGB", (24, 16), GREEN).save(file, kind)
    image = read_image(file)
    assert (image.shape, image.dtype) == ((3, 16, 24), torch.float32)
    # JPEG, WebP and AVIF are lossy.
    assert colors(file) == pytest.approx(GREEN, abs=4 if kind in ("JPEG", "WEBP", "AVIF") else 1e-4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(tmp_path: Path, kind: str, orientation: int) -> None:
    # The first row of the image as it is shown is white, and of its first column the upper half.
    shown = np.zeros((32, 64, 3), np.uint8)
    shown[:8], shown[:16, :8] = 255, 255
    transposed = [None, None, 0, 3, 1, 5, 2, 6, 4][orientation]  # what undoes it, by PIL.Image.Transpose's numbers
    stored = Image.fromarray(shown)
    if transposed is not None:
        stored = stored.transpose(Image.Transpose(transposed))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    stored.save(tmp_path / "a", kind, exif=exif, **options)
    image = read_image(tmp_path / "a")
    assert image.shape == (3, 32, 64)
    assert float((image - torch.from_numpy(shown).permute(2, 0, 1) / 255).abs().mean()) < 0.02


def half_clear() -> np.ndarray:
    """Red, but clear to the left, where the colour that is hidden is blue."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, :8, 2] = 255
    pixels[:, 8:] = (255, 0, 0, 255)
    return pixels


def transparent(mode: str) -> tuple[Image.Image, dict[str, Any]]:
    image = Image.fromarray(half_clear())
    if mode == "RGBA":
        return image, {}
    if mode == "P":
        return image.convert("RGB").quantize(2, dither=Image.Dither.NONE), {}
    if mode == "RGB":
        return image.convert("RGB"), {"transparency": (0, 0, 255)}
    grey = np.where(half_clear()[..., 3] == 0, 40, 0)
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(grey.astype(np.uint8)), image.getchannel("A")]), {}
    return Image.fromarray(grey.astype(np.uint8 if mode == "L" else np.uint16)), {"transparency": 40}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "I;16"])
def test_what_is_transparent_lies_on_white(tmp_path: Path, mode: str) -> None:
    image, options = transparent(mode)
    if mode == "P":  # by a table of alphas, one of each colour
        options = {"transparency": bytes(255 * (i != image.getpixel((0, 0))) for i in range(2))}
    assert image.mode == mode
    image.save(tmp_path / "a.png", **options)
    found = read_image(tmp_path / "a.png")
    assert found[:, :, :8].min() == 1
    right = [1.0, 0, 0] if mode in ("RGBA", "P", "RGB") else [0.0, 0, 0]
    assert found[:, :, 8:].mean((1, 2)).tolist() == right


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 102)).save(tmp_path / "a.png")
    assert colors(tmp_path / "a.png") == pytest.approx([153] * 3)  # 0.4 black on white


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_sixteen_bits_keep_their_value(tmp_path: Path, name: str) -> None:
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / name)
    assert torch.equal(read_image(tmp_path / name)[1], torch.from_numpy(levels.astype(np.float32) / 65535))


def test_sixteen_bits_of_color(tmp_path: Path) -> None:
    levels = np.array([[[0, 32768, 65535], [257, 1000, 40000]]], np.uint16)
    file = tmp_path / "a.png"
    file.write_bytes(png((2, 1), levels.astype(">u2"), depth=16, kind=2))
    np.testing.assert_allclose(
        read_image(file).permute(1, 2, 0), levels / 65535, atol=1 / 255
    )  # Pillow keeps 8 of them


def test_white_may_be_zero_in_a_tiff(tmp_path: Path) -> None:
    levels = np.array([[0, 65535, 16384]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.tiff", tiffinfo={262: 0})
    np.testing.assert_allclose(read_image(tmp_path / "a.tiff")[0], 1 - levels / 65535, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes(tmp_path: Path, mode: str) -> None:
    name = "a.tiff" if mode in ("CMYK", "YCbCr") else "a.png"
    Image.new("RGB", (8, 8), "white").convert(mode).save(tmp_path / name)
    assert colors(tmp_path / name) == pytest.approx([255] * 3, abs=1)


# What cannot be read is a sentence with the file.


def png(size: tuple[int, int], rows: np.ndarray, depth: int = 8, kind: int = 2) -> bytes:
    """A PNG written by hand; ``rows`` [H, W, C] in the file's own byte order."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def encoded(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((32, 32), 60).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def unreadable() -> dict[str, bytes]:
    first, second = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")
    animation, floats = io.BytesIO(), io.BytesIO()
    first.save(animation, "PNG", save_all=True, append_images=[second])
    Image.new("F", (8, 8)).save(floats, "TIFF")
    return {
        "empty": b"",
        "text": b"not an image",
        "cut": encoded("PNG")[:-400],
        "cut_jpeg": encoded("JPEG")[:-200],
        "bomb": png((30000, 30000), np.zeros((0, 0, 3))),
        "half_a_bomb": png((10000, 10000), np.zeros((0, 0, 3))),
        "animation": animation.getvalue(),
        "floats": floats.getvalue(),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
    }


@pytest.mark.parametrize("what", unreadable())
def test_what_cannot_be_read_is_a_sentence(tmp_path: Path, what: str) -> None:
    file = tmp_path / f"{what}.png"
    file.write_bytes(unreadable()[what])
    with pytest.raises(UserError, match=rf"{what}\.png cannot be read as an image: \S") as caught:
        read_image(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.png cannot be read as an image: No such file or directory$"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF"])
def test_damage_anywhere_is_at_most_a_sentence(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole, chosen, file = encoded(kind, exif=exif), random.Random(kind), tmp_path / "a"
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(chosen.randint(1, 4)):
            data[chosen.choice([chosen.randrange(len(data)), chosen.randrange(min(len(data), 200))])] = (
                chosen.randrange(256)
            )
        file.write_bytes(data[: chosen.choice([len(data), chosen.randrange(len(data))])])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert read_image(file).shape[0] == 3
            except UserError as error:
                assert str(file) in str(error)


# Which files there are, in which order.


def folder_with(folder: Path, *names: str) -> Path:
    """One image for each name, whose level of grey is its place."""
    for level, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), level).save(folder / name, "PNG")
    return folder


def places(folder: Path, names: tuple[str, ...], **options: Any) -> list[int]:
    """Places of the images of a set in the list of their names."""
    found = folder_of_images(folder, "x", "--checkpoint", len(names), **options)
    return [round(float(image.mean()) * 255) for batch in found.batches(3) for image in batch]


@pytest.mark.parametrize(
    "names",
    [
        tuple(f"{i}.png" for i in range(12)),
        ("a2.png", "a10.png", "b1.png"),
        ("image.png", "image (1).png", "image (2).png", "image (10).png"),
        ("2/9.png", "2/10.png", "10/1.png"),
        ("p1_i9.png", "p1_i10.png", "p2_i1.png", "p10_i0.png"),
    ],
)
def test_numbers_in_names_are_sorted_as_numbers(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.warns(UserWarning, match=r"are sorted by the numbers in their names: \S.* comes before "):
        assert places(folder_with(tmp_path, *names), names) == list(range(len(names)))


@pytest.mark.parametrize("names", [("00009.png", "00010.png"), ("a.png", "a1.png", "b.png"), ("01.png", "1.png")])
def test_where_both_orders_agree_nothing_is_said(tmp_path: Path, names: tuple[str, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert places(folder_with(tmp_path, *names), names) == list(range(len(names)))


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    names = ("0.png", "1.png")
    folder_with(tmp_path, *names, ".hidden.png", ".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/._0.png")
    (tmp_path / "._0.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "folder.png").mkdir()
    assert places(tmp_path, names) == [0, 1]
    assert by_number(Path("a/2.png")) < by_number(Path("a/10.png")) < by_number(Path("b/1.png"))


def test_formats_that_are_not_read_are_named(tmp_path: Path) -> None:
    folder_with(tmp_path, "0.png", "1.png", "2.heic")
    with pytest.warns(UserWarning, match=r"holds 2 images \(besides 1 that are not read: \.gif, \.heic"):
        folder_of_images(tmp_path, "x", "--reference")
    with pytest.raises(UserError, match=r"holds 2 images \(besides 1 .*\), but the prompts require 3"):
        folder_of_images(tmp_path, "x", "--checkpoint", 3)


def test_a_link_to_nowhere_is_a_sentence(tmp_path: Path) -> None:
    folder_with(tmp_path, "0.png").joinpath("1.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"--reference: .*1\.png cannot be read: No such file"):
        folder_of_images(tmp_path, "x", "--reference")


# A manifest.

LINES = [
    '{"file_name": "b.png", "prompt": "two"}',
    '{"file_name": "d/a.png", "prompt": "one"}',
    '{"file_name": "c.png", "text": "two"}',
]


def test_a_manifest_says_which_image_is_whose(tmp_path: Path) -> None:
    names = ("b.png", "d/a.png", "c.png")
    folder_with(tmp_path, *names, "overview.png").joinpath("prompts.jsonl").write_text("\n".join(LINES))
    assert places(tmp_path, names) == [0, 1, 2]
    assert places(tmp_path, names, texts=["one", "two", "two"]) == [1, 0, 2]
    with pytest.raises(
        UserError, match=r"prompts\.jsonl has 1 image of the prompt 'one', but the evaluation asks for 2"
    ):
        places(tmp_path, names, texts=["one", "one", "two"])
    with pytest.raises(
        UserError, match=r"more images of the prompt 'two' than the evaluation asks for; c\.png is left over"
    ):
        places(tmp_path, names, texts=["one", "two"])
    assert len(folder_of_images(tmp_path, "x", "--reference").files) == len(find_images(tmp_path)) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "e.png", "prompt": "one"}', "entry 4: there is no e.png"),
        ('{"file_name": "b.png", "prompt": "one"}', "entry 4: b.png is listed twice"),
        ('{"file_name": "../b.png", "prompt": "one"}', 'entry 4: "file_name" must be the path of an image below'),
        ('{"prompt": "one"}', 'entry 4: "file_name" must be'),
        ('{"file_name": "c.png"}', 'line 4: the key "prompt"'),
    ],
)
def test_a_manifest_that_does_not_fit_is_a_sentence(tmp_path: Path, line: str, message: str) -> None:
    folder_with(tmp_path, "b.png", "d/a.png", "c.png").joinpath("prompts.jsonl").write_text("\n".join([*LINES, line]))
    with pytest.raises(UserError, match=rf"prompts\.jsonl {message}"):
        places(tmp_path, ("b.png",) * 4)


def test_a_list_of_prompts_is_no_manifest(tmp_path: Path) -> None:
    folder_with(tmp_path, "0.png", "1.png").joinpath("prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}')
    assert places(tmp_path, ("0.png", "1.png"), texts=["b", "a"]) == [0, 1]
