"""Prompt files: plain text, JSON and JSONL; tables and datasets have their own modules."""

import codecs
import json
import os
from pathlib import Path
from typing import Any

from pcpo_fast.config.shipped import find
from pcpo_fast.errors import UserError
from pcpo_fast.prompts.datasets_files import read_dataset
from pcpo_fast.prompts.entries import Prompt, column_of, prompt_of
from pcpo_fast.prompts.hub_files import SCHEME, hub_file
from pcpo_fast.prompts.table_files import SEPARATORS, parse_table

_TEXT = ("", ".txt")
_JSON = (".jsonl", ".ndjson", ".json")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # starts with UTF-16's mark
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def load_prompts(path: str | Path, column: str | None = None) -> list[Prompt]:
    """Read prompts from a text file, JSON, a table, or one of the formats in which benchmarks are published.

    ``hf://datasets/OWNER/NAME[/FILE]`` is a file of a dataset on the Hugging Face hub, which is downloaded once.

    The format follows from the extension:

    - ``.txt`` or none: one prompt per line.
    - ``.jsonl``, ``.ndjson``, ``.json``: ``{"prompt": "...", "metadata": {...}}`` on each line, where without
      ``metadata`` the other keys become the metadata (GenEval); or one list of strings or of such objects (HPDv2); or
      COCO's captions, of which the first of each image is used.
    - ``.csv``, ``.tsv``: tables with a header (DrawBench, PartiPrompts); the other columns become the metadata.
    - ``.parquet``, or a folder saved by the library ``datasets``: likewise, read with that library.

    The prompt's key or column is ``column``, or else ``prompt``, ``prompts``, ``text`` or ``caption``
    (case-insensitive, in this order).
    Files are UTF-8, or UTF-16 or UTF-32 with a byte order mark. Blank lines are skipped, surrounding whitespace is
    stripped, and prompts may repeat.

    Raises:
        UserError: the file is missing, unreadable, empty, of an unknown format or not UTF-8; a line or an entry is
            invalid; it has no such column; ``datasets`` is needed but not installed; or the hub cannot be reached.
    """
    path = hub_file(str(path)) if str(path).startswith(SCHEME) else find(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet" or os.path.isdir(path):
        listed = read_dataset(path, column)
    elif suffix in (*_TEXT, *_JSON, *SEPARATORS) or not os.path.lexists(path):
        text = _read_text(path)
        if suffix in SEPARATORS:
            listed = parse_table(text, SEPARATORS[suffix], path, column)
        else:
            lines = text.replace("\r\n", "\n").replace("\r", "\n")
            listed = _parse_json(lines, path, column) if suffix in _JSON else _parse_text(lines, path)
    else:
        known = ", ".join((*_TEXT[1:], *_JSON, *SEPARATORS, ".parquet"))
        raise UserError(f"prompt file {path}: files ending in {suffix} are not supported; allowed are {known}")
    if not listed:
        raise UserError(f"prompt file {path} is empty; it needs at least one prompt")
    return listed


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        like_hub = len(path.parts) == 2 and not path.suffix and not path.is_absolute() and not path.parent.is_dir()
        hint = f" (a dataset on the Hugging Face hub is {SCHEME}{path.as_posix()})" if like_hub else ""
        raise UserError(f"prompt file {path} does not exist{hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"prompt file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise UserError(
                f"prompt file {path} is not valid {encoding.upper()} despite its byte order mark (byte {error.start} "
                "of the file); save it as UTF-8"
            ) from None
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"prompt file {path} line {line} is not UTF-8 text (byte {error.start} of the file); save it as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(
            f"prompt file {path} line {line} contains a NUL character, as UTF-16 without a byte order mark does; save "
            "it as UTF-8"
        )
    return text.removeprefix("\ufeff").replace("\n\ufeff", "\n")  # concatenated files have one mark each


def _numbered(text: str, path: Path) -> list[tuple[str, str]]:
    """(location, line) of all lines that are not blank. Only "\\n" ends a line: prompts and JSON strings may contain
    the other characters at which str.splitlines breaks."""
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), start=1))
    return [(f"{path} line {number}", line) for number, line in lines if line]


def _parse_text(text: str, path: Path) -> list[Prompt]:
    lines = _numbered(text, path)
    for where, line in lines:
        if line.startswith("{") and _is_prompt(line):
            raise UserError(f"{where}: a JSON object in a file of plain prompts; give the file a name ending in .jsonl")
    if lines and lines[0][1].startswith("[") and isinstance(_json_or_none(text), list):
        raise UserError(f"{lines[0][0]}: a JSON list in a file of plain prompts; give the file a name ending in .json")
    if lines and "\t" in lines[0][1] and column_of(lines[0][1].split("\t"), lines[0][0]) is not None:
        raise UserError(f"{lines[0][0]}: a table in a file of plain prompts; give the file a name ending in .tsv")
    return [Prompt(line) for _, line in lines]


def _is_prompt(line: str) -> bool:
    try:
        prompt_of(_json_or_none(line), "")
    except UserError:
        return False
    return True


def _parse_json(text: str, path: Path, column: str | None) -> list[Prompt]:
    """Parse the file as a single list or object if it is one, otherwise line by line."""
    whole = _loads(text, str(path)) if text.lstrip().startswith("[") else _json_or_none(text)
    if isinstance(whole, list):
        entries = ({column or "prompt": entry} if isinstance(entry, str) else entry for entry in whole)
        return [prompt_of(entry, f"{path} entry {number}", column) for number, entry in enumerate(entries, start=1)]
    if isinstance(whole, dict):
        annotations = whole.get("annotations")
        if isinstance(annotations, list):
            return _of_coco(annotations, path)
        return [prompt_of(whole, f"{path} line 1", column)]
    return [prompt_of(_loads(line, where), where, column) for where, line in _numbered(text, path)]


def _of_coco(annotations: list[Any], path: Path) -> list[Prompt]:
    first: dict[Any, Prompt] = {}
    for number, entry in enumerate(annotations):
        where = f"{path} annotations[{number}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("image_id"), int | str):
            raise UserError(f'{where}: must be an object with "caption" and "image_id", as in COCO\'s caption files')
        image = entry["image_id"]
        if image not in first:
            first[image] = prompt_of({"caption": entry.get("caption"), "metadata": {"image_id": image}}, where)
    return list(first.values())


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_repetition)
    except json.JSONDecodeError as error:
        line = f" line {error.lineno}" if error.lineno > 1 else ""
        raise UserError(f"{where}{line}: not valid JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # duplicate key; too many digits; nesting too deep
        raise UserError(f"{where}: not valid JSON: {error}") from None


def _json_or_none(text: str) -> Any:
    try:
        return _loads(text, "")
    except UserError:
        return None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {json.dumps(next(n for n in names if names.count(n) > 1))} is given twice")
    return found
