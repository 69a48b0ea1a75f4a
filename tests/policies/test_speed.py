"""What makes a run faster or smaller leaves its numbers where they were."""

import io
import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from rich.console import Console
from tested_families import FIXTURES, Family
from tiny_pipeline import PROMPTS, tiny_config
from tiny_runs import CPU, LORA, Bench, randomize_adapters
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pcpo_fast.engine.engine import deepspeed_config
from pcpo_fast.engine.offload import Offload
from pcpo_fast.errors import UserError
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.models import build_on_meta, find_architecture
from pcpo_fast.planning.recomputing import device_memory
from pcpo_fast.policies import Policy
from pcpo_fast.policies.families import FAMILIES, family_of, find_family, keep_reference, load_policy
from pcpo_fast.policies.lora import merged_adapters
from pcpo_fast.policies.speed import COMPILE_OPTIONS, checkpoint_blocks, checkpointed_numbers, compile_blocks
from pcpo_fast.rollout.rollout import first_rows
from pcpo_fast.training.trainer import train

EPS = torch.finfo(torch.float32).eps
ROUNDING = 100 * EPS
"""Of a network of a few layers in float32, relative to its largest output."""


BLOCKS = {"flux3": 4, "klein": 3, "krea2": 2, "qwen_image": 2, "sd": 4, "sd3": 2, "z_image": 4}
"""Of the guided miniatures: those that repeat."""


@pytest.fixture(params=BLOCKS)
def guided(request: pytest.FixtureRequest) -> Family:
    return Family(request.param, request.getfixturevalue(FIXTURES[request.param]))


def inputs_of(policy: Policy, rows: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    latents = torch.randn(rows, *policy.latent_shape)
    return latents, torch.rand(rows), policy.encode(PROMPTS[:rows])


def gradients_of(policy: Policy, inputs: Any) -> dict[str, Tensor]:
    policy.module.zero_grad()
    policy.predict(*inputs).square().sum().backward()
    found = {name: p.grad.clone() for name, p in policy.module.named_parameters() if p.grad is not None}
    assert len(found) > 10
    return found


def products_of(policy: Policy, inputs: Any) -> int:
    """Floating-point operations of a forward and backward, without those of attention, which has none on a CPU."""
    with FlopCounterMode(display=False) as counter:
        gradients_of(policy, inputs)
    return counter.get_total_flops()


def close(one: Tensor, other: Tensor, bound: float = ROUNDING) -> bool:
    return bool((one - other).abs().max() <= bound * other.abs().max().clamp_min(1e-3))


# Recomputing some of the blocks


def test_the_blocks_that_are_recomputed_are_spread_evenly() -> None:
    assert checkpointed_numbers(6, 0.5) == [1, 3, 5]
    assert checkpointed_numbers(57, 1.0) == list(range(57))
    assert checkpointed_numbers(57, 0.0) == []
    assert checkpointed_numbers(4, 0.01) == [3]  # at least one, where there is a share at all
    for count in (1, 2, 7, 57):
        for share in (0.1, 0.3, 0.5, 0.77):
            chosen = checkpointed_numbers(count, share)
            assert share * count <= len(chosen) < share * count + 1
            gaps = {after - before for before, after in pairwise(chosen)}
            assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_a_share_of_the_blocks_is_recomputed_and_gradients_stay(pipeline_folder: Path, finetune: str) -> None:
    policy = load_policy(tiny_config(pipeline_folder, *LORA, f"model.finetune={finetune}"), CPU)
    randomize_adapters(policy)
    inputs, calls = inputs_of(policy), dict[nn.Module, int]()

    def count(block: nn.Module, *_: Any) -> None:
        calls[block] = calls.get(block, 0) + 1

    blocks = [*policy.module.transformer_blocks, *policy.module.single_transformer_blocks]  # type: ignore[operator, misc]
    for block in blocks:
        block.register_forward_pre_hook(count)
    expected = gradients_of(policy, inputs)
    for share, again, selective in (
        (0.5, [1, 2], False),
        (1.0, [2, 2], False),
        (0.5, [1, 2], True),
        (1.0, [2, 2], True),
        (0.0, [1, 1], False),
    ):
        chosen = policy.recomputed_blocks(policy.module)
        assert checkpoint_blocks(policy.module, chosen, share, selective=selective) == again.count(2)
        calls.clear()
        found = gradients_of(policy, inputs)
        assert [calls[block] for block in blocks] == again, share
        assert all(found[name].equal(expected[name]) for name in expected)


def test_selective_recomputation_repeats_no_product_but_those_of_adapters(pipeline_folder: Path) -> None:
    policy = load_policy(tiny_config(pipeline_folder, *LORA), CPU)
    randomize_adapters(policy)
    inputs = inputs_of(policy)
    once = products_of(policy, inputs)
    added = list[int]()  # of each adapter, which adds rank products to an output of its layer
    for name, layer in policy.module.named_modules():
        if name.endswith("lora_B.default"):
            layer.register_forward_hook(
                lambda layer, given, output: added.append(2 * layer.in_features * output.numel())  # type: ignore[misc]
            )
    gradients_of(policy, inputs)
    adapters = sum(added)
    counted = {}
    for selective in (True, False):
        checkpoint_blocks(policy.module, policy.recomputed_blocks(policy.module), 1.0, selective=selective)
        counted[selective] = products_of(policy, inputs) - once
    assert 0 < counted[True] <= adapters < counted[False] / 4


@pytest.mark.slow
def test_compiled_blocks_keep_what_selective_recomputation_keeps(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen from outside, by the tensors that autograd holds after the forward."""
    monkeypatch.setitem(COMPILE_OPTIONS, "backend", "aot_eager")
    policy = load_policy(tiny_config(pipeline_folder, *LORA), CPU)
    randomize_adapters(policy)
    inputs = inputs_of(policy)
    weights = {p.untyped_storage().data_ptr() for p in policy.module.parameters()}
    expected = gradients_of(policy, inputs)

    def held() -> int:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = policy.predict(*inputs)
        del output
        return sum(kept.values())

    plain = held()
    compile_blocks(policy.module, policy.compiled_blocks(policy.module))
    blocks = policy.recomputed_blocks(policy.module)
    assert checkpoint_blocks(policy.module, blocks, 1.0, selective=True) == len(blocks)
    assert held() < 0.7 * plain
    found = gradients_of(policy, inputs)
    assert all(close(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_a_run_chooses_how_many_blocks_to_recompute(pipeline_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The model is counted once, for this and for the rates of a GPU's run."""
    settings = ("model.gradient_checkpointing=selective", "model.checkpointed_share=null", "train.epochs=0")
    counted = list[Any]()
    of_trainer = "pcpo_fast.training.trainer"
    monkeypatch.setattr(f"{of_trainer}.ModelCosts", lambda *given: counted.append(given) or ModelCosts(*given))
    monkeypatch.setattr(f"{of_trainer}.utilization_of", lambda config, device, told, costs: costs() and None)
    for memory, words in (
        (100e9, "0% of the blocks are selectively recomputed"),
        (1e9, "100% .* `pcpo-fast plan` shows what"),
    ):
        monkeypatch.setattr("pcpo_fast.training.trainer.device_memory", lambda *_, memory=memory: memory)
        shown, chosen = io.StringIO(), list[tuple[float, bool]]()
        monkeypatch.setattr(
            "pcpo_fast.training.trainer.checkpoint_blocks",
            lambda network, blocks, share, selective, chosen=chosen: chosen.append((share, selective)),
        )
        train(
            tiny_config(pipeline_folder, *settings, f"output_dir={tmp_path / str(memory)}"), console=Console(file=shown)
        )
        assert re.search(words, " ".join(shown.getvalue().split()))
        assert chosen == [(1.0, False) if memory < 2e9 else (0.0, True)]
        assert len(counted) == 1
        counted.clear()
    assert device_memory(CPU, 1) == 2 * device_memory(CPU, 2) > 1e8


# Compiled blocks; the back end of the compiler does not matter to what is ours


@pytest.mark.parametrize("finetune", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_compiled_blocks_compute_the_same(pipeline_folder: Path, finetune: str) -> None:
    config = tiny_config(pipeline_folder, *LORA, f"model.finetune={finetune}", "credit.kl_coefficient=0.1")
    policy = load_policy(config, CPU)
    randomize_adapters(policy)
    keep_reference(policy, config, CPU)
    inputs = inputs_of(policy)
    expected = gradients_of(policy, inputs)
    with torch.no_grad():
        output = policy.predict(*inputs)
    names = list(policy.module.state_dict())
    graphs = []

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    assert compile_blocks(policy.module, policy.compiled_blocks(policy.module), backend=backend) == 2
    with torch.no_grad():
        assert close(policy.predict(*inputs), output)
    assert graphs, "nothing was compiled"
    found = gradients_of(policy, inputs)
    assert all(close(found[name], expected[name]) for name in expected)
    assert list(policy.module.state_dict()) == names
    if finetune == "lora":
        with policy.as_reference(), torch.no_grad():
            assert not close(policy.predict(*inputs), output), "the adapters are switched off in compiled blocks, too"


@pytest.mark.slow
def test_a_run_may_have_many_batch_sizes(pipeline_folder: Path) -> None:
    """PyTorch's own limit is eight, after which a whole graph is an error."""
    policy = load_policy(tiny_config(pipeline_folder), CPU)
    compile_blocks(policy.module, policy.compiled_blocks(policy.module), backend="eager")
    with torch.no_grad():
        for rows in range(2, 12):
            latents = torch.randn(rows, *policy.latent_shape)
            policy.predict(latents, torch.rand(rows), policy.encode([PROMPTS[0]] * rows))


def test_compiled_blocks_of_the_other_families(guided: Family) -> None:
    policy = guided.policy()
    inputs = inputs_of(policy)
    with torch.no_grad():
        expected = policy.predict(*inputs)
        graphs = []

        def backend(graph: Any, examples: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        count = compile_blocks(policy.module, policy.compiled_blocks(policy.module), backend=backend)
        assert count == BLOCKS[guided.name]
        assert close(policy.predict(*inputs), expected) and graphs


def test_every_block_of_the_other_families_is_recomputed(guided: Family) -> None:
    policy = guided.policy("model.gradient_checkpointing=true")
    calls: list[nn.Module] = []
    blocks = policy.compiled_blocks(policy.module)
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: calls.append(module))
    gradients_of(policy, inputs_of(policy))
    assert len(blocks) == BLOCKS[guided.name] and [calls.count(block) for block in blocks] == [2] * len(blocks)
    chosen, inputs = policy.recomputed_blocks(policy.module), inputs_of(policy)
    gradients, products = list[dict[str, Tensor]](), list[int]()
    for share, selective in ((0.0, False), (1.0, True), (1.0, False)):
        checkpoint_blocks(policy.module, chosen, share, selective=selective)
        calls.clear()
        gradients.append(gradients_of(policy, inputs))
        assert {calls.count(block) for block in blocks} == {1 + bool(share)}
        products.append(products_of(policy, inputs))
    for name, value in gradients[0].items():
        assert all(other[name].equal(value) for other in gradients), name
    assert products[0] == products[1] < products[2]


def test_the_configuration_compiles_accelerates_and_recomputes(pipeline_folder: Path) -> None:
    settings = ("model.compile=true", "model.block_kernels=true", "model.gradient_checkpointing=true")
    policy = load_policy(tiny_config(pipeline_folder, *settings, "model.checkpointed_share=0.5"), CPU)
    blocks = [*policy.module.transformer_blocks, *policy.module.single_transformer_blocks]  # type: ignore[operator, misc]
    assert all(block._compiled_call_impl is not None for block in blocks)
    assert all("forward" in vars(block) for block in blocks), "the package's own forward"
    assert policy.module.is_gradient_checkpointing


def test_block_kernels_reach_every_block_or_refuse_the_network(guided: Family) -> None:
    if guided.name in ("klein", "sd3"):
        policy = guided.policy("model.block_kernels=true")
        reached = [block for block in policy.compiled_blocks(policy.module) if "forward" in vars(block)]
        assert reached == policy.accelerated_blocks(policy.module) and len(reached) == BLOCKS[guided.name]
    else:
        network = type(guided.policy().module).__name__
        with pytest.raises(UserError, match=rf"^model\.block_kernels: {network} has no block .*=false$"):
            guided.policy("model.block_kernels=true")


def test_the_families_declare_the_blocks_that_the_kernels_know() -> None:
    declared = {name for pipeline in FAMILIES for name in family_of(pipeline).accelerated}
    assert declared == set(sys.modules["pcpo_kernels.accelerate"].BLOCKS)


def test_a_family_without_blocks_is_told_that_nothing_would_change(
    guided: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a new family whose network diffusers says nothing of, and whose blocks no kernel knows."""
    family = find_family(guided.config().model)[1]
    monkeypatch.setattr(family, "repeated_blocks", ())
    monkeypatch.setattr(family, "also_recomputed", ())
    monkeypatch.setattr(family, "accelerated", ())
    network, architecture = family.network_class(), find_architecture(guided.config().model)
    for setting in ("compile", "gradient_checkpointing", "block_kernels"):
        config = guided.config(f"model.{setting}=true")
        said = rf"^model\.{setting}: {network} has no block that "
        with pytest.raises(UserError, match=said):
            load_policy(config, CPU)
        with pytest.raises(UserError, match=said):
            build_on_meta(architecture, config.model)
    costs = ModelCosts(architecture, guided.config().model)
    assert costs.training(1, True) == costs.training(1, False), "a plan counts on no recomputation"


def test_a_network_that_diffusers_cannot_recompute_is_refused() -> None:
    class Network(ModelMixin):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(2, 2)

    network = Network()
    assert checkpoint_blocks(network, [network.block], 0.0) == 0
    with pytest.raises(UserError, match=r"^model\.gradient_checkpointing: Network: "):
        checkpoint_blocks(network, [network.block], 0.5)


@pytest.mark.parametrize(
    "setting", ["model.compile=true", "rollout.merge_lora=true", "model.gradient_checkpointing=selective"]
)
def test_partitioned_weights_can_neither_be_compiled_nor_merged_nor_kept_apart(tmp_path: Path, setting: str) -> None:
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    config = tiny_config(tmp_path, *LORA, setting, f"deepspeed={file}")
    with pytest.raises(
        UserError, match=rf"^{setting.partition('=')[0]}: (selective )?needs the full weights .* ZeRO stage 3"
    ):
        deepspeed_config(config, 1)


# Adapters merged for rollouts


def test_merged_adapters_compute_the_same_and_leave_no_trace(pipeline_folder: Path) -> None:
    policy = load_policy(tiny_config(pipeline_folder, *LORA, "rollout.merge_lora=true"), CPU)
    randomize_adapters(policy)
    config = tiny_config(pipeline_folder, *LORA, "rollout.merge_lora=true")
    before = {name: value.clone() for name, value in policy.module.state_dict().items()}
    inputs = inputs_of(policy)
    with torch.no_grad():
        expected = policy.predict(*inputs)
        with policy.as_reference():
            base = policy.predict(*inputs)
        for _ in range(2):
            with policy.sampling(config.rollout):
                merged = policy.predict(*inputs)
                changed = [name for name, value in policy.module.state_dict().items() if not value.equal(before[name])]
            assert close(merged, expected) and not close(merged, base)
            assert changed and all("base_layer.weight" in name for name in changed)
            after = policy.module.state_dict()
            assert all(after[name].equal(value) for name, value in before.items())
            assert torch.equal(policy.predict(*inputs), expected)
        with pytest.raises(RuntimeError, match="inside"), merged_adapters(policy.module):
            raise RuntimeError("inside")
        assert torch.equal(policy.predict(*inputs), expected)


def test_settings_that_need_another_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rollout\.merge_lora: needs model\.finetune=lora"):
        tiny_config(tmp_path, "rollout.merge_lora=true")
    with pytest.raises(UserError, match=r"rollout\.share_first_steps: .* rollout\.same_initial_noise=true"):
        tiny_config(tmp_path, "rollout.share_first_steps=true", "rollout.same_initial_noise=false")


# One prediction for images that are still equal


def test_first_rows() -> None:
    first, copies = first_rows(torch.tensor([7, 7, 3, 7, 5, 3]), CPU)
    assert first.tolist() == [2, 4, 0] and copies.tolist() == [2, 2, 0, 2, 1, 0]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("settings", [(), ("window.size=1", "window.start=2", "window.schedule=fixed")])
def test_equal_images_are_predicted_once(pipeline_folder: Path, settings: tuple[str, ...]) -> None:
    """Up to the first step with noise: step 0, or with a window behind deterministic steps, all up to it."""
    rollouts, rows = [], []
    for share in ("false", "true"):
        overrides = (
            *settings,
            f"rollout.share_first_steps={share}",
            "rollout.batch_size=3",
            "train.micro_batch_size=1",
        )
        bench = Bench.build(tiny_config(pipeline_folder, *overrides), record=False)
        counts: list[int] = []
        predict = bench.policy.predict

        def counting(latents: Tensor, *rest: Any, counts: list[int] = counts, predict: Any = predict) -> Tensor:
            counts.append(len(latents))
            return predict(latents, *rest)  # type: ignore[no-any-return]

        bench.policy.predict = counting  # type: ignore[method-assign]
        bench.collect(0)
        rollouts.append(bench.rollout)
        rows.append(counts)
    plain, shared = rollouts
    alike = 3 if settings else 1
    batches = plain.groups.split(3)  # of eight images, four of each of two prompts
    assert rows[0] == [len(batch) for batch in batches for _ in range(4)]
    assert rows[1] == [len(batch.unique()) if step < alike else len(batch) for batch in batches for step in range(4)]
    outputs, latents = shared.trajectories.outputs, shared.trajectories.latents
    assert close(outputs, plain.trajectories.outputs) and close(latents, plain.trajectories.latents)
    one, other = [int(row) for row in (shared.groups == 0).nonzero()[:2]]
    assert torch.equal(latents[one, 0], latents[other, 0]) and not torch.equal(latents[one, -1], latents[other, -1])


# Memory that is given back


def test_an_offload_empties_storages_and_fills_them_with_the_same_bits() -> None:
    whole = torch.randn(40)
    view, other, kept = whole[10:20].view(2, 5), torch.randn(3, 4).t(), torch.randn(6)
    copies = [tensor.clone() for tensor in (whole, other, kept)]
    offload = Offload("cpu")
    for _ in range(2):
        with offload.without([view, other, kept], needed=[kept[:1]]):
            assert whole.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
            assert torch.equal(kept, copies[2]), "shares its memory with what is needed"
        assert all(map(torch.equal, (whole, other, kept), copies))
        whole += 1
        copies[0] += 1
        assert torch.equal(view.flatten(), whole[10:20]), "still a view"
    with pytest.raises(RuntimeError, match="inside"), offload.without([whole]):
        raise RuntimeError("inside")
    assert torch.equal(whole, copies[0])


def test_nothing_is_parked_that_is_not_on_the_device() -> None:
    tensor = torch.randn(5)
    with Offload("cuda").without([tensor]):
        assert tensor.untyped_storage().nbytes() == 20


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        pytest.param(1, ("model.dtype=bfloat16",), marks=pytest.mark.slow),
        (2, ("optimizer.moments=8bit", "train.ema_decay=0.9")),
        pytest.param(3, (), marks=pytest.mark.slow),
    ],
)
def test_an_engine_offloads_its_state_and_trains_on(
    pipeline_folder: Path, tmp_path: Path, stage: int, settings: tuple[str, ...]
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    trained = []
    for offloaded in (False, True):
        bench = Bench.build(tiny_config(pipeline_folder, f"deepspeed={file}", *settings), record=False)
        bench.engine.offload = Offload("cpu")
        bench.run()
        state = [value for group in bench.engine.optimizer.state.values() for value in group.values()]
        moments = [value for value in state if isinstance(value, Tensor) and value.dim()]
        with bench.engine.offloaded(offloaded):
            sizes = {tensor.untyped_storage().nbytes() for tensor in moments}
            assert (sizes == {0}) == offloaded and moments
            bench.collect(1)
        bench.run()
        trained.append(bench.engine.full_state())
    assert trained[0] and all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
