"""The numbers that a run is reduced to: what they are called and mean, and whether more is better."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pcpo_fast.comparison.curves import Reached, first_reached, interpolated, last_value, trailing_mean, until
from pcpo_fast.comparison.reading import WORK, RunCurves
from pcpo_fast.reporting.series import Series

Metric = Literal["training", "heldout"]
Primary = Literal["heldout_area", "heldout_final", "reward_over_epochs", "reward_final"]
"""Measures that may decide: those that need no target."""

BACKWARD = 2
"""Number of forward passes that a backward pass counts as."""

SPIKE = 3.0
"""A gradient norm above this many times the run's median is a spike."""

WARM_UP = 0.1
"""Share of the updates, at the beginning, that gradient norms are not taken from."""


class Costs(BaseModel):
    """What the parts of the work cost, in passes of an image through the network without a gradient.

    Attributes:
        decode: an image decoded.
        reward: an image scored by one reward.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    decode: float = Field(1.0, description="a number")
    reward: float = Field(1.0, description="a number")


@dataclass(frozen=True)
class Reading:
    """How runs are read: the same for every run of a comparison.

    Attributes:
        horizon: epochs that count, the same for all runs.
        target: the reward whose reaching is timed; None: there is none.
        metric: the reward that is compared with the target, of the rollouts or of the held-out evaluations.
        smoothing: epochs of the trailing mean over training rewards.
        at_epoch: an epoch at which rewards are also compared; None: only at the end.
        costs: what the parts of the work cost.
        compute: the work that all runs have done, in forward passes; None where runs have not counted theirs.
        seconds: the time that all runs have trained for; None where a run does not say.
        kl: the KL from the base model that all runs have reached that measured it; None where none has.
    """

    horizon: int
    target: float | None
    metric: Metric
    smoothing: int
    at_epoch: int | None
    costs: Costs = field(default_factory=Costs)
    compute: float | None = None
    seconds: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Measure:
    """One number per run.

    Attributes:
        key: its name in comparison.json.
        label: its name in a table.
        better: which direction is better; None if neither is.
        form: how a value is written.
        meaning: one sentence.
        of: computes it; None where the run does not say.
    """

    key: str
    label: str
    better: Literal["higher", "lower"] | None
    form: str
    meaning: str
    of: Callable[[RunCurves, Reading], float | None]

    def text(self, value: float, *, signed: bool = False) -> str:
        """A value as shown in a table."""
        return format(value, f"{'+' if signed else ''}{self.form}")


def smoothed_reward(run: RunCurves, reading: Reading) -> Series:
    """Training reward until the horizon, as its trailing mean."""
    return trailing_mean(until(run.reward, reading.horizon - 1), reading.smoothing)


def timed(run: RunCurves, reading: Reading) -> Reached | None:
    """When the run reached the target; None without one, or where the run has no such reward."""
    heldout = reading.metric == "heldout"
    curve = run.heldout if heldout else smoothed_reward(run, reading)
    if reading.target is None or not curve:
        return None
    return first_reached(curve, reading.target, reading.horizon, between=heldout)


def compute_spent(run: RunCurves, costs: Costs) -> list[float] | None:
    """Work of a run after 0, 1, 2, ... epochs, in forward passes; None where an epoch has not counted it."""
    parts = [run.work[name] for name in WORK]
    if any(len(part.epochs) < run.epochs for part in parts):
        return None
    weights = np.array([1, 1 + BACKWARD, costs.decode, costs.reward])
    return [0.0, *np.cumsum(weights @ np.array([part.values for part in parts])).tolist()]


def seconds_spent(run: RunCurves) -> list[float] | None:
    """Seconds of a run after 0, 1, 2, ... epochs, without evaluations; None where an epoch does not say."""
    return None if len(run.seconds.epochs) < run.epochs else list(accumulate(run.seconds.values, initial=0.0))


def _mean_height(run: RunCurves, spent: list[float] | None, budget: float | None) -> float | None:
    """Area under the held-out curve from 0 to the budget, with straight lines between evaluations, over the budget."""
    curve = until(run.heldout, run.epochs)
    if not spent or not budget or len(curve.epochs) < 2 or curve.epochs[0] != 0:
        return None
    x, y = [spent[epoch] for epoch in curve.epochs], curve.values
    inside = [*(place for place in x if place < budget), budget]
    return float(np.trapezoid(np.interp(inside, x, y), inside)) / budget


def clip_by_step(run: RunCurves, reading: Reading) -> dict[int, float]:
    """Mean clip fraction of each sampler step over the epochs."""
    curves = {step: until(curve, reading.horizon - 1).values for step, curve in run.clip_steps.items()}
    return {step: statistics.fmean(values) for step, values in curves.items() if values}


def norms_after_warm_up(run: RunCurves, reading: Reading) -> list[float]:
    """Gradient norms of the updates after the warm-up: the first tenth, or the learning rate's warm-up if longer."""
    norms = [norm for epoch, norm in run.grad_norms if epoch < reading.horizon]
    warm_up = 0 if run.config is None else run.config.optimizer.warmup_updates
    return norms[max(math.ceil(WARM_UP * len(norms)), warm_up) :]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


MEASURES: dict[str, Measure] = {}
"""All measures by their keys, in the order of their definitions below, which is that of the tables."""

Direction = Literal["higher", "lower"] | None
Function = Callable[[RunCurves, Reading], float | None]


def _measure(label: str, better: Direction, meaning: str, form: str = ".4f") -> Callable[[Function], Function]:
    """Make a function the measure of its own name; see :class:`Measure`."""

    def add(of: Function) -> Function:
        MEASURES[of.__name__] = Measure(of.__name__, label, better, form, meaning, of)
        return of

    return add


@_measure(
    "epochs to target",
    "lower",
    "epochs trained until the reward first reaches the target; a run that never does counts with the epochs that it "
    "was watched for, and the mean is then a lower bound",
    ".1f",
)
def epochs_to_target(run: RunCurves, reading: Reading) -> float | None:
    reached = timed(run, reading)
    return None if reached is None else reached.epochs


EPOCHS_TO_TARGET = MEASURES["epochs_to_target"]


@_measure(
    "training reward at the end",
    "higher",
    "trailing mean of the training reward after the last epoch that all runs have",
)
def reward_final(run: RunCurves, reading: Reading) -> float | None:
    return last_value(smoothed_reward(run, reading), reading.horizon)


@_measure(
    "training reward at epoch {at_epoch}",
    "higher",
    "trailing mean of the training reward after as many epochs as --at-epoch says",
)
def reward_at_epoch(run: RunCurves, reading: Reading) -> float | None:
    return None if reading.at_epoch is None else last_value(smoothed_reward(run, reading), reading.at_epoch)


@_measure(
    "training reward, mean over epochs",
    "higher",
    "mean of the training reward over all epochs: speed and level in one number, without a target",
)
def reward_over_epochs(run: RunCurves, reading: Reading) -> float | None:
    return _mean(until(run.reward, reading.horizon - 1).values)


@_measure("held-out reward at the end", "higher", "reward on held-out prompts and fixed seeds, last evaluation")
def heldout_final(run: RunCurves, reading: Reading) -> float | None:
    values = until(run.heldout, reading.horizon).values
    return values[-1] if len(values) > 1 else None


@_measure(
    "held-out reward at epoch {at_epoch}",
    "higher",
    "reward on held-out prompts after as many epochs as --at-epoch says, between evaluations on a straight line",
)
def heldout_at_epoch(run: RunCurves, reading: Reading) -> float | None:
    return None if reading.at_epoch is None else interpolated(run.heldout, reading.at_epoch)


@_measure(
    "held-out reward over compute",
    "higher",
    "area under the held-out reward against compute, up to the compute that all runs have spent, divided by it; "
    "compute is counted in forward passes of an image: a backward pass is 2, a decode and a reward call are "
    "what the plan's `costs` says, 1 if nothing",
)
def heldout_area(run: RunCurves, reading: Reading) -> float | None:
    return _mean_height(run, compute_spent(run, reading.costs), reading.compute)


@_measure(
    "held-out reward over seconds",
    "higher",
    "the same against the seconds of rollout, reward and update, as slow as the jobs beside it made them",
)
def heldout_area_seconds(run: RunCurves, reading: Reading) -> float | None:
    return _mean_height(run, seconds_spent(run), reading.seconds)


@_measure(
    "epoch of the best held-out reward",
    None,
    "epochs trained at the best evaluation; the last one: the reward was still rising",
    ".1f",
)
def heldout_best_epoch(run: RunCurves, reading: Reading) -> float | None:
    curve = until(run.heldout, reading.horizon)
    return float(curve.epochs[curve.values.index(max(curve.values))]) if curve else None


@_measure(
    "diversity at the target",
    "higher",
    "diversity where the held-out reward reaches the target, between evaluations on a straight line; of the runs "
    "that reached it",
)
def diversity_at_target(run: RunCurves, reading: Reading) -> float | None:
    time = timed(run, reading) if reading.metric == "heldout" else None
    return interpolated(run.diversity, time.epochs) if time is not None and time.reached else None


@_measure(
    "KL from the base model",
    None,
    "KL of held-out trajectories from the base model's in nats per image, last evaluation",
    ".4g",
)
def kl(run: RunCurves, reading: Reading) -> float | None:
    return last_value(run.kl, reading.horizon)


def _at_equal_kl(run: RunCurves, reading: Reading, curve: Series) -> float | None:
    if not reading.kl or not run.kl:
        return None
    return interpolated(curve, first_reached(run.kl, reading.kl, reading.horizon, between=True).epochs)


@_measure(
    "held-out reward at equal KL",
    "higher",
    "held-out reward where a run first reaches the KL from the base model that all runs reach, on a straight line "
    "between evaluations",
)
def heldout_at_equal_kl(run: RunCurves, reading: Reading) -> float | None:
    return _at_equal_kl(run, reading, run.heldout)


@_measure(
    "diversity at equal KL",
    "higher",
    "diversity where a run first reaches the KL from the base model that all runs reach",
)
def diversity_at_equal_kl(run: RunCurves, reading: Reading) -> float | None:
    return _at_equal_kl(run, reading, run.diversity)


@_measure(
    "distance from the base model",
    None,
    "root mean square pixel distance of held-out images from the base model's of the same noise, last evaluation",
)
def base_distance(run: RunCurves, reading: Reading) -> float | None:
    return last_value(run.base_distance, reading.horizon)


@_measure("diversity at the end", "higher", "mean distance between images of the same held-out prompt, last evaluation")
def diversity(run: RunCurves, reading: Reading) -> float | None:
    return last_value(run.diversity, reading.horizon)


@_measure(
    "clip fraction",
    None,
    "share of (image, step) pairs that the clip range leaves without a gradient, mean over epochs",
)
def clip_fraction(run: RunCurves, reading: Reading) -> float | None:
    return _mean(until(run.clip_fraction, reading.horizon - 1).values)


@_measure(
    "clip fraction, unevenness over steps",
    None,
    "standard deviation over sampler steps of each step's mean clip fraction, divided by their mean; 0: flat",
    ".3f",
)
def clip_unevenness(run: RunCurves, reading: Reading) -> float | None:
    values = list(clip_by_step(run, reading).values())
    return statistics.pstdev(values) / statistics.fmean(values) if len(values) > 1 and any(values) else None


@_measure(
    "gradient norm, variation",
    None,
    "standard deviation of the gradient norm over updates divided by its mean, without the first tenth of the "
    "updates (or the learning rate's warm-up)",
    ".3f",
)
def grad_variation(run: RunCurves, reading: Reading) -> float | None:
    norms = norms_after_warm_up(run, reading)
    return statistics.stdev(norms) / statistics.fmean(norms) if len(norms) > 1 and any(norms) else None


@_measure(
    "gradient norm, share of spikes",
    None,
    f"share of these updates whose gradient norm is above {SPIKE:g} times the run's median",
)
def grad_spikes(run: RunCurves, reading: Reading) -> float | None:
    norms = norms_after_warm_up(run, reading)
    limit = SPIKE * statistics.median(norms) if norms else math.inf
    return _mean([float(norm > limit) for norm in norms])


def judge_measure(name: str) -> Measure:
    """The held-out score of a reward that is for evaluation only."""

    def of(run: RunCurves, reading: Reading) -> float | None:
        return last_value(run.judges[name], reading.horizon) if name in run.judges else None

    meaning = f"mean score of {name}, which is not trained on, on held-out prompts, last evaluation"
    return Measure(f"judge/{name}", f"judge {name} at the end", "higher", ".4f", meaning, of)
