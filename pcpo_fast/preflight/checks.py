"""The single checks before a run; each says in a sentence what it found."""

import importlib.metadata
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from pcpo_fast.config.schema import Config
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.planning.published import PUBLISHED
from pcpo_fast.planning.recomputing import device_memory
from pcpo_fast.planning.run_plan import GB, make_plan
from pcpo_fast.planning.states import WEIGHT_BYTES, optimizer_bytes
from pcpo_fast.policies.families import find_family
from pcpo_fast.policies.folder_checks import check_folder
from pcpo_fast.training.run_inputs import RunInputs

Status = Literal["ok", "warning", "failed", "skipped"]
PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "safetensors")


class Check(NamedTuple):
    """What a check found.

    Attributes:
        name: of the check.
        status: a run starts with warnings, and not with anything failed.
        says: one sentence.
    """

    name: str
    status: Status
    says: str


def attempt(name: str, check: Callable[[], tuple[Status, str]]) -> Check:
    """Run a check; a user's mistake is its failure."""
    try:
        return Check(name, *check())
    except UserError as error:
        return Check(name, "failed", str(error))


def check_versions() -> tuple[Status, str]:
    """Installed libraries against the ranges that this project declares."""
    required = {}
    for line in importlib.metadata.requires("pcpo-fast") or ():
        match = re.match(r"([\w.-]+)\s*([^;]*)$", line.strip())
        if match:
            required[match[1].lower()] = match[2].strip()
    from packaging.specifiers import SpecifierSet

    found, wrong = [], []
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{package} is not installed")
            continue
        allowed = required.get(package, "")
        found.append(f"{package} {version}")
        if allowed and not SpecifierSet(allowed).contains(version, prereleases=True):
            wrong.append(f"{package} {version} is installed, and {allowed} is tested")
    return ("warning", "; ".join(wrong)) if wrong else ("ok", ", ".join(found))


def check_gpus(wanted: int) -> tuple[Status, str]:
    """GPUs that PyTorch sees on this machine against those that are wanted."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return "warning", "PyTorch sees no GPU here: the run would train on the CPU, which is for tiny models only"
    name = torch.cuda.get_device_name(0)
    if count < wanted:
        return "failed", f"{wanted} GPUs are asked for, and PyTorch sees {count} ({name})"
    return "ok", f"{count} x {name}"


def gpu_memory_gb() -> float | None:
    """Memory of the first GPU in 1e9 bytes; None without one."""
    if not torch.cuda.is_available():
        return None
    return device_memory(torch.device("cuda", 0), 1) / GB


def check_model(config: Config) -> tuple[Status, str]:
    """Whether the model is here, or can be downloaded with the rights of this user."""
    path = config.model.path
    folder = Path(path).expanduser()
    if folder.is_dir():
        _, family = find_family(config.model)
        check_folder(folder, family, config.model)
        return "ok", f"{path}: a {family.pipeline_class.__name__} with all its weights"
    if _in_cache(path, config.model.revision):
        return "ok", f"{path} is in the hub's cache on this machine"
    from huggingface_hub import auth_check

    try:
        auth_check(path)
    except Exception as error:  # the hub's client has many kinds of error
        reason = reason_of(error)
        return "failed", (
            f"model.path: {path} is not in the cache and cannot be had from the hub: {reason} (a gated model needs its "
            "license accepted on its page, and `hf auth login`)"
        )
    return "ok", f"{path} may be downloaded"


def check_inputs(config: Config) -> tuple[Status, str]:
    """Prompts, rewards, loggers and the DeepSpeed file, as the run itself reads them."""
    inputs = RunInputs.load(config)
    return "ok", f"{len(inputs.prompts)} prompts to train on, {len(inputs.heldout)} held out; rewards load"


def needed_bytes(config: Config, trained: int, network: int) -> float:
    """What a run writes: its checkpoints (one more than are kept, while it is written) and the exported weights."""
    optimizer, width = optimizer_bytes(config), WEIGHT_BYTES[config.model.dtype]
    checkpoint = trained * (width + optimizer.master + optimizer.moments + width)
    kept = config.checkpoint.keep + getattr(config.checkpoint, "keep_best", 0) + 1
    return kept * checkpoint + (trained if config.model.finetune == "lora" else network) * width


def check_disk(config: Config, plan: dict[str, object]) -> tuple[Status, str]:
    """Free space where the run writes, and for a download where the hub's cache is."""
    counts = plan["parameters"]
    assert isinstance(counts, dict)
    needs = {_existing(Path(config.output_dir)): needed_bytes(config, counts["trained"], counts["network"])}
    path = config.model.path
    if not Path(path).expanduser().is_dir() and not _in_cache(path, config.model.revision):
        everything = counts["network"] + counts["vae"] + sum(counts["text_encoders"].values())
        from huggingface_hub.constants import HF_HUB_CACHE

        cache = _existing(Path(HF_HUB_CACHE))
        needs[cache] = needs.get(cache, 0) + everything * WEIGHT_BYTES["bfloat16"]
    sentences = []
    for folder, needed in needs.items():
        free = shutil.disk_usage(folder).free
        if not os.access(folder, os.W_OK):
            return "failed", f"{folder} cannot be written"
        if free < needed:
            return "failed", (
                f"{folder} has {free / GB:.1f} GB free, and the run needs {needed / GB:.1f} (lower checkpoint.keep, or "
                "choose another output_dir)"
            )
        sentences.append(f"{folder}: {free / GB:.1f} GB free, {needed / GB:.2g} needed")
    return "ok", "; ".join(sentences)


def check_memory(plan: dict[str, object]) -> tuple[Status, str]:
    """The memory plan of the configuration as it stands."""
    own, advice = plan["configured"], plan["recommendation"]
    assert isinstance(own, dict) and isinstance(advice, dict)
    if own["fits"]:
        return "ok", (
            f"{own['peak']:.2f} of {plan['gpu_memory_gb']:.0f} GB at the peak ({own['worst_phase']}, {own['zero']})"
        )
    what = f"set {' '.join(advice['settings'])}" if advice["fits"] else "; ".join(advice["ways_out"])
    return "failed", (
        f"{own['peak']:.1f} GB are needed at the peak ({own['worst_phase']}, {own['zero']}), more than "
        f"{plan['gpu_memory_gb']:.0f} GB allow: {what}"
    )


def plan_for(config: Config, gpus: int, memory_gb: float | None) -> dict[str, object]:
    """The plan that the checks of disk and memory read; without a GPU, for one of 80 GB."""
    return make_plan(config, gpus, memory_gb or gpu_memory_gb() or 80.0)


def _in_cache(path: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    network = "unet" if "unet" in PUBLISHED.get(path, {}).get("parts", ()) else "transformer"
    try:
        files = [
            try_to_load_from_cache(path, name, revision=revision)
            for name in ("model_index.json", f"{network}/config.json")
        ]
    except ValueError:
        return False
    if not all(isinstance(file, str) for file in files):
        return False
    return any(Path(str(files[1])).parent.glob("*.safetensors"))


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder
