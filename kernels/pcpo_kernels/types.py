"""Argument and result types of the ops."""

from typing import Literal, NamedTuple

from torch import Tensor

Objective = Literal["hinge", "clip", "divergence_mask"]
Reduction = Literal["mean", "sum"]


class NoiseKey(NamedTuple):
    """Standard normal noise specified by a random stream instead of a tensor.

    Element ``j`` of row ``r`` is element ``offset[r] + j`` of the Philox4x32-10 stream with key ``seed[r]``
    (:func:`pcpo_kernels.philox_normal`), so it does not depend on batch size, launch grid or device.

    Attributes:
        seed: int64 [B], one key per image.
        offset: int64 [B], first element; ``step * D`` for step ``step`` of an image with ``D`` latent elements.
    """

    seed: Tensor
    offset: Tensor


class Endpoints(NamedTuple):
    """The start and end of a sampled step, from which its noise is recovered: ``z = (x' - a x - b f_old) / std``.

    Attributes:
        latents: ``x`` [B, ...], the start of the step.
        next_latents: ``x'`` [B, ...], its end as stored (if ``x'`` was rounded, ``z`` includes the rounding).
        a, b, std: [B], the step's transition; ``std`` must be positive.
    """

    latents: Tensor
    next_latents: Tensor
    a: Tensor
    b: Tensor
    std: Tensor


class PolicyLoss(NamedTuple):
    """Result of :func:`pcpo_kernels.policy_loss`.

    Attributes:
        loss: scalar, mean over rows; differentiable in the output (and in ``unconditional`` if given).
        log_ratio: [B], the log importance ratio of each row; exactly 0 where the output is unchanged.
        clipped: bool [B], rows whose policy term has zero gradient because the ratio left the clip range, or, with
            ``divergence_mask``, because they are masked.
        taylor_error: [B], ``|l - (e^l - 1)| / |e^l - 1|``, 0 where ``l`` is 0: the relative error of the hinge's
            log-ratio in place of the ratio minus 1.
        kl: [B], each row's KL term in the loss; None without a reference.
        divergence: [B], the KL divergence of each row's step from the old policy's; exactly 0 where the output is
            unchanged.
    """

    loss: Tensor
    log_ratio: Tensor
    clipped: Tensor
    taylor_error: Tensor
    kl: Tensor | None
    divergence: Tensor


class SampledStep(NamedTuple):
    """Result of :func:`pcpo_kernels.sample_step`.

    Attributes:
        next_latents: ``x'`` [B, ...] in the dtype of the latents.
        log_prob: [B], log-density of ``x'`` under the step, reduced over the elements; 0 where ``std`` is 0.
    """

    next_latents: Tensor
    log_prob: Tensor
