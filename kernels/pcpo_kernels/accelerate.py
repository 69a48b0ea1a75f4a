"""Install the fused ops in an unmodified diffusers transformer, and remove them again."""

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import nn

from pcpo_kernels import block_forwards
from pcpo_kernels.attention_processors import Flux2SingleProcessor, FluxProcessor, JointProcessor, head_norm

# By class name, and here rather than in a model family: each function reimplements the forward of one class, and this
# package imports neither diffusers nor pcpo_fast.
BLOCKS: dict[str, Callable[..., Any]] = {
    "FluxTransformerBlock": block_forwards.flux_double_block,
    "FluxSingleTransformerBlock": block_forwards.flux_single_block,
    "Flux2TransformerBlock": block_forwards.flux2_double_block,
    "Flux2SingleTransformerBlock": block_forwards.flux2_single_block,
    "JointTransformerBlock": block_forwards.joint_block,
}
LAYERS: dict[str, Callable[..., Any]] = {
    "AdaLayerNormZero": block_forwards.ada_layer_norm_zero,
    "AdaLayerNormZeroSingle": block_forwards.ada_layer_norm_zero_single,
    "SD35AdaLayerNormZeroX": block_forwards.sd35_ada_layer_norm_zero_x,
    "Flux2SwiGLU": block_forwards.flux2_swiglu,
}
PROCESSORS: dict[str, type[FluxProcessor] | type[JointProcessor]] = {
    "FluxAttnProcessor": FluxProcessor,
    "Flux2AttnProcessor": FluxProcessor,
    "Flux2ParallelSelfAttnProcessor": Flux2SingleProcessor,
    "JointAttnProcessor2_0": JointProcessor,
}
HEAD_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
FORWARDS = (*BLOCKS.values(), *LAYERS.values(), head_norm)


def accelerate(transformer: nn.Module) -> int:
    """Make the blocks of a diffusers transformer use this package's ops; :func:`restore` undoes it.

    The transformer is changed in place: its blocks, their adaptive norms, their SwiGLU and the norms of their attention
    heads get another ``forward``, their attention another processor. Weights, names, hooks and adapters (LoRA) are
    unchanged, and every layer with weights is still called as a module. Attention with another processor or other norms
    than the model's own (for example an IP adapter's) is not changed. Calling it again has no effect.

    Args:
        transformer: a diffusers FLUX, FLUX.2 or Stable Diffusion 3 transformer, or a module that contains one.

    Returns:
        Number of accelerated blocks.

    Raises:
        ValueError: there is no supported block, the layer norms of one have weights (those of the published models have
            none), or another library has replaced a block's ``forward``.
    """
    blocks = [module for module in transformer.modules() if type(module).__name__ in BLOCKS]
    if not blocks:
        raise ValueError(
            f"{type(transformer).__name__} has no block that can be accelerated; supported: {', '.join(BLOCKS)}"
        )
    for block in blocks:
        norms = (getattr(child, "norm", child) for name, child in block.named_children() if name.startswith("norm"))
        if any(type(norm) is not nn.LayerNorm or norm.weight is not None for norm in norms):
            raise ValueError(f"a {type(block).__name__} can only be accelerated if its layer norms have no weights")
    parts = [part for block in blocks for part in _parts(block)]
    for module, _ in parts:
        own = vars(module).get("forward")
        if own is not None and not _is_ours(own):
            raise ValueError(
                f"another library has replaced the forward of a {type(module).__name__}; call accelerate before it"
            )
    for module, forward in parts:
        module.forward = MethodType(forward, module)
    for block in blocks:
        for attention in _attentions(block):
            replacement = PROCESSORS.get(type(attention.processor).__name__)
            if replacement is not None:
                attention.processor = replacement(attention.processor)
    return len(blocks)


def restore(transformer: nn.Module) -> int:
    """Undo :func:`accelerate` completely.

    Returns:
        Number of restored blocks; 0 if none was accelerated.
    """
    count = 0
    for module in transformer.modules():
        if _is_ours(vars(module).get("forward")):
            del module.forward
            count += type(module).__name__ in BLOCKS
        processor = vars(module).get("processor")
        if isinstance(processor, FluxProcessor | JointProcessor):
            if isinstance(processor, FluxProcessor):  # keep what was set in the meantime
                processor.original._attention_backend = processor._attention_backend
                processor.original._parallel_config = processor._parallel_config
            module.processor = processor.original
    return count


def _parts(block: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """The modules of a block whose forward is replaced, each with the replacement."""
    yield block, BLOCKS[type(block).__name__]
    for module in block.modules():
        if type(module).__name__ in LAYERS:
            yield module, LAYERS[type(module).__name__]
    for attention in _attentions(block):
        for norm in _head_norms(attention):
            yield norm, head_norm


def _attentions(block: nn.Module) -> Iterator[Any]:
    """The block's attention modules that have the model's own processor and RMS norms of the heads."""
    for name in ("attn", "attn2"):
        attention = getattr(block, name, None)
        if attention is None:
            continue
        known = type(attention.processor).__name__ in PROCESSORS
        norms = _head_norms(attention)
        joint = getattr(attention, "added_kv_proj_dim", None) is not None
        alike = len({getattr(norm, "eps", None) for norm in norms}) == 1 and all(
            type(norm).__name__ == "RMSNorm" and norm.eps is not None and getattr(norm, "bias", None) is None
            for norm in norms
        )
        if known and alike and len(norms) == (4 if joint else 2):
            yield attention


def _head_norms(attention: nn.Module) -> list[Any]:
    norms = (getattr(attention, name, None) for name in HEAD_NORMS)
    return [norm for norm in norms if norm is not None]


def _is_ours(forward: object) -> bool:
    return isinstance(forward, MethodType) and forward.__func__ in FORWARDS
