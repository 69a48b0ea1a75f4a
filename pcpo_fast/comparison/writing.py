"""Writes a comparison's results: comparison.json, comparison.md, comparison.html and figures/."""

import json
from pathlib import Path

from pcpo_fast.comparison.analysis import Comparison
from pcpo_fast.comparison.comparison_tables import comparison_markdown
from pcpo_fast.comparison.record import comparison_record
from pcpo_fast.files.atomic import write_atomically

JSON_FILE, MARKDOWN_FILE, PAGE_FILE, FIGURES = "comparison.json", "comparison.md", "comparison.html", "figures"


def write_comparison(result: Comparison, folder: Path | str) -> list[Path]:
    """Write everything, each file in one step; returns the paths: comparison.json, .md and .html, and the figures."""
    from pcpo_fast.comparison.comparison_figures import comparison_figures
    from pcpo_fast.comparison.comparison_page import comparison_page
    from pcpo_fast.reporting.plots import save_figure

    folder = Path(folder)
    write_atomically(folder / JSON_FILE, json.dumps(comparison_record(result), indent=1, allow_nan=False) + "\n")
    figures, drawn = [], comparison_figures(result)
    write_atomically(folder / PAGE_FILE, comparison_page(result, folder, drawn))
    for name, figure in drawn.items():
        figures.append(folder / FIGURES / f"{name}.png")
        save_figure(figure, figures[-1])
    for stale in set((folder / FIGURES).glob("*.png")) - set(figures):
        stale.unlink()
    names = [path.relative_to(folder).as_posix() for path in figures]
    write_atomically(folder / MARKDOWN_FILE, comparison_markdown(result, names))
    return [folder / JSON_FILE, folder / MARKDOWN_FILE, folder / PAGE_FILE, *figures]
