"""Checkpoints taken up by another ZeRO stage or another number of ranks: the same weights, moments and next epoch."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from deepspeed.utils import safe_get_full_fp32_param
from tiny_pipeline import tiny_config
from tiny_runs import LORA, Bench
from torch import Tensor

from pcpo_fast.engine.engine import read_state_file
from pcpo_fast.engine.resharding import MOMENTS, SavedState, UnknownLayoutError
from pcpo_fast.errors import UserError
from pcpo_fast.runs.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning")  # of what DeepSpeed calls

# An eps far below the gradients' size would turn the rounding of vanishing gradients into whole steps.
EPS = "optimizer.eps=1e-4"
EMA = "train.ema_decay=0.5"


def bench_of(pipeline: Path, folder: Path, stage: int, *overrides: str) -> Bench:
    """A bench of a ZeRO stage; with stage 3 every tensor is scattered."""
    file = folder / f"ds{stage}_{os.getpid()}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))
    return Bench.build(
        tiny_config(pipeline, "train.micro_batch_size=6", EPS, f"deepspeed={file}", *overrides), record=False
    )


def save(bench: Bench, folder: Path, epoch: int) -> Path:
    return save_checkpoint(folder, bench.engine, bench.policy, epoch, {}, 9)


def state_of(path: Path, bench: Bench) -> dict[str, Tensor]:
    """Master weights, moments and step count of one rank's checkpoint."""
    (file,) = (path / "engine").glob("*_optim_states.pt")
    trained = [(name, p) for name, p in bench.policy.module.named_parameters() if p.requires_grad]
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in trained}
    saved = SavedState([read_state_file(file, "cpu")["optimizer_state_dict"]], sizes)
    assert saved.step is not None and saved.moments == MOMENTS
    state = {f"{name} {what}": saved.full(name, what) for name in sizes for what in ("weights", *MOMENTS)}
    assert all(bool(state[f"{name} exp_avg_sq"].any()) for name in sizes), "there is nothing in the moments to compare"
    return state | {"step": saved.step}


def average_of(bench: Bench) -> dict[str, Tensor]:
    """The moving average by parameter, in float32; nothing where there is none."""
    if bench.engine.ema is None:
        return {}
    with bench.engine.averaged():
        named = bench.engine.deepspeed.module.named_parameters()
        return {name: safe_get_full_fp32_param(p).flatten().clone() for name, p in named if p.requires_grad}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """To what sums in another order change: a few units in the last place of steps of 1e-3 on weights of 0.1."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("saved", "loaded", "overrides"),
    [
        (1, 3, (EMA,)),
        (3, 2, (*LORA, EMA)),
        pytest.param(3, 1, (), marks=pytest.mark.slow),
        pytest.param(2, 3, LORA, marks=pytest.mark.slow),
        pytest.param(1, 2, ("model.dtype=bfloat16", EMA), marks=pytest.mark.slow),
    ],
    ids=["full-ema-1-3", "lora-ema-3-2", "full-3-1", "lora-2-3", "bf16-ema-1-2"],
)
def test_another_zero_stage_goes_on_with_the_same_state(
    pipeline_folder: Path, tmp_path: Path, saved: int, loaded: int, overrides: tuple[str, ...]
) -> None:
    one = bench_of(pipeline_folder, tmp_path, saved, *overrides)
    one.epochs(0, 1)
    path = save(one, tmp_path / "checkpoints", 1)
    at_save = one.engine.full_state()  # with a moving average: that
    kept = average_of(one)
    if kept:
        masters = state_of(path, one)
        assert not any(torch.equal(kept[name], masters[f"{name} weights"]) for name in kept), "they must differ"
    one.epochs(1, 2)

    other = bench_of(pipeline_folder, tmp_path, loaded, *overrides)
    assert not same(other.engine.full_state(), at_save)
    assert load_checkpoint(path, other.engine)["epoch"] == 1
    assert other.engine.updates == 2
    assert same(other.engine.full_state(), at_save)
    assert same(average_of(other), kept)
    assert other.engine.ema is None or other.engine.ema.updates == 2
    assert same(state_of(save(other, tmp_path / "again", 1), other), state_of(path, one))
    other.epochs(1, 2)
    assert not same(other.engine.full_state(), at_save)
    if "bfloat16" not in str(overrides):  # there the next epoch rounds on another path
        close(one.engine.full_state(), other.engine.full_state())


def two_ranks(number: int, pipeline: str, folder: str, port: int, stage: int) -> None:
    """What each of two processes does: train an epoch and save; take up what one rank has saved, and go on.

    With a moving average: what is compared is that, and the epoch after shows that weights and moments came along.
    """
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(number), "LOCAL_RANK": str(number),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    from pcpo_fast.engine.engine import start_distributed

    start_distributed()
    root = Path(folder)
    # Both ranks sample and train the whole epoch, so the mean of their gradients is what one rank has alone.
    bench = bench_of(Path(pipeline), root, stage, EMA)
    bench.epochs(0, 1)
    save(bench, root / "two", 1)
    load_checkpoint(root / "one" / "epoch_000001", bench.engine)
    taken = bench.engine.full_state()
    bench.epochs(1, 2)
    after = bench.engine.full_state()
    if number == 0:
        torch.save({"taken": taken, "after": after}, root / "seen.pt")


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [3, 2])
def test_two_ranks_take_up_one_and_one_takes_up_two(pipeline_folder: Path, tmp_path: Path, stage: int) -> None:
    bench = bench_of(pipeline_folder, tmp_path, 1, EMA)
    bench.epochs(0, 1)
    save(bench, tmp_path / "one", 1)
    first = bench.engine.full_state()
    bench.epochs(1, 2)
    second = bench.engine.full_state()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (str(pipeline_folder), str(tmp_path), port, stage)
    context = torch.multiprocessing.start_processes(two_ranks, arguments, nprocs=2, join=False, start_method="spawn")
    end = time.monotonic() + 1200
    while not context.join(timeout=5):
        assert time.monotonic() < end
    seen = torch.load(tmp_path / "seen.pt", weights_only=True)
    assert same(seen["taken"], first)
    close(second, seen["after"])

    single = bench_of(pipeline_folder, tmp_path, 1, EMA)
    load_checkpoint(tmp_path / "two" / "epoch_000001", single.engine)
    close(first, single.engine.full_state())  # two ranks have trained the same epoch
    single.epochs(1, 2)
    close(second, single.engine.full_state())


# ------------------------------------------------------------------------------------------ shards by hand


def group_shard(weights: list[float], names: dict[str, tuple[int, int]], moments: bool = True, **state: Any) -> Any:
    class Address:
        def __init__(self, start: int, numel: int) -> None:
            self.start, self.numel = start, numel

    flat = torch.tensor(weights)
    full = {"step": torch.tensor(3.0), "exp_avg": 10 * flat, "exp_avg_sq": 100 * flat, **state}
    return {
        "single_partition_of_fp32_groups": [flat],
        "base_optimizer_state": {"state": {0: full} if moments else {}},
        "param_slice_mappings": [{name: Address(*place) for name, place in names.items()}],
    }


def test_parameters_that_are_cut_between_ranks_are_put_together() -> None:
    shards = [group_shard([1, 2, 3], {"a": (0, 2), "b": (2, 1)}), group_shard([4, 5], {"b": (0, 2)})]
    saved = SavedState(shards, {"a": 2, "b": 3})
    assert saved.full("a").tolist() == [1, 2] and saved.full("b").tolist() == [3, 4, 5]
    assert saved.full("b", "exp_avg_sq").tolist() == [300, 400, 500]
    assert saved.step == 3
    before_the_first_step = SavedState([group_shard([1, 2], {"a": (0, 2)}, moments=False)], {"a": 2})
    assert before_the_first_step.moments == () and before_the_first_step.step is None


def test_parameters_of_zero_3_are_cut_one_by_one_and_padded() -> None:
    def shard(*groups: list[float]) -> dict[str, Any]:
        flat = [torch.tensor(group) for group in groups]
        states = {i: {"step": torch.tensor(1.0), "exp_avg": 10 * v, "exp_avg_sq": v} for i, v in enumerate(flat)}
        return {"fp32_flat_groups": flat, "optimizer_state_dict": {"state": states}}

    saved = SavedState([shard([1.0, 2, 6], [8.0]), shard([3.0, 0, 7], [0.0])], {"a": 3, "b": 2, "c": 1})
    assert [saved.full(name).tolist() for name in "abc"] == [[1, 2, 3], [6, 7], [8]]
    assert saved.full("a", "exp_avg").tolist() == [10, 20, 30]
    with pytest.raises(UnknownLayoutError, match="does not hold all of d"):
        SavedState([shard([1.0])], {"a": 1, "d": 1})


def test_an_average_lies_where_the_weights_do() -> None:
    shards = [group_shard([1, 2, 3], {"a": (0, 2), "b": (2, 1)}), group_shard([4, 5], {"b": (0, 2)})]
    averages = [[torch.tensor([6.0, 7, 8])], [torch.tensor([9.0, 10, 0])]]  # padded
    saved = SavedState(shards, {"a": 2, "b": 3}, averages)
    assert saved.full("a", "average").tolist() == [6, 7] and saved.full("b", "average").tolist() == [8, 9, 10]
    with pytest.raises(UnknownLayoutError, match="only some of its ranks"):
        SavedState(shards, {"a": 2, "b": 3}, averages[:1])
    with pytest.raises(UnknownLayoutError, match="moving average does not have one value for each weight"):
        SavedState(shards, {"a": 2, "b": 3}, [averages[0], averages[1][:0]])


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        (group_shard([1, 2], {"a": (0, 2)}, exp_avg=torch.zeros(1)), "moments do not have one value for each weight"),
        (group_shard([1, 2], {"a": (0, 2)}, exp_avg_sq=None), "moments do not have one value for each weight"),
        (group_shard([1, 2], {"a": (0, 1)}), "does not hold all of a"),
        ({"base_optimizer_state": {}}, "shards have no"),
    ],
    ids=["quantised", "momentum", "short", "other"],
)
def test_what_cannot_be_divided_is_refused(shard: Any, words: str) -> None:
    with pytest.raises(UnknownLayoutError, match=words):
        SavedState([shard], {"a": 2})


@pytest.mark.usefixtures("process_group")
def test_a_state_of_another_kind_names_what_wrote_it(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(bench_of(pipeline_folder, tmp_path, 1, *LORA), tmp_path / "checkpoints", 1)
    other = bench_of(pipeline_folder, tmp_path, 2, *LORA)

    def refuse(*_: Any) -> None:
        raise UnknownLayoutError("its optimizer state is not AdamW's")

    monkeypatch.setattr("pcpo_fast.engine.optimizer_state.SavedState", refuse)
    with pytest.raises(
        UserError, match=r"only be resumed on 1 rank with ZeRO stage 1, as when it was written: its optimizer"
    ):
        load_checkpoint(path, other.engine)
