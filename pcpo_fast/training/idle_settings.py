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
    return [f"{key} has no effect: {why}" for key, why in found if own[key] != usual[key]]


def _found(config: Config, prompts: int, heldout: int, ranks: int) -> Iterator[tuple[str, str]]:
    epochs, advantage, rollout, window = config.train.epochs, config.advantage, config.rollout, config.window
    if epochs == 0:
        return
    within, every = f"in {counted(epochs, 'epoch')} (train.epochs)", config.evaluation.every
    sampled = -(-max(rollout.images_per_prompt, rollout.candidates or 0) * rollout.prompts_per_epoch // ranks)
    alone = rollout.batch_size != AUTO and rollout.batch_size >= sampled
    if config.scoring.overlap and alone and advantage.steps == "final":
        images, size = counted(sampled, "image"), rollout.batch_size
        why = f"a rank samples its {images} in one batch (rollout.batch_size={size}), none of them during the scoring"
        yield "scoring.overlap", why
    if advantage.gain_lambda_rise and heldout and 3 * every >= epochs:
        why = (
            f"it takes three evaluations (evaluation.every={every}) before the last epoch, more than there are {within}"
        )
        yield "advantage.gain_lambda_rise", why
    if window.size and window.schedule != "fixed" and interval_at(window, window.start) >= epochs:
        yield "window.interval", f"the window does not move {within}"
    drawn = math.ceil(epochs * rollout.prompts_per_epoch / prompts) * rollout.images_per_prompt
    if advantage.normalization == "running" and drawn < advantage.min_count:
        why = f"advantage.min_count={advantage.min_count} is more rewards than any prompt gets {within}, {drawn}"
        yield "advantage.normalization", why
    if config.evaluation.min_diversity is not None and every >= epochs:
        why = f"evaluation.every={every} puts no evaluation before the last epoch {within}"
        yield "evaluation.min_diversity", why
    if config.checkpoint.keep_best and math.lcm(every, config.checkpoint.every) >= epochs:
        why = (
            f"evaluation.every={every} and checkpoint.every={config.checkpoint.every} coincide only at the end {within}"
        )
        yield "checkpoint.keep_best", why
    if 0 < heldout < config.evaluation.prompts:
        yield "evaluation.prompts", f"prompts.heldout has only {counted(heldout, 'prompt')}, all of which are used"
