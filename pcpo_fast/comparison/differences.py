"""Differences between configurations, and their consequences for a comparison."""

from collections.abc import Mapping
from typing import Any

from pcpo_fast.config.dotted_keys import flattened
from pcpo_fast.config.roles import role_of, roles
from pcpo_fast.config.schema import Config

_BASE_MODEL = tuple(key for key, role in roles(Config) if role is not None and role.base_model)
_CONSEQUENCES = (
    (("rewards",), "their rewards are not on the same scale"),
    (_BASE_MODEL, "they do not start from the same images"),
    (("prompts.train", "prompts.column"), "they do not train on the same prompts"),
    (("prompts.heldout", "prompts.column", "evaluation.prompts", "evaluation.seed", "evaluation.images_per_prompt"),
     "their held-out rewards are not measured on the same images"),
    (("evaluation.deterministic", "sampler.steps", "sampler.shift", "sampler.grid"),
     "their held-out images are not sampled in the same way"),
    (("rollout.prompts_per_epoch", "rollout.images_per_prompt", "train.updates_per_epoch", "train.inner_epochs",
      "train.max_log_ratio", "train.old_output", "model.cfg_scale", "sampler.steps", "window", "credit.steps",
      "credit.fraction", "credit.train_last_step", "credit.kl_coefficient", "advantage.steps",
      "advantage.scored_steps", "advantage.audit_every", "advantage.audit_images"),
     "an epoch is not the same amount of work"),
)  # fmt: skip


def differences(configs: Mapping[str, Config]) -> dict[str, dict[str, Any]]:
    """The settings that differ between configurations, as {key: {name: value}}, except those specific to a run.

    A setting that a configuration does not have (of a reward that only another one uses) is None there.
    """
    flat = {name: dict(flattened(config.model_dump(mode="json"), lists=True)) for name, config in configs.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    found = {}
    for key in keys:
        values = {name: each.get(key) for name, each in flat.items()}
        first, *others = values.values()
        if any(other != first for other in others) and role_of(Config, key).in_comparison != "own":
            found[key] = values
    return found


def decisive(found: Mapping[str, Any]) -> list[str]:
    """The keys that affect what is learnt."""
    return [key for key in found if role_of(Config, key).in_comparison == "decisive"]


def consequences(found: Mapping[str, Any]) -> list[str]:
    """Caveats for comparing variants that differ in these keys, a sentence each."""
    sentences = []
    for names, consequence in _CONSEQUENCES:
        keys = [key for key in found if any(key == name or key.startswith(f"{name}.") for name in names)]
        if keys:
            sentences.append(f"The variants differ in {', '.join(keys)}: {consequence}.")
    return sentences
