"""What a run reads, by its content: recorded when it begins, and held against what is there when it goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcpo_fast.atomic import write_atomically
from pcpo_fast.config import Config
from pcpo_fast.content import RECORD_FOLDER, Contents, different, part_files, pipeline_files
from pcpo_fast.distributed import once_per_machine
from pcpo_fast.errors import UserError
from pcpo_fast.fingerprints import digest
from pcpo_fast.policies.loading import find_family
from pcpo_fast.prompts import Prompt
from pcpo_fast.run_directory import ACCEPT
from pcpo_fast.run_inputs import RunInputs

INPUTS_FILE = "inputs.json"
VERSION = 1
INDEX = "model_index.json"
SINGLE_FILES = ("transformer", "unet")
"""Keys of ``model`` that may name a file of weights to take instead of the pipeline's own."""
Input = dict[str, Any]
"""``path`` as the configuration has it, and ``files``, the hash of each; of prompts ``count`` and ``hash``."""


def read_contents(config: Config, inputs: RunInputs, *, anew: bool = False) -> dict[str, Input]:
    """All that the result of a run depends on besides its settings, by name; all ranks must call it.

    The base model's files that a policy loads, prompts with their metadata, and what rewards were made from. Not
    what a reward asks of another machine, and of a user's own reward not what its module imports.

    Args:
        config: the run.
        inputs: read with it.
        anew: read every file, whatever is known of it.

    Raises:
        UserError: the model is not there, or a file cannot be read.
    """
    folder, family = find_family(config.model)
    model = config.model.model_dump()
    parts = (family.trained_part, "vae", "scheduler", *family.encoder_parts)
    files = {"model.path": {INDEX: folder / INDEX} | pipeline_files(folder, parts, model.get("variant"))}
    paths = {"model.path": config.model.path}
    for key, path in (("lora.init", config.model.lora.init), *((name, model.get(name)) for name in SINGLE_FILES)):
        if path is not None and (place := Path(path).expanduser()).exists():
            files[f"model.{key}"] = part_files(place) if place.is_dir() else {place.name: place}
            paths[f"model.{key}"] = str(place if place.is_dir() else place.parent)
    for reward, sources in inputs.rewards.sources.items():
        for what, given in sources.items():
            files[f"reward {reward}, {what}"] = given
            paths[f"reward {reward}, {what}"] = str(next((file.parent for file in given.values()), ""))
    contents = Contents(config.embedding_folder / RECORD_FOLDER, anew=anew)
    read = once_per_machine(lambda: {name: contents.of_files(given) for name, given in files.items()})
    prompts = {"prompts.train": _of_prompts(config.prompts.train, inputs.prompts)}
    if config.prompts.heldout is not None:
        prompts["prompts.heldout"] = _of_prompts(config.prompts.heldout, inputs.heldout)
    return prompts | {name: {"path": paths[name], "files": given} for name, given in read.items()}


def _of_prompts(path: str, prompts: list[Prompt]) -> Input:
    rows = [[row.text, json.dumps(row.metadata, sort_keys=True, default=lambda _: "not JSON")] for row in prompts]
    return {"path": path, "count": len(prompts), "hash": digest(rows)}


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
            f"{file} is damaged, so nothing says whether prompts, rewards and model are those that the run began with; "
            f"accept what is there now with --resume {ACCEPT}"
        ) from None


def check_unchanged(folder: Path, now: Mapping[str, Input], *, accept: bool) -> list[str]:
    """Refuse to go on with a run whose inputs are others than when it began; returns what differs where it may.

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
            f"the run in {folder} cannot be resumed, since the content of its inputs has changed: {'; '.join(found)}; "
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
