"""How the norms' plans are chosen: by the rule, from the table, and into the table."""

import json
from itertools import pairwise

import pytest
import torch
from pcpo_kernels.dispatch import triton_installed

if not triton_installed():
    pytest.skip("triton is not installed", allow_module_level=True)

import tune_norms
from pcpo_kernels import tuning
from pcpo_kernels.tuning import IMAGES, MOST_SHARED, NormPlan, default_plan, norm_plan

LAUNCHES = [*IMAGES, "backward-norm", "backward-residual", "backward-residual-norm"]


@pytest.mark.parametrize("launched", LAUNCHES)
def test_the_rule_covers_every_channel(launched: str) -> None:
    for channels in (1, 24, 96, 97, 320, 1152, 1536, 1537, 2432, 3072, 4096, 6144, 8192):
        for size in (2, 4):
            plan = default_plan(launched, channels, size)
            assert plan.PARTS * plan.BLOCK >= channels > plan.BLOCK * (plan.PARTS - 1)
            assert plan.BLOCK & (plan.BLOCK - 1) == 0
            shared = (plan.STAGES - 1) * IMAGES.get(launched, 0) * plan.PARTS * plan.BLOCK * size
            assert shared <= MOST_SHARED


def test_no_lane_is_idle_at_the_widths_of_flux_and_sd3() -> None:
    for channels in (1536, 3072):
        for launched in IMAGES:
            plan = default_plan(launched, channels, 2)
            assert plan.STAGES == 3
            assert channels == plan.PARTS * plan.BLOCK
            assert 8 * 32 * plan.warps == plan.BLOCK  # 16 bytes at once


@pytest.fixture
def table(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "tuned.json")
    tuning.TABLE.write_text("{}\n")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Fast Card 9")
    norm_plan.cache_clear()
    yield tuning.TABLE
    norm_plan.cache_clear()


def test_a_measured_plan_holds_on_its_card_alone(table) -> None:
    measured, device = NormPlan(1, 1, 128, 2), torch.device("cuda", 0)
    rule = default_plan("forward-norm", 128, 2)
    assert measured != rule == norm_plan("forward-norm", 128, 2, device)
    tune_norms.write("Fast Card 9", {"forward-norm-128x2": measured})
    tune_norms.write("Other", {"forward-norm-256x2": measured})
    norm_plan.cache_clear()
    assert norm_plan("forward-norm", 128, 2, device) == measured
    assert norm_plan("forward-norm", 128, 4, device) == default_plan("forward-norm", 128, 4)
    assert norm_plan("forward-norm", 256, 2, device) == default_plan("forward-norm", 256, 2)
    assert norm_plan("forward-norm", 128, 2, torch.device("cpu")) == rule
    again = json.loads(table.read_text())
    assert again == {
        "Fast Card 9": {"forward-norm-128x2": [1, 1, 128, 2]},
        "Other": {"forward-norm-256x2": [1, 1, 128, 2]},
    }


def test_the_tool_keeps_what_is_faster(table, monkeypatch, capsys) -> None:
    """Times from a clock that likes plans with more stages; the ops themselves run as plain PyTorch here."""
    monkeypatch.setenv("PCPO_KERNELS", "reference")
    channels, current = 512, []
    original = tune_norms.planned
    monkeypatch.setattr(tune_norms, "planned", lambda name, plan: current.append(plan) or original(name, plan))

    class Clock:
        def milliseconds(self, call) -> float:
            return 4.0 - current[-1].STAGES

    found = tune_norms.tune(torch.device("cpu"), [channels], 2, Clock())
    assert {name.removesuffix("-512x2") for name in found} == {
        "backward-norm",
        "backward-residual",
        "backward-residual-norm",
    }
    assert {plan.STAGES for plan in found.values()} == {3}  # the rule has them elsewhere
    assert capsys.readouterr().out.count("(kept)") == 3


def test_candidates_fill_their_threads() -> None:
    found = list(tune_norms.candidates(3072))
    assert len(found) == len(set(found)) >= 8
    assert all(one <= other for one, other in pairwise(plan.PARTS for plan in found))
    for plan in found:
        assert plan.PARTS * plan.BLOCK >= 3072 and 256 * plan.warps <= plan.BLOCK


def test_the_tool_needs_a_gpu(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune_norms.main([]) == 2
    assert capsys.readouterr().err == "error: no GPU that PyTorch can use\n"


def test_the_committed_table_is_well_formed() -> None:
    for plans in json.loads(tuning.TABLE.read_text()).values():
        for name, plan in plans.items():
            launched, _, rest = name.rpartition("-")
            channels, size = map(int, rest.split("x"))
            assert launched in LAUNCHES and size in (2, 4)
            assert channels <= NormPlan(*plan).PARTS * NormPlan(*plan).BLOCK
