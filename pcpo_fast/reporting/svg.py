"""Matplotlib figures as inline SVG: no external references, unique ids, colours set by the page."""

import io
import re
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from pcpo_fast.reporting.style import DARK

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def inline_svg(figure: "Figure", name: str, description: str) -> Markup:
    """An ``<svg>`` element for an HTML page.

    `name` (letters and digits) makes its ids unique; `description` is for screen readers. Colours of
    `pcpo_fast.reporting.style` become CSS variables (see `color_variables`), so that the page chooses light or dark.
    Text remains text, in the page's font. The width adapts to the page.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "svg.image_inline": True}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, facecolor="none")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    opening, rest = text.split(">", 1)
    box = re.search(r'viewBox="([^"]*)"', opening)
    assert box is not None, "matplotlib writes a viewBox"
    rest = rest.replace("xlink:href=", "href=")
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = rest.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    for colour in DARK:
        rest = re.sub(re.escape(colour), f"var({variable(colour)})", rest, flags=re.IGNORECASE)
    width = float(box[1].split()[2])
    style = f"width:100%;max-width:{width * 4 / 3:.0f}px;height:auto"
    opening = f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(description)}" style="{style}">'
    return Markup(opening + rest.strip())


def variable(colour: str) -> str:
    """The CSS variable of a figure colour."""
    return f"--plot-{colour.lstrip('#').lower()}"


def color_variables(dark: bool) -> str:
    """CSS declarations of all figure colours, for a light or a dark page."""
    return " ".join(f"{variable(light)}: {deep if dark else light};" for light, deep in DARK.items())
