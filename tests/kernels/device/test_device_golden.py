"""The step numbers of the public trainers, through the kernels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pcpo_kernels import Endpoints, policy_loss, sample_step

from pcpo_fast.method.transitions import dance_sde, ddim, flow_sde, shifted_times, stable_diffusion_alphas

GOLDEN = Path(__file__).parents[2] / "golden"
SETTINGS = json.loads((GOLDEN / "steps.json").read_text())
OUTPUTS = {"dance": ("v", "vnew"), "flowgrpo": ("v", "vnew"), "ddim": ("eps", "epsnew")}
EPS = torch.finfo(torch.float32).eps


def table(name, golden):
    chosen = SETTINGS[name]
    if name == "dance":
        return dance_sde(shifted_times(chosen["steps"], chosen["shift"]), chosen["eta"])
    if name == "flowgrpo":
        return flow_sde(golden["flowgrpo_sigmas"].double(), chosen["noise_level"])
    alphas = stable_diffusion_alphas(beta_start=chosen["beta_start"], beta_end=chosen["beta_end"])
    return ddim(alphas, golden["ddim_timesteps"], chosen["eta"])


@pytest.mark.parametrize("name", list(OUTPUTS))
def test_steps_of_public_trainers(device, name) -> None:
    """All steps in one call, one row per (step, image): x', its log-probability, and new minus old log-probability."""
    with np.load(GOLDEN / "steps.npz") as arrays:
        golden = {key: torch.from_numpy(arrays[key]) for key in arrays}
    transitions = table(name, golden)
    x, following, logp = (golden[f"{name}_{part}"] for part in ("x", "next", "logp"))
    old, new = (golden[f"{name}_{part}"] for part in OUTPUTS[name])
    images = x.shape[1]
    noisy = (transitions.std > 0).repeat_interleave(images)
    a, b, std = (column.repeat_interleave(images)[noisy] for column in (transitions.a, transitions.b, transitions.std))
    x, following, old, new = (value.flatten(0, 1)[noisy] for value in (x, following, old, new))
    per_row = [value.reshape(-1, *[1] * (x.dim() - 1)) for value in (a, b, std)]
    z = ((following.double() - per_row[0] * x - per_row[1] * old) / per_row[2]).float()
    columns = [value.float().to(device) for value in (a, b, std)]
    step = sample_step(x.to(device), old.to(device), *columns, z.to(device))
    torch.testing.assert_close(step.next_latents.cpu(), following, rtol=4 * EPS, atol=16 * EPS)

    public = logp.transpose(1, 2).flatten(0, 1)[noisy]  # [rows, (old, new)]
    # The published log-probabilities are float32 and of size 1 to 4; see tests/method/test_transitions.py.
    torch.testing.assert_close(step.log_prob.cpu(), public[:, 0], rtol=26 * EPS, atol=26 * EPS)
    kappa = (b / std).float().to(device)
    result = policy_loss(
        new.to(device),
        old.to(device),
        Endpoints(x.to(device), following.to(device), *columns),
        kappa,
        0.5 * kappa * kappa,
        torch.ones_like(kappa),
        torch.ones_like(kappa),
        clip_range=1e-4,
    )
    difference = public[:, 1].double() - public[:, 0].double()
    allowed = 52 * EPS * public.abs().max().item()
    assert (result.log_ratio.double().cpu() - difference).abs().max().item() <= allowed
