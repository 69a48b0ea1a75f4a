"""One prompt from an entry of a file: a JSON object or a row of a table."""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pcpo_fast.errors import UserError

COLUMNS = ("prompt", "prompts", "text", "caption")
"""Keys and column names of the prompt (case-insensitive); the first of these that is present is used."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and its metadata.

    Attributes:
        text: the prompt, not empty.
        metadata: passed to rewards unchanged; empty for plain text files.
    """

    text: str
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)


def column_of(names: Iterable[str], where: str, column: str | None = None) -> str | None:
    """The name of the prompt's column: ``column``, or the first of :data:`COLUMNS`; None if there is none.

    Raises:
        UserError: two candidates differ only in case.
    """
    names = list(names)
    if column is not None:
        return column if column in names else None
    for wanted in COLUMNS:
        found = [name for name in names if name.lower() == wanted]
        if len(found) > 1:
            raise UserError(f'{where}: both "{found[0]}" and "{found[1]}" could be the prompt; keep one of them')
        if found:
            return found[0]
    return None


def wanted_columns(column: str | None) -> str:
    """The columns that may hold the prompt, for error messages."""
    return f'"{column}" (prompts.column)' if column is not None else f"{', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}"


def prompt_of(entry: Any, where: str, column: str | None = None) -> Prompt:
    """Parse ``{"prompt": "...", "metadata": {...}}``; without ``metadata`` the other keys become the metadata.

    Args:
        entry: a parsed JSON value.
        where: prefix of error messages.
        column: the key of the prompt; None: one of :data:`COLUMNS`.

    Raises:
        UserError: the entry is not such an object, has no prompt, or contains invalid text.
    """
    if not isinstance(entry, dict):
        raise UserError(f'{where}: must be a JSON object with the key "prompt", got {_kind(entry)}')
    key = column_of(entry, where, column)
    others = {name: value for name, value in entry.items() if name not in (key, "metadata")}
    # Next to "metadata" no other key is allowed, and a key that nearly reads "metadata" is a typo.
    unknown = next(
        (name for name in others if "metadata" in entry or difflib.get_close_matches(name, ["metadata"])), None
    )
    if unknown is not None:
        raise UserError(f'{where}: unknown key "{unknown}"; allowed: "prompt" and "metadata", which may hold any keys')
    if key is None:
        there = ", ".join(f'"{name}"' for name in list(entry)[:5]) or "none"
        key = '"prompt" (or "text", or "caption")' if column is None else wanted_columns(column)
        raise UserError(f"{where}: the key {key} is missing; the keys are {there}")
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
    """The type of a JSON value, in words."""
    if isinstance(value, str) and not value.strip():
        return "an empty string"
    names = {str: "a string", bool: "true or false", dict: "an object", list: "a list", type(None): "null"}
    return names.get(type(value), "a number")
