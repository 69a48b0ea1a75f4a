"""Fused ops for policy-gradient training of diffusion and flow models.

Knows tensors only: a sampler step is a row of (a, b, std), a credit rule a row of (linear, quadratic, scale).
"""

from pcpo_kernels.guidance import guidance
from pcpo_kernels.noise import philox_normal
from pcpo_kernels.policy_loss import policy_loss
from pcpo_kernels.step_sampling import sample_step
from pcpo_kernels.types import Endpoints, NoiseKey, PolicyLoss, SampledStep

__all__ = [
    "Endpoints",
    "NoiseKey",
    "PolicyLoss",
    "SampledStep",
    "guidance",
    "philox_normal",
    "policy_loss",
    "sample_step",
]
