"""Inputs for the kernel benchmarks, at the sizes of real training, and the memory traffic each op cannot avoid."""

from dataclasses import dataclass

import torch
from pcpo_kernels import Endpoints, NoiseKey, philox_normal, sample_step
from torch import Tensor

NOISE = 0.3
CLIP_RANGE = 1e-4

# Latent elements of one image.
SIZES = {
    "sd15_512": 4 * 64 * 64,
    "sd3_512": 16 * 64 * 64,
    "flux_512": 64 * 64 * 16,
    "flux_720": 90 * 90 * 16,
    "flux_1024": 128 * 128 * 16,
}


@dataclass
class Case:
    """A batch of (image, step) rows at steps of the FLUX default sampler, with outputs half a per cent apart."""

    output: Tensor
    old_output: Tensor
    latents: Tensor
    next_latents: Tensor
    key: NoiseKey
    a: Tensor
    b: Tensor
    std: Tensor
    time: Tensor
    following: Tensor
    linear: Tensor
    quadratic: Tensor
    scale: Tensor
    advantage: Tensor
    unconditional: Tensor

    @property
    def endpoints(self) -> Endpoints:
        """The step's ends."""
        return Endpoints(self.latents, self.next_latents, self.a, self.b, self.std)


def make_case(
    rows: int,
    elements: int,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    difference: float = 0.005,
    seed: int = 0,
) -> Case:
    """Random inputs; every row at another step of the Dance SDE with 16 steps and shift 3."""
    g = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device)

    u = torch.linspace(1, 0, 17, dtype=torch.float64)
    times = 3 * u / (1 + 2 * u)
    steps = torch.arange(rows) % 15
    t, t_next = times[steps], times[steps + 1]
    delta = t - t_next
    drift = NOISE**2 / (2 * t)
    a, b, std = 1 - delta * drift, -delta * (1 + (1 - t) * drift), NOISE * delta.sqrt()
    kappa = b / std
    columns = (a, b, std, t, t_next, kappa, kappa * kappa / 2, torch.ones_like(t))
    a, b, std, t, t_next, linear, quadratic, scale = (column.float().to(device) for column in columns)
    old = normal(rows, elements)
    output = (old + difference * normal(rows, elements)).to(dtype)
    old = old.to(dtype)
    latents = normal(rows, elements)
    key = NoiseKey(torch.arange(rows, device=device), (steps * elements).to(device))
    following = sample_step(latents, old, a, b, std, key).next_latents
    return Case(
        output, old, latents, following, key, a, b, std, t, t_next, linear, quadratic, scale, normal(rows),
        normal(rows, elements).to(dtype),
    )  # fmt: skip


def noise_tensor(case: Case) -> Tensor:
    """The key's noise as a tensor."""
    return philox_normal(*case.key, case.latents.shape[1])


# Bytes per element that an op must move with outputs of ``w`` bytes and fp32 latents: (forward, forward and backward).
# docs/kernels.md derives them.
def loss_traffic(form: str, w: int) -> tuple[int, int]:
    """Of the loss, for the forms of the noise; "detached" is on-policy with endpoints."""
    reads = {"key": 2 * w, "endpoints": 2 * w + 8, "tensor": 2 * w + 4, "detached": w + 8}[form]
    forward = 0 if form == "detached" else reads
    return forward, forward + reads + w


def step_traffic(w: int) -> int:
    """Of a sampler step with made noise: x and f in, x' out."""
    return 8 + w


def guidance_traffic(w: int) -> tuple[int, int]:
    """Of guidance: two outputs in, one out; backward one gradient in, two out."""
    return 3 * w, 6 * w
