"""Rates from counts of work: the operations of the plan, over the seconds that they took."""

from pathlib import Path

import pytest
import torch
from tiny_pipeline import tiny_config
from tiny_pipelines import SD3_RUN

from pcpo_fast.config.schema import Config
from pcpo_fast.planning import utilization
from pcpo_fast.planning.cards import CARDS, card_of
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.models import find_architecture
from pcpo_fast.planning.utilization import Utilization, utilization_of
from pcpo_fast.planning.work import work_of_epoch
from pcpo_fast.rollout.epoch_plan import steps_per_image


def costs_of(config: Config) -> ModelCosts:
    return ModelCosts(find_architecture(config.model), config.model)


@pytest.mark.parametrize(("folder", "settings", "rows"), [("pipeline_folder", (), 1), ("sd3_folder", SD3_RUN, 2)])
def test_an_epochs_operations_are_those_of_the_plan(
    folder: str, settings: tuple[str, ...], rows: int, request: pytest.FixtureRequest
) -> None:
    config = tiny_config(request.getfixturevalue(folder), *settings)
    assert (config.model.cfg_scale != 1) == (rows == 2)
    images, trainable = config.images_per_epoch, 2
    pairs = images * steps_per_image(config, trainable) * config.train.inner_epochs
    costs = costs_of(config)
    work = work_of_epoch(config, costs, trainable, checkpointed=0.0)
    planned = sum(work[phase].flops for phase in ("rollout", "decode", "update"))
    counts = (rows * images * config.sampler.steps, rows * pairs, images)
    found = Utilization(config, costs, 4e9).metrics(*counts, seconds=5.0, gpus=2)
    assert found["throughput/tflops"] == pytest.approx(planned / 10 / 1e12, rel=1e-9)
    assert found["throughput/mfu"] == pytest.approx(planned / 10 / 4e9, rel=1e-9)
    assert "throughput/mfu" not in Utilization(config, costs, None).metrics(*counts, seconds=5.0, gpus=2)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA L40", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_cards_by_the_names_that_cuda_gives(name: str, card: str | None) -> None:
    assert card_of(name) == (None if card is None else CARDS[card])


def test_a_gpu_run_has_rates_a_cpu_has_none_and_an_unknown_model_is_said(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    config = tiny_config(pipeline_folder)
    assert utilization_of(config, torch.device("cpu"), said.append, lambda: costs_of(config)) is None
    monkeypatch.setattr(utilization.torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    found = utilization_of(config, torch.device("cuda"), said.append, lambda: costs_of(config))
    assert found is not None and found.peak == 989e12 and said == []
    unknown = config.model_copy(update={"model": config.model.model_copy(update={"path": "someone/something"})})
    assert utilization_of(unknown, torch.device("cuda"), said.append, lambda: costs_of(unknown)) is None
    assert len(said) == 1 and said[0].startswith("throughput/tflops and throughput/mfu are left out: ")
