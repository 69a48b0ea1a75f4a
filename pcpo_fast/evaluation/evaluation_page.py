"""evaluation.html: the numbers, and image grids side by side to flip through; one file, nothing from the network."""

import base64
import io
from collections.abc import Sequence

from PIL import Image

from pcpo_fast.comparison.tables import Grid
from pcpo_fast.evaluation.result import Evaluation
from pcpo_fast.evaluation.result_tables import difference_table, images_text, main_table, matched_table, number
from pcpo_fast.evaluation.trade_off_figures import trade_figure
from pcpo_fast.reporting.grids import to_image
from pcpo_fast.reporting.html_page import page, section, text
from pcpo_fast.reporting.svg import inline_svg

SHOWN_IMAGES = 4
"""Images of a prompt that the page shows."""

_SMALL = 128
_LARGE = 512

_STYLE = """
main { max-width: 1280px; }
table.numbers-table td, table.numbers-table th { padding-right: 26px; white-space: nowrap; }
table.numbers-table thead th { color: var(--soft); font-size: 12.5px; text-align: right; }
table.numbers-table thead th:first-child { text-align: left; }
.flip { display: none; align-items: center; gap: 12px; margin: 0 0 12px; }
.live .flip { display: flex; }
.flip button { font: inherit; color: var(--ink); background: transparent; border: 1px solid var(--line);
  border-radius: 6px; padding: 3px 14px; cursor: pointer; }
.flip output { color: var(--soft); font-variant-numeric: tabular-nums; }
.prompt + .prompt { margin-top: 26px; }
.live .prompt + .prompt { margin-top: 0; }
.live .prompt[hidden] { display: none; }
.prompt h3 { margin: 0 0 10px; font-size: 16px; font-weight: 600; overflow-wrap: anywhere; }
.columns { display: grid; gap: 18px; overflow-x: auto; }
.columns > div { min-width: 130px; }
.columns h4 { margin: 0 0 6px; font-size: 13.5px; font-weight: 600; overflow-wrap: anywhere; }
.columns figure + figure { margin-top: 8px; }
.columns img { width: 100%; }
.columns img.small { image-rendering: pixelated; }
.columns figcaption { margin-top: 2px; font-size: 12px; font-variant-numeric: tabular-nums; }
@media print { .flip { display: none !important; } .prompt[hidden] { display: block !important; } }
"""

_SCRIPT = """
document.querySelectorAll("[data-flip]").forEach(function (box) {
  var prompts = box.querySelectorAll(".prompt"), text = box.querySelector("output"), at = 0;
  function show(next) {
    at = (next + prompts.length) % prompts.length;
    prompts.forEach(function (prompt, i) { prompt.hidden = i !== at; });
    text.textContent = (at + 1) + " of " + prompts.length;
  }
  box.querySelector("[data-step='-1']").addEventListener("click", function () { show(at - 1); });
  box.querySelector("[data-step='1']").addEventListener("click", function () { show(at + 1); });
  document.addEventListener("keydown", function (event) {
    if (event.altKey || event.ctrlKey || event.metaKey) { return; }
    if (event.key === "ArrowLeft") { show(at - 1); event.preventDefault(); }
    if (event.key === "ArrowRight" || event.key === " ") { show(at + 1); event.preventDefault(); }
    if (event.key === "Home") { show(0); event.preventDefault(); }
    if (event.key === "End") { show(prompts.length - 1); event.preventDefault(); }
  });
  box.classList.add("live");
  show(0);
});
"""


def evaluation_page(result: Evaluation, shown: int) -> str:
    """The document.

    Args:
        result: what was found.
        shown: prompts whose images are in the page.

    Raises:
        UserError: an image cannot be read.
    """
    tables = [main_table(result), difference_table(result), matched_table(result)]
    body = "".join(f"<h3>{text(table.title)}</h3>{_table(table)}" for table in tables[1:] if table is not None)
    sections = [section("Numbers", f"{main_table(result).title}.", _table(main_table(result)) + body)]
    figure = trade_figure(result)
    if figure is not None:
        why = (
            "Up is more reward, left is closer to the reference. Compare runs at the same height. Bars: 95 % intervals."
        )
        svg = inline_svg(figure, "trade", "rewards against distances")
        sections.append(section("Reward against distance", why, f"<figure>{svg}</figure>"))
    why = "The same prompt and the same noise in every row. Arrow keys, space, Home and End turn the pages."
    sections.append(section("Images", why, _prompts(result, shown)))
    if result.notes:
        notes = "".join(f"<li>{text(note)}</li>" for note in result.notes)
        sections.append(section("What to know", "", f"<ul>{notes}</ul>"))
    subtitle = ", ".join(result.names)
    return page("Evaluation", subtitle, sections, images_text(result), script=_SCRIPT, style=_STYLE)


def embedded(image: Image.Image) -> tuple[str, bool]:
    """A data URL, and whether the image is so small that its pixels are to be seen: then it is kept exactly."""
    small = max(image.size) <= _SMALL
    buffer = io.BytesIO()
    if small:
        image.save(buffer, "PNG")
    else:
        image.thumbnail((_LARGE, _LARGE), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=90)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}", small


def _prompts(result: Evaluation, shown: int) -> str:
    pages = [_prompt(result, index) for index in range(min(shown, len(result.prompts)))]
    if len(pages) < 2:
        return "".join(pages)
    controls = (
        '<div class="flip"><button type="button" data-step="-1">Previous</button>'
        '<button type="button" data-step="1">Next</button><output></output></div>'
    )
    return f"<div data-flip>{controls}{''.join(pages)}</div>"


def _prompt(result: Evaluation, index: int) -> str:
    rows = range(index * result.count, index * result.count + min(result.count, SHOWN_IMAGES))
    columns = ""
    for one in result.sets:
        figures = ""
        for row in rows:
            source, small = embedded(to_image(one.read(row)))
            scores = ", ".join(f"{r.name} {number(r.scores[one.name][row])}" for r in result.rewards)
            kind = ' class="small"' if small else ""
            alt = text(f"{one.name}: {result.prompts[index].text}, image {row - rows[0] + 1}")
            figures += f'<figure><img{kind} alt="{alt}" src="{source}"><figcaption>{text(scores)}</figcaption></figure>'
        columns += f"<div><h4>{text(one.name)}</h4>{figures}</div>"
    layout = f"grid-template-columns:repeat({len(result.sets)},minmax(130px,{_LARGE}px))"
    title = f"<h3>{text(result.prompts[index].text)}</h3>"
    return f'<div class="prompt">{title}<div class="columns" style="{layout}">{columns}</div></div>'


def _table(grid: Grid) -> str:
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in grid.header)
    body = "".join(_row(row) for row in grid.rows)
    table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="table"><table class="numbers-table">{table}</table></div>'


def _row(row: Sequence[str]) -> str:
    cells = "".join(f"<td>{text(cell)}</td>" for cell in row[1:])
    return f'<tr><th scope="row">{text(row[0])}</th>{cells}</tr>'
