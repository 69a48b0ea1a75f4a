"""The policy loss: exact log-ratio, clip, hinge or divergence mask, step weights and KL, with its gradient."""

from typing import get_args

from torch import Tensor

from pcpo_kernels.checks import check_batched, check_choice, check_float, check_integer_rows, check_like, check_rows
from pcpo_kernels.dispatch import backend_for
from pcpo_kernels.ops.policy_loss.inputs import LossInputs
from pcpo_kernels.types import Endpoints, NoiseKey, Objective, PolicyLoss, Reduction

_OBJECTIVES = get_args(Objective)


def policy_loss(
    output: Tensor,
    old_output: Tensor | None,
    noise: Tensor | NoiseKey | Endpoints,
    linear: Tensor,
    quadratic: Tensor,
    scale: Tensor,
    advantage: Tensor,
    *,
    clip_range: float,
    objective: Objective = "hinge",
    reduction: Reduction = "mean",
    reference: Tensor | None = None,
    kl: Tensor | None = None,
    divergence: Tensor | None = None,
    unconditional: Tensor | None = None,
    guidance_scale: Tensor | None = None,
) -> PolicyLoss:
    """Policy-gradient loss of a batch of (image, step) rows.

    With ``delta = f - f_old`` and the step's credit columns, per row:

        log_ratio = linear <delta, z> - quadratic <delta, delta>
        hinge:  h = max(0, xi |A| - A log_ratio)
        clip:   h = max(-A e^log_ratio, -A clip(e^log_ratio, 1 - xi, 1 + xi))
        divergence_mask:
                h = 0 where divergence <delta, delta> >= xi and A log_ratio > 0, else -A e^log_ratio
        loss    = mean over rows of scale h + kl <f - f_ref, f - f_ref>

    where ``<u, v>`` is the mean (or sum) of ``u v`` over the row's elements. The log-ratio is never formed as a
    difference of two log-probabilities, so it is exactly 0 where the output is unchanged.

    Args:
        output: new model output ``f`` [B, ...] (the conditional half where ``unconditional`` is given); differentiable.
        old_output: the output that sampled the step, after guidance [B, ...]; None means this output itself, detached.
        noise: the step's noise ``z`` as a tensor [B, ...], as a :class:`NoiseKey`, or as :class:`Endpoints` from which
            it is recovered with ``old_output``. With ``old_output=None`` pass Endpoints: the noise then belongs to
            the output that it is recovered with.
        linear, quadratic, scale: [B], rows of a credit table.
        advantage: [B].
        clip_range: xi, not negative: of the log-ratio, of the ratio, or of the divergence.
        objective: ``hinge`` (PCPO, Lee and Ye 2026), ``clip`` (PPO as in DDPO, DanceGRPO, Flow-GRPO) or
            ``divergence_mask`` (Flow-DPPO, Ping et al. 2026, arXiv:2606.11025, Eq. 18).
        reduction: inner products as means (all public trainers) or sums over the elements.
        reference: output of the frozen reference policy, after guidance [B, ...].
        kl: [B], KL coefficient of each row, already times beta; required with ``reference``.
        divergence: [B], factor of ``<delta, delta>`` in the KL divergence of the step's Gaussian from the old policy's,
            ``b^2 / (2 std^2)``; None for ``quadratic``, which is that for native credit.
        unconditional: unconditional half [B, ...]; differentiable. ``f = u + guidance_scale (output - u)``.
        guidance_scale: [B], required with ``unconditional``.

    Returns:
        :class:`PolicyLoss`. Arithmetic in fp32 (fp64 for an fp64 output); gradients in the dtype of their tensor. An
        empty batch has loss 0.

    Raises:
        TypeError: a tensor is not floating point, or a key not int64.
        ValueError: shapes or devices disagree, or a value is not allowed.
    """
    inputs = LossInputs(
        output, old_output, noise, linear, quadratic, scale, advantage,
        clip_range, objective, reduction, reference, kl, divergence, unconditional, guidance_scale,
    )  # fmt: skip
    _check(inputs)
    if backend_for(output) == "triton":
        from pcpo_kernels.ops.policy_loss.triton import policy_loss as backend
    else:
        from pcpo_kernels.ops.policy_loss.reference import policy_loss as backend
    return backend(inputs)


def _check(inputs: LossInputs) -> None:
    output, noise = inputs.output, inputs.noise
    check_batched("output", output)
    check_float("output", output)
    if (inputs.reference is None) != (inputs.kl is None):
        raise ValueError("reference and kl go together: give both or neither")
    if (inputs.unconditional is None) != (inputs.guidance_scale is None):
        raise ValueError("unconditional and guidance_scale go together: give both or neither")
    images = ("old_output", inputs.old_output), ("reference", inputs.reference), ("unconditional", inputs.unconditional)
    check_like(output, *[named for named in images if named[1] is not None])
    extra = ("kl", inputs.kl), ("divergence", inputs.divergence), ("guidance_scale", inputs.guidance_scale)
    check_rows(
        output,
        ("linear", inputs.linear), ("quadratic", inputs.quadratic), ("scale", inputs.scale),
        ("advantage", inputs.advantage), *[named for named in extra if named[1] is not None],
    )  # fmt: skip
    if isinstance(noise, Endpoints):
        check_like(output, ("noise.latents", noise.latents), ("noise.next_latents", noise.next_latents))
        check_rows(output, ("noise.a", noise.a), ("noise.b", noise.b), ("noise.std", noise.std))
    elif isinstance(noise, NoiseKey):
        check_integer_rows(output, ("noise.seed", noise.seed), ("noise.offset", noise.offset))
    else:
        check_like(output, ("noise", noise))
    check_choice("objective", inputs.objective, _OBJECTIVES)
    check_choice("reduction", inputs.reduction, ("mean", "sum"))
    if not inputs.clip_range >= 0:
        raise ValueError(f"clip_range must not be negative, got {inputs.clip_range}")
