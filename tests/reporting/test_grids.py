"""pcpo_fast.reporting.grids: pixels are where they should be, captions fit and can be read."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from reporting_runs import CAPTIONS, scenes

from pcpo_fast.reporting.grids import before_after, image_grid, to_image, wrap


def pixels(sheet: Image.Image) -> np.ndarray:
    return np.asarray(sheet).astype(int)


def test_small_images_are_enlarged_by_repeating_pixels() -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sheet = pixels(image_grid(image, 1))
    exact = np.round(image[0].permute(1, 2, 0).numpy() * 255)
    enlarged = exact.repeat(5, axis=0).repeat(5, axis=1)
    assert (sheet[16 : 16 + 160, 16 : 16 + 160] == enlarged).all()
    assert sheet.shape[:2] == (160 + 2 * 16 + 4, 160 + 2 * 16)


def test_images_lie_row_by_row() -> None:
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]])
    sheet = pixels(image_grid(colours[:, :, None, None].expand(5, 3, 10, 10), 3, scale=4))
    assert sheet.shape[:2] == (16 + 2 * 44 + 14 + 16, 16 + 3 * 40 + 2 * 14 + 16)
    for i, colour in enumerate(colours.numpy() * 255):
        y, x = 16 + (i // 3) * (40 + 4 + 14), 16 + (i % 3) * (40 + 14)
        assert (sheet[y : y + 40, x : x + 40] == colour).all()
    assert (sheet[-40:, -50:] == 255).all()  # the sixth place stays empty


def test_large_images_are_shrunk() -> None:
    sheet = image_grid(torch.rand(2, 3, 1024, 768), 2)
    assert sheet.size == (16 + 240 + 14 + 240 + 16, 16 + 320 + 4 + 16)


def test_a_wide_sheet_stays_below_its_limit() -> None:
    assert image_grid(torch.zeros(16, 3, 512, 512), 16).width < 2400 + 15 * 14 + 33


def test_captions_are_drawn_below_their_image() -> None:
    images = torch.ones(2, 3, 32, 32)
    plain, captioned = image_grid(images, 2), image_grid(images, 2, ["", "a red circle"])
    assert captioned.height > plain.height
    ink = (pixels(captioned)[16 + 160 :] < 128).all(axis=-1)
    assert ink[:, 16 + 160 + 14 :].sum() > 50
    assert ink[:, : 16 + 160 + 14].sum() == 0


def test_text_never_leaves_its_column() -> None:
    captions = ["incomprehensibilities " * 30, "x" * 500, "W" * 3]
    sheet = pixels(image_grid(torch.ones(3, 3, 32, 32), 3, captions, title="A title that is far too long " * 9))
    ink = (sheet < 200).any(axis=-1)
    for gap in (slice(0, 15), slice(16 + 160 + 1, 16 + 160 + 13), slice(-15, None)):
        rows = slice(-110, None) if gap.start > 0 else slice(None)  # the title may cross the inner gaps
        assert not ink[rows, gap].any()
    assert not ink[-15:].any()


@pytest.mark.parametrize("width", [40, 90, 200])
def test_wrapping(width: int) -> None:
    font = ImageFont.load_default(size=13)
    text = "a photograph of an incomprehensibility on a table"
    lines = wrap(text, font, width, 99)
    assert all(font.getlength(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    cut = wrap(text, font, width, 2)
    if len(lines) > 2:
        assert len(cut) == 2 and cut[1].endswith("...") and font.getlength(cut[1]) <= width


def test_letters_the_font_lacks_become_plain_ones() -> None:
    font = ImageFont.load_default(size=13)
    assert wrap("Crème brûlée – 1→2", font, 999, 1) == ["Creme brulee - 1->2"]


def test_before_and_after_lie_side_by_side() -> None:
    before, after = scenes(0.2), scenes(1.0)
    sheet = pixels(before_after(before, after, CAPTIONS, columns=3, title="Samples"))
    flat = np.round(after[0].permute(1, 2, 0).numpy() * 255).repeat(5, 0).repeat(5, 1)
    top = next(
        y for y in range(sheet.shape[0] - 160) if (sheet[y : y + 160, 16 + 164 : 16 + 324] == flat).all()
    )  # the title and the headings are above
    left = np.round(before[0].permute(1, 2, 0).numpy() * 255).repeat(5, 0).repeat(5, 1)
    assert (sheet[top : top + 160, 16 : 16 + 160] == left).all()
    assert sheet.shape[1] == 2 * 16 + 3 * 324 + 2 * 14


def test_scores_tell_better_from_worse() -> None:
    images = torch.ones(3, 3, 32, 32)
    sheet = pixels(before_after(images, images, columns=3, scores=([0.5, 0.5, 0.5], [0.9, 0.1, 0.5])))
    below = sheet[-35:]
    columns = [below[:, 16 + i * 338 : 16 + i * 338 + 324].reshape(-1, 3) for i in range(3)]
    darkest = [column[column.sum(axis=1).argmin()] for column in columns]
    assert darkest[0][2] > darkest[0][0]  # blue
    assert darkest[1][0] > darkest[1][2]  # orange
    assert np.ptp(darkest[2]) < 30  # grey


def test_to_image_clips_and_takes_any_float() -> None:
    values = torch.tensor([-1.0, 0.5, 2.0, float("nan")]).reshape(1, 1, 4).expand(3, 1, 4)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert np.asarray(to_image(values.to(dtype)))[0, :, 0].tolist() == [0, 128, 255, 0]
    assert to_image(values.float().requires_grad_()).size == (4, 1)
    assert np.asarray(to_image(np.ones((1, 2, 2)))).min() == 255


def test_bad_requests() -> None:
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="3 captions for 2 images"):
        image_grid(images, 2, ["a", "b", "c"])
    with pytest.raises(ValueError, match="no images"):
        image_grid(images[:0], 2)
    with pytest.raises(ValueError, match="columns is 0"):
        image_grid(images, 0)
    with pytest.raises(ValueError, match="scale"):
        image_grid(images, 2, scale=0)
    with pytest.raises(ValueError, match=r"\[2, 8, 8\]"):
        image_grid(torch.zeros(1, 2, 8, 8), 1)
    with pytest.raises(ValueError, match="2 images before, but 1 after"):
        before_after(images, images[:1])
    with pytest.raises(ValueError, match="scores"):
        before_after(images, images, scores=([1.0], [1.0, 2.0]))
