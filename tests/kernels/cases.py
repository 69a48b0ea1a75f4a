"""Random inputs for the ops, and the loss written a second time: plain formulas, autograd, no shared code."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from pcpo_kernels import Endpoints, NoiseKey, PolicyLoss, policy_loss
from torch import Tensor

NOISES = ("tensor", "key", "endpoints")
KEY_FIRST = ["key", *(pytest.param(noise, marks=pytest.mark.slow) for noise in NOISES if noise != "key")]
"""For tests of which the others than the key's are slow."""
# Random123's known answers for philox4x32 with 10 rounds: counter (4 words), key (2), result (4).
PHILOX_VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def signed(value: int) -> int:
    """A 64-bit word as the int64 that has its bits."""
    return value - 2**64 if value >= 2**63 else value


@dataclass
class LossCase:
    """Arguments of one policy_loss call; ``noise`` says in which form the step's noise is handed over."""

    output: Tensor
    old_output: Tensor | None
    z: Tensor
    key: NoiseKey
    ends: Endpoints
    linear: Tensor
    quadratic: Tensor
    scale: Tensor
    advantage: Tensor
    noise: str = "tensor"
    clip_range: float = 0.02
    objective: str = "hinge"
    reduction: str = "mean"
    reference: Tensor | None = None
    kl: Tensor | None = None
    divergence: Tensor | None = None
    unconditional: Tensor | None = None
    guidance_scale: Tensor | None = None

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for policy_loss."""
        noise = {"tensor": self.z, "key": self.key, "endpoints": self.ends}[self.noise]
        positional = self.output, self.old_output, noise, self.linear, self.quadratic, self.scale, self.advantage
        names = (
            "clip_range",
            "objective",
            "reduction",
            "reference",
            "kl",
            "divergence",
            "unconditional",
            "guidance_scale",
        )
        return positional, {name: getattr(self, name) for name in names}

    def run(self) -> PolicyLoss:
        """Call policy_loss."""
        positional, keywords = self.arguments()
        return policy_loss(*positional, **keywords)

    def cast(self, dtype: torch.dtype, *names: str) -> "LossCase":
        """A copy whose named tensors (all floating ones by default) are of ``dtype``, detached."""
        fields = {}
        for name, value in vars(self).items():
            if names and name not in names:
                continue
            if isinstance(value, Tensor):
                fields[name] = value.detach().to(dtype)
            elif isinstance(value, Endpoints):
                fields[name] = Endpoints(*(part.to(dtype) for part in value))
        return replace(self, **fields)

    def to(self, device: torch.device | str) -> "LossCase":
        """A copy on another device."""
        fields: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                fields[name] = value.detach().to(device)
            elif isinstance(value, Endpoints | NoiseKey):
                fields[name] = type(value)(*(part.to(device) for part in value))
        return replace(self, **fields)


def make_case(
    rows: int = 5,
    shape: tuple[int, ...] = (7, 3),
    *,
    noise: str = "tensor",
    detached: bool = False,
    with_reference: bool = False,
    with_guidance: bool = False,
    difference: float = 0.1,
    seed: int = 0,
    **settings: Any,
) -> LossCase:
    """A float64 case in which every row is at another step: z, key and endpoints name the same noise up to rounding.

    ``difference`` is the size of the new output's distance from the old one.
    """
    from pcpo_kernels import philox_normal

    g = torch.Generator().manual_seed(seed)
    size = (rows, *shape)
    count = math.prod(shape)

    def normal(*dims: int) -> Tensor:
        return torch.randn(dims, generator=g, dtype=torch.float64)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(rows, generator=g, dtype=torch.float64)

    key = NoiseKey(torch.randint(-(2**62), 2**62, (rows,), generator=g), torch.arange(rows) * count)
    z = philox_normal(key.seed, key.offset, count).double().reshape(size)
    old = normal(*size)
    output = old + difference * normal(*size)
    unconditional = guidance_scale = None
    if with_guidance:
        unconditional, guidance_scale = normal(*size), uniform(1.5, 5.0)
        g_rows = guidance_scale.reshape(-1, *[1] * len(shape))
        output = unconditional + (output - unconditional) / g_rows
    behind = old
    if detached:
        behind = output
        if unconditional is not None:
            behind = unconditional + g_rows * (output - unconditional)
    x, a, b, std = normal(*size), uniform(0.8, 1.1), -uniform(0.02, 0.2), uniform(0.05, 0.3)
    column = [value.reshape(-1, *[1] * len(shape)) for value in (a, b, std)]
    following = column[0] * x + column[1] * behind + column[2] * z
    kappa = b / std
    return LossCase(
        output=output,
        old_output=None if detached else old,
        z=z,
        key=key,
        ends=Endpoints(x, following, a, b, std),
        linear=kappa,
        quadratic=0.5 * kappa * kappa,
        scale=uniform(0.5, 2.0),
        advantage=normal(rows),
        noise=noise,
        reference=old + 0.3 * normal(*size) if with_reference else None,
        kl=uniform(0.01, 0.5) if with_reference else None,
        divergence=(b / std) ** 2 / 2,
        unconditional=unconditional,
        guidance_scale=guidance_scale,
        **settings,
    )


def autograd_loss(case: LossCase) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log-ratio and clipped flags of a case from the formulas, in the dtype of its tensors, row by row."""
    losses, ratios, flags = [], [], []
    for r in range(case.output.shape[0]):
        f = case.output[r]
        if case.unconditional is not None and case.guidance_scale is not None:
            f = case.unconditional[r] + case.guidance_scale[r] * (f - case.unconditional[r])
        old = f.detach() if case.old_output is None else case.old_output[r]
        z = case.z[r]
        if case.noise == "endpoints":
            z = (
                case.ends.next_latents[r] - case.ends.a[r] * case.ends.latents[r] - case.ends.b[r] * old
            ) / case.ends.std[r]

        def inner(u: Tensor, v: Tensor) -> Tensor:
            product = (u * v).flatten()
            return product.mean() if case.reduction == "mean" else product.sum()

        delta = f - old
        log_ratio = case.linear[r] * inner(delta, z) - case.quadratic[r] * inner(delta, delta)
        advantage, xi, ratio = case.advantage[r], case.clip_range, log_ratio.exp()
        if case.objective == "divergence_mask":
            # Flow-DPPO, Eqs. 14 and 18: KL of two Gaussians of one variance from their means.
            shift = case.ends.b[r] * delta
            divergence = inner(shift, shift) / (2 * case.ends.std[r] ** 2)
            away = (ratio > 1 and advantage > 0) or (ratio < 1 and advantage < 0)
            clipped = torch.tensor(bool(divergence >= xi and away))
            h = torch.zeros_like(ratio) if clipped else -advantage * ratio
        elif case.objective == "hinge":
            h = torch.relu(xi * advantage.abs() - advantage * log_ratio)
            clipped = xi * advantage.abs() - advantage * log_ratio < 0
        else:
            bounded = ratio.clamp(1 - xi, 1 + xi)
            h = torch.maximum(-advantage * ratio, -advantage * bounded)
            clipped = -advantage * bounded > -advantage * ratio
        loss = case.scale[r] * h
        if case.reference is not None and case.kl is not None:
            gap = f - case.reference[r]
            loss = loss + case.kl[r] * inner(gap, gap)
        losses.append(loss)
        ratios.append(log_ratio)
        flags.append(clipped)
    return torch.stack(losses).mean(), torch.stack(ratios), torch.stack(flags)
