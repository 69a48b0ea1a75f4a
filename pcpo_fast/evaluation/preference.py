"""A blind preference study: one HTML file with pairs of images, and a key that says which side is whose."""

import json
import random
from pathlib import Path
from typing import Any

from pcpo_fast.errors import UserError
from pcpo_fast.evaluation.evaluation_page import embedded
from pcpo_fast.evaluation.result import Evaluation
from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.files.content import digest
from pcpo_fast.files.image_files import read_image
from pcpo_fast.reporting.grids import to_image
from pcpo_fast.reporting.html_page import page, text

PAGE_FILE, KEY_FILE = "preference.html", "preference_key.json"

_STYLE = """
main { max-width: 1180px; }
.pair h2 { font-size: 18px; margin: 0 0 14px; overflow-wrap: anywhere; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; }
.sides button { padding: 0; border: 3px solid transparent; border-radius: 10px; background: transparent;
  cursor: pointer; }
.sides button:hover, .sides button:focus-visible { border-color: var(--accent); outline: none; }
.sides img { display: block; width: 100%; border-radius: 6px; }
.sides img.small { image-rendering: pixelated; }
.bar { display: flex; flex-wrap: wrap; align-items: center; gap: 12px; margin-top: 16px; }
.bar button, .bar input { font: inherit; color: var(--ink); background: var(--paper); border: 1px solid var(--line);
  border-radius: 6px; padding: 5px 14px; }
.bar button { cursor: pointer; } .bar output { color: var(--soft); margin-left: auto; }
.bar button.main { background: var(--accent); border-color: var(--accent); color: #ffffff; }
kbd { font: 12px ui-monospace, Menlo, Consolas, monospace; border: 1px solid var(--line); border-radius: 4px;
  padding: 0 5px; }
"""

_SCRIPT = """
(function () {
  var box = document.querySelector("[data-page]"), id = box.dataset.page, pairs = box.querySelectorAll(".pair");
  var done = box.querySelector(".done"), status = box.querySelector("output"), name = box.querySelector("input");
  var store = "pcpo-preference-" + id, state = { voter: "", votes: {} }, at = 0;
  try { state = JSON.parse(localStorage.getItem(store)) || state; } catch (error) { }
  function keep() { try { localStorage.setItem(store, JSON.stringify(state)); } catch (error) { } }
  function voted() { return Object.keys(state.votes).length; }
  function next() {
    for (var i = 0; i < pairs.length; i += 1) { if (!(i in state.votes)) { return i; } }
    return pairs.length;
  }
  function show(place) {
    at = Math.max(0, Math.min(place, pairs.length));
    pairs.forEach(function (pair, i) { pair.hidden = i !== at; });
    done.hidden = at !== pairs.length;
    status.textContent = voted() + " of " + pairs.length + " judged";
  }
  function vote(choice) {
    if (at === pairs.length) { return; }
    state.votes[at] = choice; keep();
    show(at + 1 < pairs.length && !((at + 1) in state.votes) ? at + 1 : next());
  }
  function save() {
    state.voter = name.value.trim(); keep();
    if (!state.voter) { name.focus(); status.textContent = "Please write your name or a nickname first"; return; }
    var data = JSON.stringify({ page: id, voter: state.voter, votes: state.votes }, null, 1);
    var link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([data], { type: "application/json" }));
    link.download = "votes-" + state.voter.replace(/[^A-Za-z0-9_-]+/g, "_") + ".json";
    document.body.appendChild(link); link.click(); link.remove();
    status.textContent = "Saved " + voted() + " votes to " + link.download;
  }
  name.value = state.voter;
  name.addEventListener("input", function () { state.voter = name.value.trim(); keep(); });
  box.querySelectorAll("[data-vote]").forEach(function (button) {
    button.addEventListener("click", function () { vote(button.dataset.vote); });
  });
  box.querySelector("[data-back]").addEventListener("click", function () { show(at - 1); });
  box.querySelector("[data-save]").addEventListener("click", save);
  document.addEventListener("keydown", function (event) {
    if (event.target === name || event.altKey || event.ctrlKey || event.metaKey) { return; }
    var choice = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie" }[event.key];
    if (choice) { vote(choice); event.preventDefault(); }
    if (event.key === "Backspace") { show(at - 1); event.preventDefault(); }
  });
  show(next());
}());
"""


def parse_pair(value: str, names: list[str]) -> tuple[str, str]:
    """The two checkpoints of ``--preference A,B``.

    Raises:
        UserError: they are not two of the names.
    """
    chosen = [name.strip() for name in value.split(",")]
    wrong = next((name for name in chosen if name not in names), None)
    if len(chosen) != 2 or chosen[0] == chosen[1] or wrong is not None:
        raise UserError(f"--preference {value!r}: is written A,B with two of {', '.join(names)}")
    return chosen[0], chosen[1]


def write_preference(result: Evaluation, pair: tuple[str, str], folder: Path) -> tuple[Path, Path]:
    """Write the page, which does not tell the checkpoints apart, and the key, which does; returns their paths.

    Order and sides are drawn from the names and the seed: the same evaluation makes the same page, and votes of an
    earlier page of it still count.

    Raises:
        UserError: an image cannot be read.
    """
    sets = dict(zip(result.names, result.sets, strict=True))
    identity = digest([pair, [sets[name].identity for name in pair], result.seed, result.count])
    draw = random.Random(identity)
    rows = list(range(len(result.prompts) * result.count))
    draw.shuffle(rows)
    # As many pairs with the first on the left as on the right: who always takes one side decides nothing.
    sides = [pair, pair[::-1]] * (len(rows) // 2) + [pair] * (len(rows) % 2)
    draw.shuffle(sides)
    entries: list[dict[str, Any]] = []
    blocks = []
    for row, (left, right) in zip(rows, sides, strict=True):
        prompt = result.prompts[row // result.count].text
        entries.append({"prompt": row // result.count, "image": row % result.count, "left": left, "right": right})
        shown = "".join(_side(sets[name].files[row], side) for name, side in ((left, "left"), (right, "right")))
        blocks.append(f'<div class="pair" hidden><h2>{text(prompt)}</h2><div class="sides">{shown}</div></div>')
    done = (
        '<div class="done" hidden><h2>Thank you: that was the last pair.</h2>'
        "<p>Write your name or a nickname below and save the votes to a file.</p></div>"
    )
    bar = (
        '<div class="bar"><button type="button" data-vote="tie">No difference</button>'
        '<button type="button" data-back>Back</button><input placeholder="your name" aria-label="your name">'
        '<button type="button" class="main" data-save>Save votes to a file</button><output></output></div>'
        '<p class="why">Keys: <kbd>&larr;</kbd> left, <kbd>&rarr;</kbd> right, <kbd>&darr;</kbd> no difference, '
        "<kbd>Backspace</kbd> back. Votes stay in this browser until they are saved; nothing is sent anywhere.</p>"
    )
    section = f'<section data-page="{identity}">{"".join(blocks)}{done}{bar}</section>'
    title = "Which image is better?"
    subtitle = "Choose the image that fits the text better and looks better. Click it, or use the arrow keys."
    document = page(title, subtitle, [section], f"{len(rows)} pairs", script=_SCRIPT, style=_STYLE)
    key = {
        "page": identity,
        "checkpoints": list(pair),
        "prompts": [prompt.text for prompt in result.prompts],
        "pairs": entries,
    }
    write_atomically(folder / KEY_FILE, json.dumps(key, indent=1, ensure_ascii=False))
    write_atomically(folder / PAGE_FILE, document)
    return folder / PAGE_FILE, folder / KEY_FILE


def _side(file: Path, side: str) -> str:
    source, small = embedded(to_image(read_image(file)))
    kind = ' class="small"' if small else ""
    return f'<button type="button" data-vote="{side}"><img{kind} alt="the image on the {side}" src="{source}"></button>'
