"""Settings that can have no effect in a run of this length and size, which is said at its start.

What has no effect at any length and size is refused (:mod:`pcpo_fast.config.unused_settings`). Here it may be on
purpose: a short trial of a long run's configuration, or the same configuration on more GPUs.
"""

import math
from collections.abc import Iterator

from pcpo_fast.config.dotted_keys import flattened
from pcpo_fast.config.presets import PRESETS
from pcpo_fast.config.schema import AUTO, Config
from pcpo_fast.config.wording import counted
from pcpo_fast.method.windows import interval_at


def idle_settings(config: Config, prompts: int, heldout: int, ranks: int) -> list[str]:
    """One sentence for each setting that was changed from what the algorithm has, and will do nothing.

    Args:
        config: the run.
        prompts: number of training prompts.
        heldout: number of held-out prompts that are used.
        ranks: number of processes.
    """
    usual = dict(flattened(Config.model_validate(PRESETS[config.algorithm]).model_dump(mode="json")))
    own = dict(flattened(config.model_dump(mode="json")))
    found = _found(config, prompts, heldout, ranks)
    return [said for keys, said in found if any(own[key] != usual[key] for key in keys)]


def _found(config: Config, prompts: int, heldout: int, ranks: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """What will do nothing, with the settings of which one must have been changed: otherwise nobody asked for it."""
    epochs, advantage, rollout, window = config.train.epochs, config.advantage, config.rollout, config.window
    if epochs == 0:
        return
    within, every = f"in {counted(epochs, 'epoch')} (train.epochs)", config.evaluation.every
    sampled = -(-max(rollout.images_per_prompt, rollout.candidates or 0) * rollout.prompts_per_epoch // ranks)
    alone = rollout.batch_size != AUTO and rollout.batch_size >= sampled
    if config.scoring.overlap and alone and advantage.steps == "final":
        yield (
            ("scoring.overlap",),
            f"scoring.overlap has no effect: a rank samples its {counted(sampled, 'image')} in one batch "
            f"(rollout.batch_size={rollout.batch_size}), none of them during the scoring",
        )
    if advantage.gain_lambda_rise and heldout and 3 * every >= epochs:
        yield (
            ("advantage.gain_lambda_rise",),
            "advantage.gain_lambda_rise has no effect: it takes three evaluations before the end, more than "
            f"evaluation.every={every} gives {within}",
        )
    if window.size and window.schedule != "fixed" and interval_at(window, window.start) >= epochs:
        yield (
            ("window.schedule", "window.interval"),
            f"window.schedule={window.schedule} does not move the window {within}: window.interval={window.interval}",
        )
    drawn = math.ceil(epochs * rollout.prompts_per_epoch / prompts) * rollout.images_per_prompt
    if advantage.normalization == "running" and drawn < advantage.min_count:
        yield (
            ("advantage.normalization", "advantage.min_count"),
            "advantage.normalization=running compares every image with all of its epoch, as global does: no prompt "
            f"gets {counted(advantage.min_count, 'reward')} (advantage.min_count) {within}, only {drawn}",
        )
    if config.evaluation.min_diversity is not None and every >= epochs:
        yield (
            ("evaluation.min_diversity",),
            "evaluation.min_diversity has no effect: there is no evaluation before the end "
            f"(evaluation.every={every}, train.epochs={epochs})",
        )
    if config.checkpoint.keep_best and math.lcm(every, config.checkpoint.every) >= epochs:
        yield (
            ("checkpoint.keep_best",),
            "checkpoint.keep_best has no effect: no evaluation meets a checkpoint before the end "
            f"(evaluation.every={every}, checkpoint.every={config.checkpoint.every}, train.epochs={epochs})",
        )
    if 0 < heldout < config.evaluation.prompts:
        yield (
            ("evaluation.prompts",),
            f"evaluation.prompts has no effect: prompts.heldout has only {counted(heldout, 'prompt')}, all of which "
            "are used",
        )
