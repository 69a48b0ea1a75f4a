"""From the configuration to the tables that drive sampling and training."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from pcpo_fast.config import Config, SamplerConfig
from pcpo_fast.credit import CreditTable, credit_table
from pcpo_fast.errors import UserError
from pcpo_fast.transitions import (
    Transitions,
    coefficients_preserving,
    dance_sde,
    flow_sde,
    shifted_times,
    trainable_steps,
)

SAMPLERS = {"dance": dance_sde, "flow": flow_sde, "cps": coefficients_preserving}


def build_transitions(settings: SamplerConfig, scheduler_times: Tensor | None = None) -> Transitions:
    """The sampler's table.

    Args:
        settings: the configuration's ``sampler`` section.
        scheduler_times: grid of the pipeline's scheduler, needed for ``sampler.grid`` ``scheduler``.

    Raises:
        UserError: the settings make no valid sampler.
    """
    try:
        times = shifted_times(settings.steps, settings.shift) if settings.grid == "shifted" else scheduler_times
        if times is None:
            raise UserError("sampler.grid: scheduler needs a model whose scheduler gives the grid")
        transitions = SAMPLERS[settings.name](times, settings.noise)
        if settings.final_step != "default":
            transitions = replace(transitions, final_step=settings.final_step)
    except ValueError as error:
        raise UserError(f"sampler: {error}") from None
    return transitions


def steps_to_train(config: Config, transitions: Transitions) -> list[int]:
    """The steps that may be trained, ascending.

    Raises:
        UserError: ``credit.steps`` names a step that does not exist or has no credit, or nothing is left.
    """
    allowed = trainable_steps(transitions)
    chosen: Sequence[int] = sorted(set(config.credit.steps)) if config.credit.steps is not None else allowed
    last = transitions.steps - 1
    for step in chosen:
        if step > last:
            raise UserError(f"credit.steps: there is no step {step}; sampler.steps={last + 1} makes steps 0 to {last}")
        if step not in allowed:
            raise UserError(
                f"credit.steps: step {step} cannot be trained (it has no noise, or its noise never reaches the image); "
                f"allowed: {', '.join(map(str, allowed))}"
            )
    if config.credit.steps is None and not config.credit.train_last_step:
        chosen = [step for step in chosen if step != last]
    if config.credit.train_last_step and last not in allowed:
        raise UserError(
            f"credit.train_last_step: the last step of sampler {config.sampler.name} has no noise, or its noise never "
            "reaches the image (sampler.final_step=noisy decodes the noisy sample of dance and flow)"
        )
    if not chosen:
        raise UserError("credit.steps: no step is left to train")
    return list(chosen)


def build_credit(config: Config, transitions: Transitions) -> CreditTable:
    """The credit table of a run.

    Raises:
        UserError: the rule cannot be had with this sampler, for the reason it gives.
    """
    try:
        return credit_table(
            transitions, config.credit.rule, trained_steps=steps_to_train(config, transitions), kl=config.credit.kl
        )
    except ValueError as error:
        raise UserError(f"credit: {error}") from None
