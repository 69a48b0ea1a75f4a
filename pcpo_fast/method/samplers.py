"""Building the sampler and credit tables from the configuration."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from pcpo_fast.config.sampler_registry import SAMPLERS, Kind, samplers_of
from pcpo_fast.config.schema import Config, SamplerConfig
from pcpo_fast.errors import UserError
from pcpo_fast.method.credit import CreditTable, credit_table
from pcpo_fast.method.schedules import DiffusionSchedule, FlowSchedule, Schedule
from pcpo_fast.method.transitions import Transitions, ddim, euler_ode, shifted_times, trainable_steps


def build_transitions(settings: SamplerConfig, schedule: Schedule | None = None) -> Transitions:
    """The table of the configured sampler.

    Args:
        settings: the configuration's ``sampler`` section.
        schedule: the model's schedule; required for diffusion models and for ``sampler.grid: scheduler``.

    Raises:
        UserError: the settings do not define a valid sampler, or the sampler is for the other kind of model.
    """
    check_sampler(settings, _kind(schedule))
    sampler = SAMPLERS[settings.name]
    own = {name: getattr(settings, name) for name in sampler.settings}
    try:
        transitions: Transitions
        if isinstance(schedule, DiffusionSchedule):
            times = (schedule.alphas_cumprod, schedule.timesteps)
            transitions = sampler.load()(*times, settings.noise, prediction=schedule.prediction, **own)
        else:
            transitions = sampler.load()(_grid(settings, schedule), settings.noise, **own)
        if settings.final_step != "default":
            transitions = replace(transitions, final_step=settings.final_step)
    except ValueError as error:
        raise UserError(f"sampler: {error}") from None
    return transitions


def deterministic_transitions(settings: SamplerConfig, schedule: Schedule | None = None) -> Transitions:
    """The same time grid without noise: Euler for a flow model, DDIM with eta 0 for a diffusion model.

    Raises:
        UserError: as in :func:`build_transitions`.
    """
    check_sampler(settings, _kind(schedule))
    try:
        if isinstance(schedule, DiffusionSchedule):
            return ddim(schedule.alphas_cumprod, schedule.timesteps, 0.0, prediction=schedule.prediction)
        return euler_ode(_grid(settings, schedule))
    except ValueError as error:
        raise UserError(f"sampler: {error}") from None


def check_sampler(settings: SamplerConfig, kind: type[Schedule]) -> None:
    """Check that the sampler is for this kind of model, without loading the model.

    Raises:
        UserError: it is not; the message lists the samplers that are.
    """
    needed = SAMPLERS[settings.name].kind
    found: Kind = "diffusion" if issubclass(kind, DiffusionSchedule) else "flow"
    if needed != found:
        allowed = samplers_of(found)
        raise UserError(
            f"sampler.name: {settings.name} is for {needed} models, but this model is a {found} model; "
            f"allowed: {', '.join(allowed)}"
        )


def _kind(schedule: Schedule | None) -> type[Schedule]:
    """The kind of model; without a schedule it is a flow model, whose shifted grid needs none."""
    return FlowSchedule if schedule is None else type(schedule)


def _grid(settings: SamplerConfig, schedule: Schedule | None) -> Tensor:
    if settings.grid == "shifted":
        return shifted_times(settings.steps, settings.shift)
    if not isinstance(schedule, FlowSchedule):
        raise UserError("sampler.grid: scheduler needs a model whose scheduler defines the grid")
    return schedule.times


def steps_to_train(config: Config, transitions: Transitions) -> list[int]:
    """The steps that may be trained, ascending.

    Raises:
        UserError: ``credit.steps`` contains a step that does not exist or cannot be trained, or no step is left.
    """
    allowed = trainable_steps(transitions)
    chosen: Sequence[int] = sorted(set(config.credit.steps)) if config.credit.steps is not None else allowed
    last = transitions.steps - 1
    for step in chosen:
        if step > last:
            raise UserError(f"credit.steps: there is no step {step}; sampler.steps={last + 1} has steps 0 to {last}")
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
        raise UserError("credit.steps: no steps are left to train")
    return list(chosen)


def build_credit(config: Config, transitions: Transitions) -> CreditTable:
    """The credit table of a run.

    Raises:
        UserError: the rule does not work with this sampler.
    """
    try:
        return credit_table(
            transitions,
            config.credit.rule,
            trained_steps=steps_to_train(config, transitions),
            kl=config.credit.kl,
            normalize_over=config.credit.normalize_over,
            normalize_scale=config.credit.normalize_scale,
        )
    except ValueError as error:
        raise UserError(f"credit: {error}") from None
