"""Fused ops for policy-gradient training of diffusion and flow models.

All arguments are tensors: a sampler step is a row of (a, b, std), a credit rule a row of (linear, quadratic, scale).
The package also fuses the elementwise operations inside diffusion transformers.
"""

from pcpo_kernels.accelerate import accelerate, restore
from pcpo_kernels.ops.adaptive_norm import gated_residual, gated_residual_norm, modulated_norm
from pcpo_kernels.ops.guidance import guidance
from pcpo_kernels.ops.noise import philox_normal
from pcpo_kernels.ops.policy_loss import policy_loss
from pcpo_kernels.ops.rotary import norm_rope
from pcpo_kernels.ops.sample_step import sample_step
from pcpo_kernels.ops.swiglu import swiglu
from pcpo_kernels.types import Endpoints, NoiseKey, PolicyLoss, SampledStep
from pcpo_kernels.version import __version__

__all__ = [
    "Endpoints",
    "NoiseKey",
    "PolicyLoss",
    "SampledStep",
    "__version__",
    "accelerate",
    "gated_residual",
    "gated_residual_norm",
    "guidance",
    "modulated_norm",
    "norm_rope",
    "philox_normal",
    "policy_loss",
    "restore",
    "sample_step",
    "swiglu",
]
