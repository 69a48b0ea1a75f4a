"""Checks that a path computes the same as plain eager PyTorch, before anything is timed.

With the same inputs and slightly perturbed weights, outputs are computed in a wider type, in eager mode, and with a
configuration's optimizations. From each of the three, the log-ratio is computed in float64 by the same formula.
"""

from typing import Any

import torch
from pcpo_kernels import policy_loss
from step_model import Size
from step_paths import Parts
from torch import Tensor

from pcpo_fast.config.schema import Config
from pcpo_fast.policies.pipeline_policy import DTYPES

ROWS = 4
FACTOR = 2.0
"""An output's error relative to the wider type may be this many times the eager one's."""
MOVED = 1e-3
"""Standard deviation of what is added to the trained weights, relative to theirs, or to 1 where they are 0."""


class Check:
    """The references of a size and a way of fine-tuning, computed once.

    Attributes:
        clip_range: what a log-ratio is compared with in training.
    """

    def __init__(self, size: Size, config: Config, device: torch.device) -> None:
        self.size, self.device, self.clip_range = size, device, config.credit.clip_range
        self.dtype = DTYPES[config.model.dtype]
        wide = torch.float64 if device.type == "cpu" else torch.float32
        eager = Parts(size, config, device, self.dtype)
        generator = torch.Generator(device).manual_seed(4)
        shape = (ROWS, *eager.policy.latent_shape)
        steps = torch.tensor((eager.at.steps * ROWS)[:ROWS], device=device)
        self.latents, self.noise = (torch.randn(shape, device=device, generator=generator) for _ in range(2))
        self.times = eager.at.sampler.times[steps]
        self.rates = [column[steps] for column in (eager.at.credit.linear, eager.at.credit.quadratic)]
        self.old = self._outputs(eager, 1).float()
        move(eager.policy.module)
        self.eager = self._outputs(eager, 1)
        eager.policy.module.to(wide)
        self.wide = self._outputs(eager, 1)
        self.eager_error = rms(self.eager.to(wide) - self.wide)

    def __call__(self, config: Config) -> dict[str, Any]:
        """How far a configuration's optimizations change outputs and log-ratios, and whether that is rounding."""
        path = Parts(self.size, config, self.device, self.dtype)
        move(path.policy.module)
        with path.policy.sampling(config.rollout):
            outputs = self._outputs(path, config.rollout.batch_size)
        error = rms(outputs.to(self.wide.dtype) - self.wide)
        rounding = torch.finfo(self.dtype).eps * rms(self.wide)
        kernel = self._log_ratio_of_the_loss(outputs)
        formula, plain, wide = (self._log_ratio(values) for values in (outputs, self.eager, self.wide))
        loss_error = float((kernel - formula).abs().max() / self._terms(outputs))
        return {
            "output_error": error,
            "eager_error": self.eager_error,
            "output_change": rms((outputs - self.eager).double()) / rms(self.eager.double()),
            "log_ratio": float(plain.abs().mean()),
            "log_ratio_change": float((formula - plain).abs().mean()),
            "log_ratio_error": float((formula - wide).abs().mean()),
            "eager_log_ratio_error": float((plain - wide).abs().mean()),
            "clip_range": self.clip_range,
            "loss_error": loss_error,
            "passed": error <= FACTOR * self.eager_error + rounding and loss_error < 1e-5,
        }

    @torch.no_grad()
    def _outputs(self, path: Parts, batch: int) -> Tensor:
        """Of all rows, in batches of the rollout's size: what is compiled here is compiled for the rollout, too."""
        parts = zip(self.latents.split(batch), self.times.split(batch), strict=True)
        found = []
        for x, t in parts:
            rows = torch.arange(batch, device=self.device) % len(x)
            found.append(path.policy.predict(x[rows], t[rows], path.conditioning(batch))[: len(x)])
        return torch.cat(found)

    def _log_ratio(self, new: Tensor) -> Tensor:
        linear, quadratic = (rate.double() for rate in self.rates)
        delta, noise = new.double() - self.old.double(), self.noise.double()
        return linear * (delta * noise).mean(dim=(1, 2)) - quadratic * delta.square().mean(dim=(1, 2))

    def _terms(self, new: Tensor) -> float:
        """Size of what a log-ratio is a sum of."""
        delta = (new.double() - self.old.double()) * self.noise.double()
        return float((self.rates[0].double() * delta.abs().mean(dim=(1, 2))).abs().max())

    def _log_ratio_of_the_loss(self, new: Tensor) -> Tensor:
        ones = torch.ones(ROWS, device=self.device)
        result = policy_loss(new, self.old, self.noise, *self.rates, ones, ones, clip_range=self.clip_range)
        return result.log_ratio.double()


def rms(values: Tensor) -> float:
    """Root of the mean square."""
    return float(values.double().square().mean().sqrt())


@torch.no_grad()
def move(network: torch.nn.Module) -> None:
    """Add the same noise to the trained weights every time."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    generator = torch.Generator(trained[0].device).manual_seed(5)
    for parameter in trained:
        scale = MOVED * (float(parameter.float().std()) if parameter.numel() > 1 else 1.0) or MOVED
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        parameter += (scale * noise).to(parameter)
