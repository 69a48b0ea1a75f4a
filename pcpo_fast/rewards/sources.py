"""Recording the files that a reward is created from."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from pcpo_fast.files.content import is_weights, part_files

Sources = dict[str, dict[str, Path | str]]
"""Role in the reward (such as an option's name) -> file name -> file, or source code that is not in a file."""

_noted: ContextVar[Sources | None] = ContextVar("noted", default=None)


@contextmanager
def noted_sources() -> Iterator[Sources]:
    """Collect the sources that are noted within the block."""
    found: Sources = {}
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


def note_source(what: str, place: Path, *, weights: bool = True) -> None:
    """Note a file or a model's folder; without ``weights``, weights files in the folder are left out."""
    found = _noted.get()
    if found is not None:
        files = part_files(place) if place.is_dir() else {place.name: place}
        found[what] = {name: file for name, file in files.items() if weights or not is_weights(file)}


def note_text(what: str, name: str, text: str) -> None:
    """Note source code that is not in a file."""
    found = _noted.get()
    if found is not None and text:
        found[what] = {name: text}


def note_options(options: Mapping[str, Any]) -> None:
    """Note the weights (files, or folders with weights) in the options of a user's reward.

    Other files are ignored, because the reward may write them.
    """
    for option, value in options.items():
        if isinstance(value, str):
            place = Path(value).expanduser()
            files = part_files(place).values() if place.is_dir() else [place] * place.is_file()
            if any(map(is_weights, files)):
                note_source(option, place)
