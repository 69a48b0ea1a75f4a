"""What a sweep over scales is shown with: the table of images, the plot and the progress."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from pcpo_fast.reporting.grids import image_table
from pcpo_fast.reporting.plots import save_figure
from pcpo_fast.reporting.progress import StepProgress
from pcpo_fast.reporting.scale_figure import ScalePoint, scale_figure


def dark(picture: np.ndarray) -> bool:
    return bool((picture < 130).any())


def test_images_and_texts_of_a_table() -> None:
    colours = torch.rand(2, 3, 3)  # column, row, colour
    cells = [column[:, :, None, None].expand(3, 3, 144, 150) for column in colours]
    scores = [[0.25, 0.5, 1], [12.5, 0.001, -3]]
    sheet = np.asarray(image_table(cells, columns=["λ = 0", "λ = 1"], rows=["same", "same", "other"], scores=scores))
    line = (sheet.shape[0] - 16 - 4 - 3 * 144 - 2 * 10 - 16) // 4
    assert sheet.shape[1] == 16 + 132 + 10 + 150 + 10 + 150 + 16
    for column in range(2):
        left = 16 + 132 + 10 + column * 160
        assert dark(sheet[16 : 16 + line, left : left + 80])
        for row in range(3):
            top = 16 + line + 4 + row * (144 + 10 + line)
            expected = np.round(colours[column, row].numpy() * 255)
            assert (sheet[top : top + 144, left : left + 150] == expected).all()
            assert dark(sheet[top + 144 : top + 144 + line, left : left + 60])
    labels = [sheet[16 + line + 4 + row * (154 + line) :, 16 : 16 + 132][:60] for row in range(3)]
    assert [dark(label) for label in labels] == [True, False, True]  # one like that above is not repeated
    assert not dark(sheet[:16]) and not dark(sheet[-10:]) and not dark(sheet[:, :16])


def test_a_table_with_a_title_and_large_images() -> None:
    image = Image.new("RGB", (1024, 1024), (0, 90, 0))
    plain = image_table([[image]] * 6, columns=list("abcdef"), rows=["row"])
    titled = image_table([[image]] * 6, columns=list("abcdef"), rows=["row"], title="title")
    assert plain.width == 16 + 132 + 6 * (10 + 320) + 16
    assert 15 < titled.height - plain.height < 35
    assert dark(np.asarray(titled)[16:36, 16:60])


@pytest.mark.parametrize(
    ("columns", "rows", "scores"),
    [(["a"], ["x"], None), (["a", "b"], ["x", "y"], None), (["a", "b"], ["x"], [[1.0]]), ([], [], None)],
)
def test_a_table_whose_parts_do_not_fit(columns: list[str], rows: list[str], scores: list[list[float]] | None) -> None:
    cells = torch.zeros(2, 1, 3, 4, 4) if columns else []
    if columns == ["a", "b"] and scores is not None:
        scores = [*scores, [1.0, 2.0]]
    with pytest.raises(ValueError, match="do not match"):
        image_table(list(cells), columns=columns, rows=rows, scores=scores)


def test_rewards_against_the_scale(tmp_path: Path) -> None:
    points = [
        ScalePoint(1.5, 0.9, 0.85, 0.95, 0.2),
        ScalePoint(0.0, 0.6, 0.5, 0.7, 0.3),
        ScalePoint(1.0, 0.8, 0.75, 0.85, 0.25),
    ]
    figure = scale_figure({"one": points, "$two$": points[:1], "three": [ScalePoint(0.5, 1.0, None, None, None)]}, 12)
    first, second, third = figure.axes
    (line,) = [line for line in first.lines if line.get_marker() == "o"]
    assert line.get_xydata().tolist() == [[0.0, 0.6], [1.0, 0.8], [1.5, 0.9]]
    assert [text.get_text() for text in first.texts] == ["base", "tuned"]
    assert [text.get_text() for text in first.get_legend().get_texts()] == [
        "± 1 std over images",
        "mean of 12 images",
        "95 % interval of the mean",
    ]
    bars = first.collections[-1].get_segments()
    np.testing.assert_allclose([bar[:, 1] for bar in bars], [[0.5, 0.7], [0.75, 0.85], [0.85, 0.95]])
    assert [len(axes.texts) for axes in (second, third)] == [0, 0]
    assert [text.get_text() for text in third.get_legend().get_texts()] == ["mean of 12 images"]
    save_figure(figure, tmp_path / "plot.png")
    with pytest.raises(ValueError, match="nothing to plot"):
        scale_figure({}, 1)
    with pytest.raises(ValueError, match="nothing to plot"):
        scale_figure({"one": []}, 1)


def test_progress_without_a_terminal_is_a_line_now_and_then() -> None:
    now = 0.0
    text = io.StringIO()
    with StepProgress(10, "sampling", console=Console(file=text), plain_interval=15, clock=lambda: now) as progress:
        for step in range(10):
            now += 6
            if step == 4:
                progress.describe("[more]")
            progress.advance()
    assert text.getvalue().splitlines() == [
        "sampling: 3 of 10 steps, 42 s left",
        "[more]: 6 of 10 steps, 24 s left",
        "[more]: 9 of 10 steps, 6 s left",
    ]


def test_progress_on_a_terminal_is_a_bar_that_goes_away() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    with StepProgress(4, "sampling", console=console) as progress:
        progress.describe("sampling at scale 0.5")
        for _ in range(4):
            progress.advance()
    assert "sampling at scale 0.5" in text.getvalue() and "4/4" in text.getvalue()
    assert text.getvalue().endswith(("\x1b[2K", "\x1b[?25h\r\x1b[1A\x1b[2K"))
