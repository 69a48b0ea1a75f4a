"""Image sheets with captions: sample grids, before/after pairs, and tables with row and column headings."""

import io
import json
import math
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from pcpo_fast.config.wording import counted

ImageLike = Any
"""A PIL image, or a tensor or array [3, H, W] (or [1, H, W]) with values in 0..1."""

TILES = "tiles"
"""Text of a PNG sheet: JSON with ``tiles``, of each the boxes of its images (one, or before and after), its caption
and scores; ``scale``, how often a pixel of theirs is repeated; and ``headings``."""

SHOWN = 16
"""Number of images in the grids that show the progress of training."""

LONGEST = 320
"""Pixels along the longer side of an image in a grid, at most."""

_PAPER = (255, 255, 255)
_INK = (32, 36, 44)
_SOFT = (96, 103, 115)
_GOOD = (0, 114, 178)
_BAD = (176, 72, 0)

_MARGIN = 16
_GAP = 14
_TABLE_GAP, _LABEL_WIDTH, _LABEL_LINES = 10, 132, 6  # of a table
_MAX_CAPTION_LINES = 4
_MAX_SHEET_WIDTH = 2400


def to_image(image: ImageLike) -> Image.Image:
    """Convert to an 8-bit RGB image; values outside 0..1 are clipped, NaN becomes black.

    Raises:
        ValueError: the shape is not [3, H, W] or [1, H, W].
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    pixels = _array(image)
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise ValueError(f"an image must be [3, H, W] or [1, H, W], not {list(pixels.shape)}")
    levels = np.round(np.clip(np.nan_to_num(pixels, nan=0.0), 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(levels, (3, *levels.shape[1:])).transpose(1, 2, 0).copy())


def image_bytes(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    """Encode an image as "png" or "jpeg"; `options` are passed to PIL. A PNG sheet keeps where its tiles are."""
    if kind == "png" and TILES in image.info:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt(TILES, image.info[TILES])
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def image_grid(
    images: ImageLike,
    columns: int,
    captions: Sequence[str] | None = None,
    *,
    scale: float | None = None,
    title: str | None = None,
) -> Image.Image:
    """A sheet of `images` ([B, 3, H, W] in 0..1, or a sequence of images), row by row, each with its caption below.

    `scale` multiplies the size of the images; by default small ones are enlarged by an integer factor to about 160
    pixels and large ones shrunk to at most 320. Enlarging repeats pixels (nearest neighbour) instead of interpolating.
    Captions are wrapped to the image and cut after four lines. Raises ValueError if there are no images, if the
    number of captions differs, or if `columns` or `scale` is not positive.
    """
    pictures = _images(images)
    cells = [resized(image, columns, scale) for image in pictures]
    _check(len(cells), columns, captions)
    font = _font(_font_size(cells[0].width))
    texts = _wrapped(captions, len(cells), cells[0].width, font)
    sheet, boxes = _sheet(cells, columns, texts, font, title=title)
    _note_tiles(sheet, [[box] for box in boxes], captions, max(1, cells[0].width // pictures[0].width), ())
    return sheet


def before_after(
    before: ImageLike,
    after: ImageLike,
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    scores: tuple[Sequence[float], Sequence[float]] | None = None,
    labels: tuple[str, str] = ("before", "after"),
    scale: float | None = None,
    title: str | None = None,
) -> Image.Image:
    """A sheet of pairs of images with the same caption and seed: before training (left) and after (right).

    `before` and `after` are [B, 3, H, W] in 0..1. `columns` counts pairs (None: up to three, about square); `scores`
    are the rewards before and after, written below the caption, blue if they rose and orange if they fell.
    Sizes and errors as in `image_grid`.
    """
    first, second = _images(before), _images(after)
    if len(first) != len(second):
        raise ValueError(f"{counted(len(first), 'image')} before, but {len(second)} after")
    if columns is None:
        columns = max(1, min(3, math.ceil(math.sqrt(len(first)))))
    _check(len(first), columns, captions)
    if scores is not None and not len(scores[0]) == len(scores[1]) == len(first):
        raise ValueError(f"{len(scores[0])} and {counted(len(scores[1]), 'score')} for {counted(len(first), 'pair')}")
    pairs = []
    for left, right in zip(first, second, strict=True):
        left, right = resized(left, 2 * columns, scale), resized(right, 2 * columns, scale)
        pair = Image.new("RGB", (left.width + 4 + right.width, max(left.height, right.height)), _PAPER)
        pair.paste(left, (0, 0))
        pair.paste(right, (left.width + 4, 0))
        pairs.append(pair)
    font = _font(_font_size(pairs[0].width // 2))
    texts = _wrapped(captions, len(pairs), pairs[0].width, font)
    for lines, old, new in zip(texts, *(scores or ([], [])), strict=False):
        colour = _GOOD if new > old else _BAD if new < old else _SOFT
        lines.append((f"{float(old):.2f} to {float(new):.2f}", colour))
    sheet, boxes = _sheet(pairs, columns, texts, font, title=title, headings=labels)
    halves = [[(x, y, (x + end - 4) // 2, bottom), ((x + end + 4) // 2, y, end, bottom)] for x, y, end, bottom in boxes]
    _note_tiles(sheet, halves, captions, max(1, (pairs[0].width - 4) // 2 // first[0].width), labels, scores)
    return sheet


def _note_tiles(
    sheet: Image.Image,
    boxes: Sequence[Sequence[tuple[int, int, int, int]]],
    captions: Sequence[str] | None,
    scale: int,
    headings: Sequence[str],
    scores: tuple[Sequence[float], ...] | None = None,
) -> None:
    """Remember for pages, which set captions as text and wrap the tiles, where the images of a sheet are (`TILES`)."""
    columns = [[float(score) for score in one] for one in scores or ()]
    tiles = [
        {"boxes": places, "caption": str(captions[i]) if captions else "", "scores": [column[i] for column in columns]}
        for i, places in enumerate(boxes)
    ]
    sheet.info[TILES] = json.dumps({"tiles": tiles, "scale": scale, "headings": list(headings)}, ensure_ascii=False)


def image_table(
    cells: Sequence[ImageLike],
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    scores: Sequence[Sequence[float]] | None = None,
    title: str | None = None,
) -> Image.Image:
    """A table of images to compare along its rows.

    Args:
        cells: the images of each column, one per row: a tensor [rows, 3, H, W] in 0..1, or PIL images.
        columns: heading of each column.
        rows: label of each row; not repeated if equal to the one above.
        scores: numbers below the images, by column like ``cells``.
        title: a line at the top.

    Raises:
        ValueError: there are no images, or the lengths differ.
    """
    lengths = {len(rows), *map(len, cells), *(map(len, scores) if scores is not None else ())}
    if len(lengths) != 1 or 0 in lengths or not cells or len(columns) != len(cells):
        counts = [len(column) for column in cells]
        raise ValueError(
            f"columns of images ({counts}) do not match the {counted(len(columns), 'heading')}, "
            f"{counted(len(rows), 'row')} or scores"
        )
    pictures = [[resized(to_image(image), len(cells) + 1, None) for image in column] for column in cells]
    width = max(picture.width for column in pictures for picture in column)
    height = max(picture.height for column in pictures for picture in column)
    font = _greek_font(13)
    line = sum(font.getmetrics()) + 2
    row_height = height + _TABLE_GAP + (line if scores is not None else 0)
    top = _MARGIN + line + 4 + (line + 6 if title else 0)
    left = _MARGIN + _LABEL_WIDTH + _TABLE_GAP
    right = left + len(cells) * (width + _TABLE_GAP) - _TABLE_GAP
    bottom = top + len(rows) * row_height - _TABLE_GAP
    sheet = Image.new("RGB", (right + _MARGIN, bottom + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_MARGIN, _MARGIN), title, _INK, font=font)
    for number, label in enumerate(rows):
        if number == 0 or label != rows[number - 1]:
            for place, text in enumerate(wrap(label, font, _LABEL_WIDTH, _LABEL_LINES)):
                draw.text((_MARGIN, top + number * row_height + place * line), text, _INK, font=font)
    for column, heading in enumerate(columns):
        x = left + column * (width + _TABLE_GAP)
        text = next(iter(wrap(heading, font, width, 1)), "")
        draw.text((x, top - line - 4), text, _INK, font=font)
        for number, picture in enumerate(pictures[column]):
            y = top + number * row_height
            sheet.paste(picture, (x, y))
            if scores is not None:
                draw.text((x, y + height + 1), f"{scores[column][number]:.3g}", _SOFT, font=font)
    return sheet


Line = tuple[str, tuple[int, int, int]]


def _sheet(
    cells: list[Image.Image],
    columns: int,
    texts: list[list[Line]],
    font: Any,
    *,
    title: str | None,
    headings: tuple[str, str] | None = None,
) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """Lay out cells in rows, with lines of text below each, headings above each column, and a title.

    Returns the sheet, and the box of every cell (left, upper, right, lower).
    """
    columns = min(columns, len(cells))
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    line_height = _line_height(font)
    rows = [range(start, min(start + columns, len(cells))) for start in range(0, len(cells), columns)]
    text_heights = [max(len(texts[i]) for i in row) * line_height for row in rows]

    sheet_width = 2 * _MARGIN + columns * width + (columns - 1) * _GAP
    title_font = _font(20)
    title_lines = wrap(title, title_font, sheet_width - 2 * _MARGIN, 2) if title else []
    top = _MARGIN + (len(title_lines) * _line_height(title_font) + 6 if title_lines else 0)
    top += line_height + 4 if headings else 0
    sheet_height = top + sum(height + 4 + text + _GAP for text in text_heights) - _GAP + _MARGIN

    sheet = Image.new("RGB", (sheet_width, sheet_height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(title_lines):
        draw.text((_MARGIN, _MARGIN + number * _line_height(title_font)), line, _INK, font=title_font)
    if headings:
        for column in range(columns):
            for half, heading in enumerate(headings):
                left = _MARGIN + column * (width + _GAP) + half * (width + 4) // 2
                draw.text((left, top - line_height - 2), heading, _SOFT, font=font)
    y, boxes = top, []
    for row, text_height in zip(rows, text_heights, strict=True):
        for column, i in enumerate(row):
            x = _MARGIN + column * (width + _GAP)
            sheet.paste(cells[i], (x, y))
            boxes.append((x, y, x + cells[i].width, y + cells[i].height))
            for number, (line, colour) in enumerate(texts[i]):
                draw.text((x, y + height + 4 + number * line_height), line, colour, font=font)
        y += height + 4 + text_height + _GAP
    return sheet, boxes


def _wrapped(captions: Sequence[str] | None, count: int, width: int, font: Any) -> list[list[Line]]:
    """The lines of every cell's caption."""
    captions = [""] * count if captions is None else captions
    return [[(line, _INK) for line in wrap(caption, font, width, _MAX_CAPTION_LINES)] for caption in captions]


def wrap(text: str, font: Any, width: int, max_lines: int) -> list[str]:
    """Break text into lines of at most `width` pixels; long words are broken, and text that is cut ends in "..."."""
    lines = [""]
    for word in printable(str(text)).split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
        while font.getlength(lines[-1]) > width and len(lines) <= max_lines + 1:  # a single word is too long
            line = lines.pop()
            cut = max(1, sum(font.getlength(line[:end]) <= width for end in range(1, len(line))))
            lines += [line[:cut], line[cut:]]
        if len(lines) > max_lines + 1:
            break
    lines = [line for line in lines if line]
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], last.rstrip() + "..."]
    return lines


def printable(text: str) -> str:
    """Reduce text to what PIL's default font can draw: accents are dropped, dashes and arrows become ASCII.

    Letters of other scripts are kept, but drawn as boxes: a font with their glyphs would have to be bundled.
    """
    text = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return text.translate({0x2010: "-", 0x2011: "-", 0x2013: "-", 0x2014: "-", 0x2212: "-", 0x2192: "->"})


def _images(images: ImageLike) -> list[Image.Image]:
    items = list(images) if isinstance(images, list | tuple) else list(_array(images))
    if not items:
        raise ValueError("there are no images to show")
    return [to_image(item) for item in items]


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):  # a tensor: any device, any floating type
        values = values.detach().cpu().float().numpy()
    return np.asarray(values, dtype=np.float32)


def resized(image: Image.Image, columns: int, scale: float | None) -> Image.Image:
    """Resize an image to a cell of the sheet; see `image_grid` for `scale`."""
    longest = max(image.size)
    if scale is None:
        most = max(32, min(LONGEST, _MAX_SHEET_WIDTH // max(columns, 1)))
        scale = math.ceil(144 / longest) if longest < 144 else min(1.0, most / longest)
    if not scale > 0:
        raise ValueError(f"scale is {scale} (must be positive)")
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return image if size == image.size else image.resize(size, method)


def _check(count: int, columns: int, captions: Sequence[str] | None) -> None:
    if columns < 1:
        raise ValueError(f"columns is {columns} (must be at least 1)")
    if captions is not None and len(captions) != count:
        raise ValueError(f"{counted(len(captions), 'caption')} for {counted(count, 'image')}")


def _font_size(width: int) -> int:
    return min(16, max(12, width // 12))


def _font(size: int) -> ImageFont.FreeTypeFont:
    """PIL's default font, for the same result on every machine."""
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=size))


@cache
def _greek_font(size: int) -> ImageFont.FreeTypeFont:
    """The font bundled with matplotlib; PIL's has no Greek letters."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _line_height(font: Any) -> int:
    top, bottom = font.getbbox("Agjy|")[1::2]
    return int(bottom - top) + 5
