"""comparison.html: a comparison's tables and charts; a single file that loads nothing from the network."""

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from pcpo_fast.comparison.analysis import Comparison, missing_lines
from pcpo_fast.comparison.comparison_tables import (
    about_decisions,
    decision_table,
    difference_table,
    explanations,
    main_table,
    seed_table,
    setting_table,
)
from pcpo_fast.config.wording import counted
from pcpo_fast.reporting.charts import charts
from pcpo_fast.reporting.pages import render_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = Path(__file__).parent / "templates" / "comparison.html"
_FIGURES = {
    "reward": "Reward over epochs",
    "compute": "Held-out reward over compute",
    "epochs_to_target": "Epochs to the target",
    "clip_fraction": "Clip fraction per step",
    "gradient_norm": "Spread of the gradient norm",
}


def comparison_page(result: Comparison, folder: Path, figures: "Mapping[str, Figure]") -> str:
    """The HTML document.

    Args:
        result: the comparison.
        folder: where it is written, which names it.
        figures: by name, as `pcpo_fast.comparison.comparison_figures.comparison_figures` makes them.
    """
    configs = [run.config for variant in result.variants for run in variant.runs if run.config is not None]
    models = sorted({config.model.path for config in configs})
    said = [f"model {', '.join(models)}"] if models else []
    runs = sum(len(variant.runs) for variant in result.variants)
    return render_page(
        _TEMPLATE,
        title=f"Comparison of {', '.join(variant.name for variant in result.variants)}",
        subtitle=", ".join([*said, folder.resolve().name, counted(runs, "run"), f"{date.today():%-d %B %Y}"]),
        footer="Made from the runs' metrics.jsonl by pcpo-fast compare.",
        main=main_table(result),
        decided=decision_table(result) if result.decisions else None,
        about_decisions=about_decisions(result) if result.decisions else None,
        figures={_FIGURES[name]: charts(figure, _FIGURES[name]) for name, figure in figures.items()},
        details=[
            *([table] if (table := setting_table(result)) is not None else []),
            *(difference_table(variant, result) for variant in result.variants if variant.against),
            seed_table(result),
        ],
        missing=missing_lines(result.missing),
        explanations=[line.replace("*", "") for line in explanations(result)],
        meanings=[f"{measure.label}: {measure.meaning}." for measure in result.measures],
    )
