"""The figure of the kernels' times, from a full file and from little."""

import json
from pathlib import Path

import plot_kernels
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("graphs", [True, False])
def test_one_batch_and_a_call_that_failed(tmp_path: Path, graphs: bool) -> None:
    content = json.loads((ROOT / "benchmarks" / "results" / "nvidia_h200" / "kernels.json").read_text())
    content["records"] = [record for record in content["records"] if record["rows"] == 8]
    for record in content["records"]:
        record["graph_milliseconds"] = record["graph_milliseconds"] if graphs else None
    failed = {key: content["records"][0][key] for key in ("op", "way", "form", "size", "elements", "name")}
    content["records"].append(failed | {"rows": 16, "failed": "RuntimeError: no"})
    figure = plot_kernels.draw(content)
    *left, right = figure.axes
    assert len(left) == (2 if graphs else 1)
    for axes in left:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["8"]
        shown = [line for line in axes.lines if len(line.get_xdata()) == 1]
        assert len(shown) == 6
        assert all(line.get_marker() == "o" for line in shown)
        assert len({(line.get_color(), line.get_markerfacecolor()) for line in shown}) == 6
    assert len(right.lines) == 5

    (tmp_path / "kernels.json").write_text(json.dumps(content))
    assert plot_kernels.main([str(tmp_path / "kernels.json"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "kernel_speed_nvidia_h200.png").stat().st_size > 10_000
