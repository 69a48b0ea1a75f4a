"""What a run reads, by its content: recorded when it begins, and compared when it resumes."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pcpo_fast.errors import UserError
from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.files.content import different, digest

INPUTS_FILE = "inputs.json"
VERSION = 1
ACCEPT = "accept-changes"
"""The value of ``--resume`` that continues even if what the run reads has changed."""

Input = dict[str, Any]
"""``path`` as the configuration has it, and ``files``, the hash of each; of prompts ``count`` and ``hash``."""


def hashes(inputs: Mapping[str, Input]) -> dict[str, str]:
    """One hash of each input, by a name to be shown."""
    return {
        f"content of {name}": given["hash"] if "hash" in given else digest(given["files"])
        for name, given in inputs.items()
    }


def changes(before: Mapping[str, Input], now: Mapping[str, Input]) -> list[str]:
    """What differs in the inputs that both have, in a few words each."""
    found = []
    for name in now.keys() & before.keys():
        old, new = before[name], now[name]
        if "hash" in new and old["hash"] != new["hash"]:
            found.append(f"{name} ({new['path']}: {old['count']} prompts then, {new['count']} different ones now)")
        elif "files" in new and (names := different(old["files"], new["files"])):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            found.append(f"{name} ({names[0]}{more} in {new['path']})")
    return sorted(found)


def read_record(folder: Path) -> dict[str, Input] | None:
    """What a run read when it began; None of a run from before this was recorded, or of another version's record.

    Raises:
        UserError: the record is damaged.
    """
    file = folder / INPUTS_FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["version"] != VERSION:
            return None
        for given in record["inputs"].values():
            str(given["path"]), dict(given["files"]) if "files" in given else (given["count"], given["hash"])
        return dict(record["inputs"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{file} is damaged, so prompts, rewards and model cannot be compared with those that the run began with; "
            f"accept what is there now with --resume {ACCEPT}"
        ) from None


def read_differently(folders: Sequence[Path]) -> list[str]:
    """Inputs that runs name alike, with another content in each; a run without a record says nothing."""
    records = []
    for folder in folders:
        with suppress(UserError):
            records.append(read_record(folder) or {})
    contents: dict[tuple[str, str], set[str]] = {}
    for record in records:
        for (name, given), content in zip(record.items(), hashes(record).values(), strict=True):
            contents.setdefault((name, given["path"]), set()).add(content)
    return sorted({f"{name} ({path})" for (name, path), found in contents.items() if len(found) > 1})


def check_unchanged(folder: Path, now: Mapping[str, Input], *, accept: bool) -> list[str]:
    """Refuse to resume a run whose inputs have changed since it began; returns the differences if they are accepted.

    Args:
        folder: the run's.
        now: of :func:`read_contents`.
        accept: the user has said that it may.

    Raises:
        UserError: they are, with all that differ, or nothing can be known.
    """
    try:
        before = read_record(folder)
    except UserError:
        if not accept:
            raise
        return []
    found = changes(before or {}, now)
    if found and not accept:
        raise UserError(
            f"the run in {folder} cannot be resumed because its inputs have changed: {'; '.join(found)}; "
            f"restore it, choose another output_dir, or accept the change with --resume {ACCEPT}"
        )
    return found


def write_record(folder: Path, inputs: Mapping[str, Input], epoch: int) -> None:
    """Record what a run reads from an epoch on, unless that is on record already.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        before = read_record(folder)
    except UserError:
        before = None  # said or accepted already
    if before == inputs and epoch:
        return
    record = {"version": VERSION, "since_epoch": epoch, "inputs": inputs}
    try:
        write_atomically(folder / INPUTS_FILE, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be written: {error.strerror}") from None
