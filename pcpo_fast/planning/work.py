"""Floating-point operations of an epoch by phase. Recomputation does not count as model operations."""

from typing import NamedTuple

import torch

from pcpo_fast.config.schema import AdvantageConfig, Config
from pcpo_fast.method.step_advantages import Segments, StepAdvantages
from pcpo_fast.method.step_tables import EpochTables
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.rollout.epoch_plan import steps_per_image


class Work(NamedTuple):
    """Operations of a phase, summed over all GPUs.

    Attributes:
        flops: model operations, two per multiply-add.
        recomputed: operations repeated by checkpointing and in the backward of attention.
    """

    flops: float
    recomputed: float = 0.0

    def seconds(self, rate: float) -> float:
        """Seconds that the model operations take at ``rate`` operations per second."""
        return self.flops / rate


def predictions_of_image(settings: AdvantageConfig, tables: EpochTables) -> int:
    """Predictions of an image that per-step credit decodes, where each step is trained for some image of its group."""
    if settings.steps == "final":
        return 0
    trained = torch.zeros(tables.sampler.steps, dtype=torch.bool)
    trained[tables.steps] = True
    segments = Segments.of(tables.sampler.noisy, settings.scored_steps)
    return int(segments.needed(trained, StepAdvantages(settings, len(trained)).gain_lambda).sum())


def work_of_epoch(
    config: Config, costs: ModelCosts, trainable: int, *, checkpointed: float, predictions: int = 0
) -> dict[str, Work]:
    """Operations of each phase of an epoch, and of one evaluation.

    Args:
        config: the run.
        costs: costs of its model.
        trainable: number of steps that may be trained in an epoch.
        checkpointed: share of the blocks whose activations the update recomputes.
        predictions: of :func:`predictions_of_image`.

    Returns:
        Keys "candidates" (only with them; their decodes, too), "rollout", "decode", "predictions" (only with per-step
        credit), "update" and "evaluation".
    """
    images, steps = config.images_per_epoch, config.sampler.steps
    forward, decode = costs.forward(1).flops, costs.decoding(1).flops
    training = costs.training(1, False)
    recomputed = training.recomputed
    if checkpointed:
        again = costs.training(1, config.model.gradient_checkpointing or True)
        recomputed += checkpointed * (again.recomputed - recomputed)
    pairs = images * steps_per_image(config, trainable)
    passes = pairs * config.train.inner_epochs
    update = passes * training.flops
    if config.credit.kl_coefficient > 0:
        update += passes * forward
    if config.train.old_output == "recompute":
        update += pairs * forward
    phases = {"rollout": Work(images * steps * forward), "decode": Work(images * decode)}
    if config.rollout.candidates is not None:
        count = config.rollout.prompts_per_epoch * config.rollout.candidates
        phases = {"candidates": Work(count * (steps * forward + decode))} | phases
    settings = config.advantage
    if settings.steps != "final":
        flops = images * predictions * decode
        if settings.audit_every:  # two branches per image, starting halfway on average
            flops += settings.audit_images * (steps * forward + 4 * decode) / settings.audit_every
        phases["predictions"] = Work(flops)
    shown = config.evaluation.prompts * config.evaluation.images_per_prompt
    if config.prompts.heldout is None:
        shown = 0
    return phases | {
        "update": Work(update, passes * recomputed),
        "evaluation": Work(shown * (steps * forward * (3 if config.evaluation.kl else 1) + decode)),
    }
