"""Command lines in the documentation are ones that the program takes, with settings that exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from pcpo_fast.cli import parse
from pcpo_fast.config.loading import load_config
from pcpo_fast.config.shipped import configurations

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/README.md"))
PROGRAM = r"(?:[\w./]*pcpo-fast|(?:python|deepspeed|torchrun|srun)\b[^`\n|]*?(?:(?:-m|--module) pcpo_fast|train\.py))"
TAKES_SETTINGS = ("train", "plan", "preflight", "compare")


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each command as the page shows it, in a block or in a sentence, and its arguments, with numbers for letters."""
    text = re.sub(r"\s*\\\n\s*", " ", page.read_text(encoding="utf-8"))
    lines = rf"^ *(?:\$ )?(?:\w+=\S+ )*({PROGRAM} .+)$(?!\n *error: )"  # not what a page shows to be refused
    blocks = re.findall(lines, text, re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(rf"`({PROGRAM} [^`]+)`", text)]
    for shown in blocks + [span for span in spans if re.search(r" -|=", span)]:  # others only name a command
        command = re.split(r"\s+#|\s{2,}(?!-|[\w.]+=)|\s[>|&]\s| \.\.\.", shown)[0]
        taken = re.fullmatch(rf"({PROGRAM})(?:\s+(.*))?", command)
        if taken is not None:  # not shortened before the program's name
            given = re.sub(
                r"(--(?:gpus|epoch|minutes|jobs)) [A-Z]\b|(--(?:host-memory|disk)) GB", r"\1\2 1", taken[2] or ""
            )
            yield shown, [*(["train"] if taken[1].endswith("train.py") else []), *shlex.split(given)]


def test_documented_commands_are_taken() -> None:
    count = 0
    for page in PAGES:
        for shown, words in commands(page):
            if not words or words[0].isupper() or words[0] in ("COMMAND", "--version", "--help") or "--help" in words:
                continue
            count += 1
            try:
                arguments = parse(words)
            except SystemExit:
                pytest.fail(f"{page.name}: {shown}")
            if words[0] in TAKES_SETTINGS and arguments.settings:
                known = [text for text in words if text in configurations() or (ROOT / text).is_file()]
                load_config(next(iter(known), None), arguments.settings)
    assert count > 60
