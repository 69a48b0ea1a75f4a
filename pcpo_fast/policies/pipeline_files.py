"""Resolves ``model.path`` to a folder on this machine, downloading it from the hub if necessary."""

import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pcpo_fast.config.shipped import find
from pcpo_fast.distributed.collectives import local_rank, shared_errors
from pcpo_fast.errors import UserError
from pcpo_fast.files.content import INDEX, MODULAR_INDEX, index_of
from pcpo_fast.policies.weight_files import read_json

NOT_TRAINED = {
    "Flux2KleinKVPipeline": "FLUX.2-klein-9b-kv",
    "Flux2KleinInpaintPipeline": "FLUX.2-klein for inpainting",
    "Flux3DistilledModularPipeline": "distilled FLUX.3, whose network predicts jumps between times and no velocity",
    "StableDiffusionXLPipeline": "Stable Diffusion XL",
}
"""Names of the models of unsupported pipelines, for error messages."""


def pipeline_folder(
    path: str, revision: str | None, known: Collection[str], variant: str | None = None
) -> tuple[Path, str]:
    """The folder of a diffusers pipeline (``path`` itself, or the downloaded snapshot of a hub id), and its class.

    Args:
        path: folder or hub id ("owner/name").
        revision: hub revision; ignored for a folder.
        known: pipeline classes, one of which the index must name, for example "FluxPipeline".
        variant: of the files that are downloaded, such as "fp16".

    Raises:
        UserError: not found, gated, no network, a single file, or a pipeline of none of these classes.
    """
    folder = find(path)
    if not folder.is_dir():
        check_hub_id(path)
        with shared_errors():
            if local_rank() == 0:
                _download(path, revision, variant, tuple(known))
        folder = _download(path, revision, variant, tuple(known))
    return folder, pipeline_class_of(folder, known)


def folder_here(path: str, revision: str | None) -> Path | None:
    """The folder of a pipeline that is on this machine: ``path`` itself, or a snapshot in the hub's cache."""
    folder = find(path)
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    try:
        index = try_to_load_from_cache(path, INDEX, revision=revision)
    except ValueError:  # not a hub id
        return None
    return Path(index).parent if isinstance(index, str) else None


def pipeline_class_of(folder: Path, known: Collection[str], key: str = "model.path") -> str:
    """The class that ``model_index.json`` or ``modular_model_index.json`` names, which must be one of the known ones.

    Raises:
        UserError: it names another, or there is no such file; ``key`` names the setting.
    """
    index = index_of(folder)
    if not index.is_file():
        raise UserError(f"{key}: {folder} is not a diffusers pipeline: it holds no model_index.json")
    found = read_json(index, key).get("_class_name")
    if isinstance(found, list):  # [module, class] of code that is in the folder
        raise UserError(
            f"{key}: {folder} is a pipeline with custom code ({'.'.join(map(str, found))} in {index.name}), "
            f"which is not run; allowed are {', '.join(known)}"
        )
    refused = NOT_TRAINED.get(str(found), "a modular pipeline" if index.name == MODULAR_INDEX else None)
    if refused is not None and found not in known:
        raise UserError(
            f"{key}: {folder} is {refused} ({found} in {index.name}), which cannot be trained yet; allowed are "
            f"{', '.join(known)}"
        )
    if not isinstance(found, str) or found not in known:
        raise UserError(f"{key}: {folder} is a {found}; allowed are {', '.join(known)}")
    return found


def check_hub_id(path: str) -> None:
    """Check that ``model.path`` is a folder or looks like a hub id.

    Raises:
        UserError: it is a file, or neither.
    """
    single = path.endswith((".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin"))
    if single or Path(path).expanduser().is_file():
        raise UserError(
            f"model.path: {path} is a single file, but text encoders, VAE and scheduler come from a pipeline folder: "
            "give that as model.path and the file as model.transformer, or model.unet for Stable Diffusion 1.x"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise UserError(f"model.path: {path} is neither a folder nor a hub id of the form owner/name")


def clip_tokens(folder: Path, key: str = "model.path") -> int:
    """Number of tokens that the tokenizer of a pipeline's CLIP reads; 77 if its folder does not say.

    Raises:
        UserError: the tokenizer's configuration is malformed; ``key`` names the setting.
    """
    tokenizer = folder / "tokenizer" / "tokenizer_config.json"
    tokens = read_json(tokenizer, key).get("model_max_length", 77) if tokenizer.is_file() else 77
    if not isinstance(tokens, int):
        raise UserError(f"{key}: {tokenizer}: model_max_length must be an integer, got {tokens!r}")
    return tokens


def part_classes(folder: Path, key: str = "model.path") -> dict[str, str | None]:
    """The class that the index names for each part; None for a part that the pipeline does without.

    Raises:
        UserError: a modular index says that a part lies elsewhere than ``save_pretrained`` of diffusers'
            ``ModularPipeline`` puts it; ``key`` names the setting.
    """
    index, parts = index_of(folder), {}
    for name, kind in read_json(index, key).items():
        if isinstance(kind, list) and len(kind) == 2:
            parts[name] = str(kind[1]) if all(kind) else None
        elif isinstance(kind, list) and len(kind) == 3 and isinstance(kind[2], dict):
            parts[name] = _modular_class(index, name, kind[2], key)
        elif kind is None:
            parts[name] = None
    return parts


def _modular_class(index: Path, name: str, spec: Mapping[str, Any], key: str) -> str | None:
    """The class of a part of a modular pipeline, whose files must be in the pipeline's folder under the part's name."""
    hint, place, origin = (spec.get(field) for field in ("type_hint", "subfolder", "pretrained_model_name_or_path"))
    if (index.parent / name).is_dir() and place != name:
        raise UserError(
            f"{key}: {index} says that {name} is in the subfolder {place!r} of {origin}, "
            f"but a part is read from {name}/ of the same folder: load all parts with diffusers' load_components and "
            "write the folder with save_pretrained"
        )
    return str(hint[1]) if isinstance(hint, list) and len(hint) == 2 and all(hint) else None


@cache  # what is hashed, what is loaded and what loads later is one snapshot, though a branch may move on
def _download(path: str, revision: str | None, variant: str | None, known: tuple[str, ...]) -> Path:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError

    from pcpo_fast.files.hub_errors import hub_problem

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn at length of what is said below in a sentence
    try:
        try:
            index = Path(hf_hub_download(path, INDEX, revision=revision))
        except RemoteEntryNotFoundError:
            index = Path(hf_hub_download(path, MODULAR_INDEX, revision=revision))
        pipeline_class_of(index.parent, known)  # before a hundred gigabytes of a model that cannot be trained
        if index.name == MODULAR_INDEX:
            raise UserError(
                f"model.path: {path} is a modular pipeline, which is read from a folder: download it with `hf download "
                f"{path} --local-dir FOLDER` and give FOLDER"
            )
        return Path(DiffusionPipeline.download(path, revision=revision, variant=variant))
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, RevisionNotFoundError) or isinstance(error.__cause__, RevisionNotFoundError):
            raise UserError(f"model.revision: the hub model {path} has no revision {revision!r}") from None
        problem = hub_problem(error, path)
        raise UserError(f"model.path: {path} is not a folder under {Path.cwd()}, and {problem}") from None
    finally:
        logging.set_verbosity(level)
