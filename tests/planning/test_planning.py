"""The planner against closed formulas, PyTorch's own accounting, and measured peaks."""

import io
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import allocations, trained_once
from cli_runs import call
from planned_peaks import FINETUNES, KINDS, MODELS, peaks, render, render_gain
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from pcpo_fast.config.loading import load_config
from pcpo_fast.config.schema import AUTO, Config, ModelConfig
from pcpo_fast.engine.whole_weights import needs_whole_weights
from pcpo_fast.method.step_tables import RunTables
from pcpo_fast.planning import recommendation
from pcpo_fast.planning.advice import RESERVE, Choice, choose, usable
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.disk import evaluation_count
from pcpo_fast.planning.memory import plan_memory, rollout_buffers
from pcpo_fast.planning.models import find_architecture
from pcpo_fast.planning.plan_table import show_plan
from pcpo_fast.planning.recomputing import least_recomputing
from pcpo_fast.planning.run_plan import make_plan
from pcpo_fast.planning.states import SHIPPED, OptimizerBytes, Zero, optimizer_bytes, states_of
from pcpo_fast.planning.work import predictions_of_image, work_of_epoch
from pcpo_fast.policies.families import load_policy
from pcpo_fast.policies.speed import checkpoint_blocks

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
FLUX = "configs/flux_dev_pcpo.yaml"
PARAMETERS = 11_901_408_320
TEN_PERCENT = 0.1


def shipped(path: str, *overrides: str) -> Config:
    return load_config(ROOT / path, [*overrides])


@cache
def model_costs(model: ModelConfig) -> ModelCosts:
    return ModelCosts(find_architecture(model), model)


def costs_of(config: Config) -> ModelCosts:
    """Costs of a model, counted once for all tests; its checkpointing plays no part in them."""
    return model_costs(config.model.model_copy(update={"gradient_checkpointing": False}))


def flux(size: int, finetune: str = "full") -> ModelCosts:
    lora = ["model.lora.rank=1", "model.lora.alpha=1"] if finetune == "lora" else []
    size_of = [f"model.height={size}", f"model.width={size}"]
    return costs_of(shipped(FLUX, *size_of, f"model.finetune={finetune}", *lora))


# Operations


def flux_forward_flops(size: int) -> float:
    """Written out: every matrix of a block times its tokens, and attention's two products."""
    width, text, image = 3072, 512, (size // 16) ** 2
    tokens = text + image
    double = (4 + 8) * width**2 * tokens  # query, key, value, output, and both layers of the MLP
    double += 2 * 6 * width**2  # modulation of both streams, once per image
    single = (3 + 4 + 5) * width**2 * tokens + 3 * width**2
    attention = 2 * tokens**2 * width
    ends = image * 64 * width * 2 + text * 4096 * width  # latents in and out, T5
    ends += 2 * width**2  # the last norm's modulation
    ends += 2 * (256 * width + width**2) + 768 * width + width**2  # time, guidance, CLIP
    return 2.0 * (19 * double + 38 * single + 57 * attention + ends)


@pytest.mark.parametrize("size", [512, 720, 1024])
def test_flux_forward_is_the_closed_formula(size: int) -> None:
    assert flux(size).forward(1).flops == pytest.approx(flux_forward_flops(size), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "forward", "backward", "checkpointed", "lora"), [(720, 37.3, 111.8, 149.1, 79.1)])
def test_flux_operations(size: int, forward: float, backward: float, checkpointed: float, lora: float) -> None:
    """TFLOP as computed independently; attention's scores in the backward and checkpointing are no model operations."""
    costs = flux(size)
    once, again = costs.training(1, False), costs.training(1, True)
    assert costs.forward(1).flops / 1e12 == pytest.approx(forward, rel=2e-3)
    assert once.flops / 1e12 == pytest.approx(backward, rel=2e-3)
    assert again.flops == once.flops
    # The last block's output is not needed, so a recomputation is a little less than a forward.
    assert (again.flops + again.recomputed - once.recomputed) / 1e12 == pytest.approx(checkpointed, rel=0.02)
    assert flux(size, "lora").training(1, False).flops / 1e12 == pytest.approx(lora, rel=0.01)


def test_an_epoch_of_flux() -> None:
    """12 images of a prompt, 16 steps, 9 of them trained, at 790 TFLOP/s: 9.1 s of rollout, 24.4 s in all."""
    config = shipped(FLUX, "rollout.prompts_per_epoch=1")
    work = work_of_epoch(config, flux(720), 15, checkpointed=False)
    assert work["rollout"].seconds(790e12) == pytest.approx(9.1, abs=0.05)
    assert work["rollout"].seconds(790e12) + work["update"].seconds(790e12) == pytest.approx(24.4, abs=0.1)


def test_candidates_are_work_and_their_layers_another_byte_a_weight() -> None:
    config, costs = shipped(FLUX, "rollout.prompts_per_epoch=2", "rollout.candidates=48"), flux(720)
    work = work_of_epoch(config, costs, 15, checkpointed=False)
    assert work["candidates"].flops == 2 * 48 * (16 * costs.forward(1).flops + costs.decoding(1).flops)
    network = costs.model.policy.module
    blocks = [*network.transformer_blocks, *network.single_transformer_blocks]
    weights = [p for block in blocks for name, p in block.named_parameters() if p.ndim == 2 and "lora_" not in name]
    assert costs.model.eight_bit_bytes == sum(p.numel() + 4 * len(p) for p in weights) > 11e9
    sizes = {"zero": Zero(1), "ranks": 8, "micro_batch": 1, "rollout_batch": 1, "checkpointed": 1.0}
    whole = plan_memory(config, costs, **sizes)
    without = plan_memory(shipped(FLUX, "rollout.prompts_per_epoch=2"), costs, **sizes)
    exact = plan_memory(shipped(FLUX, "rollout.candidates=48", "rollout.candidate_weights=full"), costs, **sizes)
    more = whole.phases["rollout"] - without.phases["rollout"]
    assert 0 < costs.model.eight_bit_bytes - more <= sum(rollout_buffers(config, costs, 8).values())
    assert "8-bit weights" in whole.parts and "8-bit weights" not in exact.parts


def test_predictions_and_audits_are_work() -> None:
    """Every image decoded once more for each scored step, and two branches per audited image from a step halfway."""
    costs, config = flux(720), shipped(FLUX)
    tables = RunTables(config, None, torch.device("cpu")).at(0)

    def predictions(**advantage: Any) -> float:
        changed = config.advantage.model_copy(update={"steps": "gain", **advantage})
        count = predictions_of_image(changed, tables)
        changed_config = config.model_copy(update={"advantage": changed})
        return work_of_epoch(changed_config, costs, 15, checkpointed=False, predictions=count)["predictions"].flops

    decode, images = costs.decoding(1).flops, config.images_per_epoch
    assert "predictions" not in work_of_epoch(config, costs, 15, checkpointed=False)
    assert predictions() == 15 * images * decode
    assert predictions(scored_steps=4) == 4 * images * decode
    noisy = RunTables(shipped(FLUX, "sampler.final_step=noisy"), None, torch.device("cpu")).at(0)
    assert noisy.steps == tables.steps == list(range(15))  # the last prediction is what the last trained step leads to
    for steps, count in (("final", 0), ("baseline", 15), ("gain", 16)):
        assert predictions_of_image(config.advantage.model_copy(update={"steps": steps}), noisy) == count
    audit = 8 * (16 * costs.forward(1).flops + 4 * decode) / 5
    assert predictions(audit_every=5) == pytest.approx(15 * images * decode + audit)


def test_a_reference_and_further_passes_are_work() -> None:
    costs, config = flux(720), shipped(FLUX)
    once = work_of_epoch(config, costs, 15, checkpointed=False)["update"].flops
    kl = config.model_copy(update={"credit": config.credit.model_copy(update={"kl_coefficient": 0.1})})
    assert work_of_epoch(kl, costs, 15, checkpointed=False)["update"].flops / once == pytest.approx(4 / 3, rel=1e-3)
    twice = config.model_copy(update={"train": config.train.model_copy(update={"inner_epochs": 2})})
    assert work_of_epoch(twice, costs, 15, checkpointed=False)["update"].flops == 2 * once


# Activations


def test_flux_saves_for_its_backward() -> None:
    """GB per image without checkpointing, as computed independently from the layers."""
    assert flux(720).training(1, False).saved / 1e9 == pytest.approx(17.9, rel=0.02)


@pytest.mark.slow
def test_flux_blocks_agree_with_fake_tensors() -> None:
    """One double and one single block under PyTorch's FakeTensorMode, counted by hooks on what autograd saves."""
    from diffusers import FluxTransformer2DModel

    tokens, text = 1024, 512
    mode = FakeTensorMode()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with mode:
            network = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    finally:
        torch.set_default_dtype(torch.float32)
    with mode:
        weights = {p.untyped_storage()._cdata for p in [*network.parameters(), *network.buffers()]}
        kept: dict[int, Any] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = network(
                hidden_states=torch.empty(1, tokens, 64, dtype=torch.bfloat16),
                encoder_hidden_states=torch.empty(1, text, 4096, dtype=torch.bfloat16),
                pooled_projections=torch.empty(1, 768, dtype=torch.bfloat16),
                timestep=torch.empty(1),
                img_ids=torch.empty(tokens, 3, dtype=torch.bfloat16),
                txt_ids=torch.empty(text, 3, dtype=torch.bfloat16),
                guidance=torch.empty(1),
                return_dict=False,
            )[0]
        expected = sum(storage.nbytes() for storage in kept.values())
        del output
    config = shipped(FLUX, "model.height=512", "model.width=512")
    architecture = find_architecture(config.model)
    name, whole = architecture.parts["transformer"]
    short = {**architecture.parts, "transformer": (name, {**whole, "num_layers": 1, "num_single_layers": 1})}
    costs = ModelCosts(replace(architecture, parts=short), config.model, on_gpu=False)
    assert costs.training(1, False).saved == pytest.approx(expected, rel=TEN_PERCENT)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("finetune", FINETUNES)
def test_measured_peaks_of_a_backward(model: str, finetune: str, tmp_path: Path) -> None:
    """What PyTorch's allocator hands out on a CPU during a forward and backward of six images."""
    rows = peaks(model, finetune, tmp_path)
    for row in rows:
        assert row["planned"] == pytest.approx(row["measured"], rel=TEN_PERCENT), row
    none, selective, whole = rows
    assert whole["measured"] < selective["measured"] < 0.97 * none["measured"]
    assert none["operations"] <= selective["operations"] < 1.05 * none["operations"] < whole["operations"]


def test_the_committed_peaks_are_within_ten_percent_and_in_the_documentation() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "planned_peaks.json").read_text(encoding="utf-8"))
    rows = record["rows"]
    assert len(rows) == len(KINDS) * len(MODELS) * len(FINETUNES)
    assert all(row["planned"] == pytest.approx(row["measured"], rel=TEN_PERCENT) for row in rows)
    assert render(rows) in (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    assert render_gain(rows, record["planned"]) in (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def test_a_run_recomputes_selectively_before_it_recomputes_whole_blocks() -> None:
    own = (f"model.path={ROOT / 'assets' / 'tiny-flux'}", "model.gradient_checkpointing=selective")
    config = shipped("configs/tiny_flux.yaml", *own, "train.micro_batch_size=120", "rollout.batch_size=4")
    costs, zero = costs_of(config), Zero.of(config)
    peaks = [
        plan_memory(config, costs, zero, 1, checkpointed=float(bool(kind)), recomputing=kind).peak for kind in KINDS
    ]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3
    assert plan_memory(config, costs, zero, 1).peak == peaks[1], "the configuration's own"
    expected: list[tuple[Any, Any]] = [("selective", 0.0), ("selective", 1.0), (True, 1.0), (True, 1.0)]
    for enough, (kind, share) in zip([*peaks, peaks[-1] - 1], expected, strict=True):
        least = least_recomputing(config, 1, enough + RESERVE, costs)
        assert (least.kind, least.share, least.fits) == (kind, share, enough in peaks)


@pytest.mark.slow
def test_measured_peaks_of_a_share_of_the_blocks(tmp_path: Path) -> None:
    """Between none and all, with a network deep enough for shares."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    config = shipped("configs/tiny_flux.yaml", f"model.path={ROOT / 'assets/tiny-flux'}", "rollout.batch_size=4")
    architecture = find_architecture(config.model)
    name, small = architecture.parts["transformer"]
    deep = {**small, "num_layers": 2, "num_single_layers": 6}
    costs = ModelCosts(
        replace(architecture, parts={**architecture.parts, "transformer": (name, deep)}), config.model, on_gpu=False
    )
    policy: Any = load_policy(config.model_copy(update={"output_dir": str(tmp_path / "run")}), CPU)
    policy.module = policy.network = policy.forward_module = FluxTransformer2DModel.from_config(deep)
    shapes = policy.conditioning_shapes(costs.architecture.clip_tokens)
    conditioning = {name: torch.randn(3, *shape) for name, shape in shapes.items()}
    latents, times = torch.randn(3, *policy.latent_shape), torch.full((3,), 0.5)

    def predict() -> torch.Tensor:
        return policy.predict_halves(latents, times, conditioning).conditional

    trained_once(predict, policy.module)
    measured = {}
    for share in (0.0, 0.25, 0.75, 1.0):
        checkpoint_blocks(policy.module, policy.recomputed_blocks(policy.module), share)
        measured[share] = allocations(lambda: trained_once(predict, policy.module)).peak
        assert costs.partial_peak(3, share) == pytest.approx(measured[share], rel=TEN_PERCENT), f"{share=}"
    assert sorted(measured.values(), reverse=True) == list(measured.values()), (
        "each share needs less than the one before"
    )


@pytest.mark.slow
def test_the_least_recomputing_that_fits() -> None:
    """FLUX at 1024 x 1024 with LoRA and HPSv2: nothing is recomputed on a large GPU, everything on a small one."""
    config = shipped(FLUX, "model.finetune=lora", "model.height=1024", "model.width=1024", "rollout.batch_size=1")
    costs = costs_of(config)
    plans = [least_recomputing(config, 1, memory * 1e9, costs) for memory in (141, 54, 49, 47, 10)]
    shares = [plan.share for plan in plans]
    assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares) and len(set(shares)) >= 4
    assert [plan.fits for plan in plans] == [True, True, True, True, False]
    for plan in plans[1:4]:
        less = plan_memory(config, costs, Zero.of(config), 1, checkpointed=plan.share - 1 / 16).peak
        assert plan.peak <= usable(plan.memory) < less
    assert "62%" in str(plans[0]._replace(share=0.62)) and "what would fit" in str(plans[-1])


# States


@pytest.mark.parametrize(("stage", "expected"), [(1, 65.5), (2, 44.6), (3, 23.8)])
def test_flux_states_on_eight_gpus(stage: int, expected: float) -> None:
    """GB per GPU of weights, bf16 gradients, fp32 master weights and Adam, as ZeRO divides them."""
    states = states_of(
        Zero(stage), 8, total=PARAMETERS, trained=PARAMETERS, weight_bytes=2, optimizer=OptimizerBytes(2, 4, 8, 0)
    )
    total = states.weights + states.gradients + states.master + states.moments
    assert total / 1e9 == pytest.approx(expected, abs=0.05)


def test_flux_states_on_one_gpu() -> None:
    def total(optimizer: OptimizerBytes) -> float:
        parts = states_of(Zero(1), 1, total=PARAMETERS, trained=PARAMETERS, weight_bytes=2, optimizer=optimizer)
        return (parts.weights + parts.gradients + parts.master + parts.moments) / 1e9

    assert total(OptimizerBytes(2, 4, 8, 0)) == pytest.approx(23.8 * 2 + 142.8, abs=0.1)
    assert total(OptimizerBytes(2, 0, 2, 0)) == pytest.approx(71.4, abs=0.1)  # 8-bit Adam without master weights


def test_optimizers_differ_in_their_bytes() -> None:
    assert optimizer_bytes(shipped(FLUX))[:3] == (4, 4, 8)
    assert optimizer_bytes(shipped(FLUX, "optimizer.weights=stochastic_rounding"))[:3] == (4, 2, 4)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_deepspeed_files_are_the_stages_that_are_planned(name: str) -> None:
    file = ROOT / "ds_configs" / f"{name}.json"
    if not file.parent.is_dir():
        pytest.skip("ds_configs is not part of this checkout")
    assert Zero.of(shipped("configs/tiny_flux.yaml", f"deepspeed={file}")) == SHIPPED[name]


def test_offloading_leaves_the_gpu() -> None:
    numbers: dict[str, Any] = {"total": 1000, "trained": 100, "weight_bytes": 2}
    kept = states_of(Zero(2), 2, optimizer=OptimizerBytes(4, 4, 8, 4), **numbers)
    away = states_of(Zero(2, offload_optimizer=True), 2, optimizer=OptimizerBytes(4, 4, 8, 4), **numbers)
    assert (kept.gradients, kept.master, kept.moments) == (200, 200, 400)
    assert (away.gradients, away.master, away.moments) == (200, 0, 0)  # DeepSpeed sums bf16 gradients on the GPU
    for zero, width in ((Zero(2, offload_optimizer=True), 4), (Zero(3, offload_optimizer=True), 2)):
        whole = states_of(zero, 2, optimizer=OptimizerBytes(4, 4, 8, 4), **numbers | {"weight_bytes": width})
        assert whole.gradients == 0


def test_rollout_buffers_are_those_of_a_rollout() -> None:
    """0.1 GB per prompt at 720 x 720."""
    config = shipped(FLUX, "rollout.prompts_per_epoch=1")
    buffers = rollout_buffers(config, flux(720), 1)
    tokens, images, steps = 2025, 12, 16
    assert buffers["trajectories"] == images * tokens * 64 * (4 * (steps + 1) + 2 * steps)
    assert buffers["images"] == images * 3 * 720 * 720 * 4
    assert buffers["embeddings"] == (512 * 4096 + 768) * 2
    assert buffers["trajectories"] / 1e9 == pytest.approx(0.1, rel=0.6)


# The whole plan


@pytest.fixture(scope="module")
def tiny_plan() -> dict[str, Any]:
    return make_plan(shipped("configs/tiny_flux.yaml", f"model.path={ROOT / 'assets' / 'tiny-flux'}"), 1, 8)


def test_a_plan_has_every_part(tiny_plan: dict[str, Any]) -> None:
    assert tiny_plan["parameters"] == {
        "network": 1062944,
        "trained": 1062944,
        "frozen": 0,
        "vae": 237123,
        "text_encoders": {"text_encoder": 41920, "text_encoder_2": 42336},
    }
    assert set(tiny_plan["memory_gb"]) == {"zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"}
    assert set(tiny_plan["flops"]["phases"]) == {"rollout", "decode", "update", "evaluation"}
    assert tiny_plan["configured"]["zero"] == "zero1" and tiny_plan["recommendation"]["fits"]
    json.dumps(tiny_plan, allow_nan=False)


def test_a_whole_run_in_hours(tiny_plan: dict[str, Any]) -> None:
    """60 epochs, and evaluations before them and after every tenth; at an MFU of 1 the ideal times added up."""
    run, flops = tiny_plan["run"], tiny_plan["flops"]
    assert (run["epochs"], run["evaluations"], run["mfu"]) == (60, 7, 0.35)
    ideal = 60 * flops["epoch_ideal_seconds"] + 7 * flops["phases"]["evaluation"]["ideal_seconds"]
    assert run["hours"] == pytest.approx(ideal / 0.35 / 3600)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("train.epochs=25",), 4),
        (("train.epochs=30",), 4),
        (("train.epochs=0",), 1),
        (("evaluation.every=0",), 2),
        (("prompts.heldout=null",), 0),
    ],
)
def test_evaluations_of_a_run(settings: tuple[str, ...], expected: int) -> None:
    assert evaluation_count(shipped("configs/tiny_flux.yaml", *settings)) == expected


@pytest.mark.parametrize(("value", "shown"), [(1234.5, "1,234"), (12.34, "12.3"), (0.00123, "<0.01")])
def test_a_plan_is_whole_in_80_columns(tiny_plan: dict[str, Any], value: float, shown: str) -> None:
    """With numbers of the widest forms, nothing is cut or folded."""

    def filled(stage: dict[str, Any]) -> dict[str, Any]:
        return stage | {key: dict.fromkeys(stage[key], value) for key in ("parts", "phases")}

    own = filled(tiny_plan["configured"]) | {"host": filled(tiny_plan["configured"]["host"]) | {"fits": False}}
    plan = tiny_plan | {"configured": own}
    plan |= {kind: {name: filled(stage) | {"fits": True} for name, stage in plan[kind].items()}
             for kind in ("memory_gb", "host_gb")}  # fmt: skip
    disk = plan["disk_gb"]
    plan["disk_gb"] = disk | {"parts": dict.fromkeys(disk["parts"], value), "free": 0.001, "fits": False}
    console = Console(width=80, file=io.StringIO())
    show_plan(plan, console)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert not any("…" in line for line in lines)
    assert lines[0].startswith(f"{plan['model']['path']} (")
    for stage in (own, own["host"]):
        for name in (*stage["parts"], *(f"peak: {phase}" for phase in stage["phases"])):
            assert name + 6 * shown in [line.replace("  ", "").replace(f" {shown}", shown) for line in lines], name
    for name in disk["parts"]:
        assert any(line.split("  ")[0] == name and line.endswith(f" {shown}") for line in lines), name
    assert any(line.startswith("fits 0.001 GB") for line in lines)


@pytest.mark.parametrize(
    ("hours", "shown"),
    [(1087.4, "1,087 h"), (12.34, "12.3 h"), (1 / 60, "60.0 s"), (1e-6, "3.6 ms"), (1e-8, "<1 ms")],
)
def test_times_are_written_as_people_do(tiny_plan: dict[str, Any], hours: float, shown: str) -> None:
    console = Console(width=80, file=io.StringIO())
    show_plan(tiny_plan | {"run": tiny_plan["run"] | {"hours": hours, "tflops": 1e-5}}, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f": <0.001 TFLOP, {shown} at an assumed" in text and "µs" not in text and "e-0" not in text


@pytest.mark.parametrize(
    ("arguments", "memory", "rate", "code"),
    [
        (("--gpu", "4090"), 24, 165, 0),
        (("--gpu", "b200", "--gpus", "2"), 180, 2250, 0),
        pytest.param(("--gpu", "L40S", "--gpu-memory", "40", "--mfu", "0.5"), 40, 362, 0, marks=pytest.mark.slow),
        pytest.param(("--gpu-memory", "1.51"), 1.51, 989, 3, marks=pytest.mark.slow),
    ],
)
def test_gpus_by_name_and_exit_codes(
    arguments: tuple[str, ...], memory: float, rate: float, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = call(capsys, "plan", *arguments, "--json")
    plan = json.loads(answer.out)
    assert (plan["gpu_memory_gb"], plan["peak_tflops"], answer.code) == (memory, rate, code)
    assert plan["recommendation"]["fits"] == (code == 0)


def test_recommended_settings_are_accepted_and_fit(tiny_plan: dict[str, Any]) -> None:
    settings = tiny_plan["recommendation"]["settings"]
    config = shipped("configs/tiny_flux.yaml", *settings)
    assert config.train.micro_batch_size == tiny_plan["recommendation"]["micro_batch_size"]


def test_zero_3_loads_one_weight_at_a_time() -> None:
    own = (f"model.path={ROOT / 'assets' / 'tiny-flux'}", "train.micro_batch_size=120", "rollout.batch_size=96")
    config = shipped("configs/tiny_flux.yaml", *own)
    costs = costs_of(config)
    sizes, vae = [p.numel() for p in costs.model.policy.module.parameters()], costs.model.vae_parameters
    expected = {"zero1": sum(sizes), "zero3": sum(sizes) / 4 + max(sizes), "zero3_offload": max(sizes)}
    for name, network in expected.items():
        load = plan_memory(config, costs, SHIPPED[name], 4).phases["load"]
        assert load == pytest.approx(4 * (network + vae)), name


@pytest.mark.slow
def test_weights_from_host_memory_are_used_for_large_batches() -> None:
    """Moving all of them for a batch costs more than computing a forward again."""
    config = shipped(FLUX, "model.finetune=lora", "model.lora.rank=1", "model.lora.alpha=1")
    small, *larger = (choose(config, flux(720, "lora"), 1, 1e9 * size, pairs=24) for size in (24, *range(40, 61)))
    assert small is not None
    assert (small.zero, small.checkpointed, small.micro_batch) == (SHIPPED["zero3_offload"], True, 8)
    assert {choice.zero for choice in larger if choice is not None} == {SHIPPED["zero1"]}
    assert list(dict.fromkeys(choice and choice.checkpointed for choice in larger)) == [True, "selective", False]


@pytest.mark.slow
def test_what_does_not_fit_says_what_to_change() -> None:
    plan = make_plan(shipped("configs/tiny_flux.yaml", f"model.path={ROOT / 'assets' / 'tiny-flux'}"), 1, 1.51)
    advice = plan["recommendation"]
    assert not advice["fits"] and "no settings fit 1 x 1.51 GB" in advice["reason"]
    assert any(way.startswith("use GPUs with ") for way in advice["ways_out"])


def test_a_plan_says_what_keeps_the_weights_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only partitioned weights would fit, and a setting forbids them."""

    def partitioned(config: Config, *others: Any) -> Choice | None:
        return None if any(needs_whole_weights(config)) else choose(config, *others)

    monkeypatch.setattr(recommendation, "choose", partitioned)
    settings = ("rollout.candidates=32", "model.compile=true", f"model.path={ROOT / 'assets' / 'tiny-flux'}")
    advice = make_plan(shipped("configs/tiny_flux.yaml", *settings), 1, 8)["recommendation"]
    assert not advice["fits"]
    said = "partition the weights: model.compile=false rollout.candidate_weights=full fits with deepspeed=ds_configs/"
    assert advice["ways_out"][0].startswith(said)


RECIPES = sorted((ROOT / "examples").glob("*/config.yaml"))
MACHINES = {"1x16gb": (1, 16), "1x24gb": (1, 24), "1x80gb": (1, 80), "8x80gb": (8, 80), "2x8x80gb": (16, 80)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_every_recipe_loads(path: Path) -> None:
    config = load_config(path)
    assert config.output_dir == f"runs/{path.parent.name}"
    assert config.deepspeed is None or Path(config.deepspeed).stem in SHIPPED


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_every_recipe_compiles_where_that_works_or_says_why_not(path: Path) -> None:
    config = load_config(path)
    partitioned = config.deepspeed is not None and SHIPPED[Path(config.deepspeed).stem].stage == 3
    says_why = "  # compile stays off [-]: " in path.read_text(encoding="utf-8")
    assert (config.model.compile == AUTO) is not (partitioned or says_why)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_every_recipe_fits_its_machine(path: Path) -> None:
    gpus, size = MACHINES[path.parent.name.split("_")[0]]
    config = load_config(path)
    zero = Zero.of(config) if config.deepspeed is None else SHIPPED[Path(config.deepspeed).stem]
    memory = plan_memory(config, costs_of(config), zero, gpus)
    assert memory.peak <= usable(size * 1e9), memory
    script = (path.parent / "run.sh").read_text(encoding="utf-8")
    assert f"--gpus {gpus}" in script and f"--gpu-memory {size}" in script


def test_the_command(capsys: pytest.CaptureFixture[str], tiny_plan: dict[str, Any]) -> None:
    arguments = ["plan", "--config", ROOT / "configs/tiny_flux.yaml", "--gpu-memory", "8"]
    model = f"model.path={ROOT / 'assets' / 'tiny-flux'}"
    assert json.loads(call(capsys, *arguments, model, "--json").out) == tiny_plan
    shown = call(capsys, *arguments, model).out
    assert "Recommended: zero1 without gradient checkpointing" in shown and "1,062,944" in shown
    assert "The times are those of an H100: --gpu names another card" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--gpus", "0"), "--gpus: must be at least 1, got 0"),
        (("--gpu-memory", "-1"), "--gpu-memory: must be a number above 0, got -1"),
        (("--host-memory", "0"), "--host-memory: must be a number above 0, got 0"),
        (("--gpus", "2", "--nodes", "3"), "--gpus: 2 GPUs cannot be divided evenly over 3 machines (--nodes)"),
        (("--peak-tflops", "nan"), "--peak-tflops: must be a number above 0, got nan"),
        (("--mfu", "1.5"), "--mfu: must be above 0 and at most 1, got 1.5"),
        (
            ("--gpu", "H10"),
            "--gpu: must be one of 3090, 4090, 5090, L40S, A100, H100, H200, B200, got 'H10', did you mean",
        ),
        (("--gpu-memory", "1e300"), "--gpu-memory: must be between 0.001 and 1000000, got 1e+300"),
        (("model.height=1000000000000000000000000",), "model.height: must be at most 65536"),
        (
            ("rollout.images_per_prompt=3", "train.micro_batch_size=120"),
            "train.micro_batch_size: 120 does not divide the 15",
        ),
        (("--gpus", "7"), "train.updates_per_epoch: an update has 24 images"),
        (("--model-config", "nowhere"), "--model-config nowhere: not a folder"),
        (("model.path=nowhere",), "model.path: nowhere is neither a folder nor a hub id"),
        (("model.path=some/where",), "model.path: the configuration files of some/where cannot be downloaded"),
        (("model.height=33",), "model.height: 33 is not a multiple of"),
        (("model.attention=cudnn",), "model.attention: unknown backend 'cudnn'; diffusers offers "),
        (("rollout.attention=auto",), "rollout.attention: unknown backend 'auto'; diffusers offers "),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    known = ["--config", str(ROOT / "configs/tiny_flux.yaml")] if "--config" not in arguments else []
    model = [] if any("model.path" in text for text in arguments) else [f"model.path={ROOT / 'assets' / 'tiny-flux'}"]
    output = call(capsys, "plan", *known, *arguments, *model)
    assert output.code == 2 and output.err.startswith("error: ") and says in output.err
    assert output.err.count("\n") == 1


@pytest.mark.parametrize("damage", ["missing", "malformed", "unknown"])
def test_a_damaged_model_folder_is_one_sentence(
    damage: str, own_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = own_pipeline / ("model_index.json" if damage == "unknown" else "transformer/config.json")
    if damage == "missing":
        file.unlink()
    else:
        file.write_text("{" if damage == "malformed" else '{"_class_name": "OtherPipeline"}', encoding="utf-8")
    output = call(capsys, "plan", "--config", ROOT / "configs/tiny_flux.yaml", "--model-config", own_pipeline)
    assert output.code == 2 and output.err.count("\n") == 1
    assert {"missing": "does not exist", "malformed": "is not valid JSON", "unknown": "OtherPipeline; allowed are"}[
        damage
    ] in output.err
