"""Matplotlib figures as charts on a page, with values under the pointer and zoom.

A figure is made once (`pcpo_fast.reporting.plots` and others): as a PNG file matplotlib draws it, on a page Bokeh. Here
it becomes plain data, which ``charts.js`` hands to BokehJS. The page brings BokehJS along, as the installed package has
it, so that nothing is loaded.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from pcpo_fast.reporting.style import css_color

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PIXELS = 96  # of a page per inch of a figure
_MARKERS = {"s": "square", "^": "triangle", "D": "diamond", "v": "inverted_triangle", "*": "star", "o": "circle"}

Mark = dict[str, Any]


@cache
def chart_library() -> Markup:
    """BokehJS (1.3 MiB) for a page's ``library`` block: the core and its plotting interface."""
    package = find_spec("bokeh")
    assert package is not None and package.origin is not None, "bokeh is a dependency"
    folder = Path(package.origin).parent / "server" / "static" / "js"
    names = ("bokeh.min.js", "bokeh-api.min.js")
    return Markup("\n".join((folder / name).read_text(encoding="utf-8") for name in names))


def charts(figure: "Figure", description: str) -> Markup:
    """A figure for a page, as wide as there is room: a heading, a legend and a chart for each of its axes.

    `description` is for screen readers. The page needs the ``library`` block (`chart_library`) and ``charts.js``.
    Raises TypeError if the figure holds a kind of drawing that no figure of this project has.
    """
    panels = [_panel(axes, figure.get_figheight()) for axes in figure.axes if axes.get_label() != "<colorbar>"]
    return Markup('<div class="charts" role="group" aria-label="{}">{}</div>').format(
        description, Markup("").join(panels)
    )


def _panel(axes: "Axes", inches: float) -> Markup:
    """Heading, legend, and the data of the chart, whose colours are those of a light page."""
    marks = list(_marks(axes))
    box, title = axes.get_position(original=True), axes.get_title(loc="left")
    legend = {mark["label"]: mark for mark in marks if mark.get("label")}
    content = {"x": _axis(axes.xaxis), "y": _axis(axes.yaxis), "marks": marks}
    entries = [
        Markup('<li class="{}" style="--color: {}">{}</li>').format(
            f"{mark['kind']} dashed" if mark.get("dashed") else mark["kind"], css_color(mark["color"]), label
        )
        for label, mark in legend.items()
    ]
    return Markup(
        '<div class="panel" style="flex-grow:{}">{}{}<div class="chart" style="height:{}px">'
        '<script type="application/json">{}</script></div></div>'
    ).format(
        round(100 * box.width),
        Markup("<h3>{}</h3>").format(title) if title else "",
        Markup('<ul class="legend">{}</ul>').format(Markup("").join(entries)) if entries else "",
        max(200, round(_PIXELS * inches * box.height)) + 40,
        Markup(json.dumps(content, allow_nan=False).replace("<", r"\u003c")),
    )


def _axis(axis: Any) -> dict[str, Any]:
    """Label, limits, scale, grid and ticks of an axis."""
    from matplotlib.ticker import PercentFormatter

    label, shown = axis.get_label().get_text(), axis.get_tick_params()
    return {
        "label": label,
        "scale": axis.get_scale(),
        "range": [float(limit) for limit in (axis.axes.get_xlim() if axis.axis_name == "x" else axis.axes.get_ylim())],
        "grid": shown["gridOn"],  # asking the grid lines themselves would make every tick
        "ticks": _tick_names(axis),
        "percent": isinstance(axis.get_major_formatter(), PercentFormatter),
        "whole": label.startswith(("epoch", "step", "update")),
        "names": shown.get("labelleft", True),
    }


def _tick_names(axis: Any) -> dict[str, str]:
    """The names of the ticks by their places, where the figure names them itself."""
    from matplotlib.ticker import FixedFormatter, FuncFormatter

    formatter = axis.get_major_formatter()
    if not isinstance(formatter, FixedFormatter | FuncFormatter):
        return {}
    low, high = sorted(axis.get_view_interval())
    places = [float(place) for place in axis.get_major_locator()() if low <= place <= high]
    names = formatter.format_ticks(places)
    return {f"{place:g}": name for place, name in zip(places, names, strict=True) if name}


def _marks(axes: "Axes") -> Iterator[Mark]:
    """What is drawn in the axes, from back to front."""
    for image in axes.images:
        yield _image(image)
    for drawn in axes.collections:
        yield from _collection(drawn)
    for container in axes.containers:
        yield _bars(container)
    for patch in axes.patches:
        if not any(patch in container for container in axes.containers):
            yield _stairs(patch)
    for line in axes.lines:
        yield _line(line, axes)
    text: Any
    for text in axes.texts:
        if getattr(text, "xycoords", None) == "data":  # others say what a page says beside its charts
            (x, y), shift, align = text.xy, text.get_position(), text.get_horizontalalignment()
            look = {"color": _hex(text.get_color()), "align": align, "shift": [float(value) for value in shift]}
            yield {"kind": "text", "x": float(x), "y": float(y), "text": text.get_text(), **look}


def _line(line: Any, axes: "Axes") -> Mark:
    xs, ys = (np.asarray(values, float).tolist() for values in line.get_data(orig=False))
    mark = _look(line, line.get_color()) | {"dashed": line.get_linestyle() not in ("-", "None")}
    if line.get_transform() != axes.transData:  # axhline and axvline
        across = xs == [0, 1]
        return mark | {"kind": "span", "dimension": "width" if across else "height", "at": ys[0] if across else xs[0]}
    return mark | {
        "kind": "line",
        "x": xs,
        "y": ys,
        "width": line.get_linewidth() if line.get_linestyle() != "None" else 0,
        "steps": line.get_drawstyle() == "steps-pre",
        "marker": _MARKERS.get(line.get_marker(), ""),
        "size": line.get_markersize() + 1,
    }


def _collection(drawn: Any) -> Iterator[Mark]:
    from matplotlib.collections import LineCollection, PathCollection, PolyCollection

    if isinstance(drawn, PolyCollection):  # fill_between
        for path in drawn.get_paths():
            xs, ys = np.asarray(path.vertices, float).T.tolist()
            yield _look(drawn, drawn.get_facecolor()[0]) | {"kind": "area", "x": xs, "y": ys}
    elif isinstance(drawn, LineCollection):  # vlines and hlines
        for segment in drawn.get_segments():
            xs, ys = np.asarray(segment, float).T.tolist()
            yield _look(drawn, drawn.get_color()[0]) | {"kind": "segment", "x": xs, "y": ys}
    elif isinstance(drawn, PathCollection):  # scatter
        xs, ys = np.asarray(drawn.get_offsets(), float).T.tolist()
        hollow = not len(drawn.get_facecolor())
        yield _look(drawn, drawn.get_edgecolor()[0]) | {"kind": "dots", "x": xs, "y": ys, "hollow": hollow}
    else:
        raise TypeError(f"a chart cannot show a {type(drawn).__name__}")


def _bars(container: Any) -> Mark:
    """Bars of one label; ``along`` is the axis on which a bar stands, ``shown`` its length."""
    boxes = np.array([[*bar.get_xy(), bar.get_width(), bar.get_height()] for bar in container], float)
    lying = container.orientation == "horizontal"
    at = boxes[:, 1] + boxes[:, 3] / 2 if lying else boxes[:, 0] + boxes[:, 2] / 2
    sides = (boxes[:, 0], boxes[:, 0] + boxes[:, 2], boxes[:, 1], boxes[:, 1] + boxes[:, 3])
    look = _look(container[0], container[0].get_facecolor()) | {"label": _label(container)}
    return look | _quads(sides, boxes[:, 2 if lying else 3], np.round(at), "y" if lying else "x")


def _stairs(patch: Any) -> Mark:
    from matplotlib.patches import StepPatch

    if not isinstance(patch, StepPatch):
        raise TypeError(f"a chart cannot show a {type(patch).__name__}")
    values, edges, baseline = patch.get_data()
    bottom = np.broadcast_to(np.asarray(0.0 if baseline is None else baseline), values.shape)
    sides = (edges[:-1], edges[1:], bottom, values)
    return _look(patch, patch.get_facecolor()) | _quads(sides, values - bottom, (edges[1:] + edges[:-1]) / 2, "x")


def _quads(sides: Sequence[np.ndarray], shown: np.ndarray, at: np.ndarray, along: str) -> Mark:
    mark: Mark = {name: side.tolist() for name, side in zip(("left", "right", "bottom", "top"), sides, strict=True)}
    return mark | {"kind": "block", "shown": shown.tolist(), "at": at.tolist(), "along": along}


def _image(image: Any) -> Mark:
    """A heat map; its rows run up from the bottom."""
    table = np.ma.filled(image.get_array().astype(float), np.nan)
    left, right, *heights = (float(edge) for edge in image.get_extent())
    low, high = image.get_clim()
    return {
        "kind": "image",
        "rows": [[None if np.isnan(value) else value for value in row] for row in table.tolist()],
        "x": [left, right],
        "y": sorted(heights),
        "limits": [float(low), float(high)],
        "palette": [_hex(image.cmap(share)) for share in np.linspace(0, 1, 64)],
        "percent": image.colorbar is not None and _axis(image.colorbar.ax.yaxis)["percent"],
    }


def _look(artist: Any, color: Any) -> Mark:
    return {"label": _label(artist), "color": _hex(color), "alpha": float(artist.get_alpha() or 1)}


def _label(artist: Any) -> str:
    """The label of an artist for the legend; matplotlib's own begin with an underscore."""
    label = str(artist.get_label())
    return "" if label.startswith("_") else label


def _hex(color: Any) -> str:
    from matplotlib.colors import to_hex

    return to_hex(color)
