"""Credit rules: how strongly each sampling step is trained.

The exact log-ratio of a step is ``kappa <delta, z> - kappa²/2 <delta, delta>`` with ``kappa = b / std`` and ``delta``
the change of the model output. ``|kappa|``, the step's native credit, is a by-product of the sampler. Every published
rule replaces it by three numbers per step,

    log_ratio = linear <delta, z> - quadratic <delta, delta>,        loss = scale * h(log_ratio; A, xi),

so a rule is one small function here that fills three columns. Derivations: docs/method.md.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pcpo_fast.method.transitions import Transitions

KlForm = Literal["exact", "published"]
NormalizeOver = Literal["all", "trained"]


@dataclass(frozen=True, eq=False)
class CreditTable:
    """A credit rule applied to a sampler. Columns are float64 [N] on the CPU, 0 at steps that are not trained.

    Attributes:
        linear: factor of ``<delta, z>``, with the sign of the transition's ``b``.
        quadratic: factor of ``<delta, delta>``, subtracted.
        scale: factor of the step's policy loss (not of its KL term).
        kl: factor of ``<f - f_ref, f - f_ref>``, without the KL coefficient beta.
        zeta: sum of native credit over sum of step lengths, for every rule.
        rule: name of the rule.
        trained_steps: the trained steps, in order.
    """

    linear: Tensor
    quadratic: Tensor
    scale: Tensor
    kl: Tensor
    zeta: float
    rule: str
    trained_steps: tuple[int, ...]

    def restricted(self, steps: Iterable[int]) -> "CreditTable":
        """The same credit for a subset of the trained steps; zeta and the means of the rules are unchanged.

        Raises:
            ValueError: ``steps`` is empty or contains a step that is not trained.
        """
        kept = tuple(sorted(set(steps)))
        if not kept or not set(kept) <= set(self.trained_steps):
            raise ValueError(
                f"the trained steps are {list(self.trained_steps)}, which do not include all of {list(kept)}"
            )
        chosen = torch.zeros(len(self.linear), dtype=torch.bool)
        chosen[list(kept)] = True

        def cut(column: Tensor) -> Tensor:
            return torch.where(chosen, column, 0.0)

        return replace(
            self,
            linear=cut(self.linear),
            quadratic=cut(self.quadratic),
            scale=cut(self.scale),
            kl=cut(self.kl),
            trained_steps=kept,
        )


class Steps(NamedTuple):
    """The stochastic steps as seen by a credit rule; tensors are float64 [M]."""

    kappa: Tensor  # native signed credit b / std
    std: Tensor
    delta: Tensor  # step length t - t'
    proportionate: Tensor  # zeta delta
    uniform: Tensor  # mean native credit, before any reshaping of the variance
    chosen: Tensor  # bool; the steps included in sums and means

    def mean(self, values: Tensor) -> Tensor:
        """Mean of ``values`` over the chosen steps."""
        return values[self.chosen].mean()


Columns = tuple[Tensor, Tensor, Tensor]  # linear, quadratic, scale


def _native(steps: Steps) -> Columns:
    """DDPO, DanceGRPO, Flow-GRPO."""
    return steps.kappa, steps.kappa**2 / 2, torch.ones_like(steps.kappa)


def _proportionate(steps: Steps) -> Columns:
    """PCPO for flow models: credit proportional to the step's length (Lee and Ye 2026, arXiv:2509.25774)."""
    return _with_credit(steps, steps.proportionate)


def _uniform(steps: Steps) -> Columns:
    """PCPO for diffusion models: the same credit at every step (Lee and Ye 2026)."""
    return _with_credit(steps, steps.uniform)


def _with_credit(steps: Steps, credit: Tensor) -> Columns:
    return steps.kappa.sign() * credit, credit**2 / 2, torch.ones_like(credit)


def _pcpo_ratio(steps: Steps) -> Columns:
    """PCPO as a factor on the whole native log-ratio (the "ppo" form of the authors' later code)."""
    credit = steps.proportionate
    return steps.kappa.sign() * credit, credit * steps.kappa.abs() / 2, torch.ones_like(credit)


def _tempflow(steps: Steps) -> Columns:
    """TempFlow-GRPO's noise-aware weighting (He et al. 2025, arXiv:2508.04324); ``std`` is its sigma sqrt(dt)."""
    linear, quadratic, _ = _native(steps)
    return linear, quadratic, steps.std / steps.mean(steps.std)


def _grpo_guard(steps: Steps) -> Columns:
    """GRPO-Guard's ratio normalization and gradient weighting (Wang et al. 2025, arXiv:2510.22319)."""
    return steps.kappa * steps.std, torch.zeros_like(steps.kappa), 1 / steps.delta


def _fair_clip(steps: Steps) -> Columns:
    """Equal clipping for equal changes of the mean (public code of Lee et al. 2026, arXiv:2604.17415)."""
    variance = steps.std**2
    return steps.kappa * variance, steps.kappa**2 * variance / 2, 1 / variance


def _cps_published(steps: Steps) -> Columns:
    """CPS's log-probability ``-mean((x' - mean)²)``, without the variance (Wang and Yu 2025, arXiv:2509.05952)."""
    variance = steps.std**2
    return 2 * variance * steps.kappa, variance * steps.kappa**2, torch.ones_like(variance)


_RULES: dict[str, Callable[[Steps], Columns]] = {
    "native": _native,
    "proportionate": _proportionate,
    "uniform": _uniform,
    "pcpo_ratio": _pcpo_ratio,
    "tempflow": _tempflow,
    "grpo_guard": _grpo_guard,
    "fair_clip": _fair_clip,
    "cps_published": _cps_published,
}

RULES = tuple(_RULES)


def native_credit(transitions: Transitions) -> Tensor:
    """Credit ``|b| / std`` that the sampler gives each step, float64 [N]; 0 where ``std`` is 0."""
    stochastic = transitions.std > 0
    return _scatter(transitions.b[stochastic].abs() / transitions.std[stochastic], stochastic)


def proportionate_credit(transitions: Transitions) -> Tensor:
    """PCPO's target ``zeta (t - t')`` of every stochastic step, float64 [N]; 0 where ``std`` is 0.

    Raises:
        ValueError: no step is stochastic.
    """
    stochastic = transitions.std > 0
    _check_stochastic(stochastic)
    lengths = transitions.deltas[stochastic]
    return _scatter(native_credit(transitions).sum() / lengths.sum() * lengths, stochastic)


def credit_table(
    transitions: Transitions,
    rule: str,
    trained_steps: Iterable[int] | None = None,
    kl: KlForm = "exact",
    *,
    normalize_over: NormalizeOver = "all",
    normalize_scale: bool = False,
) -> CreditTable:
    """The columns of a credit rule for a sampler.

    Args:
        transitions: the sampler, with at least one stochastic step.
        rule: one of :data:`RULES`.
        trained_steps: indices of the steps to train, in general
            :func:`~pcpo_fast.method.transitions.trainable_steps` or a subset. None: all steps with a density, including
            a last step whose noise is dropped (for inspection, not for training).
        kl: ``"exact"``: ``b² / (2 std²)``, the KL divergence of the two Gaussians; ``"published"``: that times the step
            length, as in Flow-GRPO.
        normalize_over: steps included in zeta and the rules' means: ``"all"`` stochastic steps, so that a random subset
            of trained steps does not change them, or only the ``"trained"`` ones.
        normalize_scale: divide the scale column by its mean over those steps, so that rules with ``1 / dt`` or
            ``1 / std²`` do not change the size of the loss.

    Raises:
        ValueError: the rule, KL form or normalization is unknown; no step is stochastic; a trained step does not exist,
            is repeated, is deterministic, or is a last step whose noise is dropped; or the noise is so small that the
            columns overflow.
    """
    for name, value, allowed in (
        ("rule", rule, RULES),
        ("kl", kl, get_args(KlForm)),
        ("normalize_over", normalize_over, get_args(NormalizeOver)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    stochastic = transitions.std > 0
    _check_stochastic(stochastic)
    trained = torch.zeros_like(stochastic)
    trained[_check_trained(transitions, trained_steps)] = True

    b, std, delta = (column[stochastic] for column in (transitions.b, transitions.std, transitions.deltas))
    chosen = trained[stochastic] if normalize_over == "trained" else torch.ones_like(b, dtype=torch.bool)
    kappa = b / std
    reference = kappa.abs() if transitions.reference_credit is None else transitions.reference_credit[stochastic]
    zeta = kappa[chosen].abs().sum() / delta[chosen].sum()
    steps = Steps(kappa, std, delta, zeta * delta, reference[chosen].mean().expand_as(kappa), chosen)
    linear, quadratic, scale = _RULES[rule](steps)
    if normalize_scale:
        scale = scale / steps.mean(scale)
    divergence = kappa**2 / 2 if kl == "exact" else delta * kappa**2 / 2

    columns = {"linear": linear, "quadratic": quadratic, "scale": scale, "kl": divergence}
    if not all(bool(column.isfinite().all()) for column in columns.values()):
        raise ValueError(f"the sampler's noise is too small for the rule {rule}: its credit is not finite")
    return CreditTable(
        **{name: torch.where(trained, _scatter(column, stochastic), 0.0) for name, column in columns.items()},
        zeta=float(zeta),
        rule=rule,
        trained_steps=tuple(trained.nonzero().flatten().tolist()),
    )


def _scatter(values: Tensor, where: Tensor) -> Tensor:
    """``values`` [M] at the M true positions of ``where`` [N], 0 elsewhere."""
    column = torch.zeros(len(where), dtype=torch.float64)
    column[where] = values
    return column


def _check_stochastic(stochastic: Tensor) -> None:
    if not bool(stochastic.any()):
        raise ValueError(
            "the sampler adds no noise at any step, so there is no policy to train: its noise must be above 0"
        )


def _check_trained(transitions: Transitions, trained_steps: Iterable[int] | None) -> list[int]:
    if trained_steps is None:
        return [step for step in range(transitions.steps) if transitions.std[step] > 0]
    values = trained_steps.tolist() if isinstance(trained_steps, Tensor) else list(trained_steps)
    if not values:
        raise ValueError("trained_steps is empty, so there is nothing to train")
    steps: list[int] = []
    for value in values:
        if isinstance(value, bool) or value not in range(transitions.steps):
            raise ValueError(f"trained_steps must be integers from 0 to {transitions.steps - 1}, got {value!r}")
        step = int(value)
        if step in steps:
            raise ValueError(f"trained_steps contains step {step} twice")
        if transitions.std[step] == 0:
            raise ValueError(f"step {step} adds no noise, so it has no density and cannot be trained")
        if step == transitions.steps - 1 and transitions.final_step == "clean":
            raise ValueError(
                f"step {step} is the last one and its noise is dropped (final_step is clean), so it cannot be trained"
            )
        steps.append(step)
    return steps


def credit_record(sampler: str, transitions: Transitions, table: CreditTable) -> dict[str, Any]:
    """Native, proportionate and used credit per step: the content of ``credit.json`` and of ``credit --json``."""
    return {
        "sampler": sampler,
        "rule": table.rule,
        "times": transitions.times.tolist(),
        "native": native_credit(transitions).tolist(),
        "proportionate": proportionate_credit(transitions).tolist(),
        "used": table.linear.abs().tolist(),
        "zeta": table.zeta,
        "trained_steps": list(table.trained_steps),
    }
