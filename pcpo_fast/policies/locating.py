"""From ``model.path`` to a folder on this machine, with an error that says what to do."""

import json
import re
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path

from pcpo_fast.distributed import local_rank, shared_errors
from pcpo_fast.errors import UserError, reason_of


def pipeline_folder(path: str, revision: str | None, known: Collection[str]) -> tuple[Path, str]:
    """The folder of a diffusers pipeline (``path`` itself, or the downloaded snapshot of a hub id), and its class.

    Args:
        path: folder or hub id ("owner/name").
        revision: hub revision; ignored for a folder.
        known: pipeline classes, one of which ``model_index.json`` must name, for example "FluxPipeline".

    Raises:
        UserError: not found, gated, no network, or a pipeline of none of these classes.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
            raise UserError(f"model.path: {path} is not a folder, and not a hub id of the form owner/name")
        with shared_errors():
            if local_rank() == 0:
                _download(path, revision)
        folder = _download(path, revision)
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"model.path: {path} holds no model_index.json, so it is not the folder of a diffusers pipeline"
        )
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
        found = parts.get("_class_name")
    except (ValueError, AttributeError):
        raise UserError(f"model.path: {index} is not valid JSON") from None
    if found not in known:
        raise UserError(f"model.path: {path} is a {found}; allowed are {', '.join(known)}")
    for name, kind in parts.items():
        # diffusers would go on without the folder, with an empty tokenizer for example.
        if isinstance(kind, list) and all(kind) and not (folder / name).is_dir():
            raise UserError(
                f"model.path: {path} is not complete: model_index.json names {name}, but there is no {name}/"
            )
    return folder, found


def pipeline_parts(folder: Path) -> dict[str, bool]:
    """The parts that ``model_index.json`` names, and whether the pipeline has them: SD3 may do without T5."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return {name: all(kind) for name, kind in index.items() if isinstance(kind, list)}


@cache  # what is hashed, what is loaded and what loads later is one snapshot, though a branch may move on
def _download(path: str, revision: str | None) -> Path:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn at length of what is said below in a sentence
    try:
        return Path(DiffusionPipeline.download(path, revision=revision))
    except Exception as error:
        # diffusers wraps what the hub said when it finds no local copy to fall back on.
        causes = [error, *([error.__cause__] if error.__cause__ is not None else [])]

        def met(*kinds: type[BaseException]) -> bool:
            return any(isinstance(cause, kinds) for cause in causes)

        here = f"model.path: {path} is not a folder under {Path.cwd()}"
        reason = reason_of(causes[-1])
        if met(GatedRepoError):
            problem = (
                f"{here}, and the hub model {path} is gated: accept its license on its model page, then run "
                "`hf auth login` (or set HF_TOKEN)"
            )
        elif met(RevisionNotFoundError):
            problem = f"model.revision: the hub model {path} has no revision {revision!r}"
        elif met(RepositoryNotFoundError):
            problem = (
                f"{here}, and the hub has no model {path} that you may read: check the spelling, and for a private or "
                "gated model run `hf auth login` (or set HF_TOKEN)"
            )
        elif met(EntryNotFoundError) and not met(LocalEntryNotFoundError):
            problem = f"{here}, and the hub model {path} is not a diffusers pipeline: {reason}"
        elif met(HfHubHTTPError):
            problem = f"{here}, and the hub refused {path}: {reason}"
        elif met(ConnectionError, TimeoutError, LocalEntryNotFoundError) or _from_network(causes):
            problem = (
                f"{here}, and the hub model {path} is neither in the local cache nor can the hub be reached; download "
                f"it once with a network, or give the path of a folder ({reason})"
            )
        elif met(OSError, ValueError):
            problem = f"{here}, and {path} could not be had from the hub: {reason}"
        else:
            raise
        raise UserError(problem) from None
    finally:
        logging.set_verbosity(level)


def _from_network(causes: Iterable[BaseException]) -> bool:
    """Whether an HTTP library gave up before it had an answer."""
    return any(type(cause).__module__.startswith(("httpx", "httpcore", "requests")) for cause in causes)
