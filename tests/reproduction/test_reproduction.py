"""Acceptance bands: what they say of runs, and that the committed results lie in their own."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runs import call

from pcpo_fast.errors import UserError
from pcpo_fast.reproduction.bands import Reaches, Within, read_band, shipped_bands
from pcpo_fast.reproduction.checking import check_point, check_run, overall

ROOT = Path(__file__).resolve().parents[2]
WITHIN = Within(kind="within", metric="heldout/reward/mean", epochs=3, low=0.5, high=0.7)
REACHES = Reaches(kind="reaches", metric="reward/mean", value=0.6, by_epochs=4, average=2)


def evaluated(values: dict[int, float]) -> list[dict[str, Any]]:
    return [{"kind": "evaluation", "epoch": epoch, "heldout/reward/mean": value} for epoch, value in values.items()]


def trained(*rewards: float) -> list[dict[str, Any]]:
    return [{"kind": "epoch", "epoch": epoch, "reward/mean": value} for epoch, value in enumerate(rewards)]


def band(folder: Path, **changes: Any) -> Path:
    values = {
        "name": "test",
        "source": "made up",
        "verified": False,
        "settings": {"model.path": "m", "seed": 0},
        "points": [WITHIN.model_dump()],
    }
    path = folder / "band.json"
    path.write_text(json.dumps(values | changes), encoding="utf-8")
    return path


def run(folder: Path, records: list[dict[str, Any]], config: str = "model: {path: m}\nseed: 0\n") -> Path:
    folder = folder / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    lines = (json.dumps({"time": 1.0} | record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("value", "verdict"), [(0.49, "outside"), (0.5, "inside"), (0.7, "inside"), (0.71, "outside")])
def test_a_metric_within_limits(value: float, verdict: str) -> None:
    assert check_point(WITHIN, trained(0, 0, 0) + evaluated({0: 0.1, 3: value})).verdict == verdict


def test_a_metric_is_undecided_until_it_is_measured() -> None:
    early = check_point(WITHIN, trained(0, 0) + evaluated({0: 0.6, 2: 0.6}))
    assert early.verdict == "undecided" and "has trained 2" in early.says
    unmeasured = check_point(WITHIN, trained(0, 0, 0, 0) + evaluated({0: 0.6, 4: 0.6}))
    assert unmeasured.verdict == "undecided" and "did not measure" in unmeasured.says


@pytest.mark.parametrize(
    ("rewards", "verdict"),
    [
        ((0.1, 0.2, 0.5, 0.7), "inside"),  # mean of the last two
        ((0.1, 0.9, 0.2), "undecided"),  # one value alone does not count
        ((0.1, 0.2, 0.3, 0.4, 0.5), "outside"),
        ((0.1, 0.2, 0.3, 0.4, 0.5, 0.9, 0.9), "outside"),  # too late
    ],
)
def test_a_metric_reaches_a_value_in_time(rewards: tuple[float, ...], verdict: str) -> None:
    if verdict == "outside":
        rewards = (*rewards, 0.9)
    assert check_point(REACHES, trained(*rewards)).verdict == verdict


def test_one_point_outside_is_enough() -> None:
    assert overall(["inside", "undecided", "outside"]) == "outside"
    assert overall(["inside", "undecided"]) == "undecided"
    assert overall(["inside"]) == "inside"


def test_a_band_is_chosen_by_the_settings_of_the_run(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 0)):
        (tmp_path / "recipes" / name).mkdir(parents=True)
        band(tmp_path / "recipes" / name, settings={"model.path": "m", "seed": seed})
    folder = run(tmp_path, trained(0, 0, 0) + evaluated({3: 0.6}))
    result = check_run(folder, recipes=tmp_path / "recipes")
    assert (result["verdict"], Path(result["band"]).parent.name) == ("inside", "b")
    (folder / "config.yaml").write_text("model: {path: other}\nseed: 0\n", encoding="utf-8")
    with pytest.raises(UserError, match=r'no shipped band.*differs .*, in: model.path is "other", not "m"'):
        check_run(folder, recipes=tmp_path / "recipes")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"points": []}, "points: .*at least 1"),
        ({"points": [WITHIN.model_dump() | {"low": 2}]}, "low 2 must be below high 0.7"),
        ({"points": [{"kind": "near"}]}, "kind"),
        ({"verfied": True}, "verfied: Extra inputs"),
        ({"source": ""}, "source: "),
    ],
)
def test_a_malformed_band_is_one_sentence(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        read_band(band(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_the_command_says_it_in_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, codes = band(tmp_path), {}
    for name, value in (("inside", 0.6), ("outside", 0.9), ("undecided", None)):
        (tmp_path / name).mkdir()
        folder = run(tmp_path / name, trained(0, 0) + ([] if value is None else evaluated({3: value})))
        output = call(capsys, "reproduce", "check", folder, "--band", file)
        codes[name] = output.code
        assert name in output.out and "unverified" in output.out
    assert codes == {"inside": 0, "outside": 1, "undecided": 3}
    answer = call(capsys, "reproduce", "check", tmp_path / "outside" / "run", "--band", file, "--json")
    assert json.loads(answer.out)["verdict"] == "outside"


@pytest.mark.parametrize("case", ["no run", "no band", "other settings"])
def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    folder, file = run(tmp_path, trained(0)), band(tmp_path, settings={"seed": 5 if case == "other settings" else 0})
    folder = tmp_path / "nothing" if case == "no run" else folder
    file = tmp_path / "nothing.json" if case == "no band" else file
    output = call(capsys, "reproduce", "check", folder, "--band", file)
    assert output.code == 2 and output.err.startswith("error: ") and output.err.count("\n") == 1


def test_shipped_bands_are_readable_and_say_where_they_come_from() -> None:
    bands = shipped_bands(ROOT / "examples")
    assert {path.parent.name for path in bands} >= {"demo", "1x24gb_sd15_lora", "8x80gb_flux_full"}
    for path, found in bands.items():
        assert found.verified == (path.parent.name == "demo"), f"{path}: only the demo has been run"


def test_the_committed_demo_runs_lie_in_the_demo_band() -> None:
    """The band is the 95 % prediction interval of a further run, from the committed seeds."""
    found = read_band(ROOT / "examples" / "demo" / "band.json")
    results = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))["runs"]
    for result in results:
        records = trained(*[0.0] * result["epochs"]) + evaluated(
            {0: result["heldout_reward_before"], result["epochs"]: result["heldout_reward_after"]}
        )
        assert [check_point(point, records).verdict for point in found.points] == ["inside", "inside"]
    # Three seeds: Student's t of two degrees of freedom, 4.303, times the spread of one further run.
    values = [result["heldout_reward_after"] for result in results]
    mean = sum(values) / 3
    spread = (sum((value - mean) ** 2 for value in values) / 2 * (1 + 1 / 3)) ** 0.5
    after = found.points[1]
    assert isinstance(after, Within)
    assert after.low == pytest.approx(mean - 4.303 * spread, abs=1e-3)
    assert after.high == pytest.approx(mean + 4.303 * spread, abs=1e-3)
