"""The engine around small modules: what DeepSpeed is asked to do, against plain PyTorch."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from tiny_pipeline import tiny_config
from tiny_runs import CPU, LORA, Bench, trained_parameters
from torch import Tensor, nn

from pcpo_fast.config.schema import Config
from pcpo_fast.engine.deepspeed_file import OWNED_KEYS
from pcpo_fast.engine.engine import Engine, check_deepspeed, deepspeed_config, start_distributed, stop_distributed
from pcpo_fast.errors import UserError

pytestmark = pytest.mark.usefixtures("process_group")


def config_of(*overrides: str) -> Config:
    return tiny_config(Path("unused"), "train.micro_batch_size=3", *overrides)


def module_of(dtype: torch.dtype = torch.float32, width: int = 5) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2)).to(dtype)


def batches(count: int) -> list[Tensor]:
    return list(torch.randn(count, 3, 4, generator=torch.Generator().manual_seed(4)))


def loss_of(module: nn.Module, batch: Tensor) -> Tensor:
    return 3 * module(batch.to(next(module.parameters()).dtype)).float().square().mean()


def train_step(engine: Engine, chunk: list[Tensor]) -> None:
    for batch in chunk:
        engine.backward(loss_of(engine.module, batch))
        engine.step()


def weights_of(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def stage_of(folder: Path, stage: int | None) -> tuple[str, ...]:
    """A DeepSpeed JSON with this stage; None: no JSON, so that a lone process reduces nothing."""
    if stage is None:
        return ()
    file = folder / f"stage_{stage}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return (f"deepspeed={file}",)


@pytest.mark.parametrize("stage", [None, 1, 2])
@pytest.mark.parametrize("max_grad_norm", [1e9, 0.05])
def test_accumulation_clipping_and_adamw_are_pytorchs(tmp_path: Path, stage: int | None, max_grad_norm: float) -> None:
    ours, plain = module_of(), module_of()
    overrides = (f"optimizer.max_grad_norm={max_grad_norm}", "optimizer.lr=1e-2", "optimizer.weight_decay=0.1")
    engine = Engine(ours, config_of(*overrides, *stage_of(tmp_path, stage)), accumulation=4)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    for update in range(4):
        # Gradients of different sizes, without which AdamW would forgive a wrong clipping.
        chunk = [batch * (1 + 3 * update) for batch in batches(16)[4 * update : 4 * update + 4]]
        before = weights_of(ours)
        train_step(engine, chunk[:3])
        assert same(before, weights_of(ours)), "no step before the last micro-batch"
        train_step(engine, chunk[3:])
        optimizer.zero_grad()
        for batch in chunk:
            (loss_of(plain, batch) / 4).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm)
        optimizer.step()
        assert engine.last_step.applied and engine.last_step.grad_norm == pytest.approx(float(norm), rel=1e-4)
        assert float(norm) > 0.05
    assert engine.updates == 4 and engine.zero_stage == (stage or 1) and engine.alone == (stage is None)
    for ours_now, expected in zip(weights_of(ours), weights_of(plain), strict=True):
        assert torch.allclose(ours_now, expected, atol=1e-5)


class PartlyUsed(nn.Module):
    """Weights of odd sizes, one of which gets no gradient, and one whose gradient is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.idle, self.turned = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(7, 4))
        self.last = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(x @ self.turned.T))  # type: ignore[no-any-return]


def test_a_lone_process_has_the_bits_and_checkpoints_of_deepspeeds_reductions(tmp_path: Path) -> None:
    """With clipping, accumulation, a skipped update, and each continuing from the other's checkpoint."""
    settings = ("optimizer.lr=1e-2", "optimizer.max_grad_norm=0.3", "train.ema_decay=0.9")
    pair = []
    for stage in (None, 1):
        module = PartlyUsed()
        pair.append((module, Engine(module, config_of(*settings, *stage_of(tmp_path, stage)), accumulation=2)))
    data = batches(10)
    for first in (0, 2, 4, 6, 8):
        for module, engine in pair:
            train_step(engine, [data[first] * (math.nan if first == 2 else 1), data[first + 1]])
            assert all(p.grad is None for p in module.parameters())
        (ours, alone), (reduced, other) = pair
        assert alone.last_step.applied == (first != 2)
        assert str(alone.last_step) == str(other.last_step)  # NaN is not equal to itself
        assert same(weights_of(ours), weights_of(reduced))
        if first == 4:
            for number, (_, engine) in enumerate(pair):
                engine.save(tmp_path / str(number))
            for number, (_, engine) in enumerate(reversed(pair)):
                assert engine.load(tmp_path / str(number))
    assert alone.ema is not None and other.ema is not None and same(alone.ema.average, other.ema.average)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_3_never_moves_a_whole_module_to_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """It may lie in host memory, and be too large for the device."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    ours, plain = module_of(), module_of()
    ours.register_buffer("table", torch.ones(3))
    moved: list[nn.Module] = []
    move = nn.Module.to
    monkeypatch.setattr(nn.Module, "to", lambda module, *to, **how: moved.append(module) or move(module, *to, **how))
    engine = Engine(ours, config_of(f"deepspeed={file}"), accumulation=1)
    assert (ours in moved) == (stage < 3)
    (batch,) = batches(1)
    assert torch.equal(engine.module(batch), plain(batch)) and torch.equal(ours.table, torch.ones(3))


def test_the_learning_rate_rises_over_the_warm_up_and_not_with_skipped_updates() -> None:
    engine = Engine(module_of(), config_of("optimizer.lr=0.4", "optimizer.warmup_updates=3"), accumulation=1)
    rates = []
    for index, batch in enumerate(batches(6)):
        train_step(engine, [batch * math.nan if index == 2 else batch])
        rates.append(engine.last_step.lr)
        assert all(group["lr"] == rates[-1] for group in engine.optimizer.param_groups)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.4, 0.4])
    assert engine.updates == 5


CASES = {
    "float32": (torch.float32, ()),
    "bf16, fp32 master": (torch.bfloat16, ("model.dtype=bfloat16",)),
    "bf16, stochastic": (torch.bfloat16, ("model.dtype=bfloat16", "optimizer.weights=stochastic_rounding")),
}


@pytest.mark.parametrize(("dtype", "overrides"), CASES.values(), ids=CASES)
def test_gradients_of_many_micro_batches_are_summed_in_float32(dtype: torch.dtype, overrides: tuple[str, ...]) -> None:
    """A bf16 sum stands still once it is 256 times the addend."""
    module = nn.Linear(4, 2).to(dtype)
    count = 700
    engine = Engine(module, config_of("optimizer.max_grad_norm=1e9", *overrides), accumulation=count)
    for _ in range(count):
        engine.backward(engine.module(torch.ones(1, 4, dtype=dtype)).float().sum())
        engine.step()
    assert engine.last_step.grad_norm == pytest.approx(math.sqrt(10), rel=2e-3)


@pytest.mark.parametrize(("bad", "stage"), [(math.nan, 1), (math.inf, 2)])
@pytest.mark.parametrize(("dtype", "overrides"), CASES.values(), ids=CASES)
def test_a_loss_that_is_not_finite_skips_the_update(
    tmp_path: Path, dtype: torch.dtype, overrides: tuple[str, ...], bad: float, stage: int
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    spoiled, smooth = module_of(dtype), module_of(dtype)
    config = config_of("optimizer.lr=1e-2", f"deepspeed={file}", *overrides)
    engine, other = Engine(spoiled, config, accumulation=2), Engine(smooth, config, accumulation=2)
    data = batches(6)
    for both in (engine, other):
        train_step(both, data[:2])
    before = weights_of(spoiled)
    train_step(engine, data[2:3])
    engine.backward(loss_of(engine.module, data[3]) * bad)
    engine.step()
    assert not engine.last_step.applied and not math.isfinite(engine.last_step.grad_norm)
    assert same(before, weights_of(spoiled)) and engine.updates == 1
    # The spoiled update has left nothing behind: moments and accumulated gradients are those of a run without it.
    for both in (engine, other):
        train_step(both, data[4:6])
        assert both.last_step.applied and both.updates == 2
    assert same(weights_of(spoiled), weights_of(smooth)) and not same(before, weights_of(spoiled))


def test_bf16_full_fine_tuning_follows_float32_at_a_small_learning_rate(tmp_path: Path) -> None:
    """Master weights and stochastic rounding both move as float32 does, where plain bf16 would hardly move at all."""
    moved: dict[str, Tensor] = {}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    for name, (dtype, overrides) in CASES.items():
        module = module_of(torch.bfloat16, width=600).to(dtype)
        start = torch.cat([w.flatten() for w in weights_of(module)]).double()
        engine = Engine(module, config_of("optimizer.lr=1e-5", f"deepspeed={file}", *overrides), accumulation=1)
        held = engine.optimizer.param_groups[0]["params"][0].dtype
        assert held == (torch.bfloat16 if "stochastic" in name else torch.float32)
        for _ in range(40):
            train_step(engine, batches(1))
        assert all(p.dtype == dtype for p in module.parameters())
        if "master" in name:  # what the bf16 weights are rounded from: they follow once it is half a unit away
            now = [safe_get_full_fp32_param(p) for p in module.parameters()]
            assert all(torch.equal(p, w.bfloat16()) for p, w in zip(module.parameters(), now, strict=True))
        else:
            now = weights_of(module)
        moved[name] = torch.cat([w.flatten() for w in now]).double() - start
    way = moved["float32"]
    assert 1e-4 < float(way.abs().mean()) < 1e-3  # each step far below half a unit in the last place of bf16 weights
    for name in ("bf16, fp32 master", "bf16, stochastic"):
        along = float((moved[name] * way).sum() / way.square().sum())
        assert along == pytest.approx(1, abs=0.15), name


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.dtype=bfloat16",),
        ("model.dtype=bfloat16", "optimizer.weights=stochastic_rounding"),
        ("model.dtype=bfloat16", *LORA, "model.gradient_checkpointing=selective", "credit.kl_coefficient=0.1"),
        (*LORA, "credit.kl_coefficient=0.1", "optimizer.weight_decay=0"),
    ],
    ids=["master", "stochastic", "lora-bf16", "lora-fp32"],
)
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_flux_trains_in_every_precision(
    pipeline_folder: Path, tmp_path: Path, overrides: tuple[str, ...], stage: int
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    bench = Bench.build(tiny_config(pipeline_folder, f"deepspeed={file}", *overrides))
    start = {name: p.detach().clone() for name, p in bench.policy.module.named_parameters()}
    records = bench.run()
    trained = trained_parameters(bench.policy)
    assert all(record["policy/update_applied"] == 1 and record["policy/grad_norm"] > 0 for record in records)
    assert bench.rollout.trajectories.latents.dtype == torch.float32
    assert bench.rollout.trajectories.outputs.dtype == bench.policy.dtype
    assert records[0]["policy/log_ratio_abs"] == 0
    for name, p in bench.policy.module.named_parameters():
        assert p.dtype == bench.policy.dtype and torch.isfinite(p).all()
        if name not in trained:
            assert torch.equal(p, start[name]), name
        elif (
            bench.gradients[0][name].any() and start[name].abs().max() < 0.5
        ):  # not the norms' ones, too coarse in bf16
            assert not torch.equal(p, start[name]), name
    assert sum(bool(g.any()) for g in bench.gradients[0].values()) > 0.8 * len(trained)
    assert all(("lora_" in name) for name in trained) == ("model.finetune=lora" in overrides)


def test_full_state_holds_the_trained_parameters_on_the_cpu() -> None:
    module = module_of()
    module[0].requires_grad_(False)  # type: ignore[index]
    engine = Engine(module, config_of(), accumulation=1)
    state = engine.full_state()
    assert state.keys() == {"2.weight", "2.bias"}
    assert all(torch.equal(state[name], module.get_parameter(name)) for name in state)
    train_step(engine, batches(1))
    assert not torch.equal(state["2.weight"], module.get_parameter("2.weight")), "a copy, not the weights themselves"


def test_the_process_group_can_be_started_again() -> None:
    for _ in range(2):
        stop_distributed()
        assert start_distributed() == CPU
        engine = Engine(module_of(), config_of(), accumulation=1)
        train_step(engine, batches(1))
        assert engine.last_step.applied


# --------------------------------------------------------------------------------------------- DeepSpeed's JSON


def test_settings_of_the_file_reach_deepspeed(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}, "steps_per_print": 7}))
    settings = deepspeed_config(config_of(f"deepspeed={file}", "optimizer.max_grad_norm=0.3"), 5)
    types = {type(value) for section in (settings, settings["zero_optimization"]) for value in section.values()}
    assert type(settings) is dict and types <= {dict, str, bool, int, float}  # they are pickled into checkpoints
    assert settings["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert settings["steps_per_print"] == 7 and settings["gradient_clipping"] == 0.3
    assert settings["gradient_accumulation_steps"] == 5 and settings["train_micro_batch_size_per_gpu"] == 3
    assert "bf16" not in settings
    assert deepspeed_config(config_of(), 1)["zero_optimization"] == {"stage": 1}
    stochastic = config_of("model.dtype=bfloat16", "optimizer.weights=stochastic_rounding")
    assert deepspeed_config(stochastic, 1)["zero_optimization"] == {"stage": 2}


def write(folder: Path, content: str | bytes | None) -> Path:
    file = folder / "ds.json"
    if isinstance(content, str):
        file.write_text(content)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "does not exist"),
        ('{\n "a": 1,\n}', "line 3: not valid JSON"),
        ("[1]", "must contain a JSON object"),
        (b"\xff\xfe", "cannot be read"),
        ("[" * 100_000, "not valid JSON"),
        # the stage
        *(
            (json.dumps({"zero_optimization": {"stage": stage}}), "zero_optimization.stage must be 1, 2 or 3, got")
            for stage in (0, 4, "2", True, None, 1.5, "auto")
        ),
        ('{"zero_optimization": true}', "zero_optimization: must be an object, got true"),
        # unknown keys, and those given twice
        ('{"zero_optimisation": {"stage": 3}}', "unknown key zero_optimisation, did you mean zero_optimization"),
        ('{"log_level": "loud"}', "log_level must be one of debug, info, .*, got .loud"),
        ('{"checkpoint": {"tag_validation": "x"}}', "checkpoint.tag_validation must be one of ignore, warn, fail"),
        ('{"gradient_predivide_factor": 0}', "gradient_predivide_factor must not be 0"),
        ('{"gradient_clip": 0.5}', "unknown key gradient_clip, did you mean gradient_clipping"),
        (
            '{"zero_optimization": {"stage": 2, "overlap_com": true}}',
            "unknown key zero_optimization.overlap_com, did .*comm",
        ),
        ('{"zero_optimization": {"stage": 3}, "zero_optimization": {"stage": 1}}', "zero_optimization is given twice"),
        ('{"zero_optimization": {"stage": 3, "stage": 2}}', "zero_optimization.stage is given twice"),
        ('{"data_efficiency": {}}', "data_efficiency has no effect here"),
        # types that DeepSpeed takes for one another, and numbers that are none
        ('{"zero_optimization": {"zero_hpz_partition_size": "8"}}', 'partition_size: must be a number, got "8"'),
        ('{"zero_optimization": {"overlap_comm": 1}}', "overlap_comm: must be true or false, got 1"),
        ('{"zero_optimization": {"offload_optimizer": {"pin_memory": "true"}}}', "pin_memory: must be true or false"),
        ('{"zero_optimization": {"reduce_bucket_size": NaN}}', "reduce_bucket_size must be a finite number, got nan$"),
        ('{"steps_per_print": 1e999}', "steps_per_print must be a finite number, got inf$"),
        ('{"wall_clock_breakdown": 1}', "wall_clock_breakdown: must be true or false, got 1"),
        ('{"aio": {"block_size": "1"}}', "aio.block_size: must be an integer"),
        ('{"data_types": null}', "data_types: must be a section .keys with values., got null"),
        # what changes the precision
        ('{"torch_autocast": {"enabled": true}}', "torch_autocast is set by the configuration .model.dtype"),
        ('{"communication_data_type": "bf16"}', 'communication_data_type must be "fp32"'),
        ('{"data_types": {"grad_accum_dtype": "bf16"}}', "grad_accum_dtype must be"),
        ('{"zero_optimization": {"stage": 3, "zero_quantized_weights": true}}', "quantized_weights is not allowed"),
        # what needs another stage, or a folder
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}',
            "nvme only takes effect with stage 3, but the stage is 2",
        ),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', "nvme_path is missing"),
        ('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}', "only takes effect with stage 3"),
        ('{"zero_optimization": {"stage": 1, "legacy_stage1": true}}', "legacy_stage1 is not allowed"),
        *(
            (json.dumps(settings), f"{key} is not allowed .a checkpoint is verified after writing")
            for key, settings in {
                "checkpoint.writer": {"checkpoint": {"writer": {"decoupled": True}}},
                "checkpoint.checkpoint_serialization": {"checkpoint": {"checkpoint_serialization": False}},
                "datastates_ckpt": {"datastates_ckpt": {"host_cache_size": 16}},
            }.items()
        ),
        *((json.dumps({key: 1}), f"{key} is set by the configuration .*, so remove it") for key in OWNED_KEYS),
    ],
)
def test_a_deepspeed_file_that_cannot_be_used_is_refused(
    tmp_path: Path, content: str | bytes | None, reason: str
) -> None:
    file = write(tmp_path, content)
    with pytest.raises(UserError, match=reason) as caught:
        Engine(module_of(), config_of(f"deepspeed={file}"), accumulation=1)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_instead_of_a_deepspeed_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        deepspeed_config(config_of(f"deepspeed={tmp_path}"), 1)


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    zero = {"stage": 2, "overlap_comm": "auto", "overlap_com": True, "contiguous_gradients": 1, "sub_group_size": -1}
    file = write(tmp_path, json.dumps({"zero_optimization": zero, "bf16": {"enabled": True}, "steps": 3}))
    with pytest.raises(UserError) as caught:
        deepspeed_config(config_of(f"deepspeed={file}"), 1)
    said = str(caught.value)
    for key in ("overlap_comm", "overlap_com", "contiguous_gradients", "sub_group_size", "bf16", "steps"):
        assert re.search(rf"[ .]{key}\b", said), key
    assert said.count("\n") == 0 and said.count(str(file)) == 1


def test_auto_is_our_value_for_a_size(tmp_path: Path) -> None:
    sizes = dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size"), "auto")
    owned = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    file = write(tmp_path, json.dumps({"zero_optimization": {"stage": 3, **sizes}, **owned}))
    settings = deepspeed_config(config_of(f"deepspeed={file}"), accumulation=5)
    assert settings["zero_optimization"] == {"stage": 3}
    assert settings["gradient_accumulation_steps"] == 5 and "train_batch_size" not in settings


def test_what_this_machine_lacks_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed.ops.op_builder

    loggers = {name: {"enabled": True} for name in ("tensorboard", "wandb", "comet", "flops_profiler")}
    offload = {"device": "nvme", "nvme_path": str(tmp_path / "none")}
    zero = {"zero_optimization": {"stage": 3, "offload_optimizer": offload}}
    file = write(tmp_path, json.dumps(loggers | zero))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(deepspeed.ops.op_builder.AsyncIOBuilder, "is_compatible", lambda self: False)
    config = config_of(f"deepspeed={file}")
    assert deepspeed_config(config, 1)["wandb"] == {"enabled": True}  # a plan for another machine
    with pytest.raises(UserError) as caught:
        check_deepspeed(config)
    for words in (
        "tensorboard is not",
        "wandb is not",
        "comet_ml is not",
        "einops is not",
        "none is not a writable folder",
        "libaio",
    ):
        assert words in str(caught.value)


def test_an_offloaded_optimizer_is_ours_and_trains(tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    results = []
    for overrides in ((), (f"deepspeed={file}",)):
        engine = Engine(module_of(), config_of("optimizer.lr=0.01", *overrides), accumulation=2)
        train_step(engine, batches(2))
        assert engine.last_step.applied
        results.append([safe_get_full_fp32_param(p) for p in engine.deepspeed.module.parameters()])
    assert not same(results[0], weights_of(module_of()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("given", "expected"), [(None, 37), (20, 20), (1e9, 37)])
def test_reduction_buffers_are_no_larger_than_the_trained_weights(
    tmp_path: Path, given: float | None, expected: int
) -> None:
    file = tmp_path / "ds.json"
    bucket = {} if given is None else {"reduce_bucket_size": given}
    file.write_text(json.dumps({"zero_optimization": {"stage": 2} | bucket}))
    engine = Engine(module_of(), config_of(f"deepspeed={file}"), accumulation=1)
    assert engine.deepspeed.optimizer.reduce_bucket_size == expected
    train_step(engine, batches(1))
    assert engine.last_step.applied
