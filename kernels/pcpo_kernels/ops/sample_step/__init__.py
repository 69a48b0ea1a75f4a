"""One stochastic sampler step, ``x' = a x + b f + std z``, and its log-probability."""

from torch import Tensor

from pcpo_kernels.checks import check_batched, check_choice, check_float, check_integer_rows, check_like, check_rows
from pcpo_kernels.dispatch import backend_for
from pcpo_kernels.types import NoiseKey, Reduction, SampledStep


def sample_step(
    latents: Tensor,
    output: Tensor,
    a: Tensor,
    b: Tensor,
    std: Tensor,
    noise: Tensor | NoiseKey | None,
    *,
    reduction: Reduction = "mean",
) -> SampledStep:
    """Take one affine Gaussian step for every row; rows may be at different steps. No gradient flows through it.

    Args:
        latents: ``x`` [B, ...], fp16, bf16, fp32 or fp64; keep it fp32 (a bf16 ``x'`` biases later log-ratios).
        output: the model output ``f`` after guidance [B, ...], any float dtype.
        a, b, std: [B], the rows' transitions.
        noise: the standard normal ``z`` [B, ...], or a :class:`NoiseKey` that names it, or None: no noise.
        reduction: how the log-density is reduced over the elements; the public trainers use the mean.

    Returns:
        ``x'`` and its log-probability per row; arithmetic in fp32 (fp64 where an input is fp64).

    Raises:
        TypeError: a tensor is not floating point, or a key not int64.
        ValueError: shapes or devices disagree.
    """
    check_batched("latents", latents)
    check_float("latents", latents)
    check_like(latents, ("output", output))
    check_rows(latents, ("a", a), ("b", b), ("std", std))
    if isinstance(noise, NoiseKey):
        check_integer_rows(latents, ("noise.seed", noise.seed), ("noise.offset", noise.offset))
    elif noise is not None:
        check_like(latents, ("noise", noise))
    check_choice("reduction", reduction, ("mean", "sum"))
    if backend_for((latents, output)) == "triton":
        from pcpo_kernels.ops.sample_step.triton import sample_step as backend
    else:
        from pcpo_kernels.ops.sample_step.reference import sample_step as backend
    return backend(latents, output, a, b, std, noise, reduction)
