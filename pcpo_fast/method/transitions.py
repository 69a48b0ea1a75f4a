"""Samplers as tables of affine Gaussian steps.

Every stochastic sampler used in RL for image models has the form ``x' = a x + b f + std z`` with ``z ~ N(0, I)``, where
``f`` is the model output after guidance (velocity or epsilon) and ``a, b, std`` depend only on the step. A sampler is
therefore a table with one row per step, and a new sampler is one more function that returns such a table.

Times run from 1 (noise) to 0 (image). All arithmetic is float64 on the CPU. Derivations: docs/method.md.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, get_args

import torch
from torch import Tensor

from pcpo_fast.config.sampler_registry import Variance
from pcpo_fast.config.wording import counted

FinalStep = Literal["clean", "noisy"]
PredictionType = Literal["epsilon", "v_prediction"]

PUBLISHED_WEIGHT = 4.5  # credit of the reshaped DDIM variance in PCPO's public code, at 50 steps


@dataclass(frozen=True, eq=False)
class Transitions:
    """A sampler: N steps ``x' = a x + b f + std z``.

    Attributes:
        times: [N + 1], strictly decreasing within 1..0; step i goes from ``times[i]`` to ``times[i + 1]``.
        a, b, std: [N]; ``std`` is 0 for a deterministic step.
        final_step: which latents are decoded. ``"clean"``: the clean image that the last step predicts, without the
            last step's noise. ``"noisy"``: ``x'`` of the last step.
        clean_predictions: [N, 2], coefficients ``(p, q)`` of the clean image ``p x + q f`` that each step predicts.
            None: those of a velocity model, ``(1, -times[i])``.
        reference_credit: [N], the native credit of the sampler whose variance was reshaped into this one; its mean is
            the target of the ``uniform`` credit rule. None: not reshaped.

    All tensors are float64 on the CPU; other dtypes, arrays and lists are converted.

    Raises:
        ValueError: shapes disagree, a value is not finite, ``std`` is negative, or the times are not a valid grid.
    """

    times: Tensor
    a: Tensor
    b: Tensor
    std: Tensor
    final_step: FinalStep = "noisy"
    clean_predictions: Tensor | None = None
    reference_credit: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", check_times(self.times))
        columns = ["a", "b", "std"] + (["reference_credit"] if self.reference_credit is not None else [])
        for name in columns:
            column = _vector(name, getattr(self, name))
            if len(column) != self.steps:
                raise ValueError(
                    f"{name} has {counted(len(column), 'row')}, but {len(self.times)} times define "
                    f"{counted(self.steps, 'step')}"
                )
            object.__setattr__(self, name, column)
        if self.clean_predictions is None:
            velocity = torch.stack([torch.ones_like(self.a), -self.times[:-1]], dim=1)
            object.__setattr__(self, "clean_predictions", velocity)
        if bool((self.std < 0).any()):
            step = int((self.std < 0).nonzero()[0])
            raise ValueError(f"std must not be negative, got {float(self.std[step])} at step {step}")
        if self.final_step not in get_args(FinalStep):
            raise ValueError(f"final_step must be one of {', '.join(get_args(FinalStep))}, got {self.final_step!r}")

    @property
    def steps(self) -> int:
        """Number of steps N."""
        return len(self.times) - 1

    @property
    def deltas(self) -> Tensor:
        """Length ``times[i] - times[i + 1]`` of every step, [N], positive."""
        return self.times[:-1] - self.times[1:]

    @property
    def final_row(self) -> tuple[float, float, float]:
        """The row ``(a, b, std)`` that turns the latents before the last step into the latents to decode."""
        if self.final_step == "noisy":
            return float(self.a[-1]), float(self.b[-1]), float(self.std[-1])
        assert self.clean_predictions is not None
        scale, slope = self.clean_predictions[-1].tolist()
        return scale, slope, 0.0


def trainable_steps(transitions: Transitions) -> list[int]:
    """Indices of the steps that a policy loss can train, in order.

    A step needs a density (``std`` above 0), and its noise must reach the image, which excludes the last step if
    ``final_step`` is ``"clean"``.
    """
    last = transitions.steps - 1
    dropped = last if transitions.final_step == "clean" else None
    return [step for step in range(transitions.steps) if transitions.std[step] > 0 and step != dropped]


def shifted_times(steps: int, shift: float) -> Tensor:
    """Time grid ``shift u / (1 + (shift - 1) u)`` for ``u = linspace(1, 0, steps + 1)``, float64 [steps + 1].

    The grid of DanceGRPO (FLUX: shift 3). diffusers' schedulers give slightly different grids; to reproduce a published
    run, use the grid of its code.

    Raises:
        ValueError: there are fewer than 2 steps, or the shift is not a positive number.
    """
    _check_steps(steps)
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift must be a positive number, got {shift}")
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    times = shift * u / (1 + (shift - 1) * u)
    times[0] = 1.0  # 1 + (shift - 1) is not exactly shift
    return check_times(times)


def dance_sde(times: Tensor, noise: float) -> Transitions:
    """DanceGRPO's SDE with constant noise: ``std = noise sqrt(dt)`` (Xue et al. 2025, arXiv:2505.07818).

    The mean is the Euler step of the velocity plus ``noise² / 2`` times the score times ``dt``. The published run
    decodes the clean prediction of the last step, hence ``final_step="clean"``.

    Args:
        times: [N + 1].
        noise: eta, at least 0 (published: 0.3).

    Raises:
        ValueError: see :class:`Transitions`; or the noise is negative or not finite.
    """
    times = check_times(times)
    sigma = torch.full_like(times[:-1], _check_noise(noise))
    return _velocity_sde(times, sigma, final_step="clean")


def flow_sde(times: Tensor, noise: float) -> Transitions:
    """Flow-GRPO's SDE: ``std = noise sqrt(t / (1 - t)) sqrt(dt)`` (Liu et al. 2025, arXiv:2505.05470).

    At t = 1, where that diverges, ``1 - t`` is taken at the second time of the grid, as the public code does. ``x'`` of
    the last step is decoded (``final_step="noisy"``); the published run trains all steps but the last.

    Args:
        times: [N + 1].
        noise: eta, at least 0 (published: 0.7).

    Raises:
        ValueError: see :class:`Transitions`; or the noise is negative or not finite.
    """
    times = check_times(times)
    start = times[:-1]
    sigma = _check_noise(noise) * (start / (1 - torch.where(start == 1, times[1], start))).sqrt()
    return _velocity_sde(times, sigma, final_step="noisy")


def coefficients_preserving(times: Tensor, noise: float) -> Transitions:
    """Coefficients-preserving sampling: ``std = t' sin(noise pi / 2)`` (Wang and Yu 2025, arXiv:2509.05952).

    ``x'`` has exactly the flow's total noise level ``t'``, whereas the SDEs add too much. On a grid that ends at 0 the
    last step is deterministic.

    Args:
        times: [N + 1].
        noise: share of fresh noise, 0 (none) to 1 (all noise is fresh).

    Raises:
        ValueError: see :class:`Transitions`; or the noise is not within 0..1.
    """
    times = check_times(times)
    if not 0 <= noise <= 1:
        raise ValueError(f"the noise of coefficients-preserving sampling must be between 0 and 1, got {noise}")
    start, end = times[:-1], times[1:]
    std = end * math.sin(noise * math.pi / 2)
    kept = end * math.cos(noise * math.pi / 2)  # sqrt(t'² - std²)
    return Transitions(times, 1 - end + kept, (1 - start) * kept - start * (1 - end), std, final_step="clean")


def euler_ode(times: Tensor) -> Transitions:
    """The deterministic Euler sampler of flow models: ``x' = x - dt f``.

    Raises:
        ValueError: see :class:`Transitions`.
    """
    times = check_times(times)
    return _velocity_sde(times, torch.zeros_like(times[:-1]), final_step="clean")


def ddim(
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    eta: float,
    variance: Variance = "native",
    weight: float | None = None,
    *,
    prediction: PredictionType = "epsilon",
) -> Transitions:
    """DDIM (Song et al. 2021, arXiv:2010.02502), as DDPO and DanceGRPO run it.

    Step i goes from ``t = timesteps[i]`` to ``max(t - T // N, 0)``, where T is the length of ``alphas_cumprod``.

    Args:
        alphas_cumprod: [T], see :func:`stable_diffusion_alphas`.
        timesteps: [N] integers within 1..T-1, strictly decreasing and T // N apart, see :func:`ddim_timesteps`.
        eta: scale of the native standard deviation; 0 is deterministic, 1 is DDPM. The other two variances replace it
            and require eta 1.
        variance: ``"native"``; or PCPO's variances that give every step the same credit ``weight`` (Lee and Ye 2026),
            the solutions of ``(c ∓ sqrt(1 - alpha' - std²)) / std = weight`` with ``c² = (1 - alpha) alpha' / alpha``:
            ``"exact"`` takes the minus sign, so that the native credit of every step is ``weight`` (nearly
            deterministic); ``"reshaped"`` the plus sign, as in the public code, which keeps the variance near the
            native one; train it with the ``uniform`` credit rule.
        weight: credit of every step with the last two variances; None: 4.5, the published value for 50 steps.
        prediction: what the model predicts. ``"v_prediction"`` (Salimans and Ho 2022, arXiv:2202.00512) is the same
            sampler in other coordinates, ``epsilon = sqrt(1 - alpha) x + sqrt(alpha) v``, so its ``a`` and ``b``
            differ; credit then refers to the model's own output and is ``sqrt(alpha)`` times that of epsilon. Only with
            v may the first alpha be 0 (zero terminal SNR, Lin et al. 2024, arXiv:2305.08891).

    Returns:
        The table; its times are ``timesteps / T`` with a final 0.

    Raises:
        ValueError: alphas, timesteps, eta, weight or prediction are invalid; the weight is too small for some step (the
            message gives the step and the smallest possible weight); or PCPO's variances, which are derived for
            epsilon, are used with another prediction.
    """
    if prediction not in get_args(PredictionType):
        raise ValueError(f"prediction must be one of {', '.join(get_args(PredictionType))}, got {prediction!r}")
    alphas = _vector("alphas_cumprod", alphas_cumprod)
    steps = _check_timesteps(timesteps, len(alphas))
    previous = (steps - len(alphas) // len(steps)).clamp(min=0)
    alpha, alpha_next = alphas[steps], alphas[previous]
    if not bool(((alpha >= 0) & (alpha < alpha_next) & (alpha_next <= 1)).all()):
        raise ValueError("alphas_cumprod must be between 0 and 1, and decrease with the timestep")
    if prediction == "epsilon" and not float(alpha[0]) > 0:
        raise ValueError(
            "alphas_cumprod must not be 0 with epsilon prediction, which then carries no information about the image"
        )
    if variance not in get_args(Variance):
        raise ValueError(f"variance must be one of {', '.join(get_args(Variance))}, got {variance!r}")
    beta_next = 1 - alpha_next
    c = ((1 - alpha) * alpha_next / alpha).sqrt()
    gap = (alpha_next - alpha) / alpha  # c² - beta_next without cancellation
    if variance != "native" and prediction != "epsilon":
        raise ValueError(f"the variance {variance} is derived for epsilon prediction; with {prediction} use native")
    reference_credit = None
    if variance == "native":
        if weight is not None:
            raise ValueError("weight applies to the variances reshaped and exact only; the native variance uses eta")
        std = _native_ddim_std(alpha, alpha_next, _check_noise(eta, "eta"))
    else:
        if eta != 1:
            raise ValueError(f"the variance {variance} replaces eta, which must be 1, got {eta}")
        weight = PUBLISHED_WEIGHT if weight is None else weight
        root = _reachable(weight, beta_next, gap, steps)
        if variance == "exact":
            std = gap / (weight * c + root)
        else:
            std = (weight * c + root) / (weight * weight + 1)
            reference_credit = (gap / beta_next).sqrt()  # native credit at eta 1
    direction = (beta_next - std**2).clamp(min=0).sqrt()
    a, b = (alpha_next / alpha).sqrt(), -(gap + std**2) / (direction + c)  # direction - c without cancellation
    clean = torch.stack([1 / alpha.sqrt(), -((1 - alpha) / alpha).sqrt()], dim=1)
    if prediction == "v_prediction":
        nothing_left = alpha == 0  # zero terminal SNR: epsilon is the latents themselves, and the image is -v
        a = torch.where(nothing_left, direction, a + b * (1 - alpha).sqrt())
        b = torch.where(nothing_left, -alpha_next.sqrt(), b * alpha.sqrt())
        clean = torch.stack([alpha.sqrt(), -(1 - alpha).sqrt()], dim=1)
    return Transitions(
        torch.cat([steps.double() / len(alphas), torch.zeros(1, dtype=torch.float64)]),
        a,
        b,
        std,
        final_step="noisy",
        clean_predictions=clean,
        reference_credit=reference_credit,
    )


def stable_diffusion_alphas(
    train_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Cumulative alphas of Stable Diffusion 1.x (``scaled_linear`` betas), float64 [train_steps].

    Args:
        dtype: precision of the computation; float32 reproduces diffusers bit for bit.
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, train_steps, dtype=dtype) ** 2
    return torch.cumprod(1 - betas, dim=0).double()


def ddim_timesteps(steps: int, train_steps: int = 1000, offset: int = 1) -> Tensor:
    """DDIM timesteps with diffusers' ``leading`` spacing, int64 [steps], decreasing: 981, 961, ..., 1 for 50 steps.

    Raises:
        ValueError: there are fewer than 2 steps, or more than the training schedule has.
    """
    _check_steps(steps)
    timesteps = torch.arange(steps - 1, -1, -1) * (train_steps // steps) + offset
    if steps > train_steps or int(timesteps[0]) >= train_steps:
        raise ValueError(
            f"{counted(steps, 'step')} cannot be taken from a training schedule of {counted(train_steps, 'step')}"
        )
    return timesteps


def check_times(times: Tensor | Sequence[float]) -> Tensor:
    """Convert a time grid to float64 [N + 1] and check it.

    Raises:
        ValueError: there are fewer than 2 steps, a time is not finite or outside 0..1, or the times do not strictly
            decrease.
    """
    grid = _vector("times", times)
    if len(grid) < 3:
        raise ValueError(f"a sampler needs at least 2 steps, got {max(len(grid) - 1, 0)}")
    outside = ((grid < 0) | (grid > 1)).nonzero()
    if len(outside):
        index = int(outside[0])
        raise ValueError(f"times must be between 1 (noise) and 0 (image), got {float(grid[index])} at position {index}")
    rising = (grid[1:] >= grid[:-1]).nonzero()
    if len(rising):
        index = int(rising[0])
        raise ValueError(
            f"times must strictly decrease, but {float(grid[index + 1])} follows {float(grid[index])} "
            f"at position {index + 1}"
        )
    return grid


def _velocity_sde(times: Tensor, sigma: Tensor, final_step: FinalStep) -> Transitions:
    """Euler-Maruyama step of the flow's reverse SDE with diffusion coefficient ``sigma`` [N].

    ``mean = x - dt f + sigma²/2 score dt`` with ``score = -(x - (1 - t) x0) / t²`` and ``x0 = x - t f``.
    """
    start, delta = times[:-1], times[:-1] - times[1:]
    drift = sigma**2 / (2 * start)
    return Transitions(
        times, 1 - delta * drift, -delta * (1 + (1 - start) * drift), sigma * delta.sqrt(), final_step=final_step
    )


def _native_ddim_std(alpha: Tensor, alpha_next: Tensor, eta: float) -> Tensor:
    share = (alpha_next - alpha) / (alpha_next * (1 - alpha))  # share of beta_next that is fresh noise at eta 1
    largest = float((1 / share).min().sqrt())
    if eta > largest * (1 + 1e-12):  # tolerate rounding of the largest eta
        limit = math.floor(largest * 1e6) / 1e6
        raise ValueError(f"eta {eta} adds more noise than a step allows: at most {limit:.6f} is possible here")
    return eta * ((1 - alpha_next) * share).sqrt()


def _reachable(weight: float, beta_next: Tensor, gap: Tensor, timesteps: Tensor) -> Tensor:
    """``sqrt(beta' (weight² + 1) - c²)``, the discriminant of PCPO's variances; ValueError if it is not real."""
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"weight must be a positive number, got {weight}")
    square = beta_next * (weight * weight) - gap
    if bool((square < -1e-12 * gap).any()):  # tolerate rounding of the smallest weight
        smallest = (gap / beta_next).sqrt()
        step = int(smallest.argmax())
        limit = float(smallest[step])
        remedy = f"at least {math.ceil(limit * 1e6) / 1e6:.6f} is needed" if math.isfinite(limit) else "none is enough"
        raise ValueError(
            f"no variance gives step {step} (timestep {int(timesteps[step])}) the credit weight {weight}: {remedy}"
        )
    return square.clamp(min=0).sqrt()


def _check_timesteps(timesteps: Tensor | Sequence[int], train_steps: int) -> Tensor:
    steps = _vector("timesteps", timesteps)
    if len(steps) < 2:
        raise ValueError(f"a sampler needs at least 2 steps, got {len(steps)}")
    if bool((steps != steps.round()).any()) or float(steps.min()) < 1 or float(steps.max()) > train_steps - 1:
        raise ValueError(f"timesteps must be integers within 1..{train_steps - 1}, got {steps.tolist()}")
    spacing = train_steps // len(steps)
    # A deviation of 1 is rounding in diffusers' trailing spacing; with more, times would not match the latents.
    if bool((steps[1:] >= steps[:-1]).any()) or bool(((steps[:-1] - steps[1:] - spacing).abs() > 1).any()):
        raise ValueError(
            f"{len(steps)} timesteps of {train_steps} must decrease in steps of {spacing}, got {steps.tolist()}"
        )
    return steps.long()


def _check_noise(noise: float, name: str = "noise") -> float:
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"{name} must be a number of at least 0, got {noise}")
    return float(noise)


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, SupportsIndex) or operator.index(steps) < 2:
        raise ValueError(f"the number of sampler steps must be an integer of at least 2, got {steps!r}")


def _vector(name: str, values: Any) -> Tensor:
    """``values`` as a float64 vector on the CPU; ValueError if they are not finite or not a vector."""
    if not isinstance(values, Tensor) and isinstance(values, Iterable):
        values = torch.tensor(list(values), dtype=torch.float64)
    vector = torch.as_tensor(values).detach().to(device="cpu", dtype=torch.float64, copy=True)
    if vector.ndim != 1:
        raise ValueError(f"{name} must be a vector, got the shape {list(vector.shape)}")
    bad = (~vector.isfinite()).nonzero()
    if len(bad):
        raise ValueError(f"{name} must be finite, got {float(vector[int(bad[0])])} at position {int(bad[0])}")
    return vector
