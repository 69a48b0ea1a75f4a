"""A table of images: the same things in every row, under the heading of each column."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pcpo_fast.reporting.grids import ImageLike, resized, to_image, wrap

_PAPER, _INK, _SOFT = (255, 255, 255), (32, 36, 44), (96, 103, 115)
_MARGIN, _GAP, _LABEL = 16, 10, 132
_LINES = 6  # of a row's label


def image_table(
    cells: Sequence[ImageLike],
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    scores: Sequence[Sequence[float]] | None = None,
    title: str | None = None,
) -> Image.Image:
    """Images side by side, to be compared along a row.

    Args:
        cells: for each column its images, one for each row: a tensor [rows, 3, H, W] in 0..1, or PIL images.
        columns: heading of each column.
        rows: what stands left of each row; one like that above is not repeated.
        scores: written below each image, by column like ``cells``.
        title: a line above all.

    Raises:
        ValueError: there are no images, or lengths do not fit.
    """
    lengths = {len(rows), *map(len, cells), *(map(len, scores) if scores is not None else ())}
    if len(lengths) != 1 or 0 in lengths or not cells or len(columns) != len(cells):
        raise ValueError(f"{len(cells)} columns of {[len(column) for column in cells]} images do not fit the headings")
    pictures = [[resized(to_image(image), len(cells) + 1, None) for image in column] for column in cells]
    width = max(picture.width for column in pictures for picture in column)
    height = max(picture.height for column in pictures for picture in column)
    font = _font(13)
    line = sum(font.getmetrics()) + 2
    row_height = height + _GAP + (line if scores is not None else 0)
    top = _MARGIN + line + 4 + (line + 6 if title else 0)
    left = _MARGIN + _LABEL + _GAP
    sheet = Image.new(
        "RGB",
        (left + len(cells) * (width + _GAP) - _GAP + _MARGIN, top + len(rows) * row_height - _GAP + _MARGIN),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_MARGIN, _MARGIN), title, _INK, font=font)
    for number, label in enumerate(rows):
        if number == 0 or label != rows[number - 1]:
            for place, text in enumerate(wrap(label, font, _LABEL, _LINES)):
                draw.text((_MARGIN, top + number * row_height + place * line), text, _INK, font=font)
    for column, heading in enumerate(columns):
        x = left + column * (width + _GAP)
        text = next(iter(wrap(heading, font, width, 1)), "")
        draw.text((x, top - line - 4), text, _INK, font=font)
        for number, picture in enumerate(pictures[column]):
            y = top + number * row_height
            sheet.paste(picture, (x, y))
            if scores is not None:
                draw.text((x, y + height + 1), f"{scores[column][number]:.3g}", _SOFT, font=font)
    return sheet


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's own font, the same on every machine: PIL's has no Greek letters."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
