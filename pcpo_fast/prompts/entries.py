"""One prompt, from whatever a file has of it: an object of a JSON file, a row of a table."""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pcpo_fast.errors import UserError

COLUMNS = ("prompt", "prompts", "text", "caption")
"""Keys and columns that hold the prompt, in any case; where there are several, the first of these is meant."""


@dataclass(frozen=True)
class Prompt:
    """What to draw, and what a reward may want to know besides.

    Attributes:
        text: the prompt, not empty.
        metadata: passed to rewards as it is in the file; empty for a plain text file.
    """

    text: str
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)


def column_of(names: Iterable[str], where: str) -> str | None:
    """That of the names which holds the prompt (:data:`COLUMNS`), None if none does.

    Raises:
        UserError: two differ in case only.
    """
    names = list(names)
    for wanted in COLUMNS:
        found = [name for name in names if name.lower() == wanted]
        if len(found) > 1:
            raise UserError(f'{where}: both "{found[0]}" and "{found[1]}" could be the prompt; keep one of them')
        if found:
            return found[0]
    return None


def prompt_of(entry: Any, where: str) -> Prompt:
    """The prompt of ``{"prompt": "...", "metadata": {...}}``; without ``metadata`` the other keys are the metadata.

    Args:
        entry: as JSON has it.
        where: begins the message of an error.

    Raises:
        UserError: it is something else, has no prompt, or holds something that is not text.
    """
    if not isinstance(entry, dict):
        raise UserError(f'{where}: must be a JSON object with the key "prompt", got {_kind(entry)}')
    key = column_of(entry, where)
    others = {name: value for name, value in entry.items() if name not in (key, "metadata")}
    # Beside "metadata" there is nothing else, and what is nearly that name is meant to be it.
    unknown = next(
        (name for name in others if "metadata" in entry or difflib.get_close_matches(name, ["metadata"])), None
    )
    if unknown is not None:
        raise UserError(f'{where}: unknown key "{unknown}"; allowed: "prompt" and "metadata", which may hold any keys')
    if key is None:
        there = ", ".join(f'"{name}"' for name in list(entry)[:5]) or "none"
        raise UserError(f'{where}: the key "prompt" (or "text", or "caption") is missing; the keys are {there}')
    text, metadata = entry[key], entry.get("metadata", others)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where}: "{key}" must be a non-empty string, got {_kind(text)}')
    if metadata is not None and not isinstance(metadata, dict):
        raise UserError(f'{where}: "metadata" must be a JSON object, got {_kind(metadata)}')
    for name, value in entry.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{where}: {json.dumps(name)} contains a lone surrogate (half a character)") from None
    if "\0" in text:
        raise UserError(f'{where}: "{key}" contains a NUL character')
    return Prompt(text.strip(), metadata or {})


def _kind(value: object) -> str:
    """A JSON value's type in words."""
    if isinstance(value, str) and not value.strip():
        return "an empty string"
    names = {str: "a string", bool: "true or false", dict: "an object", list: "a list", type(None): "null"}
    return names.get(type(value), "a number")
