"""The individual preflight checks."""

import importlib.metadata
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from pcpo_fast.config.schema import Config, ModelConfig
from pcpo_fast.config.shipped import find
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.planning.run_plan import GB
from pcpo_fast.planning.states import WEIGHT_BYTES, optimizer_bytes
from pcpo_fast.policies.families import FAMILIES, family_of, find_family
from pcpo_fast.policies.folder_checks import check_folder
from pcpo_fast.policies.pipeline_files import pipeline_class_of
from pcpo_fast.training.run_inputs import RunInputs

Status = Literal["ok", "warning", "failed", "skipped"]
PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "safetensors")


class Check(NamedTuple):
    """The result of a check.

    Attributes:
        name: name of the check.
        status: "failed" means that the run would not start.
        says: one sentence.
    """

    name: str
    status: Status
    says: str


def attempt(name: str, check: Callable[[], tuple[Status, str]]) -> Check:
    """Run a check; a ``UserError`` counts as failed."""
    try:
        return Check(name, *check())
    except UserError as error:
        return Check(name, "failed", str(error))


def check_versions() -> tuple[Status, str]:
    """Compare installed library versions with the ranges that this project declares."""
    from packaging.requirements import Requirement

    declared = map(Requirement, importlib.metadata.requires("pcpo-fast") or ())
    required = {requirement.name: requirement.specifier for requirement in declared}
    found, wrong = [], []
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{package} is not installed")
            continue
        allowed = required.get(package)
        found.append(f"{package} {version}")
        if allowed and not allowed.contains(version, prereleases=True):
            wrong.append(f"{package} {version} is installed, but {allowed} is tested")
    return ("warning", "; ".join(wrong)) if wrong else ("ok", ", ".join(found))


def check_gpus(wanted: int) -> tuple[Status, str]:
    """Check that PyTorch sees as many GPUs on this machine as requested."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return "warning", "PyTorch sees no GPU: the run would train on the CPU, which is only practical for tiny models"
    name = torch.cuda.get_device_name(0)
    if count < wanted:
        return "failed", f"{wanted} GPUs are requested, but PyTorch sees {count} ({name})"
    return "ok", f"{count} x {name}"


def check_model(config: Config) -> tuple[Status, str]:
    """Check that the model is available locally, or that this user may download it."""
    path = config.model.path
    folder = find(path)
    if folder.is_dir():
        _, family = find_family(config.model)
        check_folder(folder, family, config.model)
        family.check_training(config.model)
        return "ok", f"{path}: a {family.pipeline_class.__name__} with all its weights"
    if _is_cached(config.model):
        return "ok", f"{path} is in the hub's cache on this machine"
    from huggingface_hub import auth_check

    try:
        auth_check(path)
    except Exception as error:  # the hub's client raises many kinds
        return "failed", (
            f"model.path: {path} is not in the cache and cannot be downloaded from the hub: {reason_of(error)} (for a "
            "gated model accept its license on its page and run `hf auth login`)"
        )
    return "ok", f"{path} can be downloaded"


def check_inputs(config: Config) -> tuple[Status, str]:
    """Load prompts, rewards, loggers and the DeepSpeed file as the run would."""
    inputs = RunInputs.load(config)
    return "ok", f"{len(inputs.prompts)} prompts to train on, {len(inputs.heldout)} held out; rewards load"


def needed_bytes(config: Config, trained: int, network: int) -> float:
    """Bytes that a run writes: the kept checkpoints, one more while it is being written, and the exported weights."""
    optimizer, width = optimizer_bytes(config), WEIGHT_BYTES[config.model.dtype]
    checkpoint = trained * (width + optimizer.master + optimizer.moments + width)
    kept = config.checkpoint.keep + getattr(config.checkpoint, "keep_best", 0) + 1
    return kept * checkpoint + (trained if config.model.finetune == "lora" else network) * width


def check_disk(config: Config, plan: dict[str, Any]) -> tuple[Status, str]:
    """Check the free space of the output directory and, if the model must be downloaded, of the hub's cache."""
    counts = plan["parameters"]
    needs = {_existing(Path(config.output_dir)): needed_bytes(config, counts["trained"], counts["network"])}
    if not find(config.model.path).is_dir() and not _is_cached(config.model):
        everything = counts["network"] + counts["vae"] + sum(counts["text_encoders"].values())
        from huggingface_hub.constants import HF_HUB_CACHE

        cache = _existing(Path(HF_HUB_CACHE))
        needs[cache] = needs.get(cache, 0) + everything * WEIGHT_BYTES["bfloat16"]
    sentences = []
    for folder, needed in needs.items():
        free = shutil.disk_usage(folder).free
        if not os.access(folder, os.W_OK):
            return "failed", f"{folder} is not writable"
        if free < needed:
            return "failed", (
                f"{folder} has {free / GB:.1f} GB free, but the run needs {needed / GB:.1f} (lower checkpoint.keep, or "
                "choose another output_dir)"
            )
        sentences.append(f"{folder}: {free / GB:.1f} GB free, {needed / GB:.2g} needed")
    return "ok", "; ".join(sentences)


def check_memory(plan: dict[str, Any]) -> tuple[Status, str]:
    """Check that the configuration fits according to the memory plan."""
    own, advice = plan["configured"], plan["recommendation"]
    if own["fits"]:
        return "ok", (f"peak {own['peak']:.2f} of {plan['gpu_memory_gb']:.0f} GB ({own['worst_phase']}, {own['zero']})")
    what = f"set {' '.join(advice['settings'])}" if advice["fits"] else "; ".join(advice["ways_out"])
    return "failed", (
        f"the peak of {own['peak']:.1f} GB ({own['worst_phase']}, {own['zero']}) does not fit into "
        f"{plan['gpu_memory_gb']:.0f} GB: {what}"
    )


def _is_cached(settings: ModelConfig) -> bool:
    """Whether the hub's cache holds the pipeline with the weights of the trained network."""
    from huggingface_hub import try_to_load_from_cache

    try:
        index = try_to_load_from_cache(settings.path, "model_index.json", revision=settings.revision)
    except ValueError:  # not a hub id
        return False
    if not isinstance(index, str):
        return False
    family = family_of(pipeline_class_of(Path(index).parent, FAMILIES))
    return any((Path(index).parent / family.trained_part).glob("*.safetensors"))


def _existing(folder: Path) -> Path:
    """The folder, or its nearest existing parent."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder
