"""A frozen base in four bits under LoRA: what its weights are, and that training on it is training on them."""

import importlib.util
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit
from safetensors.torch import load_file, save_file
from scipy.stats import norm
from tested_families import CPU, FIXTURES, LORA, Family, randomize_adapters, trained_state
from tiny_pipeline import PROMPTS, tiny_config
from tiny_runs import Bench
from torch import Tensor, nn

from pcpo_fast.engine.engine import deepspeed_config, read_state_file
from pcpo_fast.errors import UserError
from pcpo_fast.evaluation.candidates import read_candidates
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.memory import plan_memory
from pcpo_fast.planning.models import find_architecture
from pcpo_fast.planning.states import Zero
from pcpo_fast.policies import four_bit
from pcpo_fast.policies.base import Policy
from pcpo_fast.policies.families import load_policy, load_trained_weights
from pcpo_fast.policies.four_bit import quantize_blocks
from pcpo_fast.policies.pipeline_policy import PipelinePolicy
from pcpo_fast.policies.saving import save_pipeline
from pcpo_fast.policies.speed import compile_blocks
from pcpo_fast.training.trainer import train

pytest.importorskip("bitsandbytes")
NF4 = (*LORA, "model.base_weights=nf4")
EPS = torch.finfo(torch.float32).eps
LAYERS = {"flux": 14 + 6, "klein": 12 + 2 * 2, "sd": 4 * 3, "sd3": 3}
"""Linear layers in the blocks of the miniatures whose rows divide into blocks of 32."""


def code() -> Tensor:
    """NF4's numbers by their definition (QLoRA, section 3): quantiles of the normal distribution, with an exact 0."""
    edge = (1 / 32 + 1 / 30) / 2  # the mean of half a bin on either side
    positive = norm.ppf(torch.linspace(1 - edge, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -norm.ppf(torch.linspace(1 - edge, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.tensor([*negative, 0.0, *positive[::-1]], dtype=torch.float64)
    return values / values.max()


def nearest(weight: Tensor) -> Tensor:
    """A weight in four bits, in float64: the nearest of 16 numbers times the largest magnitude of 64 or 32 in a row."""
    blocks = weight.detach().double().reshape(-1, 32 if weight.shape[1] % 64 else 64)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    return (code()[((blocks / scales)[..., None] - code()).abs().argmin(dim=2)] * scales).view_as(weight)


def in_blocks(policy: Policy) -> dict[str, Any]:
    """The linear layers of the blocks that can be in four bits, by name, with or without adapters around them."""
    blocks = policy.compiled_blocks(policy.module)
    inside = {id(layer) for block in blocks for layer in block.modules()}
    return {
        name.removesuffix(".base_layer"): layer
        for name, layer in policy.module.named_modules()
        if id(layer) in inside and isinstance(layer, nn.Linear) and "lora_" not in name and layer.in_features % 32 == 0
    }


@pytest.fixture(scope="module", params=("flux", "klein", "sd", "sd3"))
def family(request: pytest.FixtureRequest) -> Family:
    return Family(request.param, request.getfixturevalue(FIXTURES[request.param]))


def on_nearest(family: Family, *overrides: str) -> Any:
    """A policy with adapters on a plain base whose weights are those that four bits hold."""
    policy = family.policy(*LORA, *overrides)
    with torch.no_grad():
        for layer in in_blocks(policy).values():
            layer.weight.copy_(nearest(layer.weight))
    return policy


def inputs_of(family: Family, policy: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return family.latents(3), torch.tensor([0.901, 0.501, 0.201]), policy.encode(PROMPTS[:3])


# ------------------------------------------------------------------------------------------------ the weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_multiplies_by_the_nearest_of_sixteen_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    """Rows of blocks of 64, or of 32; where neither divides them, a layer stays as it is."""
    sizes = ((320, 7), (96, 40), (32, 1), (160, 33))
    network: Any = nn.ModuleDict({f"{m}x{n}": nn.Linear(m, n, dtype=dtype) for m, n in (*sizes, (48, 8))})
    whole = network["48x8"]
    before = {name: (layer.weight.clone(), layer.bias) for name, layer in network.items() if layer is not whole}
    assert quantize_blocks(network, [network], CPU, tmp_path) == len(sizes)
    assert network["48x8"] is whole
    for name, (weight, bias) in before.items():
        layer, exact = network[name], nearest(weight)
        assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == -(-weight.numel() // 2)
        assert layer.bias is bias and not layer.weight.requires_grad
        got = layer(torch.eye(weight.shape[1], dtype=dtype)) - bias
        assert torch.allclose(got.double().T, exact, rtol=0, atol=4 * torch.finfo(dtype).eps * float(exact.abs().max()))
        x = torch.zeros_like(weight, requires_grad=True)
        layer(x).backward(torch.eye(weight.shape[0], dtype=dtype))
        rtol = 2 * torch.finfo(dtype).eps + 1e-6  # of the published numbers, whose quantiles are float32's
        assert torch.allclose(x.grad.double(), exact, rtol=rtol, atol=0), "gradients pass"


def test_every_linear_layer_of_the_blocks_is_packed_and_peft_knows_it(family: Family) -> None:
    policy, plain = family.policy(*NF4), family.policy(*LORA)
    layers = in_blocks(policy)
    assert sum(p.dtype == torch.uint8 for p in policy.module.parameters()) == len(layers)
    assert layers.keys() == in_blocks(plain).keys() and len(layers) == LAYERS[family.name]
    for name, layer in layers.items():
        before = in_blocks(plain)[name].weight
        assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == -(-before.numel() // 2)
    adapted = {name: layer for name, layer in policy.module.named_modules() if hasattr(layer, "lora_A")}
    assert adapted and {type(layer) for layer in adapted.values()} <= {Linear4bit, Linear}
    assert all(isinstance(layer, Linear4bit) == (name in layers) for name, layer in adapted.items())
    start = trained_state(plain)
    assert policy.dtype == torch.float32 and trained_state(policy).keys() == start.keys()
    assert all(value.equal(start[name]) for name, value in trained_state(policy).items()), "adapters begin alike"
    assert not [name for name in policy.module.state_dict() if ".weight." in name], "scales are not trained"


def test_host_memory_holds_the_network_and_one_layer_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network: Any = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    originals, alive = [weakref.ref(layer.weight) for layer in network], list[int]()
    check = four_bit.check_finite

    def counting(layer: nn.Module, *about: Any) -> None:
        check(layer, *about)
        alive.append(sum(weight() is not None for weight in originals))

    monkeypatch.setattr(four_bit, "check_finite", counting)
    quantize_blocks(network, [network], CPU, tmp_path)
    assert alive == [6, 5, 4, 3, 2, 1]


# ------------------------------------------------------------------------------------------------ the policy


def test_a_policy_is_that_of_the_weights_which_four_bits_hold(family: Family) -> None:
    """Predictions, the reference without adapters, and gradients against float64."""
    packed, plain = family.policy(*NF4), on_nearest(family)
    randomize_adapters(packed)
    randomize_adapters(plain)
    inputs = inputs_of(family, packed)
    assert torch.allclose(packed.predict(*inputs), plain.predict(*inputs), rtol=0, atol=100 * EPS)
    assert not torch.allclose(packed.predict(*inputs), family.policy(*LORA).predict(*inputs), atol=1e-3)
    with packed.as_reference(), torch.no_grad():
        reference = packed.predict(*inputs)
    with plain.as_reference(), torch.no_grad():
        assert torch.allclose(reference, plain.predict(*inputs), rtol=0, atol=100 * EPS)
    plain.module.double()
    for policy in (packed, plain):
        policy.predict(*inputs).square().sum().backward()
    exact = {name: p.grad for name, p in plain.module.named_parameters() if p.requires_grad and p.grad is not None}
    assert len(exact) > 10
    largest = max(float(gradient.abs().max()) for gradient in exact.values())
    for name, gradient in exact.items():
        own = packed.module.get_parameter(name).grad
        assert torch.allclose(own.double(), gradient, rtol=1e-3, atol=100 * EPS * largest), name


def test_a_row_alone_is_the_row_in_a_batch(family: Family) -> None:
    policy = family.policy(*NF4, "model.cfg_scale=1.0")
    randomize_adapters(policy)
    latents, times, conditioning = inputs_of(family, policy)
    with torch.no_grad():
        together = policy.predict(latents, times, conditioning)
        for row in range(3):
            one = slice(row, row + 1)
            alone = policy.predict(latents[one], times[one], {name: value[one] for name, value in conditioning.items()})
            assert torch.allclose(alone[0], together[row], rtol=0, atol=100 * EPS)


def test_a_bfloat16_base_has_bfloat16_adapters(pipeline_folder: Path) -> None:
    config = tiny_config(pipeline_folder, *NF4, "model.dtype=bfloat16")
    policy = load_policy(config, CPU)
    assert {p.dtype for p in policy.module.parameters() if p.requires_grad} == {torch.bfloat16} == {policy.dtype}
    again = load_policy(tiny_config(pipeline_folder, *LORA, "model.dtype=bfloat16"), CPU)
    start = trained_state(again)
    assert all(value.equal(start[name]) for name, value in trained_state(policy).items())


def test_blocks_can_be_accelerated_and_recomputed(pipeline_folder: Path) -> None:
    settings = ("model.block_kernels=true", "model.gradient_checkpointing=selective")
    gradients = []
    for chosen in ((), settings):
        policy: Any = load_policy(tiny_config(pipeline_folder, *NF4, *chosen), CPU)
        randomize_adapters(policy)
        policy.predict(*inputs_of(Family("flux", pipeline_folder), policy)).square().sum().backward()
        gradients.append({name: p.grad for name, p in policy.module.named_parameters() if p.grad is not None})
    plain, other = gradients
    assert plain.keys() == other.keys() and len(plain) > 10
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    assert all(torch.allclose(other[name], plain[name], rtol=1e-4, atol=1e-5 * largest) for name in plain)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(pipeline_folder: Path) -> None:
    """Without a break in the graph, or they would be refused."""
    policy: Any = load_policy(tiny_config(pipeline_folder, *NF4), CPU)
    randomize_adapters(policy)
    inputs = inputs_of(Family("flux", pipeline_folder), policy)
    results = []
    for compiled in (False, True):
        if compiled:
            compile_blocks(policy.network, policy.compiled_blocks(policy.network), backend="aot_eager")
        policy.module.zero_grad()
        output = policy.predict(*inputs)
        output.square().sum().backward()
        with torch.no_grad():
            sampled = policy.predict(*inputs)
        results.append((output, sampled, *(p.grad for p in policy.module.parameters() if p.grad is not None)))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=100 * EPS * float(one.abs().max()))


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.usefixtures("process_group")
def test_the_log_ratio_is_exactly_0_on_policy(pipeline_folder: Path) -> None:
    """Rollout and update run the same batches here, without and with gradients."""
    overrides = ("credit.steps=[1]", "train.updates_per_epoch=1", "train.micro_batch_size=8", "rollout.batch_size=8")
    record = Bench.build(tiny_config(pipeline_folder, *NF4, *overrides, "train.old_output=rollout")).run()[0]
    assert record["policy/log_ratio_abs"] == record["rollout/mismatch_output"] == 0
    assert record["policy/grad_norm"] > 0


@pytest.mark.usefixtures("process_group")
def test_zero_1_and_2_train_the_same(pipeline_folder: Path, tmp_path: Path) -> None:
    """And what they write holds the adapters and nothing of the base."""
    weights = []
    for stage in (1, 2):
        file = tmp_path / f"zero{stage}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        bench = Bench.build(tiny_config(pipeline_folder, *NF4, f"deepspeed={file}"))
        before = {name: p.clone() for name, p in bench.policy.module.named_parameters() if not p.requires_grad}
        bench.run()
        assert all(p.equal(before[name]) for name, p in bench.policy.module.named_parameters() if not p.requires_grad)
        weights.append(bench.engine.full_state())
        bench.engine.save(tmp_path / f"stage{stage}")
        states = list((tmp_path / f"stage{stage}").rglob("*model_states.pt"))
        assert states and set(read_state_file(states[0])["module"]) == set(weights[-1])
    assert all(torch.allclose(weights[0][name], value, atol=1e-6) for name, value in weights[1].items())


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_exports_for_the_original_base(pipeline_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def settings(name: str, *more: str) -> Any:
        return tiny_config(
            pipeline_folder,
            *NF4,
            f"output_dir={tmp_path / name}",
            f"prompts.train={tmp_path / 'prompts.txt'}",
            "prompts.heldout=null",
            "optimizer.lr=3e-2",
            "checkpoint.every=1",
            *more,
        )

    train(settings("whole"))
    train(settings("parts", "train.epochs=1"))
    train(settings("parts"))
    whole, parts = (
        load_file(tmp_path / name / "export/pytorch_lora_weights.safetensors") for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys() and all(parts[name].equal(value) for name, value in whole.items())
    with pytest.raises(UserError, match=r"model\.base_weights"):
        train(settings("whole", "model.base_weights=full", "train.epochs=3"))

    weights, config = tmp_path / "whole" / "export", settings("whole")
    family = Family("flux", pipeline_folder)
    trained, original = load_policy(config, CPU), family.policy(*LORA)
    for policy in (trained, original):
        load_trained_weights(policy.module, config, weights)
    save_pipeline(config.model, weights, tmp_path / "merged")
    merged = Family("flux", tmp_path / "merged").policy()
    inputs = inputs_of(family, trained)
    expected = original.predict(*inputs)
    assert torch.allclose(merged.predict(*inputs), expected, atol=1e-4)
    assert not torch.allclose(trained.predict(*inputs), expected, atol=1e-3), "the warning in the documentation"

    bases = {
        one.name: one.config.model.base_weights
        for text in ([], ["model.base_weights=full"])
        for one in read_candidates(
            [f"run{len(text)}={tmp_path / 'whole'}", f"merged={tmp_path / 'merged'}"], None, text
        )
        if one.config is not None
    }
    assert bases == {"run0": "nf4", "run1": "full", "merged": "full"}


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("model.base_weights=nf4",),
            r"model\.base_weights: nf4 is for frozen weights, and needs model\.finetune=lora",
        ),
        ((*NF4, "rollout.merge_lora=true"), r"rollout\.merge_lora: true would round .* allowed with it: false"),
    ],
)
def test_settings_that_exclude_each_other(tmp_path: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(tmp_path, *settings)


def test_zero_3_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(UserError, match=r"^model\.base_weights: nf4 cannot be partitioned, but .* ZeRO stage 3; use"):
        deepspeed_config(tiny_config(tmp_path, *NF4, f"deepspeed={file}"), 1)


def test_without_bitsandbytes_it_is_refused_before_anything_is_loaded(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    for begin in (train, lambda config: load_policy(config, CPU)):
        with pytest.raises(UserError, match=r"^model\.base_weights: nf4 needs bitsandbytes: run `pip install bitsandb"):
            begin(tiny_config(pipeline_folder, *NF4))


def test_weights_that_are_no_numbers_are_refused_by_name(own_pipeline: Path) -> None:
    file = own_pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["transformer_blocks.0.attn.to_k.weight"][1, 2] = float("nan")
    save_file(state, file, {"format": "pt"})
    with pytest.raises(UserError, match=r": transformer_blocks\.0\.attn\.to_k\.weight holds values that are infinite"):
        load_policy(tiny_config(own_pipeline, *NF4), CPU)


def test_a_network_without_repeated_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.base_weights: Linear has no block .*: set model\.base_weights=full$"):
        quantize_blocks(nn.Linear(2, 2), [], CPU, tmp_path)


# ------------------------------------------------------------------------------------------------ the plan


@pytest.mark.parametrize("family", ("klein",), indirect=True)
def test_the_plan_counts_half_a_byte_and_a_scale_for_each_block(family: Family) -> None:
    config = family.config(*NF4)
    costs = ModelCosts(find_architecture(config.model), config.model)
    plan = plan_memory(config, costs, Zero(1), 1)
    policy = family.policy(*NF4)
    layers = [layer for layer in in_blocks(policy).values() if layer.weight.dtype == torch.uint8]
    scales = sum(layer.weight.quant_state.absmax.nbytes for layer in layers)
    held = sum(p.nbytes for p in policy.module.parameters()) + scales
    assert plan.parts["weights"] == held
    assert plan.parts["dequantised layer"] == 4 * max(layer.in_features * layer.out_features for layer in layers)
    assert plan.phases["load"] < held + plan.parts["vae"]


# ------------------------------------------------------------------------------------------------ text encoders


def test_prompts_can_be_encoded_in_host_memory(pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands in for a GPU: loading comes as far as the prompts there."""
    devices = list[Any]()

    def prepare(policy: Any, prompts: Any) -> None:
        devices.append(policy.encoding_device)
        raise InterruptedError

    monkeypatch.setattr(PipelinePolicy, "prepare_prompts", prepare)
    configs = [tiny_config(pipeline_folder, f"model.encode_on={where}") for where in ("gpu", "cpu")]
    for config in configs:
        with pytest.raises(InterruptedError):
            load_policy(config, torch.device("meta"))
    assert devices == [torch.device("meta"), CPU]
    costs = ModelCosts(find_architecture(configs[0].model), configs[0].model)
    on_gpu, elsewhere = (plan_memory(config, costs, Zero(1), 1).phases["encode prompts"] for config in configs)
    assert on_gpu > 0 == elsewhere
