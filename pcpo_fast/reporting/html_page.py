"""The frame of the report: one HTML page with its style sheet and its script inside, asking nothing of the network."""

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence

from pcpo_fast.reporting.svg import color_variables

_STYLE = """
:root { color-scheme: light dark;
  --paper: #f6f7f9; --card: #ffffff; --ink: #20242c; --soft: #606773; --line: #e3e6eb; --accent: #0072b2;
  --good: #00795a; --bad: #b04800; LIGHT }
@media (prefers-color-scheme: dark) { :root {
  --paper: #101216; --card: #181b21; --ink: #e6e9ef; --soft: #9aa3b2; --line: #2c323d; --accent: #58b1ee;
  --good: #3cc9a0; --bad: #f0904e; DARK } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
header h1 { margin: 0; font-size: 26px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
header p { margin: 4px 0 0; color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px;
  margin-top: 20px; }
h2 { margin: 0 0 4px; font-size: 18px; }
p.why { margin: 0 0 14px; color: var(--soft); max-width: 72ch; }
p.none { margin: 0; color: var(--soft); font-style: italic; }
.numbers { display: flex; flex-wrap: wrap; gap: 18px 28px; margin-top: 10px; }
.numbers b { display: block; font-size: 24px; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.numbers span { color: var(--soft); font-size: 13px; }
.numbers .up, .numbers .down { font-size: 18px; }
.up, .numbers .up { color: var(--good); } .down, .numbers .down { color: var(--bad); }
figure { margin: 0; overflow-x: auto; }
figure svg { min-width: 640px; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 6px; background: #ffffff; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 6px; }
svg { display: block; margin: 0 auto; }
svg text { font-family: inherit !important; }
svg image { image-rendering: pixelated; }
.plots > * + * { margin-top: 22px; }
.slider { display: none; align-items: center; gap: 14px; margin: 0 0 14px; }
.slider input { flex: 1; accent-color: var(--accent); min-width: 0; }
.slider button { font: inherit; color: var(--ink); background: transparent; border: 1px solid var(--line);
  border-radius: 6px; padding: 3px 14px; cursor: pointer; min-width: 74px; }
.slider output { min-width: 11ch; font-variant-numeric: tabular-nums; text-align: right; }
.frames figure + figure { margin-top: 18px; }
.live .slider { display: flex; }
.live .frames figure + figure { margin-top: 0; }
.live .frames figure[hidden] { display: none; }
details { margin-top: 4px; }
details + details { margin-top: 10px; }
summary { cursor: pointer; color: var(--accent); }
pre { overflow-x: auto; background: var(--paper); border: 1px solid var(--line); border-radius: 6px; padding: 12px 14px;
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; margin-top: 8px; }
th, td { text-align: left; padding: 3px 22px 3px 0; border-bottom: 1px solid var(--line); font-weight: 400; }
td { text-align: right; padding-right: 0; }
ul, ol { margin: 8px 0 0; padding-left: 22px; }
footer { margin-top: 24px; color: var(--soft); font-size: 13px; }
@media (max-width: 620px) { section { padding: 16px; } }
@media print { body { background: #ffffff; } section { break-inside: avoid; } .slider { display: none !important; } }
"""

_SCRIPT = """
document.querySelectorAll("[data-frames]").forEach(function (box) {
  var frames = box.querySelectorAll("figure"), range = box.querySelector("input"), text = box.querySelector("output");
  var button = box.querySelector("button"), timer = null;
  function show() {
    frames.forEach(function (frame, i) { frame.hidden = i !== +range.value; });
    text.textContent = frames[+range.value].dataset.label;
  }
  function stop() { clearInterval(timer); timer = null; button.textContent = "Play"; }
  range.max = frames.length - 1;
  range.value = frames.length - 1;
  range.addEventListener("input", function () { stop(); show(); });
  button.addEventListener("click", function () {
    if (timer) { stop(); return; }
    if (+range.value === frames.length - 1) { range.value = 0; show(); }
    button.textContent = "Stop";
    timer = setInterval(function () {
      range.value = +range.value + 1; show();
      if (+range.value === frames.length - 1) { stop(); }
    }, 700);
  });
  box.classList.add("live");
  show();
});
"""


def page(
    title: str, subtitle: str, sections: Iterable[str], footer: str, *, script: str = _SCRIPT, style: str = ""
) -> str:
    """The whole document. `sections` are HTML, `script` and `style` (added to the common one) are trusted code of the
    package; the other arguments are plain text.

    Its content security policy allows embedded images, its own style and this one script (by its hash) and nothing
    else: the browser makes no request, and a script smuggled in by a file of the run would not be executed.
    """
    style = (_STYLE + style).replace("LIGHT", color_variables(dark=False)).replace("DARK", color_variables(dark=True))
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{text(title)}</h1><p>{text(subtitle)}</p></header>\n"
        + "\n".join(sections)
        + f"\n<footer>{text(footer)}</footer>\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Anything, escaped for HTML text and attributes."""
    return html.escape(str(value), quote=True)


def section(title: str, why: str, body: str, missing: str = "Nothing was recorded for this part.") -> str:
    """A titled card: one sentence on what is to be seen, then `body` (HTML), or a note where there is none."""
    content = body or f'<p class="none">{text(missing)}</p>'
    explanation = f'<p class="why">{text(why)}</p>' if why and body else ""
    return f"<section><h2>{text(title)}</h2>{explanation}{content}</section>"


def headline(items: Sequence[tuple[str, str]]) -> str:
    """Large numbers: (HTML of the number, plain label)."""
    cells = ""
    for number, label in items:
        cells += f"<div><b>{number}</b><span>{text(label)}</span></div>"
    return f'<div class="numbers">{cells}</div>'


def picture(data: bytes, kind: str, alt: str, caption: str = "", label: str = "") -> str:
    """A figure with an embedded image; `kind` is "png" or "jpeg"."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    mark = f' data-label="{text(label)}"' if label else ""
    return f'<figure{mark}><img alt="{text(alt)}" src="{source}">{below}</figure>'


def slideshow(figures: Sequence[str], label: str) -> str:
    """Figures (made by `picture` with labels) to look through with a slider; all of them where scripts are off."""
    if len(figures) < 2:
        return "".join(figures)
    controls = (
        f'<div class="slider"><button type="button">Play</button>'
        f'<input type="range" min="0" step="1" aria-label="{text(label)}"><output></output></div>'
    )
    return f'<div data-frames>{controls}<div class="frames">{"".join(figures)}</div></div>'


def folded(title: str, body: str) -> str:
    return f"<details><summary>{text(title)}</summary>{body}</details>"


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values (plain text)."""
    body = "".join(f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in rows)
    return f'<div class="table"><table>{body}</table></div>' if body else ""
