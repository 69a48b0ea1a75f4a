"""What a run writes to disk: encoded prompts, checkpoints, the export, and pictures."""

from math import prod

from pcpo_fast.config.schema import Config
from pcpo_fast.errors import UserError
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.states import WEIGHT_BYTES, Zero, optimizer_bytes
from pcpo_fast.prompts import load_prompts, trained_prompts
from pcpo_fast.reporting.grids import LONGEST, SHOWN
from pcpo_fast.rollout.epoch_scoring import STRIPS


def evaluation_count(config: Config) -> int:
    """Evaluations of a whole run: before training, every so many epochs, and after the last."""
    if config.prompts.heldout is None:
        return 0
    epochs, every = config.train.epochs, config.evaluation.every
    return 1 + (-(-epochs // every) if every else min(epochs, 1))


def checkpoint_count(config: Config) -> int:
    """Checkpoints that are on the disk at a time: those that are kept, and one more while it is written."""
    epochs, every, settings = config.train.epochs, config.checkpoint.every, config.checkpoint
    written = -(-epochs // every) if every else min(epochs, 1)
    return min(written, settings.keep + settings.keep_best + 1)


def encoded_prompts(config: Config) -> set[str] | None:
    """Prompts that the run encodes; None where its prompts cannot be read here."""
    try:
        texts = [prompt.text for prompt in load_prompts(config.prompts.train, config.prompts.column)]
        per_epoch, epochs = config.rollout.prompts_per_epoch, config.train.epochs
        used = {texts[index] for index in trained_prompts(len(texts), per_epoch, epochs, config.seed)}
        if config.prompts.heldout is not None:
            heldout = load_prompts(config.prompts.heldout, config.prompts.column)
            used |= {prompt.text for prompt in heldout[: config.evaluation.prompts]}
    except UserError:
        return None
    return used | {config.model.negative_prompt} if config.model.cfg_scale != 1 else used


def prompt_bytes(config: Config, costs: ModelCosts) -> float:
    """Bytes of an encoded prompt in ``model.embedding_cache``; those of models that mask padding may be smaller."""
    shapes = costs.model.policy.conditioning_shapes(costs.architecture.clip_tokens)
    return float(sum(map(prod, shapes.values())) * WEIGHT_BYTES[config.model.dtype])


def state_bytes(config: Config, zero: Zero) -> float:
    """Bytes of the engine's state in a checkpoint, over all ranks, per trained parameter.

    Those are master weights, moments and the moving average, and before ZeRO-3 the weights.
    """
    each = optimizer_bytes(config)
    weights = WEIGHT_BYTES[config.model.dtype] if zero.stage < 3 else 0
    return each.master + each.moments + each.average + weights


def plan_disk(config: Config, costs: ModelCosts, zero: Zero) -> dict[str, float]:
    """Bytes by part, without the model's own files.

    A checkpoint holds the engine's state, and the weights for other programs: those of the whole network, or LoRA's in
    float32. ``encoded prompts`` is missing where the prompts cannot be read here.
    """
    width, model = WEIGHT_BYTES[config.model.dtype], costs.model
    lora = config.model.finetune == "lora"
    export = float(model.trained_parameters * 4 if lora else model.network_parameters * width)
    kept = {
        "checkpoints": checkpoint_count(config) * (model.trained_parameters * state_bytes(config, zero) + export),
        "export": export,
        "pictures": (evaluation_count(config) + 2) * _picture_bytes(config),  # the last is of before and after
    }
    prompts = encoded_prompts(config)
    return kept if prompts is None else {"encoded prompts": len(prompts) * prompt_bytes(config, costs)} | kept


def _picture_bytes(config: Config) -> float:
    """Bytes of the images that an evaluation shows, at most, in PNG files and TensorBoard's events."""
    shown = min(SHOWN, config.evaluation.prompts * config.evaluation.images_per_prompt)
    if config.advantage.steps != "final":
        shown += STRIPS * config.sampler.steps
    return shown * 3.0 * LONGEST**2 * (2 if config.logging.tensorboard else 1)
