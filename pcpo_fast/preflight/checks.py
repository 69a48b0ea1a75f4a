"""The individual preflight checks."""

import importlib.metadata
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from pcpo_fast.config.schema import Config
from pcpo_fast.config.shipped import find
from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.planning.advice import GB
from pcpo_fast.planning.disk import encoded_prompts
from pcpo_fast.planning.models import weights_are_here
from pcpo_fast.planning.states import WEIGHT_BYTES
from pcpo_fast.policies.attention import check_names
from pcpo_fast.policies.embedding_cache import EmbeddingCache
from pcpo_fast.policies.families import find_family
from pcpo_fast.policies.folder_checks import check_folder
from pcpo_fast.preflight.available import available_memory
from pcpo_fast.runs.run_directory import claim
from pcpo_fast.training.run_inputs import RunInputs, doubts

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
        return "failed", f"the run is for {counted(wanted, 'GPU')}, but PyTorch sees {count} ({name})"
    return "ok", f"{count} x {name}"


def check_model(config: Config) -> tuple[Status, str]:
    """Check that the model is available locally, or that this user may download it."""
    path = config.model.path
    folder = find(path)
    if folder.is_dir():
        _, family = find_family(config.model)
        check_folder(folder, family, config.model)
        family.check_training(config.model)
        check_names(config, family)
        return "ok", f"{path}: a {family.pipeline_class.__name__} with all its weights"
    if weights_are_here(config.model):
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


def check_inputs(config: Config, gpus: int) -> tuple[Status, str]:
    """Load prompts, rewards, loggers and the DeepSpeed file as the run would."""
    inputs = RunInputs.load(config)
    if found := doubts(config, inputs.prompts, inputs.heldout, gpus):
        return "warning", "; ".join(found)
    return "ok", f"{counted(len(inputs.prompts), 'prompt')} to train on, {len(inputs.heldout)} held out; rewards load"


def check_output(config: Config) -> tuple[Status, str]:
    """Check that the run may have its directory, as the run itself does."""
    start = claim(config, "auto")
    return "ok", f"{config.output_dir}: " + (f"continues after epoch {start.epoch}" if start.epoch else "a new run")


def check_disk(config: Config, plan: dict[str, Any]) -> tuple[Status, str]:
    """Check the free space for checkpoints and export, for encoded prompts, and for the model's download, if any."""
    counts, parts = plan["parameters"], dict(plan["disk_gb"]["parts"])
    needs: dict[Path, dict[str, float]] = {}

    def need(folder: Path, what: str, size_gb: float) -> None:
        needs.setdefault(_existing(folder), {})[what] = size_gb

    if "encoded prompts" in parts:
        need(config.embedding_folder, "encoded prompts", parts.pop("encoded prompts") * _share_to_encode(config))
    for what, size in parts.items():
        need(Path(config.output_dir), what, size)
    if not find(config.model.path).is_dir() and not weights_are_here(config.model):
        everything = counts["network"] + counts["vae"] + sum(counts["text_encoders"].values())
        from huggingface_hub.constants import HF_HUB_CACHE

        need(Path(HF_HUB_CACHE), "the model", everything * WEIGHT_BYTES["bfloat16"] / GB)
    sentences = []
    for folder, sizes in needs.items():
        free, needed = shutil.disk_usage(folder).free / GB, sum(sizes.values())
        if not os.access(folder, os.W_OK):
            return "failed", f"{folder} is not writable"
        if free < needed:
            listed = ", ".join(f"{what} {size:.2g}" for what, size in sizes.items())
            return "failed", (
                f"{folder} has {free:.1f} GB free, but the run needs {needed:.1f} ({listed}): lower checkpoint.keep, "
                "or choose another output_dir or model.embedding_cache"
            )
        sentences.append(f"{folder}: {free:.1f} GB free, {needed:.2g} needed")
    return "ok", "; ".join(sentences)


def _share_to_encode(config: Config) -> float:
    """Share of the run's prompts that no folder of ``model.embedding_cache`` has yet."""
    prompts, root = encoded_prompts(config) or {""}, config.embedding_folder
    caches = [EmbeddingCache(root, one.name) for one in root.glob("*") if one.is_dir()]
    missing = (sum(not cache.path(prompt).is_file() for prompt in prompts) for cache in caches)
    return min(missing, default=len(prompts)) / len(prompts)


def check_host(plan: dict[str, Any]) -> tuple[Status, str]:
    """Check that the ranks of this machine fit its host memory; without a GPU all that they hold is there."""
    own, here = plan["configured"], plan["gpus"] // plan["nodes"]
    needed, phase = own["host"]["peak"], own["host"]["worst_phase"]
    if not torch.cuda.is_available():
        needed, phase = here * own["peak"], own["worst_phase"]
    free = available_memory() / GB
    if needed <= free:
        return "ok", f"peak {needed:.1f} of {free:.1f} GB that are available ({phase})"
    mapped = own["host_if_mapped"]
    if mapped is not None and torch.cuda.is_available() and mapped["peak"] <= free:
        return "warning", (
            f"{free:.1f} GB are available: enough if the model's files, which are not here, store "
            f"{plan['model']['dtype']} ({mapped['peak']:.1f} GB, {mapped['worst_phase']}), else {needed:.1f} are needed"
        )
    return "failed", (
        f"{needed:.1f} GB are needed for {counted(here, 'rank')} ({phase}, {own['zero']}), but "
        f"{free:.1f} GB are available: `pcpo-fast plan --host-memory {free:.0f}` shows what would fit"
    )


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


def _existing(folder: Path) -> Path:
    """The folder, or its nearest existing parent."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder
