"""Strict validation of a user's DeepSpeed JSON, with all problems in one error.

DeepSpeed itself ignores unknown top-level keys, and accepts ``true`` as stage 1 and ``"8"`` as 8.
"""

import copy
import difflib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from pcpo_fast.config.messages import did_you_mean, requirement
from pcpo_fast.config.roles import sections_in
from pcpo_fast.config.shipped import root
from pcpo_fast.errors import UserError

OWNED_KEYS = {
    "train_batch_size": "rollout and train.updates_per_epoch",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "managed_gradient_accumulation": "train.micro_batch_size",
    "optimizer": "the section optimizer",
    "scheduler": "optimizer.warmup_updates",
    "gradient_clipping": "optimizer.max_grad_norm",
    "gradient_allreduce_op": "the method, which takes means over ranks",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "weight_quantization": "model.dtype",
    "seq_parallel_communication_data_type": "model.dtype",
    "activation_checkpointing": "model.gradient_checkpointing",
    "compile": "model.compile",
}
"""DeepSpeed settings that the configuration decides, by where it does; the JSON must not set them again."""

_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
"""Owned keys that may be ``"auto"``, which means the configuration's value."""

_FIXED: dict[str, Any] = {
    "communication_data_type": "fp32",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    # A bf16 sum of a thousand micro-batches loses half of them to rounding.
    "data_types.grad_accum_dtype": "fp32",
}
"""Keys that must have this value."""
_CHOICES = {
    "log_level": ("debug", "info", "warning", "error", "critical"),
    "checkpoint.tag_validation": ("ignore", "warn", "fail"),
}
"""Strings that DeepSpeed accepts, in upper or lower case."""


class _Strict(BaseModel):
    """Types of settings for which DeepSpeed has no pydantic model; the defaults are not used."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _Aio(_Strict):
    block_size: int = 0
    queue_depth: int = 0
    intra_op_parallelism: int = 0
    single_submit: bool = False
    overlap_events: bool = False
    use_gds: bool = False


class _FlopsProfiler(_Strict):
    enabled: bool = False
    recompute_fwd_factor: float = 0
    profile_step: int = 0
    module_depth: int = 0
    top_modules: int = 0
    detailed: bool = False
    output_file: str | None = None


class _Checkpoint(_Strict):
    tag_validation: str = ""
    load_universal: bool = False
    use_node_local_storage: bool = False
    parallel_write: dict[str, Any] = {}
    writer: Any = None  # refused below
    checkpoint_serialization: Any = None


class _DataTypes(_Strict):
    grad_accum_dtype: str = ""


class _Plain(_Strict):
    steps_per_print: int = 0
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    prescale_gradients: bool = False
    gradient_predivide_factor: float = 0
    disable_allgather: bool = False
    disable_python_gc: bool = False
    log_level: str = ""
    aio: _Aio = _Aio()
    flops_profiler: _FlopsProfiler = _FlopsProfiler()
    checkpoint: _Checkpoint = _Checkpoint()
    data_types: _DataTypes = _DataTypes()


_REFUSED = {
    "checkpoint.writer": "a checkpoint is verified after writing and renamed only then",
    "checkpoint.checkpoint_serialization": "a checkpoint is verified after writing, which needs its checksums",
    "datastates_ckpt": "a checkpoint is verified after writing and renamed only then",
    "zero_optimization.legacy_stage1": "DeepSpeed no longer has this stage",
    "zero_optimization.cpu_offload": "it is now called offload_optimizer",
    "zero_optimization.cpu_offload_param": "it is now called offload_param",
    "zero_optimization.cpu_offload_use_pin_memory": "it is now pin_memory in offload_optimizer and offload_param",
    "zero_optimization.zenflow": "it needs one of DeepSpeed's own optimizers",
    "zero_optimization.offload_optimizer.super_offload": "it needs one of DeepSpeed's own optimizers",
    "zero_optimization.zero_quantized_weights": "it changes the precision, which model.dtype decides",
    "zero_optimization.zero_quantized_nontrainable_weights": "it changes the precision, which model.dtype decides",
    "zero_optimization.zero_quantized_gradients": "it changes the precision, which model.dtype decides",
}
"""Keys that are not allowed unless off, with the reason."""

_WITHOUT_EFFECT = (
    "autotuning",
    "compression_training",
    "curriculum_learning",
    "data_efficiency",
    "dataloader_drop_last",
    "eigenvalue",
    "elasticity",
    "expert_parallel",
    "graph_harvesting",
    "hybrid_engine",
    "nebula",
    "pipeline",
    "progressive_layer_drop",
    "quantize_training",
    "sequence_parallel_size",
    "sparse_attention",
    "sparse_gradients",
    "tensor_parallel",
    "use_data_before_expert_parallelism",
    "vocabulary_size",
)
"""Keys of current or past versions of DeepSpeed that have no effect in this trainer."""

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml", "flops_profiler": "einops"}
"""Packages that loggers and profilers need when enabled."""


class _Object(dict[str, Any]):
    """A JSON object that records duplicate keys."""

    twice: tuple[str, ...] = ()


def read_deepspeed_file(path: Path, models: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """Read and validate a DeepSpeed JSON; settings that are ``"auto"`` are dropped.

    Args:
        path: the file.
        models: DeepSpeed's pydantic models of sections, by key ("timers.throughput" for a nested one).

    Raises:
        UserError: the file cannot be read, or keys are invalid; the message lists all of them.
    """
    settings = _read(path)
    broken = list(_broken(settings, ""))
    infinite = tuple(f"{text.split()[0]}:" for text in broken)  # type errors of these would be redundant
    problems = [*broken, *(text for text in _problems(settings, models) if not text.startswith(infinite or ("\n",)))]
    if problems:
        raise UserError(f"{path}: {'; '.join(dict.fromkeys(problems))}")
    for section, name in (("offload_optimizer", "nvme_path"), ("offload_param", "nvme_path")):
        found = settings.get("zero_optimization", {}).get(section) or {}
        if name in found:
            found[name] = os.path.expanduser(found[name])
    # DeepSpeed pickles its configuration into every checkpoint, and loading one must not need our classes.
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def check_machine(settings: Mapping[str, Any], file: str | None, asynchronous_io: Callable[[], bool]) -> None:
    """Check for the folders and libraries that NVMe offload needs and the packages of loggers and profilers.

    Args:
        settings: from :func:`read_deepspeed_file`.
        file: their source, for messages.
        asynchronous_io: whether DeepSpeed's asynchronous file I/O works on this machine.

    Raises:
        UserError: something is missing; the message lists everything.
    """
    problems = [
        f"{section} is enabled, but {package} is not installed (pip install {package})"
        for section, package in _PACKAGES.items()
        if settings.get(section, {}).get("enabled") and importlib.util.find_spec(package) is None
    ]
    for name in _on_nvme(settings["zero_optimization"]):
        folder = Path(settings["zero_optimization"][name]["nvme_path"])
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            problems.append(f"zero_optimization.{name}.nvme_path: {folder} is not a writable folder")
        if not asynchronous_io():
            problems.append(
                f"zero_optimization.{name}.device: nvme needs libaio and its headers, from which DeepSpeed builds "
                "async_io (apt install libaio-dev; `ds_report` shows what is missing); or set it to cpu"
            )
    if problems:
        raise UserError(f"{file}: {'; '.join(problems)}")


def _read(path: Path) -> dict[str, Any]:
    def remembering(pairs: list[tuple[str, Any]]) -> _Object:
        found = _Object(pairs)
        names = [name for name, _ in pairs]
        found.twice = tuple(name for name in found if names.count(name) > 1)
        return found

    try:
        settings = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=remembering)
    except FileNotFoundError:
        shipped = {one.stem: f"ds_configs/{one.name}" for one in root().glob("ds_configs/*.json")}
        close = difflib.get_close_matches(Path(path).stem, shipped, n=1)
        hint = f", did you mean {shipped[close[0]]}?" if close else ""
        raise UserError(f"deepspeed: {path} does not exist{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"deepspeed: {path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"deepspeed: {path} line {error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits; brackets nested too deep
        raise UserError(f"deepspeed: {path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"deepspeed: {path} must contain a JSON object")
    return settings


def _broken(value: Any, key: str) -> Iterator[str]:
    """Problems of any JSON file: duplicate keys and non-finite numbers."""
    if isinstance(value, _Object):
        yield from (f"{_below(key, name)} is given twice" for name in value.twice)
        for name, below in value.items():
            yield from _broken(below, _below(key, name))
    elif isinstance(value, list):
        for position, below in enumerate(value):
            yield from _broken(below, _below(key, str(position)))
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{key} must be a finite number, got {value}"


def _problems(settings: dict[str, Any], models: Mapping[str, type[BaseModel]]) -> Iterator[str]:
    sections = {key.partition(".")[0] for key in models}
    known = {*OWNED_KEYS, *_FIXED, *_Plain.model_fields, *sections, "datastates_ckpt"}
    for key, value in list(settings.items()):
        if key in OWNED_KEYS:
            if key in _SIZES and value == "auto":
                del settings[key]
            else:
                yield f"{key} is set by the configuration ({OWNED_KEYS[key]}), so remove it from the DeepSpeed file"
        elif key == "timers":
            if not isinstance(value, dict) or value.keys() - {"throughput"}:
                yield f"timers: must be an object with only the key throughput, got {_shown(value)}"
            elif "throughput" in value:
                yield from _modelled("timers.throughput", value["throughput"], models["timers.throughput"])
        elif key in models:
            yield from _modelled(key, value, models[key])
        elif key in _WITHOUT_EFFECT:
            yield f"{key} has no effect here, so remove it"
        elif key not in known:
            yield f"unknown key {key}{did_you_mean(key, known)}"
    try:
        _Plain(**{key: value for key, value in settings.items() if key in _Plain.model_fields})
    except ValidationError as error:
        yield from _refusals("", error, _Plain)
    zero = settings.get("zero_optimization")
    if isinstance(zero, dict):
        yield from _zero_problems(zero)
    if settings.get("gradient_predivide_factor", 1) == 0:
        yield "gradient_predivide_factor must not be 0, because gradients are divided by it"
    for key, fixed in _FIXED.items():
        value = _at(settings, key)
        if value is not None and value != fixed:
            yield f"{key} must be {json.dumps(fixed)} or omitted, got {_shown(value)}"
    for key, allowed in _CHOICES.items():
        value = _at(settings, key)
        if isinstance(value, str) and value.lower() not in allowed:
            yield f"{key} must be one of {', '.join(allowed)}, got {_shown(value)}"
    for key, reason in _REFUSED.items():
        value = _at(settings, key)
        if value is not None and value is not (key == "checkpoint.checkpoint_serialization"):
            yield f"{key} is not allowed ({reason}); remove it"


def _zero_problems(zero: dict[str, Any]) -> Iterator[str]:
    """Problems of the ZeRO section that DeepSpeed's own model does not detect."""
    stage = zero.get("stage", 1)
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        # Stage 0 reports no gradient norm and keeps bf16 gradients; stage 1 costs no more, even on one GPU.
        yield f"zero_optimization.stage must be 1, 2 or 3, got {_shown(stage)}"
        return
    if zero.get("compute_grad_norm") is False:
        yield "zero_optimization.compute_grad_norm must be true: clipping needs the gradient norm"
    for name in _on_nvme(zero):
        if stage != 3:
            yield f"zero_optimization.{name}.device: nvme only takes effect with stage 3, but the stage is {stage}"
        if not zero[name].get("nvme_path"):
            yield f"zero_optimization.{name}.nvme_path is missing: give the folder for nvme"
    if stage != 3:
        offload, hpz = zero.get("offload_param"), zero.get("zero_hpz_partition_size")
        if isinstance(offload, dict) and offload.get("device", "none") == "cpu":
            yield f"zero_optimization.offload_param only takes effect with stage 3, but the stage is {stage}"
        if isinstance(hpz, int) and hpz > 1:
            yield f"zero_optimization.zero_hpz_partition_size only takes effect with stage 3, but the stage is {stage}"


def _on_nvme(zero: Mapping[str, Any]) -> list[str]:
    names = ("offload_optimizer", "offload_param")
    return [name for name in names if isinstance(zero.get(name), dict) and zero[name].get("device") == "nvme"]


def _modelled(key: str, value: Any, model: type[BaseModel]) -> Iterator[str]:
    """Problems of a section by DeepSpeed's model, and values that the model would silently convert."""
    if not isinstance(value, dict):
        stage = "; zero_optimization.stage must be 1, 2 or 3" if key == "zero_optimization" else ""
        yield f"{key}: must be an object, got {_shown(value)}{stage}"
        return
    fields = _keys(model)
    for name in [name for name, given in value.items() if given == "auto"]:
        if name == "stage":
            continue  # checked in _zero_problems
        if name in fields and fields[name].annotation is int:
            del value[name]  # a size: DeepSpeed's default, as if omitted
        else:
            yield f'{_below(key, name)} must not be "auto", which only sizes may be'
    given = copy.deepcopy({name: below for name, below in value.items() if below != "auto"})
    if key == "zero_optimization" and given.get("stage") in ("1", "2", "3", True, False):
        del given["stage"]  # checked in _zero_problems
    try:
        read = model(**copy.deepcopy(given))
    except ValidationError as error:
        yield from _refusals(key, error, model)
        for name in {problem["loc"][0] for problem in error.errors() if problem["loc"]}:
            given.pop(name, None)
        try:  # find problems of the remaining values
            read = model(**copy.deepcopy(given))
        except (AssertionError, ValueError, TypeError):
            return
    except (AssertionError, ValueError, TypeError) as error:
        yield f"{key}: {' '.join(str(error).split())}"
        return
    yield from _mistaken(key, given, read)


def _refusals(key: str, error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    """Validation errors of a section's model, as messages."""
    for problem in error.errors():
        *above, last = problem["loc"] or ("",)
        place = ".".join(map(str, (key, *problem["loc"]) if key else problem["loc"]))
        if problem["type"] == "extra_forbidden":
            section = model
            for name in above:
                section = sections_in(section.model_fields[str(name)].annotation)[0]
            yield f"unknown key {place}{did_you_mean(str(last), _keys(section))}"
        elif place != "zero_optimization.stage":
            yield f"{place}: {requirement(problem)}, got {_shown(problem['input'])}"


def _keys(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a model by every name, including aliases, that a file may use."""
    return model.model_fields | {field.alias: field for field in model.model_fields.values() if field.alias}


def _mistaken(key: str, given: Mapping[str, Any], read: BaseModel) -> Iterator[str]:
    """Values that the model silently converted to another type: ``true`` to 1, ``"8"`` to 8."""
    names = {field.alias: name for name, field in type(read).model_fields.items()}
    for name, value in given.items():
        taken = getattr(read, names.get(name, name), value)
        if isinstance(taken, BaseModel) and isinstance(value, dict):
            yield from _mistaken(_below(key, name), value, taken)
        elif isinstance(value, bool) != isinstance(taken, bool) or (
            isinstance(value, str) and isinstance(taken, int | float)
        ):
            wanted = "true or false" if isinstance(taken, bool) else "a number"
            yield f"{_below(key, name)}: must be {wanted}, got {_shown(value)}"


def _at(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
