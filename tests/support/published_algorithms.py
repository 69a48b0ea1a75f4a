"""Training steps as the papers and the public code write them: log-probabilities in float64, differenced, clipped.

Nothing of ours is used, and every number is a literal from the source: what a preset, its tables and the policy loss
must reproduce. Sources: docs/algorithms.md.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------------ samplers


@dataclass(frozen=True)
class Sampler:
    """A stochastic sampler, step by step.

    Attributes:
        times: N + 1, from 1 (noise) to 0.
        std: of each step's noise.
        weight: native credit of each step, in the closed form of the PCPO paper.
        mean: of ``x'``, given x, the model's output and the step.
        ode: the step without noise.
        variance_in_log_prob: CPS leaves it out, and all constants.
    """

    times: list[float]
    std: list[float]
    weight: list[float]
    mean: Callable[[Tensor, Tensor, int], Tensor]
    ode: Callable[[Tensor, Tensor, int], Tensor]
    variance_in_log_prob: bool = True

    def log_prob(self, following: Tensor, mean: Tensor, step: int) -> Tensor:
        """Mean over the elements of the log-density of x'."""
        square = (following - mean) ** 2
        if not self.variance_in_log_prob:
            return -square.mean()
        s = self.std[step]
        return (-square / (2 * s**2) - math.log(s) - 0.5 * math.log(2 * math.pi)).mean()

    def delta(self, step: int) -> float:
        return self.times[step] - self.times[step + 1]


def shifted(steps: int, shift: float = 3.0) -> list[float]:
    return [shift * u / (1 + (shift - 1) * u) for u in (1 - i / steps for i in range(steps + 1))]


def sd3_grid(steps: int) -> list[float]:
    """Of Stable Diffusion 3's scheduler, as Flow-GRPO takes it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.double().tolist()


def dance(times: list[float], eta: float) -> Sampler:
    """DanceGRPO's ``flux_step``."""

    def mean(x: Tensor, v: Tensor, i: int) -> Tensor:
        t, dsigma = times[i], times[i + 1] - times[i]
        clean = x - t * v
        score = -(x - clean * (1 - t)) / t**2
        return x + dsigma * v + (-0.5 * eta**2 * score) * dsigma

    return Sampler(times, *_flow_columns(times, [eta] * (len(times) - 1)), mean, _euler(times))


def flow(times: list[float], noise_level: float) -> Sampler:
    """Flow-GRPO's ``sde_step_with_logprob``."""
    sigma = [math.sqrt(t / (1 - (times[1] if t == 1 else t))) * noise_level for t in times[:-1]]

    def mean(x: Tensor, v: Tensor, i: int) -> Tensor:
        t, dt, s = times[i], times[i + 1] - times[i], sigma[i]
        return x * (1 + s**2 / (2 * t) * dt) + v * (1 + s**2 * (1 - t) / (2 * t)) * dt

    return Sampler(times, *_flow_columns(times, sigma), mean, _euler(times))


def cps(times: list[float], noise_level: float) -> Sampler:
    """Flow-CPS's ``sde_step_with_logprob``."""
    std = [after * math.sin(noise_level * math.pi / 2) for after in times[1:]]

    def mean(x: Tensor, v: Tensor, i: int) -> Tensor:
        t, after = times[i], times[i + 1]
        clean, noise = x - t * v, x + v * (1 - t)
        return clean * (1 - after) + noise * math.sqrt(after**2 - std[i] ** 2)

    return Sampler(times, std, [math.nan] * len(std), mean, _euler(times), variance_in_log_prob=False)


def _flow_columns(times: list[float], sigma: list[float]) -> tuple[list[float], list[float]]:
    deltas = [before - after for before, after in pairwise(times)]
    std = [s * math.sqrt(dt) for s, dt in zip(sigma, deltas, strict=True)]
    weight = [
        math.sqrt(dt) / s * (1 + (1 - t) * s**2 / (2 * t)) for t, dt, s in zip(times, deltas, sigma, strict=False)
    ]
    return std, weight


def _euler(times: list[float]) -> Callable[[Tensor, Tensor, int], Tensor]:
    return lambda x, v, i: x + (times[i + 1] - times[i]) * v


def ddim(steps: int, eta: float = 1.0, weight: float | None = None, prediction: str = "epsilon") -> Sampler:
    """DDPO's ``ddim_step_with_logprob``; with a weight, the variance of PCPO's authors (``_get_std``)."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    cumulated = scheduler.alphas_cumprod.double().tolist()
    before = [cumulated[t] for t in timesteps]
    after = [cumulated[max(t - 1000 // steps, 0)] for t in timesteps]

    def native(i: int) -> float:
        return math.sqrt((1 - after[i]) / (1 - before[i]) * (1 - before[i] / after[i]))

    def reshaped(i: int, w: float) -> float:
        c1_squared = (1 - before[i]) / (before[i] / after[i])
        return (w * math.sqrt(c1_squared) + math.sqrt((1 - after[i]) * (w**2 + 1) - c1_squared)) / (w**2 + 1)

    std = [eta * (native(i) if weight is None else reshaped(i, weight)) for i in range(steps)]

    def credit(i: int) -> float:
        alpha, s = before[i] / after[i], native(i)
        return (math.sqrt(1 - before[i]) / math.sqrt(alpha) - math.sqrt(max(1 - after[i] - s**2, 0))) / s

    def step(x: Tensor, output: Tensor, i: int, s: float) -> Tensor:
        root, rest = math.sqrt(before[i]), math.sqrt(1 - before[i])
        epsilon = output if prediction == "epsilon" else root * output + rest * x
        clean = (x - rest * epsilon) / root
        return math.sqrt(after[i]) * clean + math.sqrt(max(1 - after[i] - s**2, 0)) * epsilon

    return Sampler(
        [t / 1000 for t in timesteps] + [0.0],
        std,
        [credit(i) for i in range(steps)],
        lambda x, output, i: step(x, output, i, std[i]),
        lambda x, output, i: step(x, output, i, 0.0),
    )


# ---------------------------------------------------------------------------------------------------- objectives


@dataclass(frozen=True)
class Pair:
    """What happened at a step of an image, and what the policy says now."""

    x: Tensor
    following: Tensor
    output: Tensor
    old: Tensor
    step: int
    advantage: float


Loss = Callable[["Algorithm", Pair], Tensor]


@dataclass(frozen=True)
class Algorithm:
    """A published training step.

    Attributes:
        trained: steps that are trained, without a window.
        loss: of one (image, step) pair, without the KL.
        clip: clip range.
        beta, kl_over_sigma: the KL's coefficient; divided by ``2 sigma²`` (Flow-GRPO) or by ``2 std²``.
        advantages: of an epoch's rewards, given each image's prompt; called epoch by epoch.
        window: steps of a training iteration, where a window moves.
    """

    sampler: Sampler
    trained: list[int]
    loss: Loss
    clip: float
    advantages: Callable[[], Callable[[np.ndarray, list[str]], np.ndarray]]
    beta: float = 0.0
    kl_over_sigma: bool = False
    window: Callable[[int], list[int]] | None = None

    def steps(self, iteration: int) -> list[int]:
        return self.trained if self.window is None else self.window(iteration)

    def pair_loss(self, pair: Pair, reference: Tensor | None = None) -> Tensor:
        loss = self.loss(self, pair)
        if not self.beta:
            return loss
        assert reference is not None
        sampler, i = self.sampler, pair.step
        gap = sampler.mean(pair.x, pair.output, i) - sampler.mean(pair.x, reference, i)
        spread = sampler.std[i] ** 2 / (sampler.delta(i) if self.kl_over_sigma else 1.0)
        return loss + self.beta * (gap**2).mean() / (2 * spread)


def _log_probs(algorithm: Algorithm, pair: Pair) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sampler, i = algorithm.sampler, pair.step
    mean, old_mean = (sampler.mean(pair.x, output, i) for output in (pair.output, pair.old))
    new, old = (sampler.log_prob(pair.following, m, i) for m in (mean, old_mean))
    return new, old, mean, old_mean


def _clipped(ratio: Tensor, pair: Pair, clip: float) -> Tensor:
    a = pair.advantage
    return torch.maximum(-a * ratio, -a * torch.clamp(ratio, 1.0 - clip, 1.0 + clip))


def ppo(algorithm: Algorithm, pair: Pair) -> Tensor:
    """DDPO, DanceGRPO, Flow-GRPO, Flow-CPS, MixGRPO."""
    new, old, _, _ = _log_probs(algorithm, pair)
    return _clipped(torch.exp(new - old), pair, algorithm.clip)


def tempflow(algorithm: Algorithm, pair: Pair) -> Tensor:
    """TempFlow-GRPO's code writes 2.25 for one over the mean of std over the trained steps."""
    std, trained = algorithm.sampler.std, algorithm.trained
    weight = std[pair.step] / (sum(std[i] for i in trained) / len(trained))
    return weight * ppo(algorithm, pair)


def guard(algorithm: Algorithm, pair: Pair) -> Tensor:
    """GRPO-Guard: RatioNorm, then gradient reweighting."""
    new, old, mean, old_mean = _log_probs(algorithm, pair)
    s = algorithm.sampler.std[pair.step]
    bias = (mean - old_mean).pow(2).mean() / (2 * s**2)
    ratio = torch.exp((new - old + bias) * s)
    return _clipped(ratio, pair, algorithm.clip) / algorithm.sampler.delta(pair.step)


def _matching(algorithm: Algorithm, pair: Pair, weight: float) -> Tensor:
    """PCPO's noise matching: minus the log-ratio of a step with the credit ``weight``."""
    sampler, i = algorithm.sampler, pair.step
    noise = (pair.following - sampler.mean(pair.x, pair.old, i)) / sampler.std[i]
    change = weight * (pair.output - pair.old)
    return 0.5 * (change**2).mean() + (change * noise).mean()


def _hinge(term: Tensor, pair: Pair, clip: float) -> Tensor:
    return torch.clamp(clip * abs(pair.advantage) + pair.advantage * term, min=0)


def proportionate(algorithm: Algorithm, pair: Pair) -> Tensor:
    """PCPO, flow models: ``w = zeta dt``, with all native weights in zeta."""
    sampler = algorithm.sampler
    zeta = sum(sampler.weight) / (sampler.times[0] - sampler.times[-1])
    return _hinge(_matching(algorithm, pair, zeta * sampler.delta(pair.step)), pair, algorithm.clip)


def proportionate_without_last(algorithm: Algorithm, pair: Pair) -> Tensor:
    """The same where the last step, which is not trained, is no part of zeta."""
    sampler = algorithm.sampler
    zeta = sum(sampler.weight[:-1]) / (sampler.times[0] - sampler.times[-2])
    return _hinge(_matching(algorithm, pair, zeta * sampler.delta(pair.step)), pair, algorithm.clip)


def uniform(algorithm: Algorithm, pair: Pair) -> Tensor:
    """PCPO, diffusion models: the mean native weight at every step."""
    weight = sum(algorithm.sampler.weight) / len(algorithm.sampler.weight)
    return _hinge(_matching(algorithm, pair, weight), pair, algorithm.clip)


def fair_clip(algorithm: Algorithm, pair: Pair) -> Tensor:
    """Reward Score Matching's "fair_clip" with its "matching" loss."""
    i = pair.step
    variance = algorithm.sampler.std[i] ** 2
    term = _matching(algorithm, pair, algorithm.sampler.weight[i]) * variance
    return _hinge(term, pair, algorithm.clip) / variance


# ---------------------------------------------------------------------------------------------------- advantages


def _grouped(ddof: int, epsilon: float, whole: bool = False) -> Callable[[], Any]:
    def advantages(rewards: np.ndarray, prompts: list[str]) -> np.ndarray:
        result = np.empty_like(rewards)
        for prompt in set(prompts):
            chosen = np.array([name == prompt for name in prompts])
            spread = np.std(rewards if whole else rewards[chosen], ddof=ddof)
            result[chosen] = (rewards[chosen] - rewards[chosen].mean()) / (spread + epsilon)
        return np.clip(result, -5, 5)

    return lambda: advantages


def _tracked() -> Callable[[np.ndarray, list[str]], np.ndarray]:
    """DDPO's ``PerPromptStatTracker(buffer_size=16, min_count=16)``."""
    remembered: dict[str, list[float]] = {}

    def advantages(rewards: np.ndarray, prompts: list[str]) -> np.ndarray:
        result = np.empty_like(rewards)
        for prompt in sorted(set(prompts)):
            chosen = np.array([name == prompt for name in prompts])
            remembered[prompt] = (remembered.get(prompt, []) + rewards[chosen].tolist())[-16:]
            known = rewards if len(remembered[prompt]) < 16 else np.array(remembered[prompt])
            result[chosen] = (rewards[chosen] - np.mean(known)) / (np.std(known) + 1e-6)
        return np.clip(result, -5, 5)

    return advantages


DANCE_GRPO, GROUP, FLOW_GRPO = _grouped(1, 1e-8), _grouped(0, 1e-4), _grouped(0, 1e-4, whole=True)


def mixgrpo_window(iteration: int) -> list[int]:
    """MixGRPO's ``GRPOTrainingStates``: group_size 4, iters_per_group 25, prog_overlap_step 1, counted iteration by
    iteration. Its last places, which no published run of 300 iterations reaches, shrink; ours end at a whole window.
    """
    place, inside = 0, 0
    for _ in range(iteration):
        inside += 1
        if inside >= 25:
            place, inside = place + 1, 0
        if place > 24 - 4:
            place = 0
    return list(range(place, place + 4))


# ------------------------------------------------------------------------------------------------------- the runs


def algorithm(name: str) -> Algorithm:
    """A preset's published run, at its published settings."""
    sd3 = sd3_grid(10)
    of_ten = Algorithm(flow(sd3, 0.7), list(range(9)), ppo, 1e-4, FLOW_GRPO, beta=0.04, kl_over_sigma=True)
    of_fifty = Algorithm(ddim(50), list(range(49)), ppo, 1e-4, DANCE_GRPO)
    with_buffer = replace(of_fifty, trained=list(range(50)), advantages=_tracked)
    of_flux = Algorithm(dance(shifted(16), 0.3), list(range(15)), ppo, 1e-4, DANCE_GRPO)
    runs = {
        # The population form: the demo's; a common factor.
        "pcpo": replace(of_flux, loss=proportionate, advantages=_grouped(0, 1e-8)),
        "pcpo_flow": replace(of_ten, loss=proportionate_without_last),
        "pcpo_diffusion": replace(of_fifty, loss=uniform),
        "pcpo_ddpo": replace(with_buffer, loss=uniform),
        "dancegrpo": of_flux,
        "dancegrpo_diffusion": of_fifty,
        "ddpo": with_buffer,
        "flow_grpo": of_ten,
        "flow_grpo_fast": replace(of_ten, sampler=cps(sd3, 0.8), trained=[0, 1, 2, 3, 4], clip=1e-5, beta=0.0),
        "flow_cps": replace(of_ten, sampler=cps(sd3, 0.8), beta=0.0),
        "mixgrpo": replace(of_flux, sampler=flow(shifted(25), 0.7), trained=list(range(24)), window=mixgrpo_window),
        "tempflow": replace(of_ten, loss=tempflow, beta=0.004, kl_over_sigma=False, advantages=GROUP),
        "grpo_guard": replace(of_ten, loss=guard, clip=2e-6, beta=0.0, advantages=GROUP),
        "fair_clip": replace(of_ten, loss=fair_clip, beta=0.01),
    }
    return runs[name]
