"""One rank and several, full weights and adapters, scattered by ZeRO 3 or not: the same numbers (docs/scaling.md)."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

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
