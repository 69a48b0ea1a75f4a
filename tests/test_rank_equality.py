"""One rank and several, full weights and adapters, scattered by ZeRO 3 or not: the same numbers (docs/scaling.md)."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_pipeline import tiny_config
from tiny_runs import Bench

from pcpo_fast.policies.loading import load_policy

ROOT = Path(__file__).parents[1]
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
    assert len(table) == 18
    for line in table:
        assert all(line[kind] <= limit for kind, limit in equality.LIMITS.items()), line


def test_a_difference_is_seen(equality: ModuleType) -> None:
    import numpy as np

    kinds = {kind: np.linspace(1, 2, 50) for kind in equality.LIMITS}
    one = {**kinds, "start": np.zeros(50), "rewards_of": np.arange(50)}
    other = {**one, "gradients": one["gradients"] + 1e-4}
    differences = equality.compare(one, other)
    assert differences["rewards"] == 0 and differences["gradients"] > equality.LIMITS["gradients"]
    with pytest.raises(AssertionError, match="rewards of other images"):
        equality.compare(one, {**one, "rewards_of": np.arange(1, 51)})


def test_the_committed_table_is_within_the_limits_and_in_the_documentation(equality: ModuleType) -> None:
    result = json.loads(COMMITTED.read_text())
    assert result["limits"] == equality.LIMITS and result["unequal"] == 0
    document = (ROOT / "docs" / "scaling.md").read_text()
    assert equality.render(result["rows"]) in document, "render it again: python benchmarks/rank_equality.py --show"


def test_encoders_and_vae_are_outside_of_what_zero_divides(pipeline_folder: Path) -> None:
    """What the engine gets is the network alone: no text encoder is there to be scattered, and the VAE stays whole."""
    import torch

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
