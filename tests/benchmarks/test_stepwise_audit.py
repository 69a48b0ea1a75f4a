"""The summary of audits by branches over several runs."""

import json
from pathlib import Path

import pytest
import stepwise_audit


def run_of(folder: Path, *epochs: dict[str, float]) -> Path:
    folder.mkdir()
    lines = [json.dumps({"kind": "epoch", "epoch": number, **metrics}) for number, metrics in enumerate(epochs)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_the_last_slopes_of_each_run_and_the_mean_correlation(tmp_path: Path) -> None:
    slope, beta, correlation = (f"stepwise/{name}_step_" for name in ("branch_slope", "beta", "correlation"))
    one = run_of(
        tmp_path / "one",
        {slope + "3": 0.5, correlation + "3": 0.2, beta + "3": 0.0},
        {slope + "3": 0.75, correlation + "3": 0.4, beta + "3": 0.6},
    )
    two = run_of(tmp_path / "two", {slope + "3": 1.25, correlation + "3": 0.9}, {slope + "1": 0.1})
    output, picture = tmp_path / "audit.json", tmp_path / "audit.png"
    assert stepwise_audit.main([str(one), str(two), "--json", str(output), "--plot", str(picture)]) == 0
    written = json.loads(output.read_text())
    assert list(written) == ["1", "3"]
    measured = {"slopes": [0.75, 1.25], "audits": [2, 1], "betas": [0.6]}
    assert written["3"] == measured | {"correlations": pytest.approx([0.3, 0.9])}
    assert written["1"] == {"slopes": [0.1], "audits": [1], "betas": [], "correlations": []}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_without_audits_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_of(tmp_path / "plain", {"reward/mean": 0.5})
    with pytest.raises(SystemExit) as stopped:
        stepwise_audit.main([str(folder)])
    assert stopped.value.code == 2
    assert "plain has no audits: it must be a run with advantage.audit_every above 0" in capsys.readouterr().err


def test_a_figure_that_cannot_be_written_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_of(tmp_path / "one", {"stepwise/branch_slope_step_0": 0.5})
    for name, said in (("audit.jpg", "must end in .png"), ("one/metrics.jsonl/audit.png", "metrics.jsonl")):
        with pytest.raises(SystemExit) as stopped:
            stepwise_audit.main([str(folder), "--plot", str(tmp_path / name)])
        assert stopped.value.code == 2 and said in capsys.readouterr().err
