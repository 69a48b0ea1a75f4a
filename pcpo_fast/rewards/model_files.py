"""Where a reward's model is: a path, else Hugging Face's cache, else the hub, with a word about the size."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pcpo_fast.distributed.collectives import local_rank
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.rewards.sources import note_source

_REPOSITORY = r"[\w-][\w.-]*/[\w.-]+"
_SETTINGS = ["*.json", "*.txt", "*.model"]
_WEIGHTS = {"safetensors": "model*.safetensors", "bin": "pytorch_model*.bin"}


def model_folder(reward: str, option: str, path: str, *, weights: bool = True) -> Path:
    """The folder of a model of transformers, or of a tokenizer.

    Args:
        reward, option: for messages.
        path: folder, or hub id "owner/name".
        weights: whether weights are wanted; a tokenizer has none.

    Raises:
        UserError: it is in none of these places, or lacks what is needed.
    """
    folder = pretrained_folder(f"reward {reward}: option {option}", f"reward {reward}", path, weights=weights)
    note_source(option, folder, weights=weights)
    return folder


def pretrained_folder(where: str, user: str, path: str, *, weights: bool = True) -> Path:
    """The folder of a model of transformers, downloaded where it is neither a folder nor in the hub's local cache.

    Args:
        where: begins the message of an error.
        user: who needs it, for the line that announces a download and its size.
        path: folder, or hub id "owner/name".
        weights: whether weights are wanted; a tokenizer has none.

    Raises:
        UserError: it is in none of these places, or lacks what is needed.
    """
    if not isinstance(path, str) or not path:
        raise UserError(f"{where} must be a folder or a hub id of the form owner/name, got {path!r}")
    local = Path(path).expanduser()
    if local.is_dir():
        lacking = _lacking(local, weights)
        if lacking:
            raise UserError(f"{where}: the folder {path} has no {lacking}")
        return local
    if local.exists() or path.startswith((".", "/", "~")) or not re.fullmatch(_REPOSITORY, path):
        raise UserError(f"{where}: {path} is not a folder, and not a hub id of the form owner/name")
    cached = _cached_snapshot(path)
    if cached is not None and not _lacking(cached, weights):
        return cached
    return _from_hub(where, path, lambda: _download_folder(user, path, weights))


def model_file(reward: str, option: str, path: str, name: str) -> Path:
    """A checkpoint in a file.

    Args:
        reward, option: for messages.
        path: the file, a folder with it, or a hub id "owner/name".
        name: the file's name in a folder or on the hub.

    Raises:
        UserError: it is in none of these places.
    """
    file = pretrained_file(f"reward {reward}: option {option}", f"reward {reward}", path, name)
    note_source(option, file)
    return file


def pretrained_file(where: str, user: str, path: str, name: str) -> Path:
    """A checkpoint in a file, downloaded where it is neither here nor in the hub's local cache.

    Args:
        where: begins the message of an error.
        user: who needs it, for the line that announces a download and its size.
        path: the file, a folder with it, or a hub id "owner/name".
        name: the file's name in a folder or on the hub.

    Raises:
        UserError: it is in none of these places.
    """
    if not isinstance(path, str) or not path:
        raise UserError(f"{where} must be a file or a hub id of the form owner/name, got {path!r}")
    local = Path(path).expanduser()
    if local.is_file():
        return local
    if local.is_dir():
        if not (local / name).is_file():
            raise UserError(f"{where}: the folder {path} has no {name}")
        return local / name
    if path.startswith((".", "/", "~")) or not re.fullmatch(_REPOSITORY, path):
        raise UserError(f"{where}: {path} is not a file or folder, and not a hub id of the form owner/name")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, name)
    if isinstance(cached, str):
        return Path(cached)
    return _from_hub(where, f"{path}/{name}", lambda: _download_file(user, path, name))


def _lacking(folder: Path, weights: bool) -> str | None:
    """What a folder lacks to be used, or None."""
    if not weights:
        names = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spm.model", "bpe_encoder.bin")
        return None if any((folder / name).is_file() for name in names) else "tokenizer"
    if not (folder / "config.json").is_file():
        return "config.json"
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            shards = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
            lacking = sorted(shard for shard in shards if not (folder / shard).is_file())
            if not lacking:
                return None
    if any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin")):
        return None
    return "model.safetensors"


def _cached_snapshot(repository: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None


def _download_folder(user: str, repository: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [*_SETTINGS, *(_WEIGHTS.values() if weights else ())]
    options: dict[str, Any] = {"allow_patterns": wanted, "ignore_patterns": ["*/*"]}
    files: Any = snapshot_download(repository, dry_run=True, **options)
    if any(file.filename.endswith(".safetensors") for file in files):
        options["ignore_patterns"] = ["*/*", "*.bin"]
        files = [file for file in files if not file.filename.endswith(".bin")]
    _announce(user, repository, files)
    return Path(snapshot_download(repository, **options))


def _download_file(user: str, repository: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    _announce(user, f"{repository}/{name}", [hf_hub_download(repository, name, dry_run=True)])
    return Path(hf_hub_download(repository, name))


def _announce(user: str, what: str, files: list[Any]) -> None:
    """One line before the first byte; the hub's own progress bars follow. Other ranks wait for the first's files."""
    size = sum(file.file_size or 0 for file in files if file.will_download)
    if size and local_rank() == 0:
        from huggingface_hub.constants import HF_HUB_CACHE

        print(f"{user}: downloading {what}, {_readable(size)}, to {HF_HUB_CACHE}", file=sys.stderr, flush=True)


def _readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _from_hub(where: str, what: str, download: Callable[[], Path]) -> Path:
    from huggingface_hub.errors import (
        DryRunError,
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return download()
    except Exception as raised:
        error: BaseException = raised
    if isinstance(error, DryRunError) and error.__cause__ is not None:
        error = error.__cause__  # what kept the hub's client from looking
    here = f"{where}: {what} is not under {os.getcwd()}"
    if isinstance(error, GatedRepoError):
        problem = "and on the hub it is gated: accept its license on its model page, then run `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        problem = "and the hub has no such model that you may read: check the spelling"
    elif isinstance(error, DryRunError | LocalEntryNotFoundError | ConnectionError | TimeoutError) or _no_answer(error):
        problem = (
            "nor in the local cache, and the hub cannot be reached; download it once with a network (`hf download`), "
            f"or give a path ({reason_of(error)})"
        )
    elif isinstance(error, EntryNotFoundError):
        problem = f"and the hub does not have it: {reason_of(error)}"
    elif isinstance(error, HfHubHTTPError):
        problem = f"and the hub refused it: {reason_of(error)}"
    elif isinstance(error, OSError):
        problem = f"and it could not be had from the hub: {reason_of(error)}"
    else:
        raise error
    raise UserError(f"{here}, {problem}") from None


def _no_answer(error: BaseException) -> bool:
    """Whether an HTTP library gave up before there was an answer."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests")
