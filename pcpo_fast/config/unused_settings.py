"""Settings that only take effect together with others, one rule each; setting one that has no effect is refused.

A rule applies to values that the user's file or command line changes from what they would be otherwise. Conditions on
the model itself (``model.guidance``) are checked by its family in :mod:`pcpo_fast.policies`.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcpo_fast.config.credit_rules import CREDIT_RULES, rules_taking
from pcpo_fast.config.dotted_keys import flattened
from pcpo_fast.config.sampler_registry import SAMPLERS, listed, samplers_taking
from pcpo_fast.config.schema import Config, RewardConfig
from pcpo_fast.config.shipped import find


@dataclass(frozen=True)
class Rule:
    """Some settings only take effect under a condition.

    Attributes:
        keys: the settings, or sections of them.
        condition: what they need, worded to follow "only takes effect with".
        holds: whether a configuration meets it.
        switch: a setting that turns this part of a run off. On the command line it turns off what a file says of the
            part, too: nobody who writes ``prompts.heldout=null`` expects an evaluation.
    """

    keys: tuple[str, ...]
    condition: str
    holds: Callable[[Config], bool]
    switch: str | None = None

    def concerns(self, key: str) -> bool:
        """Whether a dotted key is one of the settings, or lies in one of the sections."""
        return any(key == name or key.startswith(f"{name}.") for name in self.keys)


RULES = (
    Rule(("model.lora",), "model.finetune=lora", lambda c: c.model.finetune == "lora"),
    Rule(("model.negative_prompt",), "a model.cfg_scale other than 1", lambda c: c.model.cfg_scale != 1),
    Rule(
        ("model.checkpointed_share",),
        "model.gradient_checkpointing true or selective",
        lambda c: c.model.gradient_checkpointing is not False,
        switch="model.gradient_checkpointing",
    ),
    Rule(
        ("prompts.column",),
        "prompt files that have columns or keys",
        lambda c: any(Path(path).suffix not in ("", ".txt") for path in (c.prompts.train, c.prompts.heldout) if path),
    ),
    Rule(("model.revision",), "a hub id as model.path, not a folder", lambda c: not find(c.model.path).is_dir()),
    Rule(
        ("sampler.shift", "sampler.grid"),
        f"sampler.name {listed(samplers_taking('shift'))}",
        lambda c: "shift" in SAMPLERS[c.sampler.name].takes,
    ),
    Rule(("sampler.shift",), "sampler.grid=shifted", lambda c: c.sampler.grid == "shifted"),
    Rule(("window",), "window.size above 0", lambda c: c.window.size > 0, switch="window.size"),
    Rule(
        ("window.stride", "window.decay", "window.decay_after", "window.wrap"),
        "window.schedule=progressive",
        lambda c: c.window.schedule == "progressive",
    ),
    Rule(
        ("window.interval",),
        "window.schedule progressive or random",
        lambda c: c.window.schedule in ("progressive", "random"),
    ),
    Rule(("window.decay_after",), "window.decay above 0", lambda c: c.window.decay > 0, switch="window.decay"),
    Rule(
        ("rollout.share_first_steps",),
        "rollout.images_per_prompt above 1",
        lambda c: max(c.rollout.images_per_prompt, c.rollout.candidates or 0) > 1,
    ),
    Rule(
        ("rollout.candidate_weights",),
        "rollout.candidates",
        lambda c: c.rollout.candidates is not None,
        switch="rollout.candidates",
    ),
    Rule(("credit.train_last_step",), "credit.steps=null", lambda c: c.credit.steps is None),
    Rule(
        ("credit.clip_range",),
        "credit.objective hinge or clip",
        lambda c: c.credit.objective != "divergence_mask",
        switch="credit.objective",
    ),
    Rule(
        ("credit.divergence_threshold",),
        "credit.objective=divergence_mask",
        lambda c: c.credit.objective == "divergence_mask",
        switch="credit.objective",
    ),
    Rule(
        ("credit.kl", "credit.kl_reference"),
        "credit.kl_coefficient above 0",
        lambda c: c.credit.kl_coefficient > 0,
        switch="credit.kl_coefficient",
    ),
    Rule(("credit.kl_reference",), "model.lora.init", lambda c: c.model.lora.init is not None),
    Rule(
        ("credit.normalize_scale",),
        f"credit.rule {listed(rules_taking('normalize_scale'))}",
        lambda c: "normalize_scale" in CREDIT_RULES[c.credit.rule],
    ),
    Rule(
        ("credit.normalize_over",),
        f"credit.rule {listed(rules_taking('normalize_over'))}, or credit.normalize_scale=true",
        lambda c: "normalize_over" in CREDIT_RULES[c.credit.rule] or c.credit.normalize_scale,
    ),
    Rule(
        ("advantage.unbiased",),
        "an advantage.normalization other than running",
        lambda c: c.advantage.normalization != "running",
    ),
    Rule(
        ("advantage.buffer_size", "advantage.min_count"),
        "advantage.normalization=running",
        lambda c: c.advantage.normalization == "running",
    ),
    Rule(
        (
            "advantage.calibrated",
            "advantage.scored_steps",
            "advantage.control",
            "advantage.audit_every",
            "advantage.audit_images",
        ),
        "advantage.steps baseline or gain",
        lambda c: c.advantage.steps != "final",
        switch="advantage.steps",
    ),
    Rule(
        ("advantage.min_spread",),
        "advantage.steps baseline or gain, or advantage.scale others or earlier",
        lambda c: c.advantage.steps != "final" or c.advantage.scale != "own",
        switch="advantage.steps",
    ),
    Rule(("advantage.gain_lambda",), "advantage.steps=gain", lambda c: c.advantage.steps == "gain"),
    Rule(
        ("advantage.gain_lambda_rise",),
        "advantage.steps=gain, a gain_lambda below 1, held-out prompts and evaluation.every above 0",
        lambda c: (
            c.advantage.steps == "gain"
            and c.advantage.gain_lambda < 1
            and c.prompts.heldout is not None
            and c.evaluation.every > 0
        ),
        switch="advantage.steps",
    ),
    Rule(
        ("advantage.audit_images",),
        "advantage.audit_every above 0",
        lambda c: c.advantage.audit_every > 0,
        switch="advantage.audit_every",
    ),
    Rule(
        ("train.max_log_ratio",),
        "train.inner_epochs above 1",
        lambda c: c.train.inner_epochs > 1,
        switch="train.inner_epochs",
    ),
    Rule(
        ("evaluation",),
        "held-out prompts (prompts.heldout)",
        lambda c: c.prompts.heldout is not None,
        switch="prompts.heldout",
    ),
    Rule(
        ("checkpoint.keep_best",),
        "evaluation.every and checkpoint.every above 0",
        lambda c: c.evaluation.every > 0 and c.checkpoint.every > 0,
    ),
)
"""All rules; where several concern one setting, the first that does not hold is reported."""

REWARD_RULES: tuple[tuple[str, str, Callable[[RewardConfig], bool]], ...] = (
    ("weight", "evaluation_only=false", lambda reward: not reward.evaluation_only or reward.weight == 0),
    ("clip", "evaluation_only=false and a weight other than 0", lambda reward: reward.trained_on),
)
"""The same for each of ``rewards``: setting, condition, and whether a reward meets it."""


def unused(
    config: Config, unset: Config, given: Collection[str], commanded: Collection[str]
) -> Iterator[tuple[list[str], str]]:
    """Settings that have no effect, with the condition under which they would have one.

    Args:
        config: the run.
        unset: the run if nothing but the algorithm were set.
        given: dotted keys that the user sets.
        commanded: those among them that the command line sets.
    """
    before: dict[str, Any] = dict(flattened(unset.model_dump(mode="json"), lists=True))
    now: dict[str, Any] = dict(flattened(config.model_dump(mode="json"), lists=True))
    left = [key for key in now if key in given and not (key in before and before[key] == now[key])]
    for rule in (*RULES, *_rules_of_rewards(config)):
        if rule.holds(config):
            continue
        meant = commanded if rule.switch in commanded else given
        found = [key for key in left if rule.concerns(key) and key in meant and key != rule.switch]
        left = [key for key in left if not rule.concerns(key)]
        if found:
            yield found, rule.condition


def _rules_of_rewards(config: Config) -> Iterator[Rule]:
    for position, reward in enumerate(config.rewards):
        for name, condition, holds in REWARD_RULES:
            if getattr(reward, name) != RewardConfig.model_fields[name].default:
                met = holds(reward)
                yield Rule((f"rewards.{position}.{name}",), condition, lambda _, met=met: met)  # type: ignore[misc]
