"""evaluation.html: the numbers, and image grids side by side; a single file that loads nothing from the network."""

from pathlib import Path

from pcpo_fast.evaluation.image_sets import ImageSet
from pcpo_fast.evaluation.result import Evaluation
from pcpo_fast.evaluation.result_tables import evaluation_tables, images_text
from pcpo_fast.evaluation.trade_off_figures import trade_off_figure
from pcpo_fast.reporting.charts import charts
from pcpo_fast.reporting.grids import to_image
from pcpo_fast.reporting.pages import embedded, render_page
from pcpo_fast.reporting.tables import number_text

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
    figure = trade_off_figure(result)
    return render_page(
        TEMPLATES / "evaluation.html",
        title="Evaluation",
        subtitle=", ".join(result.names),
        footer=images_text(result),
        tables=evaluation_tables(result),
        trade_off=figure and charts(figure, "Rewards against distances"),
        prompts=prompts,
        notes=result.notes,
    )


def embedded_image(images: ImageSet, row: int) -> dict[str, object]:
    """An image of a set for a page."""
    return embedded(to_image(images.read(row)))
