"""The update: from a rollout and its advantages to optimiser steps, one micro-batch of (image, step) pairs at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pcpo_kernels import Endpoints, NoiseKey, PolicyLoss, policy_loss
from torch import Tensor

from pcpo_fast.config import Config
from pcpo_fast.credit import CreditTable
from pcpo_fast.engine import Engine
from pcpo_fast.policies import Policy, select_rows
from pcpo_fast.rollout import Rollout, StepTable
from pcpo_fast.step_statistics import StepStatistics


@dataclass(frozen=True)
class CreditRows:
    """A credit table in float32 on the policy's device; ``kl`` is already times beta. All [N]."""

    linear: Tensor
    quadratic: Tensor
    scale: Tensor
    kl: Tensor

    @classmethod
    def of(cls, table: CreditTable, kl_coefficient: float, device: torch.device) -> "CreditRows":
        """Move a float64 credit table to a device."""
        columns = (table.linear, table.quadratic, table.scale, table.kl * kl_coefficient)
        return cls(*(column.to(device, torch.float32) for column in columns))


@dataclass(frozen=True)
class MicroBatch:
    """Some (image, step) pairs: positions in the rollout and steps, int64 [M] on the policy's device."""

    rows: Tensor
    steps: Tensor


class Update:
    """All optimiser steps on one rollout.

    Args:
        policy, engine: the model and what steps it.
        rollout: this rank's trajectories.
        advantages: [n], one per image of the rollout, in its order.
        table, credit: the sampler and the credit table on the policy's device.
        config: the whole configuration (sections ``train`` and ``credit`` are used).
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        rollout: Rollout,
        advantages: Tensor,
        table: StepTable,
        credit: CreditRows,
        config: Config,
    ) -> None:
        self.policy, self.engine, self.rollout = policy, engine, rollout
        self.advantages = advantages.to(policy.device, torch.float32)
        self.table, self.credit, self.config = table, credit, config
        self.old_outputs = rollout.trajectories.outputs
        self.element_count = rollout.trajectories.latents[0, 0].numel()

    def run(self) -> Iterator[dict[str, float]]:
        """Yield the metrics of each optimiser step, equal on every rank."""
        mode = self.config.train.old_output
        if mode == "recompute":
            self._recompute_outputs()
        for inner in range(self.config.train.inner_epochs):
            for update in range(self.config.train.updates_per_epoch):
                first = inner == 0 and update == 0
                statistics = StepStatistics(self.table.steps, self.policy.device)
                for batch in self._micro_batches(update):
                    self._train_on(batch, statistics, first)
                outcome = self.engine.last_step
                yield statistics.metrics() | {
                    "policy/grad_norm": outcome.grad_norm,
                    "policy/update_applied": float(outcome.applied),
                    "optimizer/lr": outcome.lr,
                }

    def _micro_batches(self, update: int) -> Iterator[MicroBatch]:
        device, plan = self.policy.device, self.rollout.plan
        per_update, count = plan.steps.shape[1:]
        rows = torch.arange(update * per_update, (update + 1) * per_update).repeat_interleave(count).to(device)
        steps = plan.steps[update].flatten().to(device)
        size = self.config.train.micro_batch_size
        for chunk in zip(rows.split(size), steps.split(size), strict=True):
            yield MicroBatch(*chunk)

    def _train_on(self, batch: MicroBatch, statistics: StepStatistics, first: bool) -> None:
        detach = first and self.config.train.old_output == "detach"
        conditioning = select_rows(self.rollout.conditioning, batch.rows)
        latents = self.rollout.trajectories.latents[batch.rows, batch.steps]
        times = self.table.times[batch.steps]
        reference = None
        if self.config.credit.kl_coefficient > 0:
            with torch.no_grad(), self.policy.as_reference():
                reference = self.policy.predict(latents, times, conditioning)
        output = self.policy.predict(latents, times, conditioning)
        old_output = None if detach else self.old_outputs[batch.rows, batch.steps]
        result = self._loss(batch, output, old_output, reference)
        statistics.add(batch.steps, result)
        if first:
            self._measure_mismatch(batch, output.detach(), statistics)
        self.engine.backward(result.loss)
        self.engine.step()

    def _loss(
        self, batch: MicroBatch, output: Tensor, old_output: Tensor | None, reference: Tensor | None = None
    ) -> PolicyLoss:
        credit, steps, settings = self.credit, batch.steps, self.config.credit
        own_noise = old_output is None or self.old_outputs is not self.rollout.trajectories.outputs
        return policy_loss(
            output,
            old_output,
            self._endpoints(batch) if own_noise else self._noise_key(batch),
            credit.linear[steps],
            credit.quadratic[steps],
            credit.scale[steps],
            self.advantages[batch.rows],
            clip_range=settings.clip_range,
            objective=settings.objective,
            reduction=settings.reduction,
            reference=reference,
            kl=None if reference is None else credit.kl[steps],
        )

    def _endpoints(self, batch: MicroBatch) -> Endpoints:
        """The step's two ends: with another old output than the rollout's, another noise explains the same ``x'``."""
        latents, steps = self.rollout.trajectories.latents, batch.steps
        return Endpoints(
            latents[batch.rows, steps],
            latents[batch.rows, steps + 1],
            self.table.a[steps],
            self.table.b[steps],
            self.table.std[steps],
        )

    def _noise_key(self, batch: MicroBatch) -> NoiseKey:
        return NoiseKey(self.rollout.seeds[batch.rows], batch.steps * self.element_count)

    @torch.no_grad()
    def _recompute_outputs(self) -> None:
        """One forward of every pair as the update will batch it, before anything has changed."""
        outputs = self.rollout.trajectories.outputs.clone()
        for update in range(self.config.train.updates_per_epoch):
            for batch in self._micro_batches(update):
                outputs[batch.rows, batch.steps] = self.policy.predict(
                    self.rollout.trajectories.latents[batch.rows, batch.steps],
                    self.table.times[batch.steps],
                    select_rows(self.rollout.conditioning, batch.rows),
                )
        self.old_outputs = outputs

    @torch.no_grad()
    def _measure_mismatch(self, batch: MicroBatch, output: Tensor, statistics: StepStatistics) -> None:
        """How far the update's forward is from the rollout's on unchanged weights."""
        stored = self.rollout.trajectories.outputs[batch.rows, batch.steps]
        steps, settings = batch.steps, self.config.credit
        result = policy_loss(
            output,
            stored,
            self._noise_key(batch),
            self.credit.linear[steps],
            self.credit.quadratic[steps],
            self.credit.scale[steps],
            self.advantages[batch.rows],
            clip_range=settings.clip_range,
            reduction=settings.reduction,
        )
        change = (output.float() - stored.float()).flatten(1).norm(dim=1)
        relative = change / stored.float().flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        statistics.add_mismatch(steps, relative, result.log_ratio)
