"""The training loop: rollout, rewards, advantages, update, evaluation, checkpoints."""

import copy
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from pcpo_fast.config.schema import AUTO, Config
from pcpo_fast.config.wording import counted
from pcpo_fast.distributed.agreement import check_agreement, check_alike
from pcpo_fast.distributed.collectives import (
    gather_objects,
    local_world_size,
    naming_lost_ranks,
    rank,
    shared_errors,
    sum_over_ranks,
    world_size,
)
from pcpo_fast.distributed.launching import launcher_rank
from pcpo_fast.distributed.preemption import Polled, Stopped, StopRequest
from pcpo_fast.engine.engine import MARGIN, Engine, check_deepspeed, start_distributed, stop_distributed
from pcpo_fast.errors import UserError
from pcpo_fast.files.content import digest
from pcpo_fast.method.advantages import RunningAdvantages
from pcpo_fast.method.step_advantages import StepAdvantages
from pcpo_fast.method.step_tables import EpochTables, RunTables
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.models import find_architecture
from pcpo_fast.planning.recomputing import device_memory, least_recomputing
from pcpo_fast.planning.sizes import fitted, is_auto, kept_sizes, with_sizes
from pcpo_fast.planning.states import Zero
from pcpo_fast.planning.utilization import utilization_of
from pcpo_fast.policies.automatic import as_begun, is_automatic, settle
from pcpo_fast.policies.compile_trial import Forwards, batch_sizes, keep_compiled
from pcpo_fast.policies.families import check_base_model, keep_reference, load_policy
from pcpo_fast.policies.low_precision import check_fp8
from pcpo_fast.policies.speed import checkpoint_blocks
from pcpo_fast.profiling import profiler_ranges
from pcpo_fast.profiling.recording import ProfileRequest, recorded
from pcpo_fast.reporting.grids import image_grid
from pcpo_fast.reporting.live_report import LiveReport
from pcpo_fast.reporting.progress import TrainingProgress, say
from pcpo_fast.reporting.records import RunRecorder
from pcpo_fast.rollout.branches import audited_images, audited_step, branch
from pcpo_fast.rollout.candidates import sample_candidates
from pcpo_fast.rollout.epoch_plan import EpochPlan, accumulation_steps, pairs_per_update, plan_epoch
from pcpo_fast.rollout.epoch_scoring import RolloutScoring
from pcpo_fast.rollout.rollout import Rollout, collect_rollout
from pcpo_fast.runs.checkpoint import load_checkpoint, save_checkpoint
from pcpo_fast.runs.input_record import ACCEPT, Input, check_unchanged, hashes, write_record
from pcpo_fast.runs.provenance import about_run, write_provenance
from pcpo_fast.runs.run_directory import RunStart, claim, open_run, read_summary, verified
from pcpo_fast.runs.run_lock import only_run
from pcpo_fast.training.collapse import CollapseMonitor, PredictionMonitor, SpreadMonitor
from pcpo_fast.training.heldout import HeldOut
from pcpo_fast.training.run_inputs import RunInputs, doubts, read_contents
from pcpo_fast.training.run_results import finish_run, write_captions, write_credit, write_gains
from pcpo_fast.training.update import Update

WORK = ("compute/forwards", "compute/trained", "compute/decodes", "compute/reward_calls")
"""An epoch's work, summed over ranks. It does not depend on the machine or the number of ranks, except for pairs that
fill the last micro-batches when others are skipped."""


def train(
    config: Config,
    resume: str = "auto",
    console: Console | None = None,
    profile: ProfileRequest | None = None,
    verify: bool = False,
) -> dict[str, Any]:
    """Train, and return the content of ``summary.json``.

    Args:
        config: the run.
        resume: "auto", "accept-changes", "never", or a checkpoint (docs/resuming.md).
        console: where progress is shown; None: stdout.
        profile: what to profile (docs/profiling.md); None: nothing.
        verify: read the files of model and rewards again, ignoring remembered hashes.

    Raises:
        UserError: an error that the user can fix; raised before the model is loaded where possible.
        Stopped: a signal stopped the run cleanly (:mod:`pcpo_fast.distributed.preemption`).
    """
    console = Console() if console is None else console
    start = claim(config, resume)
    if not start.finished:
        with only_run(Path(config.output_dir)) if launcher_rank() == 0 else nullcontext():
            start = claim(config, resume)  # again, now with the lock: another run may have continued it meanwhile
            if not start.finished:
                return _train(config, resume, start, console, profile, verify)
    _announce(start, config, console)
    return read_summary(Path(config.output_dir))


def _train(
    config: Config, resume: str, start: RunStart, console: Console, profile: ProfileRequest | None, verify: bool
) -> dict[str, Any]:
    check_deepspeed(config)  # as far as possible without the model
    inputs = RunInputs.load(config)
    device = start_distributed(config.distributed)
    try:
        with naming_lost_ranks():
            check_agreement(config)
            _, family = check_base_model(config)  # before gigabytes of it are read
            family.check_training(config.model)
            contents = read_contents(config, inputs, anew=verify)
            check_alike(hashes(contents))
            start = verified(gather_objects(start)[0])  # the first rank, which holds the lock, decides for all
            accepted = _accepted_changes(start, config, contents, resume)
            _announce(start, config, console, accepted)
            with recorded(profile, config, start.epoch, console):
                return Trainer(config, start, inputs, device, console, contents).run()
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU ran out of memory: lower rollout.batch_size, train.micro_batch_size or evaluation.batch_size, "
            "set model.gradient_checkpointing=true, or use more GPUs; `pcpo-fast plan --config FILE --gpus N` "
            f"shows what fits ({str(error).splitlines()[0]})"
        ) from error
    finally:
        # A rank that fails alone must not wait for the others: it exits, and the launcher stops them.
        if world_size() == 1 or sys.exc_info()[0] in (None, Stopped):
            stop_distributed()


def _accepted_changes(start: RunStart, config: Config, contents: dict[str, Input], resume: str) -> list[str]:
    """Accepted changes of a resumed run's inputs since it started; all ranks must call it.

    Raises:
        UserError: inputs have changed and the changes are not accepted.
    """
    found: list[str] = []
    with shared_errors():
        if rank() == 0 and start.checkpoint is not None and not start.fresh:
            found = check_unchanged(Path(config.output_dir), contents, accept=resume == ACCEPT)
    return found


def _announce(start: RunStart, config: Config, console: Console, accepted: Sequence[str] = ()) -> None:
    if launcher_rank() != 0:
        return
    folder = config.output_dir
    if accepted:
        text = f"warning: continuing with inputs whose content has changed: {'; '.join(accepted)}"
        say(console, text)
    for path, problem in start.damaged:
        text = f"warning: checkpoint {path} is damaged ({problem}) and is skipped; the one before it is used"
        say(console, text)
    if start.finished:
        text = (
            f"The run in {folder} is finished ({counted(start.epoch, 'epoch')}): there is nothing left to train. "
            "Raise train.epochs to continue it, or choose another output_dir for a new run."
        )
    elif start.checkpoint is not None:
        text = f"Resuming after epoch {start.epoch} from {start.checkpoint}"
    elif start.restarted:
        text = f"{folder} holds a run without a checkpoint: it starts again from the beginning"
    else:
        return
    say(console, text)


class Trainer:
    """A training run: model, engine, tables, rewards and monitors, and the loop over epochs."""

    def __init__(
        self,
        config: Config,
        start: RunStart,
        inputs: RunInputs,
        device: torch.device,
        console: Console,
        contents: dict[str, Input],
    ) -> None:
        self.config, self.start, self.device, self.contents = config, start, device, contents
        self.rewards, self.prompts = inputs.rewards, inputs.prompts
        self.folder = Path(config.output_dir)
        self.progress = TrainingProgress(config.train.epochs, start.epoch, rank() == 0, console=console)
        if config.rollout.candidates_in_fp8:
            check_fp8(device)
        in_parts, compiles = Zero.of(config).stage == 3, config.model.compile
        config = self.config = self._settled(config, in_parts)
        for doubt in doubts(config, inputs.prompts, inputs.heldout, world_size()):
            self.progress.message(f"warning: {doubt}")
        self.progress.message(f"Loading {config.model.path}")
        self.progress.message(f"Encoding {counted(len(inputs.texts), 'prompt')}")
        self.policy = load_policy(config, device, inputs.texts, torch.device("cpu") if in_parts else None)
        self.tables = RunTables(config, self.policy.schedule(config.sampler.steps), device)
        config = self.config = self._sized(config)
        accumulation = accumulation_steps(config, self.tables.trained_count, world_size())
        keep_reference(self.policy, config, device)
        if config.model.gradient_checkpointing and config.model.checkpointed_share is None:
            self._choose_recomputing()
        self.engine = Engine(self.policy.module, config, accumulation)
        if compiles == AUTO and config.model.compile:
            config = self.config = self._compiled(config, [prompt.text for prompt in inputs.heldout])
        self.heldout = HeldOut.of(config, self.policy, self.tables, inputs)
        patience = timedelta(seconds=config.distributed.timeout) + MARGIN
        self.stop = StopRequest(config.checkpoint.grace, patience, self.progress.message)
        self.policy.forward_module = Polled(self.engine.module, self.stop.poll)
        advantage = config.advantage
        self.running = RunningAdvantages(advantage.buffer_size, advantage.min_count, advantage.epsilon)
        self.stepwise = StepAdvantages(advantage, self.tables.transitions.steps)
        self.skipped_in_a_row = 0
        self.warned_of_mismatch = False
        self.collapse = CollapseMonitor(config.evaluation.min_diversity)
        self.spread, self.predictions = SpreadMonitor(), PredictionMonitor(self.stepwise)
        self.utilization = utilization_of(config, self.device, self.progress.message, lambda: self.costs)
        self.leads: dict[str, tuple[float, float]] = {}  # of the latest epoch's predictions, by step
        self.heldout_reward: float | None = None  # of the current weights
        self.done = self.saved = start.epoch  # epochs trained, and epochs in the newest checkpoint
        # Buffers, spreads and slopes of other rewards say nothing about these.
        self.rewarded = digest(
            [config.scoring.normalize, *(reward.model_dump(mode="json") for reward in config.rewards)]
        )
        if start.checkpoint is not None:
            state = load_checkpoint(start.checkpoint, self.engine)
            if state.get("rewarded", self.rewarded) == self.rewarded:
                self.running.load_state_dict(state["running_advantages"])
                if "step_advantages" in state:
                    self.stepwise.load_state_dict(state["step_advantages"])
                if "predictions" in state:
                    self.predictions.load_state_dict(state["predictions"])
                self.leads = state.get("leads", {})
            else:
                self.progress.message(
                    "The checkpoint was trained with other rewards: its statistics of them (running advantages, "
                    "spreads and slopes of per-step credit) are discarded"
                )
            self.skipped_in_a_row = state["skipped_in_a_row"]
            self.collapse.before = state.get("diversity_before")
        self.loop_state = self._loop_state()

    @cached_property
    def costs(self) -> ModelCosts:
        """Operations and memory of the run's model, counted at the first use.

        Raises:
            UserError: the architecture of ``model.path`` is unknown.
        """
        return ModelCosts(find_architecture(self.config.model), self.config.model)

    def _settled(self, config: Config, in_parts: bool) -> Config:
        """The run with automatic attention and compilation settled: as it began where it is resumed."""
        if not self.start.fresh:
            config = gather_objects(as_begun(config, self.folder, partitioned=in_parts))[0]
        if is_automatic(config):
            config, chosen = settle(config, *check_base_model(config), self.device, partitioned=in_parts)
            self.progress.message(f"Chosen: {chosen}")
        return config

    def _sized(self, config: Config) -> Config:
        """The run with its automatic sizes resolved, on all ranks alike: as it began where it is resumed."""
        pairs = pairs_per_update(config, self.tables.trained_count, world_size())
        if not is_auto(config):
            return config
        kept = gather_objects(None if self.start.fresh else kept_sizes(self.folder, pairs))[0]
        if kept is not None:
            config = with_sizes(config, *kept)
        else:
            memory = gather_objects(device_memory(self.device, 1)) if self.device.type == "cuda" else [None]
            costs = self.costs if self.device.type == "cuda" else None  # takes seconds, and a CPU needs none
            config = fitted(config, pairs, world_size(), min(memory), costs)
        sizes = (
            f"train.micro_batch_size={config.train.pairs_at_once} rollout.batch_size={config.rollout.images_at_once}"
        )
        self.progress.message(f"Sizes: {sizes}")
        return config

    def _compiled(self, config: Config, heldout: Sequence[str]) -> Config:
        """The run with automatic compilation only where its batches run compiled, on all ranks alike."""
        epoch, settings, size = self.start.epoch, config.rollout, config.rollout.images_at_once
        plan = plan_epoch(config, len(self.prompts), self.tables.at(epoch).steps, epoch, rank(), world_size())
        candidates = -(-len(plan.prompts) * (settings.candidates or 0) // world_size())
        evaluated = -(-len(heldout) * config.evaluation.images_per_prompt // world_size())
        forwards = Forwards(
            sampled=batch_sizes(plan.images.numel(), size),
            candidates=batch_sizes(candidates, size),
            evaluated=batch_sizes(evaluated, config.evaluation.batch_size),
            compared={config.train.pairs_at_once} if config.train.old_output == "recompute" else (),
            trained=config.train.pairs_at_once,
        )
        self.progress.message("Compiling the blocks")
        given, seen = self._encode(plan.prompts.tolist()), self.policy.encode(heldout) if heldout else {}
        with self.engine.offloaded(settings.offload_optimizer):
            problem = keep_compiled(self.policy, settings, given, seen, forwards)
        if problem is None:
            return config
        self.progress.message(f"Chosen instead: model.compile=false ({problem})")
        return config.model_copy(update={"model": config.model.model_copy(update={"compile": False})})

    def _choose_recomputing(self) -> None:
        """Recompute as few blocks as the device's memory allows."""
        memory = device_memory(self.device, local_world_size())
        chosen = least_recomputing(self.config, world_size(), memory, self.costs)
        network = self.policy.module
        blocks, selective = self.policy.recomputed_blocks(network), chosen.kind == "selective"
        checkpoint_blocks(network, blocks, chosen.share, selective=selective)
        self.progress.message(f"model.checkpointed_share: {chosen}")

    def run(self) -> dict[str, Any]:
        """Evaluate, train the remaining epochs, and write the results."""
        config, first, logging = self.config, self.start.epoch, self.config.logging
        with shared_errors():
            if rank() == 0:
                open_run(config, self.start)
                write_record(self.folder, self.contents, first)
                write_provenance(self.folder, config, first)
                write_credit(self.folder, config.sampler.name, self.tables.transitions, self.tables.credit)
                if self.heldout.prompts:
                    write_captions(self.folder, self.heldout.captions)
        self.recorder = RunRecorder(
            self.folder,
            tensorboard=logging.tensorboard,
            wandb=logging.wandb,
            trackio=logging.trackio,
            about=about_run(self.folder, config),
            enabled=rank() == 0,
        )
        shown = logging.live_report and rank() == 0
        live = LiveReport(self.folder, self.progress.message, self.progress.warnings, shown)
        with self.stop, self.recorder, self.progress:
            self.recorder.truncate_after(first)
            try:
                self._evaluate(first)
                for epoch in range(first, config.train.epochs):
                    if self.collapse.reason:
                        break
                    with profiler_ranges.named("epoch"):
                        self._epoch_and_what_is_due(epoch)
                    live.look()
                    self.stop.poll()
            except Stopped:
                if self.stop.whole and self.done > self.saved:
                    self._save()
                raise
            self.progress.phase("report")
            return finish_run(self.folder, self.policy, self.engine, self.heldout, self.recorder, self.done)

    def _epoch_and_what_is_due(self, epoch: int) -> None:
        metrics = self._epoch(epoch)
        self.recorder.log("epoch", metrics, epoch=epoch)
        self.progress.epoch(metrics)
        self.heldout_reward, self.loop_state = None, self._loop_state()
        self.done, self.stop.whole = epoch + 1, True
        last, config = self.done == self.config.train.epochs, self.config
        if self._evaluation_is_due(self.done):
            if rank() == 0 and config.advantage.steps != "final":
                write_gains(self.folder, self.stepwise.gain_correlations())
            self._evaluate(self.done)
        if last or self.collapse.reason or (config.checkpoint.every and self.done % config.checkpoint.every == 0):
            self._save()

    def _evaluation_is_due(self, done: int) -> bool:
        """Whether to evaluate after ``done`` epochs."""
        every = self.config.evaluation.every
        return done == self.config.train.epochs or bool(every and done % every == 0)

    def _loop_state(self) -> dict[str, Any]:
        """The loop's state after a complete epoch; an interrupted epoch does not change it."""
        return {
            "running_advantages": copy.deepcopy(self.running.state_dict()),
            "step_advantages": self.stepwise.state_dict(),
            "predictions": self.predictions.state_dict(),
            "leads": self.leads,
            "rewarded": self.rewarded,
            "skipped_in_a_row": self.skipped_in_a_row,
            "diversity_before": self.collapse.before,
        }

    def _epoch(self, epoch: int) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clock, before = [time.perf_counter()], self._work()
        self.progress.phase("rollout")
        tables = self.tables.at(epoch)
        plan = plan_epoch(self.config, len(self.prompts), tables.steps, epoch, rank(), world_size())
        settings, seed = self.config.rollout, self.config.seed
        scoring = RolloutScoring(
            self.config, self.rewards, self.prompts, self.running, self.stepwise, tables, plan, self.device
        )
        if rank() == 0 and self._evaluation_is_due(epoch + 1):
            scoring.keep_strips()
        with self.engine.offloaded(settings.offload_optimizer):
            with self.policy.sampling(settings), profiler_ranges.named("rollout"):
                chosen = self._candidates(scoring, plan, tables)
                candidates_done = time.perf_counter()
                rollout = collect_rollout(
                    self.policy,
                    self._encode,
                    plan,
                    settings,
                    tables.sampler,
                    seed,
                    scoring.add,
                    scoring.predicted,
                    chosen,
                )
                self._audit(scoring, rollout, tables, epoch)
            clock.append(self._now())
            self.progress.phase("reward")
            with self.stop.interruptible(), profiler_ranges.named("reward"):
                scored = scoring.finish(rollout.images)
        strips = scoring.strips_of(rollout.images)
        if strips is not None:
            rows, captions = strips
            sheet = image_grid(rows.flatten(0, 1), rows.shape[1], captions * len(rows))
            self.recorder.image(f"predictions_{epoch:04d}", sheet, epoch)
        metrics = scored.metrics
        if chosen is not None:
            metrics["time/candidates"] = candidates_done - clock[0]
        self.leads = scored.leads
        if scored.warning:
            self.progress.message(f"warning: {scored.warning}")
        for text in self.spread.look(scored.equal):
            self.progress.message(f"warning: {text}")
        clock.append(self._now())
        self.progress.phase("update")
        metrics |= self._update(rollout, scored.advantages, tables, epoch)
        if self.config.window.size:
            metrics["sampler/window_start"] = float(tables.steps[0])
        clock.append(self._now())
        work = sum_over_ranks((self._work() - before).to(self.device)).tolist()
        metrics |= dict(zip(WORK, work, strict=True))
        for name, begin, end in zip(("rollout", "reward", "update"), clock, clock[1:], strict=False):
            metrics[f"time/{name}"] = end - begin
        metrics["throughput/images_per_second"] = self.config.images_per_epoch / (clock[-1] - clock[0])
        if self.utilization is not None:
            forwards, trained, decodes, _ = work
            seconds = clock[-1] - clock[0]
            metrics |= self.utilization.metrics(forwards, trained, decodes, seconds, world_size())
        if self.device.type == "cuda":
            metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return metrics

    def _work(self) -> Tensor:
        """This rank's work so far, float64 [4] in the order of :data:`WORK`."""
        work = self.policy.work
        return torch.tensor([work.forwards, work.trained, work.decodes, self.rewards.calls], dtype=torch.float64)

    def _candidates(self, scoring: RolloutScoring, plan: EpochPlan, tables: EpochTables) -> Tensor | None:
        """With ``rollout.candidates``, sample them and return which are trained, int64 [P, images_per_prompt]."""
        if self.config.rollout.candidates is None:
            return None
        with self.policy.cheaper(self.config.rollout), profiler_ranges.named("candidates"):
            scoring.candidates = sample_candidates(
                self.policy,
                self._encode,
                self.config,
                tables.sampler,
                plan.prompts,
                self.prompts,
                plan.epoch,
                self.rewards,
            )
        return scoring.candidates.chosen

    def _audit(self, scoring: RolloutScoring, rollout: Rollout, tables: EpochTables, epoch: int) -> None:
        """Every ``advantage.audit_every`` epochs, measure a step's effect with branches of a few images."""
        settings = self.config.advantage
        if scoring.predicted is None or settings.audit_every == 0 or epoch % settings.audit_every:
            return
        scored = scoring.predicted.steps
        step = audited_step(scored, tables.steps, epoch, self.config.seed)
        if step is not None:
            chosen = audited_images(rollout.plan.images.shape[1], settings.audit_images, world_size())
            size = self.config.rollout.images_at_once
            found = branch(self.policy, rollout, tables.sampler, scored, step, chosen, self.config.seed, size)
            scoring.add_branches(found)

    def _encode(self, prompts: list[int]) -> dict[str, Tensor]:
        return self.policy.encode([self.prompts[index].text for index in prompts])

    def _update(self, rollout: Rollout, advantages: Tensor, tables: EpochTables, epoch: int) -> dict[str, float]:
        update = Update(self.policy, self.engine, rollout, advantages, tables.sampler, tables.credit, self.config)
        records: list[dict[str, float]] = []
        for index, record in enumerate(update.run()):
            self.stop.whole = False
            applied = record.pop("policy/update_applied") == 1.0
            record["policy/skipped_updates"] = float(not applied)
            self.recorder.log("update", record, epoch=epoch, update=index)
            records.append(record)
            self._count_skipped(applied, record["policy/loss"])
        # Skipped updates have no finite metrics: they are counted, but not included in means.
        applied_records = [record for record in records if not record["policy/skipped_updates"]]
        metrics = _mean_over_updates(applied_records or records)
        metrics |= _by_inner_epoch(applied_records)
        planned = self.config.train.inner_epochs * self.config.train.updates_per_epoch
        metrics["policy/stale_updates"] = float(planned - len(records))
        for name in ("policy/skipped_updates", "policy/skipped_pairs"):
            metrics[name] = sum(record[name] for record in records)
        self._warn_of_mismatch(metrics, epoch)
        return metrics

    def _count_skipped(self, applied: bool, loss: float) -> None:
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.config.train.max_skipped_updates:
            where = "gradient" if torch.isfinite(torch.tensor(loss)) else "loss"
            raise UserError(
                f"training stopped: the {where} was not finite in {counted(self.skipped_in_a_row, 'update')} in a row "
                "(train.max_skipped_updates); the weights are those from before the first of them. Check the rewards, "
                "lower optimizer.lr, or resume from an earlier checkpoint in another output_dir (--resume CHECKPOINT)"
            )

    def _warn_of_mismatch(self, metrics: dict[str, float], epoch: int) -> None:
        """Warn once if rollout and update disagree enough to affect clipping or the mask."""
        credit = self.config.credit
        name, what, whole, limit = "mismatch_log_ratio", "|log-ratio|", "clip range", credit.clip_range / 10
        if credit.objective == "divergence_mask":
            name, what, whole = "mismatch_divergence", "divergence", "threshold"
            limit = credit.divergence_threshold / 10
        mismatch = metrics.get(f"rollout/{name}", 0.0)
        if mismatch > limit and not self.warned_of_mismatch:
            self.warned_of_mismatch = True
            self.progress.message(
                f"warning: in epoch {epoch} rollout and update disagree before the first optimizer step: mean "
                f"{what} {mismatch:.1e} is above a tenth of the {whole} ({limit:.1e}). Use the same attention "
                "backend and batch shapes in both, or train.old_output=recompute. Later epochs: "
                f"rollout/{name}."
            )

    def _evaluate(self, epoch: int) -> None:
        if not self.heldout.prompts:
            return
        self.progress.phase("evaluation")
        with profiler_ranges.named("evaluation"), self.engine.averaged():
            metrics, grid = self.heldout.evaluate()
        self.heldout_reward = metrics["heldout/reward/mean"]
        for text in self.predictions.look(self.leads, self.heldout_reward):
            self.progress.message(f"warning: {text}")
        self.leads = {}  # looked at: an evaluation that is made again after resuming is not another one
        is_first = epoch == 0 or (self.start.fresh and epoch == self.start.epoch)
        self.collapse.look(metrics.get("heldout/diversity"), epoch, is_first=is_first)
        self.loop_state = self._loop_state()
        if rank() == 0:
            if is_first:
                self.heldout.keep_as_first()
            metrics |= self.heldout.moved()
        self.recorder.log("evaluation", metrics, epoch=epoch)
        self.recorder.image(f"epoch_{epoch:04d}", grid, epoch)
        self.progress.evaluation(metrics)
        if self.collapse.reason:
            self.progress.message(self.collapse.reason)

    def _save(self) -> None:
        self.progress.phase("checkpoint")
        began, folder, settings = time.monotonic(), self.folder / "checkpoints", self.config.checkpoint
        state = self.loop_state | {"heldout_reward": self.heldout_reward}
        with profiler_ranges.named("checkpoint"):
            save_checkpoint(folder, self.engine, self.policy, self.done, state, settings.keep, settings.keep_best)
        self.saved = self.done
        self.stop.reserve = max(self.stop.reserve, 1.5 * (time.monotonic() - began))

    def _now(self) -> float:
        """The time after the device has finished its work; synchronizes once per phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _by_inner_epoch(records: list[dict[str, float]]) -> dict[str, float]:
    """Metrics per pass over the rollout, which show the drift from the sampling policy; empty with a single pass."""
    passes = sorted({int(record["policy/inner_epoch"]) for record in records})
    if len(passes) < 2:
        return {}
    metrics = {}
    for inner in passes:
        means = _mean_over_updates([record for record in records if record["policy/inner_epoch"] == inner])
        for name in ("clip_fraction", "log_ratio_abs", "log_ratio_std", "taylor_error"):
            if f"policy/{name}" in means:
                metrics[f"policy/{name}_inner_{inner}"] = means[f"policy/{name}"]
    return metrics


def _mean_over_updates(records: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for record in records for name in record if name != "policy/inner_epoch")
    return {
        name: sum(values) / len(values)
        for name in names
        if (values := [record[name] for record in records if name in record])
    }
