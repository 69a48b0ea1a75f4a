"""Checkpoints: a resumed run is the uninterrupted one bit for bit, and nothing half-written is ever taken for whole."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipeline import tiny_config
from tiny_pipelines import SD3_RUN, SD_RUN
from tiny_runs import LORA, Bench
from torch import Tensor

from pcpo_fast.errors import UserError
from pcpo_fast.policies.families import load_trained_weights
from pcpo_fast.runs.checkpoint import (
    STATE_FILE,
    WEIGHTS,
    checkpoints,
    load_checkpoint,
    read_state,
    save_checkpoint,
    visible_damage,
)
from pcpo_fast.runs.manifest import damage_of

pytestmark = pytest.mark.usefixtures("process_group")
BF16, STOCHASTIC = "model.dtype=bfloat16", "optimizer.weights=stochastic_rounding"


def bench_of(pipeline: Path, *overrides: str) -> Bench:
    return Bench.build(
        tiny_config(pipeline, "credit.fraction=0.67", "train.micro_batch_size=8", *overrides), record=False
    )


def save(bench: Bench, folder: Path, epoch: int, keep: int = 2, **state: Any) -> Path:
    return save_checkpoint(folder, bench.engine, bench.policy, epoch, state, keep)


def weights(bench: Bench) -> list[Tensor]:
    return [p.detach().clone() for p in bench.policy.module.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("overrides", "stage"),
    [
        (("optimizer.warmup_updates=5", "credit.kl_coefficient=0.1"), 1),
        pytest.param((BF16,), 2, marks=pytest.mark.slow),
        pytest.param((BF16,), 1, marks=pytest.mark.slow),
        ((BF16, STOCHASTIC), 2),
        (("algorithm=flow_grpo", *LORA), 2),
    ],
    ids=["full-kl", "bf16-zero2", "bf16-zero1", "bf16-stochastic", "lora-kl"],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    pipeline_folder: Path, tmp_path: Path, overrides: tuple[str, ...], stage: int
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    overrides = (*overrides, f"deepspeed={file}")
    whole = bench_of(pipeline_folder, *overrides)
    first = whole.epochs(0, 1)
    path = save(whole, tmp_path / "checkpoints", 1, note="kept")
    at_save = weights(whole)
    rest = whole.epochs(1, 3)

    resumed = bench_of(pipeline_folder, *overrides)
    state = load_checkpoint(path, resumed.engine)
    assert state["epoch"] == 1 and state["updates"] == 2 and state["note"] == "kept"
    assert same(weights(resumed), at_save)
    again = resumed.epochs(1, 3)
    assert again == rest and again != first
    assert same(weights(resumed), weights(whole)) and not same(at_save, weights(whole))
    assert resumed.engine.updates == whole.engine.updates == 6


def test_the_weights_of_a_checkpoint_are_those_of_the_policy(pipeline_folder: Path, tmp_path: Path) -> None:
    for name, overrides in (("full", ()), ("lora", LORA)):
        bench = bench_of(pipeline_folder, *overrides)
        bench.run()
        path = save(bench, tmp_path / name, 1)
        other = bench_of(pipeline_folder, *overrides)
        assert not same(weights(other), weights(bench))
        load_trained_weights(other.policy.module, bench.config, path / WEIGHTS)
        assert same(weights(other), weights(bench))


@pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning")  # of what DeepSpeed calls
@pytest.mark.parametrize(
    ("family", "finetune"),
    [
        ("pipeline_folder", ()),
        ("pipeline_folder", LORA),
        pytest.param("sd_folder", (), marks=pytest.mark.slow),
        pytest.param("sd3_folder", (), marks=pytest.mark.slow),
    ],
    ids=["flux-full", "flux-lora", "sd-full", "sd3-full"],
)
def test_weights_that_zero_3_has_scattered_are_written_whole(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, finetune: tuple[str, ...]
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    settings = {"sd_folder": SD_RUN, "sd3_folder": SD3_RUN}.get(family, ())
    folder = request.getfixturevalue(family)
    bench = bench_of(folder, *settings, *finetune, f"deepspeed={file}")
    assert any(not p.numel() for p in bench.policy.module.parameters()), "nothing is scattered: the test tests nothing"
    bench.run()
    update = bench.update()
    next(update.run())  # which pairs are run is known from its beginning on
    batch = next(iter(update._micro_batches(0)))
    inputs = batch.latents, batch.times, batch.conditioning
    with torch.no_grad():
        expected = bench.policy.predict(*inputs)
    path = save(bench, tmp_path / "checkpoints", 1)
    other = bench_of(folder, *settings, *finetune)
    load_trained_weights(other.policy.module, bench.config, path / WEIGHTS)
    with torch.no_grad():
        assert torch.allclose(other.policy.predict(*inputs), expected, atol=1e-5)


def test_lora_checkpoints_leave_the_base_model_out(pipeline_folder: Path, tmp_path: Path) -> None:
    bench = bench_of(pipeline_folder, *LORA)
    path = save(bench, tmp_path, 1)
    trained = sum(p.numel() for p in bench.policy.module.parameters() if p.requires_grad)
    model = torch.load(path / "engine" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert sum(value.numel() for value in model.values()) == trained


def test_the_newest_checkpoints_are_kept(pipeline_folder: Path, tmp_path: Path) -> None:
    bench = bench_of(pipeline_folder, *LORA)
    assert checkpoints(tmp_path) == checkpoints(tmp_path / "none") == []
    for epoch in (2, 9, 10, 100):
        assert save(bench, tmp_path, epoch).name == f"epoch_{epoch:06d}"
    assert [path.name for path in checkpoints(tmp_path)] == ["epoch_000010", "epoch_000100"]
    assert {path.name for path in tmp_path.iterdir()} == {"epoch_000010", "epoch_000100", "latest"}
    assert (tmp_path / "latest").read_text() == "epoch_000100\n"


def test_the_best_checkpoints_are_kept_besides_the_newest(pipeline_folder: Path, tmp_path: Path) -> None:
    bench = bench_of(pipeline_folder, *LORA)
    for epoch, reward in enumerate([0.5, 0.9, None, float("nan"), 0.7, 0.1, 0.2]):
        save_checkpoint(tmp_path, bench.engine, bench.policy, epoch, {"heldout_reward": reward}, 1, 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["epoch_000001", "epoch_000004", "epoch_000006"]


def test_the_same_epoch_again_replaces_the_checkpoint(pipeline_folder: Path, tmp_path: Path) -> None:
    bench = bench_of(pipeline_folder, *LORA)
    for note in (1, 2):
        assert read_state(save(bench, tmp_path, 3, note=note))["note"] == note
    assert {path.name for path in tmp_path.iterdir()} == {"epoch_000003", "latest"}


def test_an_interrupted_save_leaves_the_earlier_checkpoint_and_is_cleared_away(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(pipeline_folder, *LORA)
    earlier = save(bench, tmp_path, 1)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bench.policy, "save_weights", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(bench, tmp_path, 2)
    assert len(list(tmp_path.iterdir())) == 3
    assert checkpoints(tmp_path) == [earlier]
    load_checkpoint(earlier, bench.engine)
    # Killed between two renames, and a folder that lost its state file.
    (tmp_path / ".epoch_000001.old").mkdir()
    (tmp_path / "epoch_000007").mkdir()
    (tmp_path / "notes").mkdir()
    assert checkpoints(tmp_path) == [earlier]
    save(bench, tmp_path, 3)
    assert {path.name for path in tmp_path.iterdir()} == {
        "epoch_000001", "epoch_000003", "epoch_000007", "notes", "latest"
    }  # fmt: skip


def test_a_checkpoint_that_lost_its_successor_counts_until_there_is_another(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    """Killed between the two renames that put a new checkpoint of the same epoch in the old one's place."""
    bench = bench_of(pipeline_folder, *LORA)
    former = save(bench, tmp_path, 3).rename(tmp_path / ".epoch_000003.old")
    (tmp_path / ".epoch_000003.tmp").mkdir()
    assert checkpoints(tmp_path) == [former]
    assert visible_damage(former) is None
    again = save(bench, tmp_path, 3)
    assert checkpoints(tmp_path) == [again] and not former.exists()


def test_what_is_left_of_a_checkpoint_in_removal_does_not_count(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(pipeline_folder, *LORA)
    save(bench, tmp_path, 1)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pcpo_fast.runs.checkpoint.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(bench, tmp_path, 2, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["epoch_000002"]
    assert (tmp_path / "latest").read_text() == "epoch_000002\n"
    save(bench, tmp_path, 3, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"epoch_000003", "latest"}


# ------------------------------------------------------------------------------------------- disks that fail


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("shards", errno.ENOSPC),
        ("weights", errno.ENOSPC),
        ("weights", errno.EROFS),
        ("state", errno.ENOSPC),
        ("manifest", errno.ENOSPC),
        ("rename", errno.EROFS),
    ],
)
def test_a_disk_that_is_full_or_read_only_is_one_sentence_and_leaves_the_earlier_checkpoint(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    bench = bench_of(pipeline_folder, *LORA)
    earlier = save(bench, tmp_path, 1)

    def full(*_: Any, **__: Any) -> None:
        raise (
            RuntimeError("PytorchStreamWriter failed writing file")
            if where == "shards"
            else OSError(number, os.strerror(number))
        )

    target = {
        "shards": "torch.save",
        "weights": "safetensors.torch.save_file",
        "state": "pcpo_fast.runs.checkpoint.write_atomically",
        "manifest": "pcpo_fast.runs.manifest.write_atomically",
        "rename": "pathlib.Path.rename",
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(target, full)
        if where == "weights":  # whatever the policy's writer calls
            patch.setattr(bench.policy, "save_weights", full)
        with pytest.raises(
            UserError, match=r"cannot be written: .*; once there is space and permission, resume from epoch_000001"
        ) as caught:
            save(bench, tmp_path, 2)
    assert "\n" not in str(caught.value)
    assert (os.strerror(number) in str(caught.value)) == (where != "shards")
    assert checkpoints(tmp_path) == [earlier] and damage_of(earlier) is None
    assert (tmp_path / "latest").read_text() == "epoch_000001\n"
    assert damage_of(save(bench, tmp_path, 2)) is None  # there is room again
    assert {path.name for path in tmp_path.iterdir()} == {"epoch_000001", "epoch_000002", "latest"}


# --------------------------------------------------------------------------------------------- wrong folders


@pytest.fixture(scope="module")
def lora_checkpoint(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pcpo_fast.engine.engine import start_distributed

    start_distributed()
    return save(bench_of(pipeline_folder, *LORA), tmp_path_factory.mktemp("lora"), 1)


def edit_state(path: Path, **changes: Any) -> None:
    state = json.loads((path / STATE_FILE).read_text())
    (path / STATE_FILE).write_text(json.dumps({**state, "engine": state["engine"] | changes}))


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for content in (None, "{", "[]", "{}", '{"epoch": 1, "updates": 2}', '{"epoch": "x", "updates": 2, "engine": {}}'):
        if content is not None:
            (tmp_path / STATE_FILE).write_text(content)
        with pytest.raises(UserError, match=r"is not a checkpoint of this trainer \(no valid state\.json in it\)"):
            read_state(tmp_path)


@pytest.mark.parametrize(
    "overrides",
    [(), (*LORA, "model.lora.targets=[attn.to_q]"), (*LORA, "model.lora.rank=2"), (*LORA, BF16, STOCHASTIC)],
    ids=["full", "targets", "rank", "dtype"],
)
def test_a_checkpoint_of_other_weights_is_refused(
    pipeline_folder: Path, lora_checkpoint: Path, overrides: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match="holds other trained weights than this configuration"):
        load_checkpoint(lora_checkpoint, bench_of(pipeline_folder, *overrides).engine)


def test_a_shard_for_every_rank_must_be_there(pipeline_folder: Path, tmp_path: Path) -> None:
    bench = bench_of(pipeline_folder, *LORA)
    path = save(bench, tmp_path, 1)
    edit_state(path, world_size=8)
    with pytest.raises(UserError, match="has no engine state"):
        load_checkpoint(path, bench.engine)


class Intruder:
    """Unpickled, it would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("intruder-was-here"),)


@pytest.mark.parametrize("divided_anew", [False, True])
@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_checkpoint_cannot_run_code(
    pipeline_folder: Path, tmp_path: Path, file: str, divided_anew: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bench = bench_of(pipeline_folder, *LORA)
    path = save(bench, tmp_path / "checkpoints", 1)
    if divided_anew:
        edit_state(path, zero_stage=2)
        if "model" in file:
            load_checkpoint(path, bench.engine)  # the other file has all that is needed, and is all that is read
            return
    content = torch.load(path / "engine" / file, weights_only=False)
    torch.save({**content, "extra": Intruder()}, path / "engine" / file)
    with pytest.raises(UserError, match="cannot be read: Weights only load failed"):
        load_checkpoint(path, bench.engine)
    assert not (tmp_path / "intruder-was-here").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "missing"])
def test_a_damaged_checkpoint_is_one_sentence(pipeline_folder: Path, tmp_path: Path, damage: str) -> None:
    bench = bench_of(pipeline_folder, *LORA)
    path = save(bench, tmp_path, 1)
    file = path / "engine" / "mp_rank_00_model_states.pt"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 200 if damage == "cut" else 0])
    with pytest.raises(UserError, match=r"^checkpoint .* (cannot be read|holds no engine state)") as caught:
        load_checkpoint(path, bench.engine)
    assert "\n" not in str(caught.value)
