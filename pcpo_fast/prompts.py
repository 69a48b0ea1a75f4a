"""Prompts: reading them from a file, and choosing those of an epoch."""

import csv
import difflib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pcpo_fast.errors import UserError

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_JSON_KEYS = ("prompt", "metadata")
_TABLES = {".csv": ",", ".tsv": "\t"}
_COLUMNS = ("prompt", "prompts", "caption", "text")


@dataclass(frozen=True)
class Prompt:
    """What to draw, and what a reward may want to know besides.

    Attributes:
        text: the prompt, not empty.
        metadata: passed to rewards as it stands in the file; empty for a plain text file.
    """

    text: str
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)


def load_prompts(path: str | Path) -> list[Prompt]:
    """Read a text file with one prompt per line, JSONL, or one of the forms in which benchmarks are published.

    A name that ends in ``.jsonl``, ``.ndjson`` or ``.json`` means JSONL, ``{"prompt": "...", "metadata": {...}}`` on
    each line; without ``metadata`` the line's other keys are the metadata, as in GenEval's file. A ``.json`` file may
    also be one list of texts or of such objects (HPDv2), or COCO's captions, of which every image's first is taken.
    ``.csv`` and ``.tsv`` are tables whose header has a column prompt, prompts, caption or text (DrawBench,
    PartiPrompts); the other columns are the metadata. Blank lines are skipped, blanks around a prompt are cut, and a
    byte order mark is ignored. A prompt may occur more than once.

    Raises:
        UserError: the file is missing, unreadable, empty or not UTF-8; a line or an entry is not what it should be.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    text = _read_text(path)
    listed = _parse_list(text, path) if suffix == ".json" else None
    if suffix in _TABLES:
        listed = _parse_table(text, _TABLES[suffix], path)
    parse = _parse_json if suffix in _JSON_SUFFIXES else _parse_text
    # Only "\n" ends a line: JSON strings may hold the other characters that str.splitlines breaks at.
    if listed is None:
        lines = enumerate(text.split("\n"), start=1)
        listed = [parse(line.strip(), f"{path} line {number}") for number, line in lines if line.strip()]
    if not listed:
        raise UserError(f"prompt file {path} is empty; it needs at least one prompt")
    return listed


def epoch_prompts(count: int, per_epoch: int, epoch: int, seed: int) -> list[int]:
    """The prompts of an epoch: indices into a list of ``count`` prompts.

    The epochs read one endless sequence, ``per_epoch`` entries each: a shuffle of all prompts, then another shuffle,
    and so on. So every prompt is used once before any is used again, also where ``per_epoch`` does not divide
    ``count`` or is larger, and an epoch's prompts follow from its number alone, whatever ran before it.

    Args:
        count: prompts to choose from, at least 1.
        per_epoch: prompts in an epoch, at least 1.
        epoch: counted from 0.
        seed: not negative.

    Raises:
        ValueError: an argument is out of range.
    """
    if count < 1 or per_epoch < 1 or epoch < 0 or seed < 0:
        raise ValueError(
            "count and per_epoch must be at least 1, epoch and seed at least 0, "
            f"got count={count}, per_epoch={per_epoch}, epoch={epoch}, seed={seed}"
        )
    chosen: list[int] = []
    position = epoch * per_epoch
    while len(chosen) < per_epoch:
        shuffle, start = divmod(position + len(chosen), count)
        order = np.random.default_rng([seed, shuffle]).permutation(count)
        chosen += order[start : start + per_epoch - len(chosen)].tolist()
    return chosen


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"prompt file {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"prompt file {path} is a folder; name a text or JSONL file in it") from None
    except OSError as error:
        raise UserError(f"prompt file {path} cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"prompt file {path} line {line} is not UTF-8 text (byte {error.start} of the file); save it as UTF-8"
        ) from None


def _parse_text(line: str, where: str) -> Prompt:
    if line.startswith("{"):
        try:
            _parse_json(line, where)
        except UserError:
            pass
        else:
            raise UserError(f"{where}: a JSON object in a file of plain prompts; give the file a name ending in .jsonl")
    return Prompt(line)


def _parse_json(line: str, where: str) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits; brackets nested too deep
        raise UserError(f"{where}: not valid JSON: {error}") from None
    return _from_entry(entry, where)


def _from_entry(entry: Any, where: str) -> Prompt:
    if not isinstance(entry, dict):
        raise UserError(f'{where}: must be a JSON object with the key "prompt", got {_kind(entry)}')
    others = {key: value for key, value in entry.items() if key not in _JSON_KEYS}
    # Beside "metadata" there is nothing else, and what is nearly one of the two names is meant to be it.
    unknown = next((key for key in others if "metadata" in entry or difflib.get_close_matches(key, _JSON_KEYS)), None)
    if unknown is not None:
        raise UserError(f'{where}: unknown key "{unknown}"; allowed: "prompt" and "metadata", which may hold any keys')
    text, metadata = entry.get("prompt"), entry.get("metadata", others)
    if "prompt" not in entry:
        raise UserError(f'{where}: the key "prompt" is missing')
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where}: "prompt" must be a text that is not empty, got {_kind(text)}')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f'{where}: "prompt" holds half a character (a lone surrogate escape)') from None
    if metadata is not None and not isinstance(metadata, dict):
        raise UserError(f'{where}: "metadata" must be a JSON object, got {_kind(metadata)}')
    return Prompt(text.strip(), metadata or {})


def _parse_list(text: str, path: Path) -> list[Prompt] | None:
    """The prompts of a file that is one JSON value as a whole; None where it is not, and read line by line."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(whole, dict) and isinstance(whole.get("annotations"), list):
        first: dict[Any, Prompt] = {}
        for number, entry in enumerate(whole["annotations"]):
            where = f"{path} annotations[{number}]"
            if not isinstance(entry, dict) or not isinstance(entry.get("image_id"), int | str):
                raise UserError(f'{where}: must be an object with "caption" and "image_id", as in COCO\'s captions')
            image = entry["image_id"]
            if image not in first:
                first[image] = _from_entry({"prompt": entry.get("caption"), "metadata": {"image_id": image}}, where)
        return list(first.values())
    if not isinstance(whole, list):
        return None
    entries = ({"prompt": entry} if isinstance(entry, str) else entry for entry in whole)
    return [_from_entry(entry, f"{path} entry {number}") for number, entry in enumerate(entries, start=1)]


def _parse_table(text: str, separator: str, path: Path) -> list[Prompt]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    prompts: list[Prompt] = []
    header: list[str] = []
    column: str | None = None
    try:
        for row in rows:
            where = f"{path} line {rows.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header = [cell.strip() for cell in row]
                column = next((name for name in header if name.lower() in _COLUMNS), None)
                if column is None:
                    raise UserError(f"{where}: the header needs a column {', '.join(_COLUMNS[:-1])} or {_COLUMNS[-1]}")
                continue
            if len(row) > len(header):
                raise UserError(f"{where}: {len(row)} cells, but the header has {len(header)}")
            cells = dict(zip(header, row, strict=False))
            metadata = {name: cell for name, cell in cells.items() if name != column and cell.strip()}
            prompts.append(_from_entry({"prompt": cells.get(column or ""), "metadata": metadata}, where))
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num}: not a valid table: {error}") from None
    return prompts


def _kind(value: object) -> str:
    """A JSON value's type in words."""
    if value == "" or (isinstance(value, str) and not value.strip()):
        return "an empty text"
    names = {str: "a text", bool: "true or false", dict: "an object", list: "a list", type(None): "null"}
    return names.get(type(value), "a number")
