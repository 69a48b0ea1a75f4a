"""docs/algorithms.md against the code: its tables of presets, samplers and rules, its numbers, its two examples."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from published_algorithms import sd3_grid

from pcpo_fast.config.docs import with_samplers
from pcpo_fast.config.loading import load_config
from pcpo_fast.config.presets import PRESETS
from pcpo_fast.config.sampler_registry import SAMPLERS, Sampler
from pcpo_fast.config.schema import Config
from pcpo_fast.errors import UserError
from pcpo_fast.method import credit
from pcpo_fast.method import transitions as functions
from pcpo_fast.method.credit import RULES, credit_table, native_credit
from pcpo_fast.method.samplers import build_credit, build_transitions, steps_to_train
from pcpo_fast.method.schedules import DiffusionSchedule, FlowSchedule, Schedule
from pcpo_fast.method.step_tables import RunTables
from pcpo_fast.method.transitions import (
    coefficients_preserving,
    ddim,
    ddim_timesteps,
    shifted_times,
    stable_diffusion_alphas,
)

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
CPU = torch.device("cpu")


def rows(header: str) -> dict[str, list[str]]:
    """The rows of the tables whose header begins so, by the name in their first cell, without marks of code."""
    found = {}
    for table in re.findall(rf"^\| `?{re.escape(header)}`? \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE):
        for line in table.splitlines():
            first, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            name = re.match(r"`(\w+)`", first)
            assert name is not None, line
            found[name.group(1)] = [cell.replace("`", "") for cell in cells]
    return found


def schedule_of(config: Config) -> Schedule:
    if config.sampler.name == "ddim":
        return DiffusionSchedule(stable_diffusion_alphas(), ddim_timesteps(config.sampler.steps))
    return FlowSchedule(torch.tensor(sd3_grid(config.sampler.steps), dtype=torch.float64))


def test_the_tables_are_complete() -> None:
    assert rows("preset").keys() == PRESETS.keys()
    assert with_samplers(TEXT) == TEXT  # python -m pcpo_fast.config.docs
    assert tuple(rows("sampler.name")) == tuple(SAMPLERS)
    assert tuple(rows("credit.rule")) == RULES
    assert set(rows("window.schedule")) == {"progressive", "random", "fixed"}
    assert set(rows("sampler.variance")) == {"native", "reshaped", "exact"}


ADVANTAGES = {
    ("group", False): "group",
    ("group", True): "group, sample std",
    ("flow_grpo", False): "prompt's mean, global std",
    ("running", False): "running buffer per prompt",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_row_is_what_it_does(preset: str) -> None:
    config = load_config(None, [f"algorithm={preset}"])
    sampler, decodes, trained, objective, rule, advantages, beta = rows("preset")[preset]
    assert sampler == f"{config.sampler.name}, {config.sampler.steps}, {config.sampler.noise}"
    tables = RunTables(config, schedule_of(config), CPU)
    assert decodes == ("noisy" if float(tables.at(0).sampler.std[-1]) > 0 else "clean")
    count = tables.trained_count
    words = {
        "all": config.sampler.steps,
        "all but the last": config.sampler.steps - 1,
        "four, in a window that moves": 4,
        "a random three of the first five": 3,
    }
    assert words[trained] == count
    kind, clip = objective.split(", ")
    assert (kind, float(clip)) == (config.credit.objective, config.credit.clip_range)
    assert rule == config.credit.rule
    whose = {1: "each", 4: "every fourth"}[config.advantage.scored_steps]
    steps = {"final": "", "gain": f", gain of {whose} step"}[config.advantage.steps]
    assert advantages == ADVANTAGES[config.advantage.normalization, config.advantage.unbiased] + steps
    assert float(beta) == config.credit.kl_coefficient


def test_which_presets_start_a_group_from_the_same_noise() -> None:
    named = re.search(r"DanceGRPO's family \(([^)]*)\)", TEXT)
    assert named is not None
    same = {name for name in PRESETS if load_config(None, [f"algorithm={name}"]).rollout.same_initial_noise}
    assert set(re.findall(r"`(\w+)`", named.group(1))) == same


def test_numbers_that_the_page_states() -> None:
    config = load_config(None, ["algorithm=pcpo_flow"])
    transitions = build_transitions(config.sampler, schedule_of(config))
    assert credit_table(transitions, "proportionate").zeta == pytest.approx(5.705, abs=5e-4)
    assert build_credit(config, transitions).zeta == pytest.approx(3.970, abs=5e-4)
    assert float(transitions.deltas[-1]) == pytest.approx(0.0089, abs=5e-5)
    native = native_credit(transitions)
    assert 0.3 < float(native[-1] / native.sum()) < 0.35  # "a third"
    trained = steps_to_train(config, transitions)
    assert float(1 / transitions.std[trained].mean()) == pytest.approx(2.252, abs=5e-4)
    of_cps = native_credit(coefficients_preserving(transitions.times, 0.8))
    assert round(float(of_cps.max())) == 32

    alphas, timesteps = stable_diffusion_alphas(), ddim_timesteps(50)
    own = native_credit(ddim(alphas, timesteps, 1.0, "reshaped"))
    assert (round(float(own.min()), 3), round(float(own.max()), 3)) == (0.385, 3.368)
    native = native_credit(ddim(alphas, timesteps, 1.0))
    assert (round(float(native.min()), 3), round(float(native.max()), 3)) == (0.374, 3.275)
    for number in ("5.705", "3.970", "0.0089", "2.252", "a native credit of 32", "0.385 to 3.368", "0.374 to 3.275"):
        assert number in TEXT


def test_the_refusal_that_the_page_quotes() -> None:
    config = load_config(None, ["algorithm=pcpo_diffusion", "sampler.steps=25", "sampler.variance=reshaped"])
    with pytest.raises(UserError) as caught:
        RunTables(config, schedule_of(config), CPU)
    assert f"`{caught.value}`" in TEXT


# The examples


def example(name: str) -> Any:
    """The function that a code block of the page defines."""
    block = next(code for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if f"def {name}(" in code)
    assert len([line for line in block.splitlines() if line and not line.startswith(("from", " " * 4 + '"""'))]) <= 10
    namespace: dict[str, Any] = {}
    exec(block, namespace)
    return namespace[name]


def test_the_sampler_of_the_page_works_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "linear_sde", example("linear_sde"), raising=False)
    monkeypatch.setitem(SAMPLERS, "linear", Sampler(f"{functions.__name__}:linear_sde", "flow", 0.5, ("",) * 4))
    config = load_config(None, ["sampler.name=linear", "sampler.steps=8", "sampler.noise=0.6"])
    table = build_transitions(config.sampler)
    times = shifted_times(8, 3.0)
    assert torch.allclose(table.std, 0.6 * times[:-1] * (times[:-1] - times[1:]).sqrt())
    # A perfect model arrives with the signal of t': x = (1 - t) x0 + t n, f = n - x0.
    assert torch.allclose(table.a * (1 - times[:-1]) - table.b, 1 - times[1:])
    for rule in RULES:
        assert len(credit_table(table, rule).trained_steps) == 8
    assert steps_to_train(config, table) == list(range(7))


def test_the_rule_of_the_page_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reward Score Matching's code: (term 1 + term 2) std² in the hinge, then over std² and times sigma / sqrt(dt)."""
    monkeypatch.setitem(credit._RULES, "fair_clip2", example("fair_clip2"))
    monkeypatch.setattr(credit, "RULES", (*RULES, "fair_clip2"))
    config = load_config(None, ["algorithm=fair_clip"])
    transitions = build_transitions(config.sampler, schedule_of(config))
    table, fair = credit_table(transitions, "fair_clip2"), credit_table(transitions, "fair_clip")
    assert torch.equal(table.linear, fair.linear) and torch.equal(table.quadratic, fair.quadratic)
    sigma = transitions.std / transitions.deltas.sqrt()
    assert torch.allclose(table.scale, fair.scale * sigma / transitions.deltas.sqrt())
    guard = credit_table(transitions, "grpo_guard")  # "and weighs the steps like GRPO-Guard"
    assert torch.allclose(table.linear * table.scale, guard.linear * guard.scale)
