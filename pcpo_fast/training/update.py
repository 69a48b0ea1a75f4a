"""The update: optimizer steps on a rollout and its advantages, in micro-batches of (image, step) pairs."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import fmean

import torch
from pcpo_kernels import Endpoints, NoiseKey, PolicyLoss, policy_loss
from torch import Tensor

from pcpo_fast.config.schema import Config
from pcpo_fast.distributed.collectives import world_size
from pcpo_fast.engine.engine import Engine
from pcpo_fast.method.step_tables import CreditRows, StepTable
from pcpo_fast.policies import Conditioning, Policy, PolicyOutput
from pcpo_fast.policies.lora import START, only_adapter
from pcpo_fast.profiling import profiler_ranges
from pcpo_fast.rollout.rollout import Rollout
from pcpo_fast.training.pairs import pairs_to_run
from pcpo_fast.training.step_statistics import StepStatistics


@dataclass(frozen=True)
class MicroBatch:
    """M (image, step) pairs, on the policy's device.

    Attributes:
        rows, steps: int64 [M], position in the rollout and step.
        counted: int64 [M], the step, or N for a pair that only fills the micro-batch and is not in the metrics.
        latents, times: the policy's inputs, [M, ...] and [M].
        conditioning: M rows.
        last: whether an optimizer step follows.
    """

    rows: Tensor
    steps: Tensor
    counted: Tensor
    latents: Tensor
    times: Tensor
    conditioning: Conditioning
    last: bool


class Update:
    """All optimizer steps on one rollout.

    Args:
        policy, engine: the model and its optimizer.
        rollout: this rank's trajectories.
        advantages: [n], one per image in the order of the rollout, or [n, N], one per image and step. A pair with
            advantage 0 has no policy gradient and is not run.
        table, credit: the sampler and credit tables on the policy's device.
        config: the run's configuration (sections ``train`` and ``credit`` are used).
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
        by_step = advantages if advantages.ndim == 2 else advantages[:, None].expand(-1, table.steps)
        self.advantages = by_step.to(policy.device, torch.float32)
        self.table, self.credit, self.config = table, credit, config
        self.stored = rollout.trajectories.outputs
        self.recomputed: Tensor | None = None
        self.element_count = rollout.trajectories.latents[0, 0].numel()
        self.masks = config.credit.objective == "divergence_mask"
        self.divergence = (table.b / table.std) ** 2 / 2  # of the Gaussians, independent of the credit rule
        self.silent = (by_step.float().cpu() == 0) | credit.silent
        if config.credit.kl_coefficient > 0:
            self.silent = torch.zeros_like(self.silent)  # the KL still has a gradient

    def run(self) -> Iterator[dict[str, float]]:
        """Yield the metrics of each optimizer step, the same on all ranks."""
        settings = self.config.train
        self.pairs = pairs_to_run(self.rollout.plan, self.silent, settings.pairs_at_once)
        if settings.old_output == "recompute":
            self.recomputed = self._recompute_outputs()
        for inner in range(settings.inner_epochs):
            distances = []
            for update in range(settings.updates_per_epoch):
                unchanged = inner == 0 and update == 0
                skipped = self.rollout.plan.steps[update].numel() - len(self.pairs[update].rows)
                statistics = StepStatistics(
                    self.table.steps,
                    self.policy.device,
                    divergence=self.masks,
                    left_out=skipped // settings.pairs_at_once,
                )
                with profiler_ranges.named("update"):
                    for batch in profiler_ranges.each("micro-step", self._micro_batches(update)):
                        self._train_on(batch, statistics, unchanged)
                    outcome, metrics = self.engine.last_step, statistics.metrics()
                distances.append(metrics.get("policy/log_ratio_abs", 0.0))
                yield metrics | {
                    "policy/inner_epoch": float(inner),
                    "policy/skipped_pairs": float(skipped * world_size()),
                    "policy/grad_norm": outcome.grad_norm,
                    "policy/update_applied": float(outcome.applied),
                    "optimizer/lr": outcome.lr,
                }
            if settings.max_log_ratio is not None and not fmean(distances) <= settings.max_log_ratio:
                return  # the policy has moved too far from the one that sampled

    def _micro_batches(self, update: int) -> Iterator[MicroBatch]:
        device, pairs, size = self.policy.device, self.pairs[update], self.config.train.pairs_at_once
        counted = pairs.steps.where(pairs.taught, self.table.steps)
        columns = (column.to(device).split(size) for column in (pairs.rows, pairs.steps, counted))
        left = len(pairs.rows) // size
        for rows, steps, counts in zip(*columns, strict=True):
            left -= 1
            latents, given = self.rollout.trajectories.latents[rows, steps], self.rollout.conditioning_of(rows)
            yield MicroBatch(rows, steps, counts, latents, self.table.times[steps], given, last=left == 0)

    def _predict(self, batch: MicroBatch) -> Tensor:
        return self.policy.predict(batch.latents, batch.times, batch.conditioning)

    def _train_on(self, batch: MicroBatch, statistics: StepStatistics, unchanged: bool) -> None:
        """Forward and backward of a micro-batch; ``unchanged``: the weights are still those of the rollout."""
        beta, reference = self.config.credit.kl_coefficient, None
        if beta > 0:
            with torch.no_grad(), self._as_reference(), profiler_ranges.named("forward"):
                reference = self._predict(batch)
        with profiler_ranges.named("forward"):
            halves = self.policy.predict_halves(batch.latents, batch.times, batch.conditioning)
        with profiler_ranges.named("loss"):
            result = self._loss(batch, halves, *self._old_side(batch, unchanged), reference)
        statistics.add(batch.counted, result if result.kl is None else result._replace(kl=result.kl / beta))
        if unchanged:
            compared = self.config.train.old_output == "rollout"
            self._measure_mismatch(batch, halves, statistics, result if compared else None)
        with profiler_ranges.named("backward"):
            self.engine.backward(result.loss, batch.last)
        self.engine.step()

    def _as_reference(self) -> AbstractContextManager[None]:
        if self.config.credit.kl_reference == "start":
            return only_adapter(self.policy.module, START)
        return self.policy.as_reference()

    def _old_side(self, batch: MicroBatch, unchanged: bool) -> tuple[Tensor | None, NoiseKey | Endpoints]:
        """The old output (None: the new one, detached), and the noise that gives ``x'`` with it."""
        if unchanged and self.config.train.old_output == "detach":
            return None, self._endpoints(batch)
        if self.recomputed is not None:
            return self.recomputed[batch.rows, batch.steps], self._endpoints(batch)
        return self.stored[batch.rows, batch.steps], self._noise_key(batch)

    def _endpoints(self, batch: MicroBatch) -> Endpoints:
        """The step's two ends, from which the noise is recovered if the old output is not the rollout's."""
        steps, table = batch.steps, self.table
        next_latents = self.rollout.trajectories.latents[batch.rows, steps + 1]
        return Endpoints(batch.latents, next_latents, table.a[steps], table.b[steps], table.std[steps])

    def _noise_key(self, batch: MicroBatch) -> NoiseKey:
        return NoiseKey(self.rollout.seeds[batch.rows], batch.steps * self.element_count)

    def _loss(
        self,
        batch: MicroBatch,
        halves: PolicyOutput,
        old_output: Tensor | None,
        noise: NoiseKey | Endpoints,
        reference: Tensor | None = None,
    ) -> PolicyLoss:
        credit, steps, settings = self.credit, batch.steps, self.config.credit
        unconditional, guidance_scale = halves.unconditional, None
        if unconditional is not None:
            guidance_scale = torch.full_like(credit.linear[steps], self.policy.cfg_scale)
        return policy_loss(
            halves.conditional,
            old_output,
            noise,
            credit.linear[steps],
            credit.quadratic[steps],
            credit.scale[steps],
            self.advantages[batch.rows, steps],
            clip_range=settings.divergence_threshold if self.masks else settings.clip_range,
            objective=settings.objective,
            reduction=settings.reduction,
            reference=reference,
            kl=None if reference is None else credit.kl[steps],
            divergence=self.divergence[steps] if self.masks else None,
            unconditional=unconditional,
            guidance_scale=guidance_scale,
        )

    @torch.no_grad()
    def _recompute_outputs(self) -> Tensor:
        """One forward of every pair to be run, in the update's micro-batches, before the first optimizer step."""
        outputs = self.stored.clone()
        for update in range(self.config.train.updates_per_epoch):
            for batch in self._micro_batches(update):
                outputs[batch.rows, batch.steps] = self._predict(batch)
        return outputs

    @torch.no_grad()
    def _measure_mismatch(
        self, batch: MicroBatch, halves: PolicyOutput, statistics: StepStatistics, result: PolicyLoss | None
    ) -> None:
        """Record how much the update's forward differs from the rollout's with the same weights.

        Args:
            batch, halves, statistics: the micro-batch, its outputs, and where to record.
            result: the loss, if it compared with the rollout's outputs.
        """
        stored = self.stored[batch.rows, batch.steps]
        output = self.policy.combine(halves)
        if result is None:
            result = self._loss(batch, halves, stored, self._noise_key(batch))
        change = (output.float() - stored.float()).flatten(1).norm(dim=1)
        relative = change / stored.float().flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        statistics.add_mismatch(batch.counted, relative, result)
