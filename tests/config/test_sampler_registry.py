"""One entry makes a sampler known to the configuration, the command line and the documentation."""

import json
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor

from pcpo_fast.cli import main
from pcpo_fast.config.docs import render, with_samplers
from pcpo_fast.config.loading import load_config
from pcpo_fast.config.sampler_registry import SAMPLERS, Kind, Sampler
from pcpo_fast.config.schema import SamplerConfig
from pcpo_fast.errors import UserError
from pcpo_fast.method.samplers import build_transitions, check_sampler
from pcpo_fast.method.schedules import DiffusionSchedule, FlowSchedule
from pcpo_fast.method.transitions import PredictionType, Transitions, ddim, ddim_timesteps, stable_diffusion_alphas

Capture = pytest.CaptureFixture[str]


def still(times: Tensor, noise: float) -> Transitions:
    """A sampler that only adds noise: every step has the same credit, 1 / noise."""
    ones = torch.ones(len(times) - 1)
    return Transitions(times, ones, ones, noise * ones)


def louder(
    alphas: Tensor,
    timesteps: Tensor,
    noise: float,
    *,
    prediction: PredictionType = "epsilon",
    weight: float | None = None,
) -> Transitions:
    """DDIM with a weight of its own."""
    return ddim(alphas, timesteps, noise * (weight or 1.0), prediction=prediction)


@pytest.fixture
def registered() -> Iterator[None]:
    SAMPLERS["still"] = Sampler(f"{__name__}:still", "flow", 0.25, ("This page", "1", "1", "2"))
    SAMPLERS["louder"] = Sampler(f"{__name__}:louder", "diffusion", 0.5, ("It", "3", "4", "5"), settings=("weight",))
    yield
    del SAMPLERS["still"], SAMPLERS["louder"]


def test_a_registered_sampler_is_one_everywhere(registered: None, capsys: Capture) -> None:
    config = load_config(None, ["sampler.name=still", "sampler.steps=4", "sampler.noise=0.5"])
    table = build_transitions(config.sampler)
    assert table.std.tolist() == [0.5] * 4 and table.a.tolist() == [1.0] * 4
    check_sampler(config.sampler, FlowSchedule)
    with pytest.raises(
        UserError, match=r"still is for flow models, but this model is a diffusion model; allowed: ddim, louder$"
    ):
        check_sampler(config.sampler, DiffusionSchedule)

    assert main(["credit", "--sampler", "still", "--steps", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["native"] == [4.0] * 5  # its usual noise
    assert main(["credit", "--sampler", "still", "--noise", "0.5", "--shift", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["native"] == [2.0] * 16
    assert main(["credit", "--sampler", "still", "--eta", "1"]) == 2
    assert "--eta does not apply to still, which accepts --noise, --shift" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["credit", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "noise level of dance (default 0.3), flow (0.7), cps (0.7) or still (0.25)" in words

    assert "`dance`, `flow`, `cps`, `ddim`, `still`, `louder` |" in render()
    assert with_samplers("| `sampler.name` | x |\n|---|---|\n| old |\n\n").count(
        "\n| `still` | This page | 1 | 1 | 2 |\n"
    )


def test_a_diffusion_sampler_takes_the_settings_it_names(registered: None, capsys: Capture) -> None:
    schedule = DiffusionSchedule(stable_diffusion_alphas(), ddim_timesteps(4))
    settings = SamplerConfig(name="louder", steps=4, noise=0.5, weight=0.5)  # type: ignore[call-arg]
    assert torch.equal(
        build_transitions(settings, schedule).std, ddim(schedule.alphas_cumprod, schedule.timesteps, 0.25).std
    )
    assert main(["credit", "--sampler", "louder", "--weight", "1", "--json"]) == 0
    with pytest.raises(UserError, match=r"sampler\.shift only takes effect with"):
        load_config(None, ["sampler.name=louder", "sampler.shift=2"])
    assert main(["credit", "--sampler", "louder", "--variance", "exact"]) == 2
    assert "--variance does not apply to louder, which accepts --eta, --weight" in capsys.readouterr().err


def test_a_sampler_that_is_no_longer_registered_is_refused(capsys: Capture) -> None:
    with pytest.raises(UserError, match=r"sampler\.name: must be one of dance, flow, cps, ddim, got 'still'$"):
        load_config(None, ["sampler.name=still"])
    with pytest.raises(UserError, match=r"got 'danc', did you mean dance\?$"):
        load_config(None, ["sampler.name=danc"])
    with pytest.raises(UserError, match=r"must be one of dance, flow, cps, ddim, got \["):
        load_config(None, ["sampler.name=[1]"])
    with pytest.raises(SystemExit):
        main(["credit", "--sampler", "still"])
    assert "invalid choice: 'still'" in capsys.readouterr().err


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_entry_names_what_there_is(name: str) -> None:
    sampler = SAMPLERS[name]
    assert callable(sampler.load()) and sampler.kind in get_args(Kind)
    assert set(sampler.takes) <= set(SamplerConfig.model_fields)
