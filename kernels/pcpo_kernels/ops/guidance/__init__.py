"""Guidance: one output pushed away from another, classifier-free or towards a reward."""

import torch
from torch import Tensor

from pcpo_kernels.checks import FLOATS, check_batched, check_float, check_like, check_rows
from pcpo_kernels.dispatch import backend_for


def guidance(reference: Tensor, output: Tensor, scale: Tensor | float, *, dtype: torch.dtype | None = None) -> Tensor:
    """Combine two model outputs: ``reference + scale (output - reference)``; differentiable in both.

    Classifier-free guidance with the unconditional half as ``reference``, or implicit reward guidance (method of PCPO)
    with the frozen model's output. Scales 0 and 1 return an input bit for bit. :func:`pcpo_kernels.policy_loss`
    combines its halves with the same arithmetic in fp32, so an old output made here with ``dtype=torch.float32``
    gives a log-ratio of exactly 0 on-policy.

    Args:
        reference: [B, ...], fp16, bf16, fp32 or fp64.
        output: [B, ...], any float dtype.
        scale: one number, or [B].
        dtype: of the result; the output's by default.

    Returns:
        [B, ...]; arithmetic in fp32 (fp64 where an input is fp64), rounded once.

    Raises:
        TypeError: a tensor or ``dtype`` is not floating point.
        ValueError: shapes or devices disagree.
    """
    check_batched("output", output)
    check_float("output", output)
    check_like(output, ("reference", reference))
    if not isinstance(scale, Tensor):
        scale = torch.full(
            output.shape[:1],
            float(scale),
            device=output.device,
            dtype=torch.float64 if output.dtype == torch.float64 else torch.float32,
        )
    check_rows(output, ("scale", scale))
    dtype = output.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    if dtype != torch.float64 and backend_for((output, reference)) == "triton":
        from pcpo_kernels.ops.guidance.triton import guidance as backend
    else:
        from pcpo_kernels.ops.guidance.reference import guidance as backend
    return backend(reference, output, scale, dtype)
