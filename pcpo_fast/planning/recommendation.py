"""The recommended settings of a plan as a JSON-compatible record; what would help where nothing fits."""

import math
from typing import Any

from pcpo_fast.config.loading import load_config
from pcpo_fast.config.schema import Config
from pcpo_fast.config.wording import counted
from pcpo_fast.engine.whole_weights import needs_whole_weights
from pcpo_fast.planning.advice import GB, Choice, Machines, choose, least_host_memory, least_memory, usable
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.memory import MemoryPlan
from pcpo_fast.planning.models import weights_are_here


def recommend(
    config: Config, costs: ModelCosts, gpus: int, memory_gb: float, pairs: int, machines: Machines
) -> dict[str, Any]:
    """The fastest settings that fit, or the smallest and why they do not.

    Args:
        config: the run.
        costs: costs of its model.
        gpus: number of GPUs.
        memory_gb: memory of one, in 1e9 bytes.
        pairs: (image, step) pairs per rank and update.
        machines: what the GPUs are in.
    """

    def changed(**model: str) -> str | None:
        """The settings with which the run fits if its model is changed so; None if it does not, or is so already."""
        settings = config.model.model_copy(update=model)
        if settings == config.model:
            return None
        run = config.model_copy(update={"model": settings})
        small = choose(run, ModelCosts(costs.architecture, settings), gpus, memory_gb * GB, pairs, machines)
        return None if small is None else " ".join(small.settings())

    choice = choose(config, costs, gpus, memory_gb * GB, pairs, machines)
    if choice is not None:
        how = {False: "without", "selective": "with selective", True: "with"}[choice.checkpointed]
        reason = (
            f"{choice.zero.name} {how} gradient checkpointing, micro-batches of {choice.micro_batch}: peak "
            f"{choice.memory.peak / GB:.1f} of {memory_gb:g} GB, in the phase {choice.memory.worst!r}"
        )
        held = choice.zero.offload_parameters and changed(base_weights="nf4")
        ways = [f"without host memory: model.base_weights=nf4 fits with {held}"] if held else []
        return {"fits": True, **_record(choice), "reason": reason} | ({"ways_out": ways} if ways else {})
    ways = []
    # Recomputation is the plan's to choose.
    given_up = [text for _, text in needs_whole_weights(config) if not text.startswith("model.gradient_checkpointing")]
    if given_up:
        run = load_config(config, given_up)
        parted = choose(run, ModelCosts(costs.architecture, run.model), gpus, memory_gb * GB, pairs, machines)
        if parted is not None:
            ways.append(f"partition the weights: {' '.join(given_up)} fits with {' '.join(parted.settings())}")
    if config.model.finetune == "full":
        small = changed(finetune="lora")
        ways += [f"train LoRA adapters: model.finetune=lora fits with {small}"] if small else []
    else:
        four_bits, elsewhere = {"base_weights": "nf4"}, {"encode_on": "cpu"}
        for change in (four_bits, elsewhere, four_bits | elsewhere):
            if small := changed(**change):
                named = " ".join(f"model.{key}={value}" for key, value in change.items())
                ways.append(f"hold less of the model on the GPU: {named} fits with {small}")
                break
    if machines.host is not None:
        lacking = least_host_memory(config, costs, gpus, memory_gb * GB, pairs, machines.nodes)
        if lacking is not None:
            if not weights_are_here(config.model):
                mapped = costs.model.loaded_parts
                least_host = least_host_memory(config, costs, gpus, memory_gb * GB, pairs, machines.nodes, mapped)
                if least_host is not None and least_host[1].peak <= usable(machines.host):
                    ways.append(
                        f"download the model, and plan again: {least_host[1].peak / GB:.1f} GB are enough if its files "
                        f"store {config.model.dtype}, with {' '.join(least_host[0].settings())}"
                    )
            return {"fits": False, **_lacking_host(*lacking, gpus, memory_gb, machines.host, ways)}
    least = least_memory(config, costs, gpus, pairs)
    for more in (2, 4, 8, 16, 32, 64):  # whether the images divide evenly over them is not checked
        if more > gpus and choose(config, costs, more, memory_gb * GB, 1) is not None:
            ways.append(f"use {counted(more, 'such GPU')}")
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
    return {"fits": False, **_record(least), "reason": reason, "ways_out": ways}


def _lacking_host(
    choice: Choice, plan: MemoryPlan, gpus: int, memory_gb: float, host: float, ways: list[str]
) -> dict[str, Any]:
    reason = (
        f"no settings that fit {gpus} x {memory_gb:g} GB fit the host: the smallest ({' '.join(choice.settings())}) "
        f"need {plan.peak / GB:.1f} GB of host memory in each machine, in the phase {plan.worst!r}, but only "
        f"{usable(host) / GB:.1f} GB are usable"
    )
    return _record(choice) | {
        "reason": reason,
        "ways_out": [*ways, f"use machines with {plan.peak / GB:.0f} GB or more"],
    }


def _record(choice: Choice) -> dict[str, Any]:
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
