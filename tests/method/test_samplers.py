"""From the configuration to sampler and credit tables."""

from pathlib import Path

import pytest
import torch
from tiny_pipeline import tiny_config

from pcpo_fast.config.schema import Config
from pcpo_fast.errors import UserError
from pcpo_fast.method.samplers import build_credit, build_transitions, steps_to_train
from pcpo_fast.method.schedules import FlowSchedule
from pcpo_fast.method.transitions import coefficients_preserving, dance_sde, flow_sde, shifted_times

GRID = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0], dtype=torch.float64)


def config_of(*overrides: str) -> Config:
    return tiny_config(Path("unused"), *overrides)


@pytest.mark.parametrize(
    ("name", "build"), [("dance", dance_sde), ("flow", flow_sde), ("cps", coefficients_preserving)]
)
def test_a_sampler_is_built_with_its_noise_and_grid(name: str, build: object) -> None:
    settings = config_of(f"sampler.name={name}", "sampler.steps=7", "sampler.shift=2", "sampler.noise=0.4").sampler
    table, expected = build_transitions(settings), build(shifted_times(7, 2.0), 0.4)  # type: ignore[operator]
    for column in ("times", "a", "b", "std"):
        assert torch.equal(getattr(table, column), getattr(expected, column))
    assert table.final_step == expected.final_step


def test_the_schedulers_grid_is_used_where_asked_for() -> None:
    settings = config_of("sampler.grid=scheduler").sampler
    assert torch.equal(build_transitions(settings, FlowSchedule(GRID)).times, GRID)
    assert not torch.equal(build_transitions(config_of().sampler, FlowSchedule(GRID)).times, GRID)
    with pytest.raises(UserError, match=r"sampler\.grid: scheduler needs a model"):
        build_transitions(settings)


@pytest.mark.parametrize("final", ["clean", "noisy"])
def test_the_final_step_can_be_chosen(final: str) -> None:
    table = build_transitions(config_of(f"sampler.final_step={final}").sampler)
    assert table.final_step == final and (table.final_row[2] > 0) == (final == "noisy")


@pytest.mark.parametrize("overrides", [("sampler.steps=1",), ("sampler.name=cps", "sampler.noise=1.5")])
def test_settings_that_make_no_sampler_are_refused(overrides: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="sampler"):
        build_transitions(config_of(*overrides).sampler)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ((), [0, 1, 2]),
        (("sampler.name=flow",), [0, 1, 2]),
        (("sampler.name=cps",), [0, 1, 2]),
        (("sampler.name=flow", "credit.train_last_step=true"), [0, 1, 2, 3]),
        (("sampler.final_step=noisy", "credit.train_last_step=true"), [0, 1, 2, 3]),
        (("credit.steps=[2, 0, 2]",), [0, 2]),
        (("sampler.name=flow", "credit.steps=[3]"), [3]),
    ],
)
def test_steps_to_train(overrides: tuple[str, ...], steps: list[int]) -> None:
    config = config_of(*overrides)
    transitions = build_transitions(config.sampler)
    assert steps_to_train(config, transitions) == steps
    credit = build_credit(config, transitions)
    assert list(credit.trained_steps) == steps
    assert all((float(credit.linear[step]) != 0) == (step in steps) for step in range(4))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("credit.steps=[3]",), r"^credit\.steps: step 3 cannot be trained .*allowed: 0, 1, 2$"),
        (("credit.steps=[9]",), r"^credit\.steps: there is no step 9; sampler\.steps=4 has steps 0 to 3$"),
        (("credit.train_last_step=true",), r"^credit\.train_last_step: the last step of sampler dance"),
        (
            ("sampler.name=cps", "sampler.final_step=noisy", "credit.train_last_step=true"),
            r"^credit\.train_last_step: the last step of sampler cps has no noise",
        ),
    ],
)
def test_steps_that_cannot_be_trained_are_refused(overrides: tuple[str, ...], reason: str) -> None:
    config = config_of(*overrides)
    with pytest.raises(UserError, match=reason):
        steps_to_train(config, build_transitions(config.sampler))


def test_the_credit_table_is_the_configured_rule() -> None:
    def linear(*overrides: str) -> torch.Tensor:
        config = config_of(*overrides)
        return build_credit(config, build_transitions(config.sampler)).linear[:3].abs()

    times = shifted_times(4, 3.0)
    proportionate = linear() / (times[:-1] - times[1:])[:3]
    assert torch.allclose(proportionate, proportionate[:1].expand(3))
    native = build_transitions(config_of().sampler)
    assert torch.allclose(linear("credit.rule=native"), (native.b.abs() / native.std)[:3])
