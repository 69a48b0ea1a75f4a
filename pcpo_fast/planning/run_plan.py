"""``pcpo-fast plan``: memory, operations and recommended settings for a configuration, without loading it."""

import math
from typing import Any

import torch

from pcpo_fast.config.schema import Config
from pcpo_fast.errors import UserError
from pcpo_fast.method.samplers import check_sampler
from pcpo_fast.method.step_tables import RunTables
from pcpo_fast.planning.advice import Choice, choose, least_memory, usable
from pcpo_fast.planning.cards import MFU
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.memory import MemoryPlan, plan_memory, uncounted_rewards
from pcpo_fast.planning.models import find_architecture
from pcpo_fast.planning.sizes import fitted
from pcpo_fast.planning.states import Zero, usual_stages
from pcpo_fast.planning.work import predictions_of_image, work_of_epoch
from pcpo_fast.rollout.epoch_plan import pairs_per_update

GB = 1e9
"""Decimal, as GPU memory is advertised; CUDA's tools report GiB of 1.074e9 bytes."""


def make_plan(
    config: Config,
    gpus: int,
    memory_gb: float,
    peak_tflops: float = 989.0,
    model_config: str | None = None,
    mfu: float = MFU,
) -> dict[str, Any]:
    """The plan as a JSON-compatible dictionary.

    Args:
        config: the run.
        gpus: number of GPUs, each a rank.
        memory_gb: memory of one GPU, in 1e9 bytes.
        peak_tflops: rate of one GPU for the ideal times, in 1e12 operations per second.
        model_config: pipeline folder to read the architecture from, instead of ``model.path``.
        mfu: model operations over time and peak rate that the whole run is assumed to reach.

    Raises:
        UserError: a number is out of range, the model is unknown, or images and batches do not divide over the GPUs.
    """
    _check(gpus, memory_gb, peak_tflops)
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu: must be above 0 and at most 1, got {mfu:g}")
    architecture = find_architecture(config.model, model_config)
    costs = ModelCosts(architecture, config.model)
    policy = costs.model.policy
    check_sampler(config.sampler, policy.schedule_kind)
    policy.check_training(config.model)
    tables = RunTables(config, policy.schedule(config.sampler.steps), torch.device("cpu"))
    trainable, predictions = tables.trained_count, predictions_of_image(config.advantage, tables.at(0))
    pairs = pairs_per_update(config, trainable, gpus)
    config = fitted(config, pairs, gpus, memory_gb * GB, costs)
    rate = gpus * peak_tflops * 1e12
    model = costs.model
    own = plan_memory(config, costs, Zero.of(config), gpus)
    plain, again = costs.training(1, False), costs.training(1, True)
    phases = work_of_epoch(
        config, costs, trainable, checkpointed=config.model.recomputed_share, predictions=predictions
    )
    epoch = [work for name, work in phases.items() if name != "evaluation"]
    evaluations = evaluation_count(config)
    whole = config.train.epochs * sum(work.flops for work in epoch) + evaluations * phases["evaluation"].flops
    return {
        "model": {
            "path": config.model.path,
            "source": architecture.source,
            "family": policy.family,
            "dtype": config.model.dtype,
            "finetune": config.model.finetune,
            "base_weights": config.model.base_weights,
        },
        "gpus": gpus,
        "gpu_memory_gb": memory_gb,
        "peak_tflops": peak_tflops,
        "parameters": {
            "network": model.network_parameters,
            "trained": model.trained_parameters,
            "frozen": model.all_parameters - model.trained_parameters,
            "vae": model.vae_parameters,
            "text_encoders": dict(model.encoders),
        },
        "flops": {
            "forward_tflops": costs.forward(1).flops / 1e12,
            "forward_backward_tflops": plain.flops / 1e12,
            "checkpointing_tflops": (again.recomputed - plain.recomputed) / 1e12,
            "phases": {
                name: {
                    "tflops": work.flops / 1e12,
                    "recomputed_tflops": work.recomputed / 1e12,
                    "ideal_seconds": work.seconds(rate),
                }
                for name, work in phases.items()
            },
            "epoch_tflops": sum(work.flops for work in epoch) / 1e12,
            "epoch_ideal_seconds": sum(work.seconds(rate) for work in epoch),
        },
        "run": {
            "epochs": config.train.epochs,
            "evaluations": evaluations,
            "tflops": whole / 1e12,
            "mfu": mfu,
            "hours": whole / (rate * mfu) / 3600,
        },
        "saved_activations_gb": {"plain": plain.saved / GB, "checkpointed": again.saved / GB},
        "memory_gb": {
            name: _memory_record(plan_memory(config, costs, zero, gpus), memory_gb)
            for name, zero in usual_stages(config).items()
        },
        "uncounted_rewards": uncounted_rewards(config),
        "configured": {
            "zero": Zero.of(config).name,
            "deepspeed": config.deepspeed,
            "micro_batch_size": config.train.pairs_at_once,
            "rollout_batch_size": config.rollout.images_at_once,
        }
        | _memory_record(own, memory_gb),
        "recommendation": _recommend(config, costs, gpus, memory_gb, pairs),
    }


def evaluation_count(config: Config) -> int:
    """Evaluations of a whole run: before training, every so many epochs, and after the last."""
    if config.prompts.heldout is None:
        return 0
    epochs, every = config.train.epochs, config.evaluation.every
    return 1 + (-(-epochs // every) if every else min(epochs, 1))


def _check(gpus: int, memory_gb: float, peak_tflops: float) -> None:
    if gpus < 1:
        raise UserError(f"--gpus: must be at least 1, got {gpus}")
    for option, value in (("--gpu-memory", memory_gb), ("--peak-tflops", peak_tflops)):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{option}: must be a number above 0, got {value:g}")
        if not 1e-3 <= value <= 1e6:
            raise UserError(f"{option}: must be between 0.001 and 1000000, got {value:g}")


def _memory_record(memory: MemoryPlan, memory_gb: float) -> dict[str, Any]:
    return {
        "parts": {name: size / GB for name, size in memory.parts.items()},
        "phases": {name: size / GB for name, size in memory.phases.items()},
        "peak": memory.peak / GB,
        "worst_phase": memory.worst,
        "fits": memory.peak <= usable(memory_gb * GB),
    }


def _recommend(config: Config, costs: ModelCosts, gpus: int, memory_gb: float, pairs: int) -> dict[str, Any]:
    choice = choose(config, costs, gpus, memory_gb * GB, pairs)
    if choice is not None:
        reason = (
            f"{choice.zero.name} {'with' if choice.checkpointed else 'without'} gradient checkpointing, micro-batches "
            f"of {choice.micro_batch}: peak {choice.memory.peak / GB:.1f} of {memory_gb:g} GB, in the phase "
            f"{choice.memory.worst!r}"
        )
        held = choice.zero.offload_parameters and _changed(config, costs, gpus, memory_gb, pairs, base_weights="nf4")
        ways = [f"without host memory: model.base_weights=nf4 fits with {held}"] if held else []
        return {"fits": True, **_choice_record(choice), "reason": reason} | ({"ways_out": ways} if ways else {})
    least = least_memory(config, costs, gpus, pairs)
    ways = []
    if config.model.finetune == "full":
        small = _changed(config, costs, gpus, memory_gb, pairs, finetune="lora")
        ways += [f"train LoRA adapters: model.finetune=lora fits with {small}"] if small else []
    else:
        four_bits, elsewhere = {"base_weights": "nf4"}, {"encode_on": "cpu"}
        for change in (four_bits, elsewhere, four_bits | elsewhere):
            if small := _changed(config, costs, gpus, memory_gb, pairs, **change):
                named = " ".join(f"model.{key}={value}" for key, value in change.items())
                ways.append(f"hold less of the model on the GPU: {named} fits with {small}")
                break
    for more in (2, 4, 8, 16, 32, 64):  # whether the images divide evenly over them is not checked
        if more > gpus and choose(config, costs, more, memory_gb * GB, 1) is not None:
            ways.append(f"use {more} such GPUs")
            break
    needed = least.memory.peak / GB
    usual = (16.0, 24.0, 32.0, 40.0, 48.0, 80.0, 96.0, 141.0, 180.0, 192.0, 288.0)
    large = next((size for size in usual if usable(size * GB) >= needed * GB), math.ceil(needed * 1.05))
    ways.append(f"use GPUs with {large:.0f} GB")
    if least.memory.worst in ("rollout", "update"):
        ways.append("use smaller images (model.height, model.width)")
    reason = (
        f"no settings fit {gpus} x {memory_gb:g} GB: the smallest plan ({' '.join(least.settings())}) needs "
        f"{needed:.1f} GB in the phase {least.memory.worst!r}, but only "
        f"{usable(memory_gb * GB) / GB:.1f} GB are usable"
    )
    return {"fits": False, **_choice_record(least), "reason": reason, "ways_out": ways}


def _changed(config: Config, costs: ModelCosts, gpus: int, memory_gb: float, pairs: int, **model: str) -> str | None:
    """The settings with which the run fits if its model is changed so; None if it does not, or is so already."""
    settings = config.model.model_copy(update=model)
    if settings == config.model:
        return None
    changed = config.model_copy(update={"model": settings})
    choice = choose(changed, ModelCosts(costs.architecture, settings), gpus, memory_gb * GB, pairs)
    return None if choice is None else " ".join(choice.settings())


def _choice_record(choice: Choice) -> dict[str, Any]:
    return {
        "zero_stage": choice.zero.stage,
        "offload_optimizer": choice.zero.offload_optimizer,
        "offload_parameters": choice.zero.offload_parameters,
        "gradient_checkpointing": choice.checkpointed,
        "micro_batch_size": choice.micro_batch,
        "rollout_batch_size": choice.rollout_batch,
        "peak_gb": choice.memory.peak / GB,
        "settings": choice.settings(),
    }
