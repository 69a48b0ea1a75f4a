"""Runs the blocks of a diffusers network faster or in less memory, without changing its weights and their names."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from pcpo_fast.errors import UserError
from pcpo_fast.policies.selective import selective_contexts

MOST_VERSIONS = 64
"""Limit of compilations per block; each kind of batch in a run needs one."""
COMPILE_OPTIONS: dict[str, Any] = {"fullgraph": True, "dynamic": False}
"""Rollouts, updates and evaluations have batches of different sizes; code for any size is slower."""


def needed(network: nn.Module, blocks: Sequence[object], setting: str, off: str = "false") -> None:
    """Check that a setting has blocks to apply to; ``off`` is its value that needs none.

    Raises:
        UserError: there are no blocks.
    """
    if not blocks:
        raise UserError(f"{setting}: {type(network).__name__} has no block that this applies to: set {setting}={off}")


def linear_layers(network: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, nn.Linear]:
    """The linear layers within some blocks of a network, by name, without those of adapters."""
    inside = {id(layer) for block in blocks for layer in block.modules()}
    return {
        name: layer
        for name, layer in network.named_modules()
        if id(layer) in inside and type(layer) is nn.Linear and "lora_" not in name
    }


def compile_blocks(network: nn.Module, blocks: Sequence[nn.Module], **options: Any) -> int:
    """Compile each repeated block by itself, which takes a fraction of the time of compiling the network.

    Each batch size is compiled for itself.

    Args:
        network: a diffusers model; adapters are added before.
        blocks: those of it that repeat (:meth:`pcpo_fast.policies.base.Policy.compiled_blocks`).
        options: for ``torch.compile``.

    Returns:
        How many blocks are compiled.

    Raises:
        UserError: there are none.
    """
    needed(network, blocks, "model.compile")
    # Sizes of batches, with and without gradients, with and without adapters: PyTorch gives up after eight.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VERSIONS)
    for block in blocks:
        block.compile(**(COMPILE_OPTIONS | options))
    return len(blocks)


def checkpointed_numbers(count: int, share: float) -> list[int]:
    """Which of ``count`` blocks are recomputed: ``share`` of them, rounded up, spread evenly."""
    chosen = -int(-count * share // 1)
    return [number for number in range(count) if (number + 1) * chosen // count > number * chosen // count]


def run_block(network: Any, block: nn.Module, *inputs: Any) -> Any:
    """Run a block in a forward of ours, recomputed in the backward where diffusers' own forward would do so."""
    if network.gradient_checkpointing and torch.is_grad_enabled():
        return network._gradient_checkpointing_func(block, *inputs)
    return block(*inputs)


def checkpoint_blocks(network: Any, blocks: Sequence[nn.Module], share: float, *, selective: bool = False) -> int:
    """Recompute the activations of a share of the blocks in the backward, and keep those of the others.

    Args:
        network: a diffusers model; adapters are added before.
        blocks: those of it that can be recomputed (:meth:`pcpo_fast.policies.base.Policy.recomputed_blocks`).
        share: 0 (none) to 1 (all of them).
        selective: recompute only what is cheap (:mod:`pcpo_fast.policies.selective`); False: whole blocks.

    Returns:
        How many blocks are recomputed.

    Raises:
        UserError: some are asked for, and there are none, or diffusers cannot recompute them.
    """
    if share:
        needed(network, blocks, "model.gradient_checkpointing")
    chosen = {blocks[number] for number in checkpointed_numbers(len(blocks), share)}
    if not chosen:
        network.disable_gradient_checkpointing()
        return 0
    contexts = selective_contexts(network) if selective else noop_context_fn

    def recomputed(call: Callable[..., Any], *inputs: Any) -> Any:
        return checkpoint(call, *inputs, use_reentrant=False, context_fn=contexts)

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(lambda block, *inputs: recomputed(block._call_impl, *inputs), **COMPILE_OPTIONS)

    def run(block: Any, *inputs: Any) -> Any:
        if block not in chosen:
            return block(*inputs)
        if selective and block._compiled_call_impl is not None:  # the compiler must see what is kept
            return compiled()(block, *inputs)
        return recomputed(block, *inputs)

    try:
        network.enable_gradient_checkpointing(run)
    except ValueError as error:  # diffusers has no gradient checkpointing for this network
        raise UserError(f"model.gradient_checkpointing: {type(network).__name__}: {error}") from None
    return len(chosen)
