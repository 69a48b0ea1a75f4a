"""The files that a reward is made from: noted by what finds them while the reward is made."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from pcpo_fast.files.content import is_weights, part_files

Sources = dict[str, dict[str, Path | str]]
"""What they are to the reward, such as an option's name -> name of a file -> file, or source code without one."""

_noted: ContextVar[Sources | None] = ContextVar("noted", default=None)


@contextmanager
def noted_sources() -> Iterator[Sources]:
    """What is noted within the block."""
    found: Sources = {}
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


def note_source(what: str, place: Path, *, weights: bool = True) -> None:
    """Note a file, or a model's folder, where without ``weights`` only the other files count."""
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
    """Note the weights that options of a user's own reward name: files, and folders that hold some.

    Other files may be ones that the reward writes.
    """
    for option, value in options.items():
        if isinstance(value, str):
            place = Path(value).expanduser()
            files = part_files(place).values() if place.is_dir() else [place] * place.is_file()
            if any(map(is_weights, files)):
                note_source(option, place)
