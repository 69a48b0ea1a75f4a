"""The expected peak of a machine's host memory in each phase of a run on GPUs, and its parts."""

import math
from collections.abc import Collection, Iterable
from math import prod

from peft.tuners.tuners_utils import BaseTunerLayer

from pcpo_fast.config.schema import Config
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.memory import MemoryPlan
from pcpo_fast.planning.states import CHUNK_BYTES, WEIGHT_BYTES, Zero, optimizer_bytes
from pcpo_fast.rewards.registry import model_bytes

PROCESS = 3e9
"""Bytes that a rank holds besides its tensors: Python's libraries (0.4e9, measured), CUDA and NCCL (assumed)."""

SUB_GROUP = 1_000_000_000
"""Parameters of a sub-group that DeepSpeed steps at a time in stage 3."""


def pinned(size: float) -> float:
    """Bytes that a page-locked tensor takes: PyTorch's allocator rounds them up to a power of two."""
    return float(1 << (math.ceil(size) - 1).bit_length()) if size > 0 else 0.0


def plan_host(
    config: Config,
    costs: ModelCosts,
    zero: Zero,
    ranks: int,
    nodes: int = 1,
    mapped: Collection[str] | None = None,
) -> MemoryPlan:
    """The host memory of the first of ``nodes`` machines that ``ranks`` GPUs are in.

    Every rank loads network, VAE and reward models into host memory, then the text encoders, which go to the GPU or
    stay (``model.encode_on``); then all of it goes to the GPU, with ZeRO-3 one weight at a time. From then on the host
    holds what is offloaded. Weights that are stored in ``model.dtype`` are mapped from their files
    (:attr:`pcpo_fast.planning.models.ModelOnMeta.mapped_parts`), all others are copies. PyTorch's fused AdamW needs no
    temporaries. A checkpoint copies a rank's state one tensor at a time, and all trained weights on the first rank;
    resuming reads a rank's state whole, and before ZeRO-3 the trained weights in each rank.

    Args:
        config: the run.
        costs: costs of its model.
        zero: stage and offloading.
        ranks: number of GPUs.
        nodes: machines that they are divided over.
        mapped: parts whose weights are mapped; None: those of which that is known.
    """
    model, width, here = costs.model, WEIGHT_BYTES[config.model.dtype], ranks // nodes
    mapped = model.mapped_parts if mapped is None else mapped
    whole, trained = float(model.network_parameters * width), model.trained_parameters
    network = whole
    if model.policy.trained_part in mapped:
        network = sum(packed for _, packed in model.packed_layers)
    vae = 0.0 if "vae" in mapped else float(model.vae_parameters * width)
    copies = 1 if config.model.encode_on == "cpu" else 0  # of mapped text encoders: all ranks read the same pages
    encoders = sum(count * width * (copies if part in mapped else here) for part, count in model.encoders.items())
    sizes = {r.column: model_bytes(r.name, {**r.options, "device": None}) or 0.0 for r in config.rewards}
    on_cpu = {reward.column for reward in config.rewards if str(reward.options.get("device")).startswith("cpu")}
    rewards, staying = sum(sizes.values()), sum(sizes[name] for name in on_cpu)

    offloaded, step = optimizer_on_host(config, zero, trained / ranks)
    weights = 0.0
    if zero.offload_parameters:
        shares = [math.ceil(p.numel() / ranks) * width for p in model.policy.module.parameters()]
        weights = _all_pinned(shares) if zero.pinned_parameters else sum(shares)
        weights += pinned(trained / ranks * width)
    merged = 0.0
    if config.rollout.merge_lora:
        adapted = [layer for layer in model.policy.module.modules() if isinstance(layer, BaseTunerLayer)]
        merged = _all_pinned(layer.get_base_layer().weight.numel() * width for layer in adapted)
    prompts = max(config.rollout.prompts_per_epoch, config.evaluation.prompts if config.prompts.heldout else 0)
    row = sum(map(prod, model.policy.conditioning_shapes(costs.architecture.clip_tokens).values()))
    saved, read = _checkpoint(config, zero, trained, trained / ranks)

    parts = {
        "processes": here * PROCESS,
        "network": here * network,
        "vae": here * vae,
        "text encoders": float(encoders),
        "reward models": here * rewards,
        "offloaded weights": here * weights,
        "offloaded optimizer": here * offloaded,
        "optimizer step": here * step,
        "unmerged weights": here * merged,
        "embeddings": float(here * prompts * row * width),
        "saving": here * saved + trained * width,
        "resuming": here * read,
    }
    loading = parts["processes"] + parts["reward models"]
    dividing = max(parts["network"] + (here * whole if config.keeps_start else 0), parts["offloaded weights"])
    standing = parts["processes"] + here * staying + parts["offloaded weights"] + parts["offloaded optimizer"]
    phases = {
        "encode prompts": loading + parts["network"] + parts["vae"] + parts["text encoders"],
        "load": loading + (dividing if zero.stage == 3 else 0),
        "train": standing + parts["unmerged weights"] + parts["embeddings"] + parts["optimizer step"],
        "save": standing + parts["unmerged weights"] + parts["saving"],
        "resume": standing + parts["resuming"],
    }
    return MemoryPlan(parts, phases)


def optimizer_on_host(config: Config, zero: Zero, share: float) -> tuple[float, float]:
    """Bytes of a rank's optimizer in host memory, and of the temporaries of its step there.

    Args:
        config: the run.
        zero: stage and offloading.
        share: trained parameters of the rank.
    """
    each, width = optimizer_bytes(config), WEIGHT_BYTES[config.model.dtype]
    if not zero.offload_optimizer:
        if not config.rollout.offload_optimizer:
            return 0.0, 0.0
        return _all_pinned((share * each.master, *2 * [share * each.moments / 2], share * each.average)), 0.0
    locked = pinned if zero.pinned_optimizer else float
    own = share * (each.moments + each.average)
    if zero.stage == 3:
        groups = [SUB_GROUP] * int(share // SUB_GROUP) + [share % SUB_GROUP]
        own += share * each.master + sum(locked(size * each.master) for size in groups) + locked(share * 4)
    else:  # master weights and their gradient, the new weights, and with float32 weights the sum of the gradients
        own += 2 * locked(share * each.master) + locked(share * width) * (2 if width == 4 else 1)
    return own, 0.0 if each.step >= 4 else min(24 * share, CHUNK_BYTES)


def _checkpoint(config: Config, zero: Zero, trained: int, share: float) -> tuple[float, float]:
    """Bytes that a rank needs at a time to save its state, and to read it."""
    each = optimizer_bytes(config)
    largest = 0.0 if zero.offload_optimizer else share * max(each.master, each.moments / 2)
    whole = trained * WEIGHT_BYTES[config.model.dtype] if zero.stage < 3 else 0
    return max(largest, share * each.average), max(float(whole), share * (each.master + each.moments))


def _all_pinned(sizes: Iterable[float]) -> float:
    return sum(map(pinned, sizes))
