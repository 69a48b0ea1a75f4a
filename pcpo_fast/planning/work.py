"""Floating-point operations of an epoch, phase by phase. Recomputation is never part of a model's operations."""

import math
from typing import NamedTuple

from pcpo_fast.config.schema import Config
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.rollout.epoch_plan import steps_per_image


class Work(NamedTuple):
    """Operations of a phase over all GPUs.

    Attributes:
        flops: of the model; a multiplication and an addition are two.
        recomputed: computed a second time, by checkpointing and in the backward of attention.
    """

    flops: float
    recomputed: float = 0.0

    def seconds(self, rate: float) -> float:
        """Time of the model's operations at ``rate`` operations per second."""
        return self.flops / rate


def work_of_epoch(config: Config, costs: ModelCosts, trainable: int, *, checkpointed: float) -> dict[str, Work]:
    """Operations of each phase of an epoch; an evaluation happens every ``evaluation.every`` epochs only.

    Args:
        config: the run.
        costs: of its model.
        trainable: steps that may be trained in an epoch.
        checkpointed: share of the blocks whose activations the update recomputes.

    Returns:
        "rollout", "decode", "predictions" where per-step credit decodes them, "update", "evaluation".
    """
    images, steps = config.images_per_epoch, config.sampler.steps
    forward, decode = costs.forward(1).flops, costs.decoding(1).flops
    training = costs.training(1, False)
    recomputed = training.recomputed
    if checkpointed:
        recomputed += checkpointed * (costs.training(1, True).recomputed - recomputed)
    pairs = images * steps_per_image(config, trainable)
    passes = pairs * config.train.inner_epochs
    update = passes * training.flops
    if config.credit.kl_coefficient > 0:
        update += passes * forward
    if config.train.old_output == "recompute":
        update += pairs * forward
    phases = {"rollout": Work(images * steps * forward), "decode": Work(images * decode)}
    settings = config.advantage
    if settings.steps != "final":
        predictions = images * math.ceil(trainable / settings.scored_steps) * decode
        if settings.audit_every:  # two branches of each image, from a step halfway on average
            predictions += settings.audit_images * (steps * forward + 4 * decode) / settings.audit_every
        phases["predictions"] = Work(predictions)
    shown = config.evaluation.prompts * config.evaluation.images_per_prompt
    if config.prompts.heldout is None:
        shown = 0
    return phases | {
        "update": Work(update, passes * recomputed),
        "evaluation": Work(shown * (steps * forward + decode)),
    }
