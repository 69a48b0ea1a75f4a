"""What selective recomputation keeps of a block: products, convolutions and attention; the rest is cheap to repeat."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
_PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
"""Each with the two factors as its last positional arguments."""


def selective_contexts(network: nn.Module) -> Callable[[], Any]:
    """For ``context_fn`` of :func:`torch.utils.checkpoint.checkpoint`: repeat what is cheap, keep the other results.

    Kept are the results of all operations whose floating-point operations PyTorch counts, and of attention of other
    libraries. Repeated are elementwise operations, norms, copies and this package's block kernels, and products with an
    inner dimension of at most the adapters' rank: those that an adapter adds to the output of its layer, which would
    have to be kept beside it.

    Args:
        network: its adapters are there already.
    """
    ranks = (len(weight) for name, weight in network.named_parameters() if ".lora_A." in name)
    return partial(create_selective_checkpoint_contexts, partial(_policy, max(ranks, default=0)))


def _policy(rank: int, _: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    kind = getattr(operation, "overloadpacket", operation)  # attention may be a higher-order operator: no overloads
    if kind in _PRODUCTS:
        kept = arguments[-2].shape[-1] > rank
    else:
        kept = kind in flop_registry or any(part in str(operation) for part in ("attention", "attn", "flash"))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
