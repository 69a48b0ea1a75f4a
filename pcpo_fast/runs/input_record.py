"""Content hashes of a run's inputs: recorded when it starts, compared when it resumes."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.files.content import different, digest

INPUTS_FILE = "inputs.json"
VERSION = 1
ACCEPT = "accept-changes"
"""The value of ``--resume`` that continues even if the run's inputs have changed."""

Input = dict[str, Any]
"""``path`` from the configuration and ``files`` with the hash of each; for prompts ``count`` and ``hash`` instead."""


def hashes(inputs: Mapping[str, Input]) -> dict[str, str]:
    """One hash per input, by a name to show to the user."""
    return {
        f"content of {name}": given["hash"] if "hash" in given else digest(given["files"])
        for name, given in inputs.items()
    }


def changes(before: Mapping[str, Input], now: Mapping[str, Input]) -> list[str]:
    """A short description of every input that both have and that differs."""
    found = []
    for name in now.keys() & before.keys():
        old, new = before[name], now[name]
        if "hash" in new and old["hash"] != new["hash"]:
            counts = f"{counted(old['count'], 'prompt')} before, {counted(new['count'], 'different prompt')} now"
            found.append(f"{name} ({new['path']}: {counts})")
        elif "files" in new and (names := different(old["files"], new["files"])):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            found.append(f"{name} ({names[0]}{more} in {new['path']})")
    return sorted(found)


def read_record(folder: Path) -> dict[str, Input] | None:
    """The inputs that a run recorded when it started; None for an old run without a record or an unknown version.

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
            f"{file} is damaged, so prompts, rewards and model cannot be compared with those at the start of the run; "
            f"accept the current ones with --resume {ACCEPT}"
        ) from None


def read_differently(folders: Sequence[Path]) -> list[str]:
    """Inputs with the same name and path but different content among runs; runs without a record are ignored."""
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
    """Check that a run's inputs are the same as when it started; returns the differences if they are accepted.

    Args:
        folder: the run directory.
        now: the current inputs.
        accept: accept changes.

    Raises:
        UserError: inputs have changed, or the record is damaged, and changes are not accepted.
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
            f"restore them, choose another output_dir, or accept the changes with --resume {ACCEPT}"
        )
    return found


def write_record(folder: Path, inputs: Mapping[str, Input], epoch: int) -> None:
    """Record a run's inputs from ``epoch`` on, unless the same inputs are already recorded.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        before = read_record(folder)
    except UserError:
        before = None  # already reported or accepted
    if before == inputs and epoch:
        return
    record = {"version": VERSION, "since_epoch": epoch, "inputs": inputs}
    try:
        write_atomically(folder / INPUTS_FILE, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be written: {error.strerror}") from None
