"""A blind preference study: an HTML file with two questions on pairs of images, and a key that identifies the sides."""

import json
import random
from pathlib import Path

from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.evaluation.evaluation_page import TEMPLATES, embedded_image
from pcpo_fast.evaluation.result import Evaluation
from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.files.content import digest
from pcpo_fast.reporting.pages import render_page

PAGE_FILE, KEY_FILE = "preference.html", "preference_key.json"


def parse_pair(value: str, names: list[str]) -> tuple[str, str]:
    """The two checkpoints of ``--preference A,B``.

    Raises:
        UserError: the value does not give two different names.
    """
    chosen = [name.strip() for name in value.split(",")]
    wrong = next((name for name in chosen if name not in names), None)
    if len(chosen) != 2 or chosen[0] == chosen[1] or wrong is not None:
        raise UserError(f"--preference {value!r}: expected A,B with two of {', '.join(names)}")
    return chosen[0], chosen[1]


def write_preference(result: Evaluation, pair: tuple[str, str], folder: Path) -> tuple[Path, Path]:
    """Write the page, which does not identify the checkpoints, and the key, which does; return both paths.

    Order and sides are drawn from the image sets and the seed, so repeating an evaluation gives the same page and
    earlier votes remain valid.

    Raises:
        UserError: an image cannot be read.
    """
    sets = dict(zip(result.names, result.sets, strict=True))
    identity = digest([pair, [sets[name].identity for name in pair], result.seed, result.count])
    draw = random.Random(identity)
    rows = list(range(len(result.prompts) * result.count))
    draw.shuffle(rows)
    # The first checkpoint is on the left in half of the pairs: voters who always choose one side change nothing.
    sides = [pair, pair[::-1]] * (len(rows) // 2) + [pair] * (len(rows) % 2)
    draw.shuffle(sides)
    entries, pairs = [], []
    for row, (left, right) in zip(rows, sides, strict=True):
        prompt, image = divmod(row, result.count)
        entries.append({"prompt": prompt, "image": image, "left": left, "right": right})
        shown = {"left": embedded_image(sets[left], row), "right": embedded_image(sets[right], row)}
        pairs.append({"text": result.prompts[prompt].text, "sides": shown})
    document = render_page(
        TEMPLATES / "preference.html",
        title="Which image is better?",
        subtitle="Two questions on each pair. Click an image, or use the arrow keys.",
        footer=counted(len(rows), "pair"),
        identity=identity,
        pairs=pairs,
    )
    key = {
        "page": identity,
        "checkpoints": list(pair),
        "prompts": [prompt.text for prompt in result.prompts],
        "pairs": entries,
    }
    write_atomically(folder / KEY_FILE, json.dumps(key, indent=1, ensure_ascii=False))
    write_atomically(folder / PAGE_FILE, document)
    return folder / PAGE_FILE, folder / KEY_FILE
