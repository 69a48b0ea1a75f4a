"""The training loop: rollout, reward, advantage, update; then the records of it."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.advantages import RunningAdvantages, compute_advantages
from pcpo_fast.checkpoint import load_checkpoint, save_checkpoint
from pcpo_fast.config import Config
from pcpo_fast.distributed import barrier, gather_rows, rank, world_size
from pcpo_fast.engine import Engine, start_distributed, stop_distributed
from pcpo_fast.epoch_plan import accumulation_steps, plan_epoch
from pcpo_fast.errors import UserError
from pcpo_fast.heldout import HeldOut
from pcpo_fast.policies.loading import keep_reference, load_policy
from pcpo_fast.prompts import load_prompts
from pcpo_fast.reporting.progress import TrainingProgress
from pcpo_fast.reporting.records import RunRecorder
from pcpo_fast.rewards import RewardSet
from pcpo_fast.rollout import Rollout, StepTable, collect_rollout
from pcpo_fast.run_directory import Start, claim, read_summary, write_config
from pcpo_fast.run_results import finish_run, write_credit
from pcpo_fast.samplers import build_credit, build_transitions, steps_to_train
from pcpo_fast.update import CreditRows, Update


def train(config: Config, resume: str = "auto") -> dict[str, Any]:
    """Train, and return what ``summary.json`` holds.

    Args:
        config: the run.
        resume: "auto", "never", or a checkpoint (docs/resuming.md).

    Raises:
        UserError: something the user can mend, in one sentence.
    """
    start = claim(config, resume)
    if start.finished:
        return read_summary(Path(config.output_dir))
    device = start_distributed()
    try:
        return Trainer(config, start, device).run()
    finally:
        stop_distributed()


class Trainer:
    """Everything that a run needs, loaded once."""

    def __init__(self, config: Config, start: Start, device: torch.device) -> None:
        self.config, self.start, self.device = config, start, device
        self.folder = Path(config.output_dir)
        self.rewards = RewardSet(config.rewards)
        self.prompts = load_prompts(config.prompts.train)
        self.policy = load_policy(config, device)
        self.transitions = build_transitions(config.sampler, self.policy.scheduler_times(config.sampler.steps))
        self.credit = build_credit(config, self.transitions)
        self.steps = steps_to_train(config, self.transitions)
        self.table = StepTable.of(self.transitions, device)
        self.rows = CreditRows.of(self.credit, config.credit.kl_coefficient, device)
        self.heldout = HeldOut.load(config, self.policy, self.transitions, self.rewards)
        self.policy.prepare_prompts([prompt.text for prompt in self.prompts] + self.heldout.texts)
        keep_reference(self.policy, config)
        self.engine = Engine(self.policy.module, config, accumulation_steps(config, len(self.steps), world_size()))
        self.policy.forward_module = self.engine.module
        self.running = RunningAdvantages()
        self.skipped_in_a_row = 0
        if start.checkpoint is not None:
            state = load_checkpoint(start.checkpoint, self.engine)
            self.running.load_state_dict(state["running_advantages"])
            self.skipped_in_a_row = state["skipped_in_a_row"]

    def run(self) -> dict[str, Any]:
        """All epochs that are left, an evaluation before and after, and the results."""
        config, first = self.config, self.start.epoch
        if rank() == 0:
            write_config(config)
            write_credit(self.folder, config.sampler.name, self.transitions, self.credit)
        barrier()
        logging = config.logging
        recorder = RunRecorder(self.folder, tensorboard=logging.tensorboard, wandb=logging.wandb, enabled=rank() == 0)
        with recorder, TrainingProgress(config.train.epochs, first, rank() == 0) as self.progress:
            self.recorder = recorder
            recorder.truncate_after(first)
            if self.start.restarted:
                self.progress.message("The directory holds a run that left no checkpoint: it begins again.")
            self._evaluate(first)
            for epoch in range(first, config.train.epochs):
                metrics = self._epoch(epoch)
                recorder.log("epoch", metrics, epoch=epoch)
                self.progress.epoch(metrics)
                done, last = epoch + 1, epoch + 1 == config.train.epochs
                if last or (config.evaluation.every and done % config.evaluation.every == 0):
                    self._evaluate(done)
                if last or (config.checkpoint.every and done % config.checkpoint.every == 0):
                    self._save(done)
            self.progress.phase("report")
            return finish_run(self.folder, self.policy, self.engine, self.heldout)

    def _epoch(self, epoch: int) -> dict[str, float]:
        clock = [time.perf_counter()]
        self.progress.phase("rollout")
        plan = plan_epoch(self.config, len(self.prompts), self.steps, epoch, rank(), world_size())
        rollout = collect_rollout(self.policy, self._encode, plan, self.config.rollout, self.table, self.config.seed)
        clock.append(self._now())
        self.progress.phase("reward")
        advantages, metrics = self._score(rollout)
        clock.append(self._now())
        self.progress.phase("update")
        metrics |= self._update(rollout, advantages, epoch)
        clock.append(self._now())
        for name, begin, end in zip(("rollout", "reward", "update"), clock, clock[1:], strict=False):
            metrics[f"time/{name}"] = end - begin
        metrics["throughput/images_per_second"] = self.config.images_per_epoch / (clock[-1] - clock[0])
        if self.device.type == "cuda":
            metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return metrics

    def _encode(self, prompts: list[int]) -> dict[str, Tensor]:
        return self.policy.encode([self.prompts[index].text for index in prompts])

    def _score(self, rollout: Rollout) -> tuple[Tensor, dict[str, float]]:
        """This rank's advantages, from the rewards of all ranks' images; and the reward metrics."""
        numbers = rollout.plan.images.flatten()
        groups = numbers // self.config.rollout.images_per_prompt
        prompts = [self.prompts[rollout.plan.prompts[group]] for group in groups.tolist()]
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
        scores = self.rewards.score(rollout.images, texts, metadata, evaluation=False)
        columns = [scores.total, *scores.components.values()]
        table = torch.stack([numbers.double(), *(column.double().cpu() for column in columns)], dim=1)
        everyone = gather_rows(table.to(self.device)).cpu()
        everyone = everyone[everyone[:, 0].argsort()]  # by image number: the same order for every world size
        total = everyone[:, 1]
        advantages = self._advantages(total, rollout.plan.prompts)
        spread = total.reshape(-1, self.config.rollout.images_per_prompt).std(dim=1, unbiased=False).mean()
        metrics = {"reward/mean": float(total.mean()), "reward/std": float(total.std(unbiased=False))}
        metrics["reward/group_std"] = float(spread)
        metrics |= {f"reward/{name}": float(everyone[:, i].mean()) for i, name in enumerate(scores.components, start=2)}
        return advantages[numbers], metrics

    def _advantages(self, rewards: Tensor, prompts: Tensor) -> Tensor:
        settings = self.config.advantage
        groups = torch.arange(len(prompts)).repeat_interleave(self.config.rollout.images_per_prompt)
        if settings.normalization == "running":
            texts = [self.prompts[prompts[group]].text for group in groups.tolist()]
            return self.running.compute(rewards, texts, settings.clip)
        return compute_advantages(rewards, groups, settings.normalization, settings.clip)

    def _update(self, rollout: Rollout, advantages: Tensor, epoch: int) -> dict[str, float]:
        update = Update(self.policy, self.engine, rollout, advantages, self.table, self.rows, self.config)
        records: list[dict[str, float]] = []
        for index, record in enumerate(update.run()):
            applied = record.pop("policy/update_applied") == 1.0
            record["policy/skipped_updates"] = float(not applied)
            self.recorder.log("update", record, epoch=epoch, update=index)
            records.append(record)
            self._count_skipped(applied, record["policy/loss"])
        metrics = _mean_over_updates(records)
        metrics["policy/skipped_updates"] = sum(record["policy/skipped_updates"] for record in records)
        self._warn_of_mismatch(metrics, epoch)
        return metrics

    def _count_skipped(self, applied: bool, loss: float) -> None:
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.config.train.max_skipped_updates:
            where = "gradient" if torch.isfinite(torch.tensor(loss)) else "loss"
            raise UserError(
                f"training stopped: the {where} was not finite in {self.skipped_in_a_row} updates in a row "
                "(train.max_skipped_updates); the weights are those before the first of them. Look at the rewards, lower "
                "optimizer.lr, or resume from an earlier checkpoint"
            )

    def _warn_of_mismatch(self, metrics: dict[str, float], epoch: int) -> None:
        """Say so when rollout and update disagree by enough to touch the clipping."""
        mismatch, limit = metrics.get("rollout/mismatch_log_ratio", 0.0), self.config.credit.clip_range / 10
        if mismatch > limit and not self._warned:
            self._warned = True
            self.progress.message(
                f"Warning: in epoch {epoch} rollout and update disagree before the first optimiser step: mean |log-ratio| "
                f"{mismatch:.1e} is above a tenth of the clip range ({limit:.1e}). Use the same attention backend and "
                "batch shapes in both, or train.old_output=recompute. Later epochs: rollout/mismatch_log_ratio."
            )

    _warned = False

    def _evaluate(self, epoch: int) -> None:
        if not self.heldout.prompts:
            return
        self.progress.phase("evaluation")
        metrics, grid = self.heldout.evaluate()
        self.recorder.log("evaluation", metrics, epoch=epoch)
        self.recorder.image(f"epoch_{epoch:04d}", grid, epoch)
        if epoch == 0 and rank() == 0:
            self.heldout.keep_as_first()
        self.progress.evaluation(metrics)

    def _save(self, epoch: int) -> None:
        self.progress.phase("checkpoint")
        state = {"running_advantages": self.running.state_dict(), "skipped_in_a_row": self.skipped_in_a_row}
        folder = self.folder / "checkpoints"
        save_checkpoint(folder, self.engine, self.policy, epoch, state, self.config.checkpoint.keep)

    def _now(self) -> float:
        """A time stamp at which the device's work is done: one wait per phase, none within."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _mean_over_updates(records: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for record in records for name in record)
    return {
        name: sum(values) / len(values)
        for name in names
        if (values := [record[name] for record in records if name in record])
    }
