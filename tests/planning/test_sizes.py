"""Automatic batch sizes: what they come to, that they divide, and that they are kept."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_runs import call, write_config

from pcpo_fast.comparison.run_sizes import with_common_sizes
from pcpo_fast.comparison.variants import ComparisonPlan, Variant, planned_runs
from pcpo_fast.config.loading import load_config
from pcpo_fast.config.schema import Config
from pcpo_fast.planning import sizes
from pcpo_fast.planning.advice import usable
from pcpo_fast.planning.sizes import fitted, kept_sizes
from pcpo_fast.rollout.epoch_plan import check_sizes


def demo(*overrides: str) -> Config:
    return load_config("tiny_flux", overrides)


def of(config: Config) -> tuple[int, int]:
    return config.train.pairs_at_once, config.rollout.images_at_once


@pytest.mark.parametrize(
    ("overrides", "ranks", "expected"),
    [
        ((), 1, (120, 96)),  # 24 images x 5 steps in an update
        (("rollout.images_per_prompt=8",), 1, (40, 32)),
        (("rollout.images_per_prompt=30",), 1, (75, 96)),  # 150 pairs
        (("train.updates_per_epoch=1",), 1, (120, 96)),  # 480 pairs
        ((), 2, (60, 48)),
        (("scoring.overlap=true",), 1, (120, 48)),  # a batch is scored while the other is sampled
        (("train.micro_batch_size=8",), 1, (8, 96)),
        (("rollout.batch_size=5",), 1, (120, 5)),
    ],
)
def test_on_a_cpu(overrides: tuple[str, ...], ranks: int, expected: tuple[int, int]) -> None:
    config = demo(*overrides)
    pairs = check_sizes(config, ranks)
    assert pairs is not None
    found = fitted(config, pairs, ranks, None)
    assert of(found) == expected and pairs % found.train.pairs_at_once == 0
    assert found.model_dump(exclude={"train": {"micro_batch_size"}, "rollout": {"batch_size"}}) == config.model_dump(
        exclude={"train": {"micro_batch_size"}, "rollout": {"batch_size"}}
    )


@pytest.mark.parametrize("memory", [16e9, 24e9, 40e9, 80e9, 1e12])
def test_on_a_gpu_they_are_the_largest_that_fit(memory: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all sizes one by one, with a plan that grows by 1 GB a pair and by 2 GB an image."""

    def plan(*_: Any, micro_batch: int, rollout_batch: int) -> Any:
        return type("Plan", (), {"phases": {"update": 5e9 + 1e9 * micro_batch, "rollout": 5e9 + 2e9 * rollout_batch}})

    monkeypatch.setattr(sizes, "plan_memory", plan)
    config: Any = demo()
    micro, batch = of(fitted(config, 120, 1, memory, object()))  # type: ignore[arg-type]
    allowed = [size for size in range(1, 121) if 120 % size == 0 and 5e9 + 1e9 * size <= usable(memory)]
    assert micro == max(allowed)
    assert 5e9 + 2e9 * batch <= usable(memory)
    batches = -(-96 // batch)  # and one batch fewer would not fit
    assert batches == 1 or 5e9 + 2e9 * -(-96 // (batches - 1)) > usable(memory)


def test_where_nothing_fits_they_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = type("Plan", (), {"phases": {"update": 1e15, "rollout": 1e15}})
    monkeypatch.setattr(sizes, "plan_memory", lambda *_, **__: plan)
    assert of(fitted(demo(), 120, 1, 80e9, object())) == (1, 1)  # type: ignore[arg-type]


def test_variants_of_a_comparison_have_the_same(tmp_path: Path) -> None:
    """Of 120 and 72 pairs, 24 is the largest that divides both; what a variant says itself stands."""
    few, own = ("credit.fraction=0.6",), ("train.micro_batch_size=5", "credit.rule=uniform")
    variants = (Variant("all"), Variant("few", settings=few), Variant("own", settings=own))
    runs = planned_runs(ComparisonPlan(tmp_path, "tiny_flux", (), variants, (0, 1)))
    found = with_common_sizes(runs, None)
    assert [of(run.config) for run in found] == 2 * [(24, 96), (24, 96), (5, 96)]
    for run in found:
        assert load_config(run.config_file, run.overrides) == run.config


def test_a_run_records_them_and_keeps_them(pipeline_folder: Path, tmp_path: Path, capsys: Any) -> None:
    config = write_config(tmp_path, pipeline_folder, train__micro_batch_size="auto", rollout__batch_size="auto")
    assert call(capsys, "train", "--config", config, "train.epochs=0").code == 0
    record = tmp_path / "run" / "config.yaml"
    assert of(load_config(record)) == (12, 8)  # 8 images, 2 updates of 4 images x 3 steps
    record.write_text(record.read_text().replace("micro_batch_size: 12", "micro_batch_size: 4"))
    assert kept_sizes(record.parent, 12) == (4, 8) and kept_sizes(record.parent, 10) is None
    answer = call(capsys, "train", "--config", config, "train.epochs=1")
    assert answer.code == 0, answer.err
    assert of(load_config(record)) == (4, 8)


@pytest.mark.parametrize("value", ["0", "-3", "2.5", "true", "atuo", "[1]", "null", "2147483648"])
def test_other_values_are_refused(value: str, capsys: Any) -> None:
    for key in ("train.micro_batch_size", "rollout.batch_size"):
        answer = call(capsys, "train", f"{key}={value}")
        assert answer.code == 2 and f"{key}: must be an integer of at least 1, or auto, got " in answer.err


def test_a_trainer_on_two_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from pcpo_fast.training import trainer

    monkeypatch.setattr(trainer, "world_size", lambda: 2)
    monkeypatch.setattr(trainer, "gather_objects", lambda one: [one, one])
    said: list[str] = []
    stand_in: Any = SimpleNamespace(
        tables=SimpleNamespace(trained_count=5),
        start=SimpleNamespace(fresh=True),
        device=torch.device("cpu"),
        progress=SimpleNamespace(message=said.append),
        folder=tmp_path,
    )
    assert of(trainer.Trainer._sized(stand_in, demo())) == (60, 48)
    assert said == ["Sizes: train.micro_batch_size=60 rollout.batch_size=48"]
