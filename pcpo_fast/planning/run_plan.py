"""``pcpo-fast plan``: memory, operations and recommended settings for a configuration, without loading it."""

import math
from typing import Any

import torch

from pcpo_fast.config.arguments import check_least
from pcpo_fast.config.schema import Config
from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.method.samplers import check_sampler
from pcpo_fast.method.step_tables import RunTables
from pcpo_fast.planning.advice import GB, Machines, usable
from pcpo_fast.planning.cards import MFU
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.disk import evaluation_count, plan_disk, prompt_bytes
from pcpo_fast.planning.host import plan_host
from pcpo_fast.planning.memory import MemoryPlan, plan_memory, uncounted_rewards
from pcpo_fast.planning.models import find_architecture, weights_are_here
from pcpo_fast.planning.recommendation import recommend
from pcpo_fast.planning.sizes import fitted
from pcpo_fast.planning.states import Zero, usual_stages
from pcpo_fast.planning.work import predictions_of_image, work_of_epoch
from pcpo_fast.policies.attention import check_names
from pcpo_fast.rollout.epoch_plan import pairs_per_update


def make_plan(
    config: Config,
    gpus: int,
    memory_gb: float,
    peak_tflops: float = 989.0,
    model_config: str | None = None,
    mfu: float = MFU,
    *,
    nodes: int = 1,
    host_gb: float | None = None,
    disk_gb: float | None = None,
) -> dict[str, Any]:
    """The plan as a JSON-compatible dictionary.

    Args:
        config: the run.
        gpus: number of GPUs, each a rank.
        memory_gb: memory of one GPU, in 1e9 bytes.
        peak_tflops: rate of one GPU for the ideal times, in 1e12 operations per second.
        model_config: pipeline folder to read the architecture from, instead of ``model.path``.
        mfu: model operations over time and peak rate that the whole run is assumed to reach.
        nodes: machines that the GPUs are divided over.
        host_gb: host memory of each machine, in 1e9 bytes; None: needs are said, but not compared.
        disk_gb: free space where the run writes, in 1e9 bytes; None likewise.

    Raises:
        UserError: a number is out of range, the model or an attention backend is unknown, or images and batches do not
            divide over the GPUs.
    """
    _check(gpus, memory_gb, peak_tflops, nodes, host_gb, disk_gb)
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu: must be above 0 and at most 1, got {mfu:g}")
    architecture = find_architecture(config.model, model_config)
    costs = ModelCosts(architecture, config.model)
    policy = costs.model.policy
    check_sampler(config.sampler, policy.schedule_kind)
    policy.check_training(config.model)
    check_names(config, type(policy))
    tables = RunTables(config, policy.schedule(config.sampler.steps), torch.device("cpu"))
    trainable, predictions = tables.trained_count, predictions_of_image(config.advantage, tables.at(0))
    pairs = pairs_per_update(config, trainable, gpus)
    config = fitted(config, pairs, gpus, memory_gb * GB, costs)
    rate = gpus * peak_tflops * 1e12
    model = costs.model
    zero, machines = Zero.of(config), Machines(nodes, None if host_gb is None else host_gb * GB)
    own = plan_memory(config, costs, zero, gpus)
    disk = plan_disk(config, costs, zero)
    written = sum(disk.values()) / GB
    advice = recommend(config, costs, gpus, memory_gb, pairs, machines)
    if disk_gb is not None and written > disk_gb:
        space = f"the run writes {written:.3g} GB to disk, but {disk_gb:g} are free"
        advice |= {
            "fits": False,
            "reason": space if advice["fits"] else f"{advice['reason']}; and {space}",
            "ways_out": [
                *([] if advice["fits"] else advice["ways_out"]),
                "lower checkpoint.keep",
                "set model.embedding_cache or output_dir to larger disks",
            ],
        }
    plain, again = costs.training(1, False), costs.training(1, config.model.gradient_checkpointing or True)
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
            "mapped": sorted(model.mapped_parts),
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
            name: _record(plan_memory(config, costs, zero, gpus), memory_gb)
            for name, zero in usual_stages(config).items()
        },
        "nodes": nodes,
        "host_memory_gb": host_gb,
        "host_gb": {
            name: _record(plan_host(config, costs, stage, gpus, nodes), host_gb)
            for name, stage in usual_stages(config).items()
        },
        "disk_gb": {
            "parts": {name: size / GB for name, size in disk.items()},
            "each_prompt": prompt_bytes(config, costs) / GB,
            "total": written,
            "free": disk_gb,
            "fits": None if disk_gb is None else written <= disk_gb,
        },
        "uncounted_rewards": uncounted_rewards(config),
        "configured": {
            "zero": zero.name,
            "deepspeed": config.deepspeed,
            "micro_batch_size": config.train.pairs_at_once,
            "rollout_batch_size": config.rollout.images_at_once,
            "host": _record(plan_host(config, costs, zero, gpus, nodes), host_gb),
            "host_if_mapped": None
            if weights_are_here(config.model)
            else _record(plan_host(config, costs, zero, gpus, nodes, model.loaded_parts), host_gb),
        }
        | _record(own, memory_gb),
        "recommendation": advice,
    }


def _check(
    gpus: int, memory_gb: float, peak_tflops: float, nodes: int, host_gb: float | None, disk_gb: float | None
) -> None:
    check_least(1, gpus=gpus, nodes=nodes)
    if gpus % nodes:
        raise UserError(
            f"--gpus: {counted(gpus, 'GPU')} cannot be divided evenly over {counted(nodes, 'machine')} (--nodes)"
        )
    amounts = {"--gpu-memory": memory_gb, "--peak-tflops": peak_tflops, "--host-memory": host_gb, "--disk": disk_gb}
    for option, value in amounts.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{option}: must be a number above 0, got {value:g}")
        if value is not None and not 1e-3 <= value <= 1e6:
            raise UserError(f"{option}: must be between 0.001 and 1000000, got {value:g}")


def _record(memory: MemoryPlan, available_gb: float | None) -> dict[str, Any]:
    return {
        "parts": {name: size / GB for name, size in memory.parts.items()},
        "phases": {name: size / GB for name, size in memory.phases.items()},
        "peak": memory.peak / GB,
        "worst_phase": memory.worst,
        "fits": None if available_gb is None else memory.peak <= usable(available_gb * GB),
    }
