"""Locating a reward's model: a local path, Hugging Face's cache, or a download from the hub (announced)."""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pcpo_fast.distributed.collectives import local_rank
from pcpo_fast.errors import UserError
from pcpo_fast.files.hub_errors import hub_problem
from pcpo_fast.rewards.sources import note_source

_SETTINGS = ["*.json", "*.txt", "*.model"]
_WEIGHTS = ["model*.safetensors", "pytorch_model*.bin"]


def model_folder(reward: str, option: str, path: str, *, weights: bool = True) -> Path:
    """The folder of a reward's transformers model or tokenizer; recorded as one of the reward's sources.

    Args:
        reward, option: names for error messages.
        path: folder, or hub id "owner/name".
        weights: whether weights are needed; False for a tokenizer.

    Raises:
        UserError: it cannot be found, or files are missing.
    """
    folder = pretrained_folder(f"reward {reward}: option {option}", f"reward {reward}", path, weights=weights)
    note_source(option, folder, weights=weights)
    return folder


def model_file(reward: str, option: str, path: str, name: str) -> Path:
    """A reward's checkpoint file; recorded as one of the reward's sources.

    Args:
        reward, option: names for error messages.
        path, name: as in :func:`pretrained_file`.

    Raises:
        UserError: it cannot be found.
    """
    file = pretrained_file(f"reward {reward}: option {option}", f"reward {reward}", path, name)
    note_source(option, file)
    return file


def pretrained_folder(where: str, user: str, path: str, *, weights: bool = True) -> Path:
    """The folder of a transformers model, downloaded if it is neither a folder nor in the hub's local cache.

    Args:
        where: prefix of error messages.
        user: who needs it, for the line that announces a download.
        path: folder, or hub id "owner/name".
        weights: whether weights are needed; False for a tokenizer.

    Raises:
        UserError: it cannot be found, or files are missing.
    """
    local = _local(where, path, "folder")
    if local is not None:
        lacking = _lacking(local, weights)
        if lacking:
            raise UserError(f"{where}: the folder {path} has no {lacking}")
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with contextlib.suppress(LocalEntryNotFoundError, OSError):
        cached = Path(snapshot_download(path, local_files_only=True))
        if not _lacking(cached, weights):
            return cached

    with _downloading(where, path, path):
        wanted = [*_SETTINGS, *(_WEIGHTS if weights else ())]
        options: dict[str, Any] = {"allow_patterns": wanted, "ignore_patterns": ["*/*"]}
        files: Any = snapshot_download(path, dry_run=True, **options)
        if any(file.filename.endswith(".safetensors") for file in files):
            options["ignore_patterns"] = ["*/*", "*.bin"]
            files = [file for file in files if not file.filename.endswith(".bin")]
        _announce(user, path, files)
        return Path(snapshot_download(path, **options))


def pretrained_file(where: str, user: str, path: str, name: str) -> Path:
    """A checkpoint file, downloaded if it is neither local nor in the hub's local cache.

    Args:
        where: prefix of error messages.
        user: who needs it, for the line that announces a download.
        path: the file, a folder with it, or a hub id "owner/name".
        name: the file's name in a folder or on the hub.

    Raises:
        UserError: it cannot be found.
    """
    local = _local(where, path, "file")
    if local is not None:
        file = local / name if local.is_dir() else local
        if not file.is_file():
            raise UserError(f"{where}: the folder {path} has no {name}")
        return file
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(path, name)
    if isinstance(cached, str):
        return Path(cached)
    with _downloading(where, path, f"{path}/{name}"):
        _announce(user, f"{path}/{name}", [hf_hub_download(path, name, dry_run=True)])
        return Path(hf_hub_download(path, name))


def _local(where: str, path: str, wanted: str) -> Path | None:
    """The local path; None for a hub id."""
    if not isinstance(path, str) or not path:
        raise UserError(f"{where} must be a {wanted} or a hub id of the form owner/name, got {path!r}")
    local = Path(path).expanduser()
    if local.is_dir() or (wanted == "file" and local.is_file()):
        return local
    if local.exists() or path.startswith((".", "/", "~")) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        places = "file, a folder" if wanted == "file" else wanted
        raise UserError(f"{where}: {path} is neither a {places} nor a hub id of the form owner/name")
    return None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder contains a tokenizer's vocabulary."""
    names = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spm.model", "bpe_encoder.bin")
    return any((folder / name).is_file() for name in names)


def _lacking(folder: Path, weights: bool) -> str | None:
    """The first required file that a folder lacks; None if it is complete."""
    if not weights:
        return None if has_tokenizer(folder) else "tokenizer"
    if not (folder / "config.json").is_file():
        return "config.json"
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            shards = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
            if all((folder / shard).is_file() for shard in shards):
                return None
    if any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin")):
        return None
    return "model.safetensors"


def _announce(user: str, what: str, files: list[Any]) -> None:
    """Print one line before a download, on the machine's first rank; the hub's own progress bars follow."""
    size = sum(file.file_size or 0 for file in files if file.will_download)
    if size and local_rank() == 0:
        from huggingface_hub.constants import HF_HUB_CACHE

        amount = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
        print(f"{user}: downloading {what}, {amount}, to {HF_HUB_CACHE}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _downloading(where: str, model: str, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        problem = hub_problem(error, model)
        raise UserError(f"{where}: {what} is not under {os.getcwd()}, and {problem}") from None
