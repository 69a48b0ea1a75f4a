"""From ``model.path`` to a folder on this machine, with an error that says what to do."""

import json
import re
from pathlib import Path

from pcpo_fast.distributed import barrier, local_rank
from pcpo_fast.errors import UserError


def pipeline_folder(path: str, revision: str | None, pipeline_class: str) -> Path:
    """The folder of a diffusers pipeline: ``path`` itself, or the downloaded snapshot of a hub id.

    Args:
        path: folder or hub id ("owner/name").
        revision: hub revision; ignored for a folder.
        pipeline_class: what ``model_index.json`` must name, for example "FluxPipeline".

    Raises:
        UserError: not found, gated, no network, or a pipeline of another class.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
            raise UserError(f"model.path: {path} is not a folder, and not a hub id of the form owner/name")
        if local_rank() == 0:
            _download(path, revision)
        barrier()
        folder = _download(path, revision)
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"model.path: {path} holds no model_index.json, so it is not a diffusers {pipeline_class} folder"
        )
    try:
        found = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError):
        raise UserError(f"model.path: {index} is not valid JSON") from None
    if found != pipeline_class:
        raise UserError(f"model.path: {path} is a {found}, not a {pipeline_class}")
    return folder


def _download(path: str, revision: str | None) -> Path:
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    here = f"model.path: {path} is not a folder under {Path.cwd()}"
    try:
        return Path(DiffusionPipeline.download(path, revision=revision))
    except GatedRepoError:
        raise UserError(
            f"{here}, and the hub model {path} is gated: accept its license on its model page, then run "
            "`hf auth login` (or set HF_TOKEN)"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"model.revision: the hub model {path} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{here}, and the hub has no model {path} that you may read: check the spelling, and for a private or gated "
            "model run `hf auth login` (or set HF_TOKEN)"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise UserError(
            f"{here}, and the hub model {path} is neither in the local cache nor can the hub be reached; download it once "
            "with a network, or give the path of a folder"
        ) from None
    except HfHubHTTPError as error:
        raise UserError(f"{here}, and the hub refused {path}: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise UserError(f"{here}, and {path} could not be had from the hub: {str(error).splitlines()[0]}") from None
