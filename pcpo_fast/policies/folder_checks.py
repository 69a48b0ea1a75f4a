"""Checks that a pipeline's folder can be loaded, before anything large is read."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerFast

from pcpo_fast.config.schema import ModelConfig
from pcpo_fast.errors import UserError
from pcpo_fast.files.content import index_of
from pcpo_fast.method.schedules import FlowSchedule
from pcpo_fast.policies.part_checks import (
    check_latent_scale,
    check_model,
    check_scheduler,
    check_single_file,
    check_tokenizer,
)
from pcpo_fast.policies.pipeline_files import part_classes
from pcpo_fast.policies.weight_files import STEMS, read_json, variants

if TYPE_CHECKING:
    from pcpo_fast.policies.pipeline_policy import PipelinePolicy

SINGLE_FILES = ("transformer", "unet")
"""Keys of ``model`` that name a file of the network."""
_passed: set[tuple[object, ...]] = set()


def check_folder(folder: Path, family: "type[PipelinePolicy]", settings: ModelConfig) -> None:
    """Check that the parts of a pipeline's folder are complete and belong to its family.

    Parts that the family never uses may be missing. A folder that has passed is not checked again by this process
    unless a file changes.

    Raises:
        UserError: naming part, file and, of weights, the key.
    """
    seen = (family, settings.variant, settings.transformer, settings.unet, *_files(folder, settings))
    if seen in _passed:
        return
    parts = used_parts(folder, family)
    file, key = single_file(settings, family.trained_part)
    _check_variant(folder, [name for name in parts if not name.startswith(("tokenizer", "scheduler"))], settings)
    for name, kind in parts.items():
        part = folder / name
        if not part.is_dir():
            raise UserError(
                f"model.path: {folder} is incomplete: {index_of(folder).name} names {name}, but there is no {name}/"
            )
        if name == "scheduler":
            check_scheduler(part, kind, flow=issubclass(family.schedule_kind, FlowSchedule))
        elif name.startswith("tokenizer"):
            check_tokenizer(part, kind, folder / name.replace("tokenizer", "text_encoder"))
        elif name == family.trained_part and file is not None:
            check_single_file(file, part, kind, key)
        else:
            check_model(part, kind, settings.variant)
            if name == "vae":
                check_latent_scale(part)
    _check_fit(folder, parts, family)
    _passed.add(seen)


def used_parts(folder: Path, family: "type[PipelinePolicy]", key: str = "model.path") -> dict[str, Any]:
    """The class of each part that a family uses; for the scheduler, of which there are many, its name.

    Raises:
        UserError: the index names another class, or none where one is needed; ``key`` names the setting.
    """
    named, pipeline, kinds = part_classes(folder, key), family.pipeline_class, family.part_kinds()
    index, parts = index_of(folder), {}
    for name in (family.trained_part, "vae", *family.encoder_parts, "scheduler"):
        found, wanted = named.get(name), kinds[name]
        if found is None:
            if name in family.optional_parts and not any(map(named.get, family.optional_parts)):
                continue
            if name == "scheduler" and family.default_scheduler() is not None:
                continue
            raise UserError(f"{key}: {index} names no {name}, which a {pipeline.__name__} needs")
        any_class = name == "scheduler" or wanted is PreTrainedTokenizerFast
        allowed = [one.removesuffix("Fast") for one in (wanted.__name__, *family.also_named.get(name, ()))]
        if not any_class and found.removesuffix("Fast") not in allowed:
            raise UserError(f"{key}: {index} says that {name} is a {found}; it must be a {wanted.__name__}")
        parts[name] = found if name == "scheduler" else wanted
    return parts


def single_file(settings: ModelConfig, trained_part: str) -> tuple[Path | None, str]:
    """The single file of the network that the configuration names, if it does, and the key that names it.

    Raises:
        UserError: the model has no such part.
    """
    for name in SINGLE_FILES:
        if getattr(settings, name) is not None and name != trained_part:
            raise UserError(f"model.{name}: the model of model.path has no {name}; its network is model.{trained_part}")
    file, key = getattr(settings, trained_part), f"model.{trained_part}"
    return (None if file is None else Path(file).expanduser()), key


def _check_fit(folder: Path, parts: Collection[str], family: "type[PipelinePolicy]") -> None:
    """Check that the parts belong to the same model, by their widths."""
    file = folder / family.trained_part / "config.json"
    ours = read_json(file)
    for key, times, other, its_key in family.fits:
        if other not in parts:
            continue
        theirs = read_json(folder / other / "config.json")
        width, its_width = ours.get(key), theirs.get("text_config", theirs).get(its_key)
        if isinstance(width, int) and isinstance(its_width, int) and width != times * its_width:
            raise UserError(
                f"model.path: {file} says {key} {width}, but by {other}/config.json ({its_key} {its_width}) it would "
                f"be {times * its_width}: the two belong to different models"
            )
    family.check_network(file, ours)


def _check_variant(folder: Path, parts: list[str], settings: ModelConfig) -> None:
    if settings.variant is None:
        return
    there = {one for name in parts for library in STEMS for one in variants(folder / name, library)}
    if settings.variant not in there:
        raise UserError(
            f"model.variant: {folder} has no weights of the variant {settings.variant}; "
            f"available: {', '.join(sorted(there)) or 'only the plain ones'}"
        )


def _files(folder: Path, settings: ModelConfig) -> list[tuple[object, ...]]:
    others = [Path(one).expanduser() for name in SINGLE_FILES if (one := getattr(settings, name)) is not None]
    files = [*sorted(folder.glob("*")), *sorted(folder.glob("*/*")), *others]
    stats = [(str(file), file.stat()) for file in files if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats]
