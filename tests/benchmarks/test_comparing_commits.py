"""Gates between commits: losses to the last bit, and times of kernels that pass their tests."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import golden_losses
import kernel_gate
import pytest
import revisions
import torch
from golden_losses import differences

LOSSES = {"full": [{"policy/loss": 0.5, "reward/mean": 1.0}, {"policy/loss": 0.25}], "lora": [{"policy/loss": 0.0}]}
TIMES = {"policy_loss": 1.0, "sample_step": 2.0}


def test_the_first_difference_of_two_runs_is_named() -> None:
    assert differences(LOSSES, json.loads(json.dumps(LOSSES))) == (None, 0.0)
    other = json.loads(json.dumps(LOSSES))
    other["full"][1]["policy/loss"] = 0.25 + 2**-54
    other["lora"][0]["policy/loss"] = 1e-9
    first, largest = differences(other, LOSSES)
    assert first is not None and first.startswith("full, record 1: policy/loss is 0.25000000000000006 instead of 0.25")
    assert largest == 1.0
    assert differences({"full": LOSSES["full"]}, LOSSES) == ("lora: other values are reported", float("inf"))


@pytest.fixture(autouse=True)
def other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The files of another commit."""
    for script in (golden_losses, kernel_gate):
        monkeypatch.setattr(script, "checkout", lambda revision: nullcontext(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("change", "limit", "code"), [(0.0, "0", 0), (1e-6, "0", 1), (1e-6, "1e-5", 0)])
def test_losses_against_another_commit(
    change: float,
    limit: str,
    code: int,
    other: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = {revisions.ROOT: 1.0, other: 1.0 + change}
    monkeypatch.setattr(golden_losses, "losses", lambda root: {"full": [{"policy/loss": found[root]}]})
    assert golden_losses.main(["--base", "old", "--limit", limit]) == code
    assert ("the same bits as old" in capsys.readouterr().out) == (change == 0)


@pytest.mark.skipif(not (revisions.ROOT / ".git").exists(), reason="not a checkout")
def test_a_commit_is_taken_whole_and_an_unknown_one_named() -> None:
    with revisions.checkout("HEAD") as root:
        assert root != revisions.ROOT and (root / "pcpo_fast" / "cli.py").is_file()
        assert revisions.environment(root)["PYTHONPATH"] == f"{root}:{root / 'kernels'}"
    assert not root.exists()
    with pytest.raises(SystemExit, match="error: --base nowhere: "), revisions.checkout("nowhere"):
        pass


@pytest.mark.slow
def test_this_checkout_still_has_the_losses_that_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    if not (golden_losses.KEPT / f"{golden_losses.platform_name()}.json").is_file():
        pytest.skip(f"nothing is kept for {golden_losses.platform_name()}")
    assert golden_losses.main([]) == 0, capsys.readouterr().out


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[Path, Any]:
    """A card that is always as fast; results of the tests by checkout."""
    passed: dict[Path, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fast Card 9")
    monkeypatch.setattr(kernel_gate, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(kernel_gate, "tests_pass", lambda root: passed.get(root, True))
    monkeypatch.setattr(kernel_gate, "times", lambda root, seconds: dict(TIMES))
    return passed


def test_times_are_kept_for_a_card_and_may_grow_by_a_twentieth(
    gpu: dict[Path, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernel_gate.main([]) == 2 and "fast_card_9.json" in capsys.readouterr().out
    assert kernel_gate.main(["--write"]) == 0 == kernel_gate.main([])
    for growth, code in ((1.04, 0), (1.06, 1)):
        grown = TIMES | {"sample_step": 2.0 * growth}
        monkeypatch.setattr(kernel_gate, "times", lambda root, seconds, grown=grown: grown)
        capsys.readouterr()
        assert kernel_gate.main([]) == code
        assert ("sample_step: 2.0000 -> 2.1200 ms, 1.060 of the time  slower" in capsys.readouterr().out) == bool(code)
    monkeypatch.setattr(kernel_gate, "times", lambda root, seconds: {"policy_loss": 1.0})
    assert kernel_gate.main([]) == 1 and "sample_step: not measured" in capsys.readouterr().out


@pytest.mark.parametrize("failing", ["this checkout", "old"])
def test_no_times_are_shown_where_tests_fail(
    failing: str, gpu: dict[Path, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernel_gate.main(["--base", "old"]) == 0 and "1.000 of the time" in capsys.readouterr().out
    monkeypatch.setattr(
        kernel_gate, "tests_pass", lambda root: (root == revisions.ROOT) != (failing == "this checkout")
    )
    monkeypatch.setattr(kernel_gate, "times", lambda root, seconds: pytest.fail("measured"))
    assert kernel_gate.main(["--base", "old"]) == 1
    assert capsys.readouterr().out == f"the kernels' tests of {failing} fail: no time is compared\n"


@pytest.mark.slow
def test_the_times_come_from_the_benchmark() -> None:
    found = kernel_gate.times(revisions.ROOT, 0.01, tiny=True)
    assert len(found) > 10 and all(value > 0 for value in found.values())
    assert {name.partition(" ")[0] for name in found} == {"policy_loss", "sample_step", "guidance"}
