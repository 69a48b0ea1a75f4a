"""The moving average of a rank's shards: against one in float64, in and out of the model, through a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from test_engine import batches, config_of, module_of, train_step
from torch import Tensor

from pcpo_fast.engine.ema import Ema
from pcpo_fast.engine.engine import Engine
from pcpo_fast.errors import UserError

pytestmark = [
    pytest.mark.usefixtures("process_group"),
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),  # of what DeepSpeed calls
]
BF16 = "model.dtype=bfloat16"
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "zero1": (1, ()),
    "zero2": (2, ()),
    "zero3": (3, ()),
    "zero1-master": (1, (BF16,)),
    "zero3-master": (3, (BF16,)),
    "zero2-stochastic": (2, (BF16, "optimizer.weights=stochastic_rounding")),
}


def plain_average(start: Tensor, path: list[Tensor], decay: float) -> Tensor:
    """The average as it is written on paper."""
    average = start.double()
    for number, weights in enumerate(path, start=1):
        d = min(decay, number / (number + 9))
        average = d * average + (1 - d) * weights.double()
    return average


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_average_in_float64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcpo_fast.engine.ema.CHUNK", 7)
    shards = [torch.randn(20).to(dtype), torch.empty(0, dtype=dtype), torch.randn(3, 5).to(dtype)]
    start, path = [shard.clone() for shard in shards], []
    ema = Ema(shards, 0.6)
    for _ in range(20):
        for shard in shards:
            shard.add_(torch.randn(shard.shape))
        path.append([shard.clone() for shard in shards])
        ema.update()
    for index, average in enumerate(ema.average):
        expected = plain_average(start[index], [weights[index] for weights in path], 0.6)
        assert average.dtype == torch.float32
        assert torch.allclose(average.double(), expected, rtol=1e-6, atol=1e-6)
    averages = [average.clone() for average in ema.average]
    ema.swap_in()
    for shard, average, last in zip(shards, averages, path[-1], strict=True):
        assert torch.equal(shard, average.to(dtype)) and (not shard.numel() or not torch.equal(shard, last))
    ema.swap_out()
    assert all(torch.equal(shard, last) for shard, last in zip(shards, path[-1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ema.average, averages, strict=True))


def test_it_is_swapped_in_and_out_in_turn() -> None:
    ema = Ema([torch.ones(3)], 0.9)
    with pytest.raises(ValueError, match="not swapped in"):
        ema.swap_out()
    ema.swap_in()
    with pytest.raises(ValueError, match="already swapped in"):
        ema.swap_in()


def test_the_state_of_other_shards_is_refused() -> None:
    state = Ema([torch.ones(3)], 0.9).state_dict()
    with pytest.raises(ValueError, match=r"has shards of shapes \[\(3,\)\], but this rank's are \[\(4,\)\]"):
        Ema([torch.ones(4)], 0.9).load_state_dict(state)


def engine_of(folder: Path, case: str, *overrides: str) -> Engine:
    stage, others = CASES[case]
    file = folder / "ds.json"
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:  # scattered, in several sub-groups
        zero |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 10}
        zero |= {"reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 1000}
    file.write_text(json.dumps({"zero_optimization": zero}))
    dtype = torch.bfloat16 if BF16 in others else torch.float32
    settings = ("optimizer.lr=1e-2", "train.ema_decay=0.5", f"deepspeed={file}", *others, *overrides)
    return Engine(module_of(dtype), config_of(*settings), accumulation=1)


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in state.values()])


def exact(engine: Engine) -> Tensor:
    """The weights that the optimizer steps, in the order of :meth:`Engine.full_state`."""
    return torch.cat([safe_get_full_fp32_param(p).flatten().float() for p in engine.deepspeed.module.parameters()])


def outputs(engine: Engine) -> Tensor:
    dtype = engine.deepspeed.module[0].weight.dtype
    with torch.no_grad():
        return engine.module(batches(1)[0].to(dtype)).clone()  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", CASES)
def test_the_engine_averages_shows_and_exports_it(tmp_path: Path, case: str) -> None:
    engine = engine_of(tmp_path, case)
    start, path = exact(engine), []
    for batch in batches(4):
        train_step(engine, [batch])
        path.append(exact(engine))
    train_step(engine, [batches(1)[0] * float("nan")])  # a step that is left out counts in no average
    assert not engine.last_step.applied
    expected, before = plain_average(start, path, 0.5), outputs(engine)
    exported = flat(engine.full_state())
    rounding = 2**-8 if BF16 in CASES[case][1] else 1e-6
    assert torch.allclose(exported.double(), expected, rtol=rounding, atol=1e-6)
    assert not torch.allclose(exported.double(), path[-1].double(), rtol=rounding, atol=1e-4), "the test tells nothing"
    with engine.averaged():
        averaged = outputs(engine)
    assert not torch.equal(averaged, before)
    assert torch.equal(outputs(engine), before) and torch.equal(exact(engine), path[-1]), "given back exactly"

    # Through a checkpoint, and on: as if nothing had happened.
    engine.save(tmp_path / "checkpoint")
    train_step(engine, batches(5)[4:])
    resumed = engine_of(tmp_path, case)
    assert resumed.load(tmp_path / "checkpoint")
    assert torch.equal(flat(resumed.full_state()), exported)
    train_step(resumed, batches(5)[4:])
    assert torch.equal(flat(resumed.full_state()), flat(engine.full_state()))
    assert torch.equal(exact(resumed), exact(engine)) and not torch.equal(exact(engine), path[-1])


def test_a_run_without_an_average_exports_its_weights_and_one_with_it_can_start_from_there(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, "zero2", "train.ema_decay=null")
    train_step(engine, batches(2))
    assert engine.ema is None and torch.equal(flat(engine.full_state()), exact(engine))
    engine.save(tmp_path / "checkpoint")
    other = engine_of(tmp_path, "zero2")
    assert other.load(tmp_path / "checkpoint")
    assert torch.equal(flat(other.full_state()), exact(engine)), "the average begins at the weights that were loaded"


def test_an_average_of_weights_on_nvme_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "nvme.json"
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}
    file.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(UserError, match=r"train\.ema_decay: .* not on NVMe.*nvme\.json"):
        Engine(module_of(), config_of("train.ema_decay=0.9", f"deepspeed={file}"), accumulation=1)
