"""What per-step credit does to the gradient: mean gradients of final, baseline and gain on frozen weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from pydantic import ValidationError
from torch import Tensor

from pcpo_fast.config.schema import AdvantageConfig, Config
from pcpo_fast.engine.engine import Engine, StepOutcome
from pcpo_fast.errors import UserError
from pcpo_fast.method.advantages import RunningAdvantages
from pcpo_fast.method.step_advantages import Segments, StepAdvantages
from pcpo_fast.method.step_tables import EpochTables, RunTables
from pcpo_fast.planning.sizes import fitted, gpu_memory
from pcpo_fast.policies import Conditioning, Policy
from pcpo_fast.policies.families import load_policy, load_trained_weights
from pcpo_fast.prompts import epoch_prompts, load_prompts
from pcpo_fast.reporting.tables import fixed_text
from pcpo_fast.rewards import RewardSet
from pcpo_fast.rollout.epoch_plan import pairs_per_update, plan_epoch
from pcpo_fast.rollout.epoch_scoring import RolloutScoring
from pcpo_fast.rollout.rollout import Rollout, collect_rollout
from pcpo_fast.training.update import Update

KINDS = ("final", "baseline", "gain")


@dataclass(frozen=True)
class GradientComparison:
    """How the mean gradients of :data:`KINDS` compare, over rollouts of the same frozen weights.

    Attributes:
        rollouts: K of them.
        cosines: [3, 3], between mean gradients; NaN where a squared length is not above 0, which says that it cannot be
            told from the noise of so few rollouts.
        errors: [3, 3], their standard errors (jackknife over rollouts); NaN where a cosine is.
        towards_final: [3], the expected cosine of one rollout's gradient with the mean gradient of ``final``, which has
            no bias but its own: how good a gradient is.
    """

    rollouts: int
    cosines: Tensor
    errors: Tensor
    towards_final: Tensor


def compare_gradients(products: Tensor) -> GradientComparison:
    """Compare mean gradients without the bias that a gradient's noise has in its product with itself.

    Inner products are taken between different rollouts alone: their mean over all pairs is an unbiased estimate of the
    inner product of the mean gradients, since the noise of two rollouts is independent.

    Args:
        products: float64 [K, 3, K, 3], inner products of the gradients of K rollouts, 3 at least.
    """

    def cosines(kept: Tensor) -> Tensor:
        mean = _between(products[kept][:, :, kept])
        lengths = mean.diagonal().where(mean.diagonal() > 0, torch.nan).sqrt()
        return mean / lengths[:, None] / lengths

    count = len(products)
    every = torch.arange(count)
    without = torch.stack([cosines(every[every != left_out]) for left_out in range(count)])
    errors = ((count - 1) * without.var(dim=0, correction=0)).sqrt()
    mean = _between(products)
    own = torch.stack([products[k, :, k].diagonal() for k in range(count)]).mean(dim=0)
    towards_final = mean[:, 0] / (mean[0, 0].where(mean[0, 0] > 0, torch.nan) * own).sqrt()
    # Where leaving out one rollout leaves nothing but noise, a cosine of them all says nothing either.
    return GradientComparison(count, cosines(every).where(errors.isfinite(), torch.nan), errors, towards_final)


def _between(products: Tensor) -> Tensor:
    """[3, 3], mean over pairs of different rollouts."""
    count = len(products)
    same = torch.stack([products[k, :, k] for k in range(count)]).sum(dim=0)
    mean = (products.sum(dim=(0, 2)) - same) / (count * (count - 1))
    return (mean + mean.T) / 2


def measure_gradients(
    config: Config,
    weights: Path | None,
    first_epoch: int,
    rollouts: int,
    warm_up: int,
    device: torch.device,
    told: Callable[[str], None] = lambda text: None,
) -> GradientComparison:
    """Sample rollouts with frozen weights, and take the gradient of each with the three kinds of credit.

    The rollouts are those of the next epochs, by their names. The slopes of ``baseline`` and ``gain`` come from
    `warm_up` rollouts before them. The gradient is that of the policy loss at the weights that sampled, without a KL
    term. The host's memory holds three gradients per rollout.

    Args:
        config: the run; ``advantage.steps`` and ``rollout.candidates`` are ignored. The rest of ``advantage`` counts,
            for ``final``, too: its small standard deviations are raised to ``min_spread``, as those of the others are.
        weights: what a checkpoint holds of the trained weights; None: the base model.
        first_epoch: epochs that these were trained for.
        rollouts, warm_up: how many.
        device: where the policy works.
        told: gets a line after each rollout.

    Raises:
        UserError: the model, prompts or rewards cannot be loaded, a reward fails, or rewards are all equal.
    """
    if config.rollout.candidates is not None:
        told("rollout.candidates is not used here: all images that are sampled are measured")
    config = _changed(config)
    prompts, rewards = load_prompts(config.prompts.train), RewardSet(config.rewards, config.scoring)
    rewards.check_predictions()
    rewards.check_prompts(prompts, f"prompts.train={config.prompts.train}", evaluation=False)
    epochs = range(first_epoch, first_epoch + warm_up + rollouts)
    per_epoch = config.rollout.prompts_per_epoch
    used = {index for epoch in epochs for index in epoch_prompts(len(prompts), per_epoch, epoch, config.seed)}
    policy = load_policy(config, device, [prompts[index].text for index in sorted(used)])
    if weights is not None:
        load_trained_weights(policy.module, config, weights)
    tables = RunTables(config, policy.schedule(config.sampler.steps), device)
    config = fitted(config, pairs_per_update(config, tables.trained_count, 1), 1, gpu_memory())

    def encode(indices: list[int]) -> Conditioning:
        return policy.encode([prompts[index].text for index in indices])

    learnt, gradients = _Recorded(config.advantage, tables.transitions.steps), list[list[Tensor]]()
    for number, epoch in enumerate(epochs):
        at = tables.at(epoch)
        plan = plan_epoch(config, len(prompts), at.steps, epoch, 0, 1)
        stepwise = learnt if number < warm_up else learnt.copy()
        scoring = RolloutScoring(config, rewards, prompts, RunningAdvantages(), stepwise, at, plan, device)
        rollout = collect_rollout(
            policy, encode, plan, config.rollout, at.sampler, config.seed, scoring.add, scoring.predicted
        )
        scored = scoring.finish(rollout.images)
        if scored.warning:
            raise UserError(f"gradients are compared on whole rollouts, but {scored.warning}")
        told(f"rollout {number + 1} of {len(epochs)}: mean reward {fixed_text(scored.metrics['reward/mean'], 4)}")
        if number >= warm_up:
            by_kind = stepwise.advantages(learnt)
            numbers = plan.images.flatten()
            gradients.append([_gradient(policy, rollout, by_kind[kind][numbers], at, config) for kind in KINDS])
    flat = torch.stack([gradient for group in gradients for gradient in group])
    products = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for part in flat.split(1 << 22, dim=1):  # all of the weights in float64 would take twice the memory again
        wide = part.double()
        products += wide @ wide.T
    if not bool(products.diagonal().any()):
        raise UserError("there is no gradient to compare: in every rollout all images of a prompt have the same reward")
    return compare_gradients(products.reshape(rollouts, len(KINDS), rollouts, len(KINDS)))


def _changed(config: Config) -> Config:
    """What is measured: predictions scored as gains need them, one pass, and no other loss."""
    values = config.model_dump()
    values["advantage"] |= {"steps": "gain", "audit_every": 0, "control": "none"}
    if values["advantage"]["calibrated"] == "branches":
        values["advantage"]["calibrated"] = True
    values["rollout"]["candidates"] = None  # all that the rollout has is measured
    values["credit"]["kl_coefficient"] = 0.0
    values["train"]["inner_epochs"] = 1
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"the gradients of per-step credit cannot be measured here: {reason}") from None


class _Recorded(StepAdvantages):
    """Keeps what the latest epoch's advantages are made of."""

    made_of: tuple[Tensor, Tensor, Segments, Tensor]

    def compute(
        self, final: Tensor, predicted: Tensor, segments: Segments, equal: Tensor, order: Tensor | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        self.made_of = final, predicted, segments, equal
        return super().compute(final, predicted, segments, equal, order)

    def copy(self) -> "_Recorded":
        other = _Recorded(self.settings, self.steps)
        other.load_state_dict(self.state_dict())
        return other

    def advantages(self, learnt: StepAdvantages) -> dict[str, Tensor]:
        """The latest epoch's advantages by kind of credit, [B, N] each, with the statistics in `learnt`."""
        final, _, _, equal = self.made_of
        clip = self.settings.clip
        found = {"final": final.masked_fill(equal, 0.0).clamp(-clip, clip)[:, None].expand(-1, self.steps)}
        for kind in ("baseline", "gain"):
            settings = AdvantageConfig.model_validate(self.settings.model_dump() | {"steps": kind})
            fresh = StepAdvantages(settings, self.steps)
            fresh.load_state_dict(learnt.state_dict())
            found[kind] = fresh.compute(*self.made_of)[0].nan_to_num()
        return found


class _Accumulating:
    """Stands in for the engine in an update that must not change the weights: gradients accumulate, without a step."""

    last_step = StepOutcome(True, 0.0, 0.0)

    def backward(self, loss: Tensor, last: bool | None = None) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        pass


def _gradient(policy: Policy, rollout: Rollout, advantages: Tensor, at: EpochTables, config: Config) -> Tensor:
    """float32 on the CPU, of the sum over all trained pairs."""
    parameters = [parameter for parameter in policy.module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    engine = cast(Engine, _Accumulating())
    for _ in Update(policy, engine, rollout, advantages, at.sampler, at.credit, config).run():
        pass
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([part.detach().float().flatten().cpu() for part in parts])
