"""Writes a comparison's results: comparison.json, comparison.md and figures/."""

import json
from pathlib import Path

from pcpo_fast.comparison.analysis import Comparison
from pcpo_fast.comparison.record import comparison_record
from pcpo_fast.comparison.tables import comparison_markdown
from pcpo_fast.files.atomic import write_atomically

JSON_FILE, MARKDOWN_FILE, FIGURES = "comparison.json", "comparison.md", "figures"


def write_comparison(result: Comparison, folder: Path | str) -> list[Path]:
    """Write everything, each file in one step; returns the paths, comparison.json and comparison.md first."""
    from pcpo_fast.comparison.figures import comparison_figures
    from pcpo_fast.reporting.plots import save_figure

    folder = Path(folder)
    write_atomically(folder / JSON_FILE, json.dumps(comparison_record(result), indent=1, allow_nan=False) + "\n")
    figures = []
    for name, figure in comparison_figures(result).items():
        figures.append(folder / FIGURES / f"{name}.png")
        save_figure(figure, figures[-1])
    for stale in set((folder / FIGURES).glob("*.png")) - set(figures):
        stale.unlink()
    names = [path.relative_to(folder).as_posix() for path in figures]
    write_atomically(folder / MARKDOWN_FILE, comparison_markdown(result, names))
    return [folder / JSON_FILE, folder / MARKDOWN_FILE, *figures]
