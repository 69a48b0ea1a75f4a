"""evaluation.html: the numbers, and image grids side by side; a single file that loads nothing from the network."""

from datetime import date
from pathlib import Path

from pcpo_fast.evaluation.image_sets import ImageSet
from pcpo_fast.evaluation.result import Evaluation
from pcpo_fast.evaluation.result_tables import evaluation_tables, images_text
from pcpo_fast.evaluation.trade_off_figures import overview_figure, trade_off_figure
from pcpo_fast.reporting.charts import charts
from pcpo_fast.reporting.grids import to_image
from pcpo_fast.reporting.pages import embedded, render_page
from pcpo_fast.reporting.tables import Grid, number_text

TEMPLATES = Path(__file__).parent / "templates"
SHOWN_IMAGES = 4
"""Images per prompt that the page shows."""


def evaluation_page(result: Evaluation, shown: int) -> str:
    """The HTML document.

    Args:
        result: the evaluation.
        shown: number of prompts whose images are on the page.

    Raises:
        UserError: an image cannot be read.
    """
    prompts = []
    for index, prompt in enumerate(result.prompts[:shown]):
        rows = range(index * result.count, index * result.count + min(result.count, SHOWN_IMAGES))
        columns = {
            one.name: [
                embedded_image(one, row)
                | {"scores": ", ".join(f"{r.name} {number_text(r.scores[one.name][row])}" for r in result.rewards)}
                for row in rows
            ]
            for one in result.sets
        }
        prompts.append({"text": prompt.text, "columns": columns})
    overview, trade_off = overview_figure(result), trade_off_figure(result)
    families = list(dict.fromkeys(one.family for one in result.candidates))
    models = {one.config.model.path for one in result.candidates if one.config is not None}
    said = [f"model {', '.join(sorted(models))}"] if models else []
    return render_page(
        TEMPLATES / "evaluation.html",
        title=f"Evaluation of {', '.join(families[:4])}{' and others' if len(families) > 4 else ''}",
        subtitle=", ".join([*said, images_text(result), f"{date.today():%-d %B %Y}"]),
        compared=_compared(result),
        footer=images_text(result),
        tables=evaluation_tables(result),
        overview=overview and charts(overview, "Every number with its interval"),
        trade_off=trade_off and charts(trade_off, "Rewards against distances"),
        prompts=prompts,
        notes=result.notes,
    )


def _compared(result: Evaluation) -> Grid:
    """Where the images of each candidate come from."""
    kinds = {"base": "base model", "run": "run", "pipeline": "pipeline", "images": "finished images"}
    rows = []
    for one in result.candidates:
        path = one.path or (one.config.model.path if one.config is not None else "")
        scale = f", reward guidance {one.scale:g}" if one.kind == "run" and one.scale != 1 else ""
        rows.append((one.name, kinds[one.kind] + scale, path))
    return Grid("What is compared", ("checkpoint", "is", "from"), tuple(rows))


def embedded_image(images: ImageSet, row: int) -> dict[str, object]:
    """An image of a set for a page."""
    return embedded(to_image(images.read(row)))
