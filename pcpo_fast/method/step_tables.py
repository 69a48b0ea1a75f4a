"""An epoch's sampler and credit tables on the policy's device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pcpo_fast.config.schema import Config
from pcpo_fast.errors import UserError
from pcpo_fast.method.credit import CreditTable
from pcpo_fast.method.samplers import build_credit, build_transitions, deterministic_transitions
from pcpo_fast.method.schedules import Schedule
from pcpo_fast.method.step_advantages import Segments
from pcpo_fast.method.transitions import Transitions
from pcpo_fast.method.windows import window_steps


@dataclass(frozen=True)
class StepTable:
    """A sampler's columns in float32 on the policy's device, indexed by step.

    Attributes:
        times: [N + 1].
        a, b, std: [N], as used in sampling (the last row makes the decoded latents).
        clean: [N, 2], coefficients ``(p, q)`` of the clean image ``p x + q f`` that a step predicts.
        noisy: N flags, whether the step has noise; on the host, so that a rollout never waits for the device.
    """

    times: Tensor
    a: Tensor
    b: Tensor
    std: Tensor
    clean: Tensor
    noisy: tuple[bool, ...]

    @classmethod
    def of(cls, transitions: Transitions, device: torch.device) -> "StepTable":
        """Convert a float64 table; the last row becomes the one that is decoded (no noise for a clean final step)."""
        a, b, std = transitions.a.clone(), transitions.b.clone(), transitions.std.clone()
        a[-1], b[-1], std[-1] = transitions.final_row
        assert transitions.clean_predictions is not None
        columns = (transitions.times, a, b, std, transitions.clean_predictions)
        times, a_row, b_row, std_row, clean = (column.to(device, torch.float32) for column in columns)
        return cls(times, a_row, b_row, std_row, clean, tuple((std > 0).tolist()))

    @property
    def steps(self) -> int:
        """Number of steps N."""
        return self.a.shape[0]


@dataclass(frozen=True)
class CreditRows:
    """A credit table in float32 on the policy's device, all [N]; ``kl`` is already multiplied by beta.

    ``silent`` is bool [N] on the CPU: the policy loss of the step has no gradient, whatever the advantage.
    """

    linear: Tensor
    quadratic: Tensor
    scale: Tensor
    kl: Tensor
    silent: Tensor

    @classmethod
    def of(cls, table: CreditTable, kl_coefficient: float, device: torch.device) -> "CreditRows":
        """Move a float64 credit table to a device."""
        columns = (table.linear, table.quadratic, table.scale, table.kl * kl_coefficient)
        linear, quadratic, scale, kl = (column.float() for column in columns)
        silent = (scale == 0) | ((linear == 0) & (quadratic == 0))
        return cls(linear.to(device), quadratic.to(device), scale.to(device), kl.to(device), silent)


@dataclass(frozen=True)
class EpochTables:
    """One epoch's sampler, credit and trained steps."""

    sampler: StepTable
    credit: CreditRows
    steps: list[int]


class RunTables:
    """A run's sampler and credit, and their tables for each epoch.

    Attributes:
        transitions: the stochastic sampler.
        deterministic: the same steps without noise.
        credit: credit of every step that is ever trained. A window changes neither zeta nor the rules' means.

    Raises:
        UserError: sampler, credit or window is invalid, or per-step credit has too few steps.
    """

    def __init__(self, config: Config, schedule: Schedule | None, device: torch.device) -> None:
        self.config, self.device = config, device
        self.transitions = build_transitions(config.sampler, schedule)
        self.deterministic = deterministic_transitions(config.sampler, schedule)
        self.credit = build_credit(config, self.transitions)
        self._made: dict[tuple[int, ...], EpochTables] = {}
        first = self.at(0)
        if config.advantage.steps != "final":
            self._check_scored_steps(first)

    @property
    def trained_count(self) -> int:
        """Number of steps that may be trained in an epoch; the same in all epochs."""
        return self.config.window.size or len(self.credit.trained_steps)

    def _check_scored_steps(self, at: EpochTables) -> None:
        kind, every = self.config.advantage.steps, self.config.advantage.scored_steps
        scored = Segments.of(at.sampler.noisy, every).scored
        if len(scored) == 1 and self.config.rollout.same_initial_noise:
            raise UserError(
                f"advantage.steps: {kind} would be final: with advantage.scored_steps={every} the only prediction that "
                f"is scored, that of step {scored[0]}, is the same for all images of a prompt; allowed here: a "
                f"scored_steps below the number of steps with noise ({sum(at.sampler.noisy)}; sampler.steps, "
                "window.size), or rollout.same_initial_noise=false"
            )
        if self.config.advantage.audit_every and not set(scored[:-1]) & set(at.steps):
            raise UserError(
                f"advantage.audit_every: with advantage.scored_steps={every} no prediction is scored at a trained step "
                "and again at a later one, so there is nothing to audit; lower scored_steps, train such a step "
                "(window.size, credit.steps), or set audit_every to 0"
            )

    def at(self, epoch: int) -> EpochTables:
        """The tables of an epoch."""
        steps = window_steps(self.config.window, list(self.credit.trained_steps), epoch, self.config.seed)
        if tuple(steps) not in self._made:
            sampler = self.transitions
            if self.config.window.size:
                sampler = noisy_only(self.transitions, self.deterministic, steps)
            self._made[tuple(steps)] = EpochTables(
                StepTable.of(sampler, self.device),
                CreditRows.of(self.credit.restricted(steps), self.config.credit.kl_coefficient, self.device),
                steps,
            )
        return self._made[tuple(steps)]


def noisy_only(stochastic: Transitions, deterministic: Transitions, steps: Sequence[int]) -> Transitions:
    """The stochastic sampler at ``steps``, the deterministic one at the others."""
    chosen = torch.zeros(stochastic.steps, dtype=torch.bool)
    chosen[list(steps)] = True
    a, b, std = (
        torch.where(chosen, getattr(stochastic, name), getattr(deterministic, name)) for name in ("a", "b", "std")
    )
    final = stochastic.final_step if chosen[-1] else deterministic.final_step
    return replace(stochastic, a=a, b=b, std=std, final_step=final, reference_credit=None)
