"""Pairs without a gradient are not run, and nothing that is trained differs from running them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pcpo_kernels import PolicyLoss
from published_loss import distance
from tiny_pipeline import tiny_config
from tiny_runs import Bench, trained_parameters
from torch import Tensor

from pcpo_fast.method.step_tables import CreditRows
from pcpo_fast.rollout.epoch_plan import EpochPlan
from pcpo_fast.training import pairs as pairs_module
from pcpo_fast.training import update as update_module
from pcpo_fast.training.pairs import pairs_to_run
from pcpo_fast.training.step_statistics import StepStatistics


def plan_of(steps: list[list[list[int]]]) -> EpochPlan:
    chosen = torch.tensor(steps)
    images = torch.arange(chosen.shape[0] * chosen.shape[1]).reshape(chosen.shape[:2])
    return EpochPlan(0, torch.tensor([0]), images, chosen)


PLAN = plan_of([[[0, 2], [1, 2], [0, 1]], [[1, 2], [0, 2], [0, 1]]])


def silent_but(*taught: tuple[int, int]) -> Tensor:
    silent = torch.ones(6, 3, dtype=torch.bool)
    silent[tuple(zip(*taught, strict=True))] = False
    return silent


def run_of(pairs: Any) -> list[tuple[int, int, bool]]:
    return list(zip(pairs.rows.tolist(), pairs.steps.tolist(), pairs.taught.tolist(), strict=True))


def test_pairs_that_teach_are_packed_and_the_last_micro_batch_is_filled() -> None:
    first, second = pairs_to_run(PLAN, silent_but((0, 2), (1, 2), (2, 1), (4, 0)), micro_batch=2)
    assert run_of(first) == [(0, 0, False), (0, 2, True), (1, 2, True), (2, 1, True)]
    assert run_of(second) == [(3, 1, False), (4, 0, True)]


def test_without_silent_pairs_the_plan_is_run_as_it_is() -> None:
    for number, pairs in enumerate(pairs_to_run(PLAN, torch.zeros(6, 3, dtype=torch.bool), micro_batch=3)):
        rows = torch.arange(3 * number, 3 * number + 3).repeat_interleave(2)
        assert torch.equal(pairs.rows, rows) and torch.equal(pairs.steps, PLAN.steps[number].flatten())


def test_every_rank_runs_as_many_micro_batches_as_any_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "gather_objects", lambda mine: [mine, [3, 1]])
    first, second = pairs_to_run(PLAN, silent_but((1, 2), (4, 0), (4, 2), (5, 1)), micro_batch=2)
    assert len(first.rows) == 6 and int(first.taught.sum()) == 1
    assert len(second.rows) == 4 and int(second.taught.sum()) == 3, "this rank needs more than the other"


CASES: dict[str, tuple[str, ...]] = {
    "hinge": ("train.micro_batch_size=2",),
    "clip_recomputed": ("algorithm=dancegrpo", "train.old_output=recompute", "train.micro_batch_size=3"),
    "mask_twice": ("credit.objective=divergence_mask", "train.inner_epochs=2", "optimizer.lr=1e-4"),
}


def trained(folder: Path, advantages: Tensor, *settings: str) -> tuple[Bench, list[dict[str, float]], int, list[float]]:
    """An epoch's update, its metrics, the pairs that went through the network, and all its log-ratios in turn."""
    bench = Bench.build(tiny_config(folder, *settings))
    bench.advantages = advantages
    predict, seen = bench.policy.predict_halves, [0]

    def counting(latents: Tensor, *others: Any) -> Any:
        seen[0] += len(latents)
        return predict(latents, *others)

    bench.policy.predict_halves = counting  # type: ignore[method-assign]
    ratios: list[float] = []
    add = StepStatistics.add

    def recording(self: StepStatistics, steps: Tensor, result: PolicyLoss) -> None:
        ratios.extend(result.log_ratio.tolist())
        add(self, steps, result)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepStatistics, "add", recording)
        return bench, bench.run(), seen[0], ratios


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("case", CASES)
def test_skipping_changes_nothing_but_the_time(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """The first update has one image that teaches in four, the second none: there the moments alone move it."""
    advantages = torch.tensor([0.0, 0.0, -1.3, 0.0, 0.0, 0.0, 0.0, 0.0])
    bench, records, run, _ = trained(pipeline_folder, advantages, *CASES[case])
    monkeypatch.setattr(
        update_module, "pairs_to_run", lambda plan, silent, size: pairs_to_run(plan, torch.zeros_like(silent), size)
    )
    whole, all_records, all_run, ratios = trained(pipeline_folder, advantages, *CASES[case])
    skipped = sum(record["policy/skipped_pairs"] for record in records)
    passes = 2 if "recompute" in str(CASES[case]) else 1
    assert skipped > 0 and all(record["policy/skipped_pairs"] == 0 for record in all_records)
    assert all_run - run == passes * skipped
    for mine, theirs in zip(bench.gradients, whole.gradients, strict=True):
        if any(value.any() for value in theirs.values()):
            assert distance(mine, {name: value.double() for name, value in theirs.items()}) < 1e-5
        else:
            assert not any(value.any() for value in mine.values())
    weights, expected = (trained_parameters(each.policy) for each in (bench, whole))
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(records, all_records, strict=True):
        for name in ("policy/loss", "policy/grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-9)
    if case == "mask_twice":  # the second pass is off-policy; its means are over the three pairs that teach
        teaching = ratios[2 * 12 + 6 : 2 * 12 + 9]
        mean = sum(map(abs, teaching)) / 3
        assert mean > 1e-6
        assert records[2]["policy/log_ratio_abs"] == pytest.approx(mean, rel=1e-3)
    assert "policy/clip_fraction" not in records[1] and "policy/clip_fraction" in records[0]


@pytest.mark.usefixtures("process_group")
def test_with_a_kl_every_pair_has_a_gradient(pipeline_folder: Path) -> None:
    bench = Bench.build(tiny_config(pipeline_folder, "credit.kl_coefficient=0.1"), record=False)
    bench.advantages = torch.zeros_like(bench.advantages)
    assert [record["policy/skipped_pairs"] for record in bench.run()] == [0, 0]


@pytest.mark.usefixtures("process_group")
def test_a_step_without_credit_is_not_run(pipeline_folder: Path) -> None:
    bench = Bench.build(tiny_config(pipeline_folder, "train.micro_batch_size=2"), record=False)
    table = bench.tables.credit
    others = torch.tensor([False, True, True, True])
    linear, quadratic, scale = (column.where(others, 0.0) for column in (table.linear, table.quadratic, table.scale))
    for columns, expected in (
        ({"linear": linear}, [False, False, False, True]),  # the last is not trained
        ({"scale": scale}, [True, False, False, True]),
        ({"linear": linear, "quadratic": quadratic}, [True, False, False, True]),
    ):
        made = CreditRows.of(replace(table, **columns), 0.0, bench.policy.device)
        assert made.silent.tolist() == expected
    bench.at = replace(bench.at, credit=made)
    records = bench.run()
    assert [record["policy/skipped_pairs"] for record in records] == [4, 4]
    assert "policy/clip_fraction_step_0" not in records[0] and "policy/clip_fraction_step_1" in records[0]
