"""One rank and several, full weights and adapters, scattered by ZeRO 3 or not: the same numbers (docs/scaling.md)."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipeline import tiny_config
from tiny_runs import Bench

from pcpo_fast.policies.families import load_policy

ROOT = Path(__file__).parents[2]
PIPELINE = ROOT / "assets" / "tiny-flux"
COMMITTED = ROOT / "benchmarks" / "results" / "rank_equality.json"


@pytest.fixture(scope="module")
def equality() -> ModuleType:
    """The benchmark as a module, under the name by which its configuration calls its reward."""
    spec = importlib.util.spec_from_file_location("rank_equality", ROOT / "benchmarks" / "rank_equality.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rank_equality"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_number_of_ranks_stage_and_mode(equality: ModuleType, tmp_path: Path) -> None:
    records = {}
    for ranks in (1, 2, 4):
        (tmp_path / str(ranks)).mkdir()
        records[ranks] = equality.launch(ranks, equality.CASES, tmp_path / str(ranks), PIPELINE)
    table = list(equality.rows(records))
    assert len(table) == 36
    for line in table:
        assert equality.above(line, line["dtype"]) == [], line


def record_like(equality: ModuleType, **changes: np.ndarray) -> dict[str, np.ndarray]:
    """A record of 6 groups of 8 images."""
    kinds = {kind: np.linspace(1, 2, 48) for kind in equality.KINDS}
    others = {"start": np.zeros(48), "rewards_of": np.arange(48), "log_ratio_terms": np.full(48, 1000.0)}
    return {**kinds, **others, **changes}


def test_a_difference_is_seen(equality: ModuleType) -> None:
    one = record_like(equality)
    assert equality.above(equality.compare(one, one)) == []
    for kind in equality.KINDS:
        other = {**one, kind: one[kind] + (0.1 if kind == "log_ratios" else 1e-4)}
        differences = equality.compare(one, other)
        expected = kind if kind in equality.LIMITS["float32"] else f"{kind}_over_terms"
        (found,) = equality.above(differences)
        assert found.startswith(f"{expected} "), (kind, found)
        also_moved = {kind, "movement"} if kind == "weights" else {kind}
        assert {text.split()[0] for text in equality.above(differences, "float64")} == also_moved
    with pytest.raises(AssertionError, match="rewards of other images"):
        equality.compare(one, {**one, "rewards_of": np.arange(1, 49)})


def test_rounding_of_the_terms_is_within_their_limit(equality: ModuleType) -> None:
    """Advantages and log-ratios in float32 against float64: the limits are neither too tight nor without meaning."""
    from pcpo_kernels import policy_loss

    generator = torch.Generator().manual_seed(5)
    old, noise = (torch.randn(64, 500, dtype=torch.float64, generator=generator) for _ in range(2))
    new = old * (1 + 1e-3 * torch.randn(64, 500, dtype=torch.float64, generator=generator))
    linear, quadratic, ones = torch.full((64,), 3.0), torch.full((64,), 4.5), torch.ones(64)
    exact, rounded = (
        policy_loss(
            new.to(dtype), old.to(dtype), noise.float(), linear, quadratic, ones, ones, clip_range=1.0
        ).log_ratio.double()
        for dtype in (torch.float64, torch.float32)
    )
    terms = equality.terms_of(new, old, noise, linear, quadratic)
    error = (rounded - exact).norm() / terms.norm()
    assert 0 < error < equality.ROUNDING
    assert (rounded - exact).norm() / exact.norm() > 10 * error, "a log-ratio magnifies the rounding of its terms"

    rewards = 100 + np.random.default_rng(5).random(48)
    one = record_like(equality, rewards=rewards, advantages=advantages(rewards))
    other = {**one, "rewards": rewards.astype(np.float32), "advantages": advantages(rewards.astype(np.float32))}
    differences = equality.compare(one, other)
    assert 0 < differences["advantages_over_terms"] < equality.ROUNDING < 10 * differences["advantages"]


def advantages(rewards: np.ndarray) -> np.ndarray:
    groups = rewards.astype(np.float64).reshape(-1, 8)
    normal: np.ndarray = (groups - groups.mean(axis=1, keepdims=True)) / groups.std(axis=1, keepdims=True)
    return normal.ravel()


def test_the_committed_table_is_within_the_limits_and_in_the_documentation(equality: ModuleType) -> None:
    result = json.loads(COMMITTED.read_text())
    assert result["limits"] == equality.LIMITS
    assert all(equality.above(line, line["dtype"]) == [] for line in result["rows"]) and result["unequal"] == 0
    ran = {(line["dtype"], line["ranks"], line["zero"], line["mode"]) for line in result["rows"]}
    assert ran >= {
        ("float32", ranks, zero, mode) for ranks in (1, 2, 4) for zero in (1, 2, 3) for mode in equality.MODES
    }
    assert ran >= {("float64", ranks, zero, mode) for ranks in (1, 2) for zero in (1, 2, 3) for mode in equality.MODES}
    document = (ROOT / "docs" / "scaling.md").read_text()
    assert equality.render(result["rows"]) in document, "render it again: python benchmarks/rank_equality.py --show"


def test_encoders_and_vae_are_outside_of_what_zero_divides(pipeline_folder: Path) -> None:
    """What the engine gets is the network alone: no text encoder is there to be scattered, and the VAE stays whole."""
    policy = load_policy(tiny_config(pipeline_folder), torch.device("cpu"), ["a red circle"])
    inside = {id(p) for p in policy.module.parameters()}
    assert inside == {id(p) for p in policy.network.parameters()}  # type: ignore[attr-defined]
    assert not inside & {id(p) for p in policy.vae.parameters()}  # type: ignore[attr-defined]
    held = [value for value in vars(policy).values() if isinstance(value, torch.nn.Module)]
    assert {type(value).__name__ for value in held} <= {"FluxTransformer2DModel", "AutoencoderKL"}


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning")  # of what DeepSpeed calls
def test_a_rollout_gathers_each_block_once_a_step_for_its_whole_batch(pipeline_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10**5}
    file.write_text(json.dumps({"zero_optimization": zero | {"stage3_prefetch_bucket_size": 0}}))
    bench = Bench.build(tiny_config(pipeline_folder, f"deepspeed={file}"), record=False)
    weight = bench.policy.module.transformer_blocks[0].ff.net[2].weight  # type: ignore[union-attr, index]
    assert weight.numel() == 0 and weight.ds_numel > 0, "nothing is scattered: the test tests nothing"
    gathered = 0
    gather = weight.all_gather_coalesced

    def counted(parameters: list[Any], **options: Any) -> Any:
        nonlocal gathered
        gathered += any(p is weight for p in parameters)
        return gather(parameters, **options)

    for parameter in bench.policy.module.parameters():
        parameter.all_gather_coalesced = counted  # type: ignore[attr-defined]
    bench.collect(1)
    assert len(bench.rollout.images) == 8
    assert gathered == bench.config.sampler.steps
    assert weight.numel() == 0, "and is scattered again afterwards"
