"""Self-contained HTML pages from Jinja2 templates; they load nothing from the network."""

import base64
import hashlib
from pathlib import Path

import jinja2

from pcpo_fast.reporting.svg import color_variables

_TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: Path, **values: object) -> str:
    """Render a template that extends ``page.html``.

    The content security policy of ``page.html`` allows only embedded images, the page's own style and its one script
    (by hash): the browser makes no request, and a script injected through a value would not run. Values are escaped
    unless they are ``markupsafe.Markup``.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _TEMPLATES]),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return environment.get_template(template.name).render(values, color_variables=color_variables)


def data_url(data: bytes, kind: str) -> str:
    """A "png" or "jpeg" image as a data URL for the ``src`` of an ``<img>``."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
