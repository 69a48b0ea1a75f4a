"""Self-contained HTML pages from Jinja2 templates; they load nothing from the network."""

import base64
import hashlib
from functools import cache
from pathlib import Path

import jinja2
from PIL import Image

from pcpo_fast.reporting.charts import chart_library
from pcpo_fast.reporting.grids import image_bytes
from pcpo_fast.reporting.style import color_variables

_SMALL, _LARGE = 128, 512
_TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: Path, **values: object) -> str:
    """Render a template that extends ``page.html``.

    The content security policy of ``page.html`` allows only embedded images, the page's own style and its own scripts
    (by hash): the browser makes no request, and a script injected through a value would not run. Values are escaped
    unless they are ``markupsafe.Markup``.
    """
    functions = {"color_variables": color_variables, "chart_library": chart_library}
    return _environment(template.parent).get_template(template.name).render(values, **functions)


@cache
def _environment(folder: Path) -> jinja2.Environment:
    """Compiles each template once."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _TEMPLATES]),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return environment


def data_url(data: bytes, kind: str) -> str:
    """A "png" or "jpeg" image as a data URL for the ``src`` of an ``<img>``."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def embedded(image: Image.Image) -> dict[str, object]:
    """An image as a data URL, at most 512 pixels large; up to 128 pixels it is lossless and its pixels stay visible."""
    if max(image.size) <= _SMALL:
        return {"source": data_url(image_bytes(image), "png"), "small": True}
    image = image.convert("RGB")
    image.thumbnail((_LARGE, _LARGE), Image.Resampling.LANCZOS)
    return {"source": data_url(image_bytes(image, "jpeg", quality=90), "jpeg"), "small": False}
