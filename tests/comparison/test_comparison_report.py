"""From run directories to a comparison: what counts, what is paired, what is censored, what is said and drawn."""

import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from comparison_runs import noisy_rise, write_run
from PIL import Image

from pcpo_fast.comparison import Comparison, ComparisonSettings, compare_runs, write_comparison
from pcpo_fast.comparison.analysis import Missing, compare, missing_lines
from pcpo_fast.comparison.comparison_figures import comparison_figures
from pcpo_fast.comparison.comparison_tables import decision_table, difference_table, main_table, seed_table
from pcpo_fast.comparison.measures import Costs
from pcpo_fast.comparison.reading import read_run
from pcpo_fast.comparison.record import comparison_record, notes
from pcpo_fast.comparison.small_records import write_small_records
from pcpo_fast.errors import UserError
from pcpo_fast.reporting import style
from pcpo_fast.reporting.records import RunRecorder
from pcpo_fast.runs.input_record import write_record


def line(slope: float, start: float = 0.5):  # type: ignore[no-untyped-def]
    """A reward that rises evenly."""
    return lambda epoch: start + slope * epoch


def groups(folder: Path, **speeds: float) -> dict[str, list[Path]]:
    """Five runs of 40 epochs for each variant."""
    return {
        name: [write_run(folder / name / str(seed), noisy_rise(speed, seed), seed=seed, epochs=40) for seed in range(5)]
        for name, speed in speeds.items()
    }


# Reading


def test_reading_a_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", line(0.01), seed=7, epochs=25, slope=0.02, diversity=True))
    assert (run.seed, run.epochs, run.finished, run.problem) == (7, 25, True, None)
    assert run.reward.epochs == list(range(25)) and run.reward.values[10] == pytest.approx(0.6)
    assert run.heldout.epochs == [0, 10, 20, 25] and run.heldout.values[-1] == pytest.approx(0.7)
    assert run.diversity.values == [0.3] * 4
    assert [curve.values[0] for curve in run.clip_steps.values()] == pytest.approx([0.1, 0.12, 0.14, 0.16, 0.18])
    assert run.grad_norms == [(number // 2, 1.0) for number in range(50)]
    assert run.seconds.values == [1.0] * 25


def test_a_small_record_of_a_run_reads_the_same(tmp_path: Path) -> None:
    settings = {"rewards": [{"name": "caption_match"}, {"name": "jpeg_compressibility", "evaluation_only": True}]}
    run = write_run(
        tmp_path / "out" / "a" / "seed_0", lambda e: 0.1 + e / 3,
        norms=lambda u: 1 / (u + 3), slope=0.01, diversity=True, work=7.0, **settings,
    )  # fmt: skip
    with RunRecorder(run, tensorboard=False, wandb=None) as recorder:
        recorder.log(
            "evaluation", {"heldout/reward/jpeg_compressibility": 1 / 7, "heldout/base_distance": 0.2}, epoch=9
        )
        recorder.log("update", {"policy/grad_norm": float("nan"), "policy/skipped_updates": 1.0}, epoch=9, update=2)
    write_run(tmp_path / "out" / "a" / "seed_1", lambda e: 0.5, seed=1, planned=40)  # not finished
    for new in (["seed_0"], []):  # a record that is there stays
        assert [path.name for path in write_small_records(tmp_path / "out", tmp_path / "kept")] == new
    kept = tmp_path / "kept" / "a" / "seed_0"
    assert sorted(path.name for path in kept.iterdir()) == ["config.yaml", "metrics.jsonl.gz", "summary.json"]
    assert read_run(kept) == replace(read_run(run), folder=kept)
    with pytest.raises(UserError, match=r"--records: .* lies in the comparison's own folder"):
        write_small_records(tmp_path / "out", tmp_path / "out" / "kept")
    (kept / "metrics.jsonl.gz").write_bytes((kept / "metrics.jsonl.gz").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"cannot read .*metrics\.jsonl\.gz"):
        read_run(kept)


def test_the_area_over_compute_ends_where_the_cheaper_run_has_spent_all(tmp_path: Path) -> None:
    """Both rise by 0.01 an epoch from 0.45 held out, and an epoch of the second costs twice as much: of it only five
    epochs count, between two evaluations.
    """
    runs = {
        name: [write_run(tmp_path / name, line(0.01), epochs=10, every=4, work=work)]
        for name, work in (("cheap", 60.0), ("dear", 120.0))
    }
    result = compare_runs(runs, ComparisonSettings())
    assert result.reading.compute == 10 * (10 + 3 * 60 + 10 + 10)  # a trained pass is three, the rest 10 of each
    assert result.variant("cheap").values["heldout_area"][0] == pytest.approx(0.45 + 0.05)
    assert result.variant("dear").values["heldout_area"][0] == pytest.approx(0.45 + 0.025)
    assert result.variant("dear").values["heldout_area_seconds"][0] == pytest.approx(0.45 + 0.05)
    assert result.variant("dear").values["heldout_best_epoch"][0] == 10
    drawn = comparison_figures(result)["compute"].axes[0].lines
    assert [line.get_xdata()[-1] for line in drawn] == pytest.approx([2.1, 2.1])
    assert [line.get_ydata()[-1] for line in drawn] == pytest.approx([0.55, 0.50])
    free = compare_runs(runs, ComparisonSettings(costs=Costs(decode=0.0, reward=4.0)))
    assert free.reading.compute == 10 * (10 + 3 * 60 + 4 * 10)
    # Runs that did not count their work have no such area, and the rest of the comparison is as it was.
    old = {name: [write_run(tmp_path / name, line(0.01))] for name in ("one", "two")}
    uncounted = compare_runs(old, ComparisonSettings(primary="heldout_area"))
    assert uncounted.reading.compute is None and "heldout_area" not in uncounted.variant("one").means
    assert "two: no verdict, because it or one has no heldout_area." in notes(uncounted)


def test_a_judge_that_is_never_trained_on_is_a_measure(tmp_path: Path) -> None:
    rewards = [{"name": "caption_match"}, {"name": "jpeg_compressibility", "evaluation_only": True}]
    folder = write_run(tmp_path / "run", line(0.01), epochs=10, rewards=rewards)
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        judged = {"kind": "evaluation", "epoch": 10, "heldout/reward/mean": 0.55, "heldout/base_distance": 0.2}
        file.write(json.dumps(judged | {"heldout/reward/jpeg_compressibility": -2.5}) + "\n")
    result = compare_runs({"one": [folder]}, ComparisonSettings())
    values = result.variant("one").values
    assert values["judge/jpeg_compressibility"] == (-2.5,) and values["base_distance"] == (0.2,)
    assert "judge jpeg_compressibility at the end" in [measure.label for measure in result.measures]


def test_reward_and_diversity_at_the_kl_that_all_runs_reach(tmp_path: Path) -> None:
    """Both have gone 0.05 per epoch in KL for one run, and 0.1 for the other: 10 epochs and 5."""
    runs = {}
    for name, pace in (("slow", 0.05), ("fast", 0.1)):
        folder = write_run(tmp_path / name, line(0.01), epochs=10)
        lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        for record in lines:
            if record["kind"] == "evaluation":
                record |= {"heldout/kl": pace * record["epoch"], "heldout/diversity": 0.3 - 0.01 * record["epoch"]}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
        runs[name] = [folder]
    result = compare_runs(runs, ComparisonSettings())
    assert result.reading.kl == pytest.approx(0.5)
    for name, epoch, final in (("slow", 10, 0.5), ("fast", 5, 1.0)):
        values = result.variant(name).values
        assert values["kl"] == pytest.approx((final,))
        assert values["heldout_at_equal_kl"] == pytest.approx((0.45 + 0.01 * epoch,))
        assert values["diversity_at_equal_kl"] == pytest.approx((0.3 - 0.01 * epoch,))
    without = compare_runs({"a": [write_run(tmp_path / "a", line(0.01))]}, ComparisonSettings())
    assert without.reading.kl is None and "heldout_at_equal_kl" not in without.variant("a").means


def test_an_unfinished_run_and_folders_without_runs(tmp_path: Path) -> None:
    assert not read_run(write_run(tmp_path / "run", line(0.01), epochs=5, planned=9)).finished
    (tmp_path / "empty").mkdir()
    for name, said in (("empty", "holds no run"), ("nowhere", "is not a run directory")):
        with pytest.raises(UserError, match=said):
            read_run(tmp_path / name)


def test_a_run_without_its_configuration_has_no_seed_and_says_why(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", line(0.01), seed=3)
    (folder / "config.yaml").write_text("sead: 3\n")
    run = read_run(folder)
    assert run.seed is None and run.finished and "sead" in str(run.problem)
    assert any("sead" in note and "settings are unknown" in note for note in notes(compare_runs({"a": [folder]})))


def test_skipped_updates_are_in_no_gradient_statistic(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", line(0.01), epochs=4)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(text) for text in lines]
    first = next(record for record in records if record["kind"] == "update")
    first.update({"policy/skipped_updates": 1.0, "policy/grad_norm": None})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    assert len(read_run(folder).grad_norms) == 7


# Numbers


def test_a_faster_variant_is_found_to_be_so(tmp_path: Path) -> None:
    result = compare_runs(groups(tmp_path, native=0.05, pcpo=0.09), ComparisonSettings(at_epoch=10))
    pcpo = result.variant("pcpo")
    assert pcpo.reached == 5 and pcpo.against["epochs_to_target"].verdict == "better"
    assert pcpo.against["epochs_to_target"].lower == 5
    speed_up = pcpo.speed_up
    assert speed_up is not None and speed_up.low is not None and speed_up.high is not None
    # 1.8 without the two epochs that the trailing mean adds on either side.
    assert 1.4 < speed_up.low < speed_up.value < speed_up.high < 1.9 and pcpo.speed_up_bound == ""
    for key in ("reward_at_epoch", "reward_over_epochs", "heldout_at_epoch"):
        assert pcpo.against[key].verdict == "better", key
    assert pcpo.against["clip_fraction"].verdict == "no clear difference"
    native = result.variant("native")
    assert native.against == {} and native.speed_up is None
    assert result.target_source.startswith("90 % of the way from the mean start of all runs")


def test_a_variant_that_is_the_same_is_not_called_better(tmp_path: Path) -> None:
    result = compare_runs(groups(tmp_path, one=0.05, other=0.05))
    against = result.variant("other").against["epochs_to_target"]
    assert (against.ties, against.verdict) == (5, "no clear difference")


def test_default_target_is_nine_tenths_of_the_baselines_way(tmp_path: Path) -> None:
    runs = {
        "a": [write_run(tmp_path / "a", line(0.01), epochs=21)],
        "b": [write_run(tmp_path / "b", line(0.02), epochs=21)],
    }
    result = compare_runs(runs, ComparisonSettings(smoothing=1))
    assert result.reading.target == pytest.approx(0.5 + 0.9 * 0.2)
    assert compare_runs(runs, ComparisonSettings(smoothing=1, baseline="b")).reading.target == pytest.approx(
        0.5 + 0.9 * 0.4
    )
    # 18.0 is a point of the line up to rounding: the next epoch is as right.
    assert result.variant("a").values["epochs_to_target"][0] in (18.0, 19.0)
    assert result.variant("b").values["epochs_to_target"] == (9.0,)


def test_smoothing_delays_and_is_undone_by_one_epoch(tmp_path: Path) -> None:
    runs = {"a": [write_run(tmp_path / "a", line(0.01), epochs=30)]}
    for smoothing, expected in ((1, 11), (5, 13)):  # a trailing mean of 5 lags 2 epochs behind a straight line
        result = compare_runs(runs, ComparisonSettings(target=0.605, smoothing=smoothing))
        assert result.variant("a").values["epochs_to_target"] == (expected,)


def test_heldout_metric_interpolates_between_evaluations(tmp_path: Path) -> None:
    runs = {"a": [write_run(tmp_path / "a", line(0.01), epochs=30)]}
    result = compare_runs(runs, ComparisonSettings(target=0.5, metric="heldout"))
    assert result.variant("a").values["epochs_to_target"] == (pytest.approx(5.0),)


def test_runs_that_do_not_reach_the_target_are_bounds_and_marked(tmp_path: Path) -> None:
    runs = {
        "fast": [write_run(tmp_path / "f" / str(s), line(0.03), seed=s, epochs=20) for s in range(3)],
        "mixed": [write_run(tmp_path / "m" / str(s), line((0.03, 0.03, 0)[s]), seed=s, epochs=20) for s in range(3)],
        "never": [write_run(tmp_path / "n" / str(s), line(0), seed=s, epochs=20) for s in range(3)],
    }
    result = compare_runs(runs, ComparisonSettings(target=0.7, smoothing=1))
    assert [variant.reached for variant in result.variants] == [3, 2, 0]
    assert result.variant("mixed").values["epochs_to_target"] == (7.0, 7.0, 20.0)
    assert result.variant("mixed").means["epochs_to_target"].value == pytest.approx(34 / 3)
    assert result.variant("never").values["epochs_to_target"] == (20.0, 20.0, 20.0)
    assert result.variant("mixed").speed_up_bound == result.variant("never").speed_up_bound == "at most"
    assert result.variant("mixed").against["epochs_to_target"].ties == 2
    rows = {row[0]: row for row in main_table(result).rows}
    assert rows["fast"][2].startswith("7.0 [") and rows["fast"][3] == "3 of 3"
    assert rows["mixed"][2].startswith("≥ 11.3 [") and rows["mixed"][3] == "2 of 3"
    assert rows["never"][2:4] == ("≥ 20.0", "0 of 3") and rows["never"][4].startswith("≤ 0.35×")
    assert [row[3] for row in seed_table(result).rows][3:6] == ["7.0", "7.0", "≥ 20.0"]
    other = compare_runs(runs, ComparisonSettings(target=0.7, smoothing=1, baseline="never"))
    assert other.variant("fast").speed_up_bound == "at least"
    assert other.variant("mixed").speed_up_bound == "restricted"
    record = comparison_record(other)["variants"]["mixed"]
    assert [run["reached_target"] for run in record["runs"]] == [True, True, False]


def test_runs_are_paired_by_seed_whatever_their_order(tmp_path: Path) -> None:
    offsets = {0: 0.0, 1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}
    native = [write_run(tmp_path / f"n{s}", line(0.001, offsets[s]), seed=s, epochs=20) for s in (0, 1, 2, 3, 4)]
    pcpo = [write_run(tmp_path / f"p{s}", line(0.002, offsets[s]), seed=s, epochs=20) for s in (3, 1, 4, 2, 0)]
    against = compare_runs({"native": native, "pcpo": pcpo}).variant("pcpo").against["reward_final"]
    assert against.paired and (against.higher, against.lower, against.ties) == (5, 0, 0)
    assert against.difference.high - against.difference.low < 1e-12  # type: ignore[operator]
    shifted = [write_run(tmp_path / f"q{s}", line(0.002, offsets[s]), seed=s + 5, epochs=20) for s in range(5)]
    result = compare_runs({"native": native, "pcpo": shifted})
    apart = result.variant("pcpo").against["reward_final"]
    assert not apart.paired and apart.difference.high - apart.difference.low > 0.1  # type: ignore[operator]
    assert apart.difference.value == pytest.approx(against.difference.value)
    assert any("not paired" in note for note in notes(result))
    assert all(row[4] == "not paired" for row in difference_table(result.variant("pcpo"), result).rows)


def test_common_seeds_make_pairs_where_runs_are_missing(tmp_path: Path) -> None:
    native = [write_run(tmp_path / f"n{s}", line(0.001, 0.1 * s), seed=s, epochs=9) for s in (0, 1, 2)]
    pcpo = [write_run(tmp_path / f"p{s}", line(0.002, 0.1 * s), seed=s, epochs=9) for s in (1, 2, 3)]
    against = compare_runs({"native": native, "pcpo": pcpo}).variant("pcpo").against["reward_final"]
    assert against.paired and against.difference.n == 2 and against.verdict == "too few seeds"


def test_everything_is_of_the_seeds_that_all_variants_have(tmp_path: Path) -> None:
    """Of two seeds, gain has only run the one in which it is better, though below the mean of native's two."""
    native = [write_run(tmp_path / f"n{s}", line(0.001, 0.5 + 0.1 * s), seed=s, epochs=9) for s in (0, 1)]
    gain = [write_run(tmp_path / "g0", line(0.002, 0.51), seed=0, epochs=9)]
    never = [Missing("never", s, "has not been trained") for s in (0, 1)]
    read = {name: [read_run(run) for run in own] for name, own in (("native", native), ("gain", gain), ("never", []))}
    result = compare(read, ComparisonSettings(primary="reward_final"), never)
    assert [[run.seed for run in variant.runs] for variant in result.variants] == [[0], [0], []]
    assert missing_lines(result.missing) == [
        "never, seeds 0, 1: has not been trained",
        "native, seed 1: left out, because gain has no run to match",
    ]
    for table in (difference_table(result.variant("gain"), result), decision_table(result)):
        row = next(row for row in table.rows if row[0] in ("gain", "training reward at the end"))
        assert float(row[3]) == pytest.approx(float(row[2]) - float(row[1]), abs=1e-4) and float(row[3]) > 0
    drawn = [mark for mark in comparison_figures(result)["reward"].axes[0].lines if mark.get_label() != "target"]
    assert [len(mark.get_xdata()) for mark in drawn] == [9, 9]
    # Without common seeds all runs count, as groups, and this is said; nor are some of them paired.
    native = [*native, write_run(tmp_path / "n2", line(0.001, 0.7), seed=2, epochs=9)]
    shifted = [write_run(tmp_path / f"s{s}", line(0.002, 0.5), seed=s, epochs=9) for s in (1, 2, 3)]
    other = [write_run(tmp_path / f"o{s}", line(0.002, 0.5), seed=s, epochs=9) for s in (7, 8, 9)]
    apart = compare_runs({"native": native, "shifted": shifted, "other": other})
    assert [len(variant.runs) for variant in apart.variants] == [3, 3, 3] and not apart.missing
    against = [variant.against["reward_final"] for variant in apart.variants[1:]]
    assert [(one.paired, one.difference.n) for one in against] == [(False, 3), (False, 3)]
    assert any("their means may be of different seeds" in note for note in notes(apart))


def test_a_variant_with_a_single_run_does_not_take_the_seeds_of_the_others(tmp_path: Path) -> None:
    starts = {"native": (0, 1, 2, 3), "pcpo": (1, 2, 3), "gain": (2,)}
    folders = {
        name: [
            write_run(tmp_path / f"{name}{s}", line(0.001 * place * (1 + s), 0.1 * s), seed=s, epochs=9) for s in seeds
        ]
        for place, (name, seeds) in enumerate(starts.items())
    }
    result = compare_runs(folders, ComparisonSettings(primary="reward_final"))
    assert [[run.seed for run in variant.runs] for variant in result.variants] == [[1, 2, 3], [1, 2, 3], [2]]
    assert missing_lines(result.missing) == ["native, seed 0: left out, because pcpo has no run to match"]
    against = {name: result.variant(name).against["reward_final"] for name in ("pcpo", "gain")}
    assert [(one.paired, one.difference.n) for one in against.values()] == [(True, 3), (True, 1)]
    assert against["gain"].difference.value == pytest.approx(0.006 * 6)  # in its seed, not from the mean of three
    assert [result.decisions[name].verdict for name in ("pcpo", "gain")] == ["better", "too few seeds"]
    assert any(note.startswith("Only one seed has been run of gain, and the other means") for note in notes(result))
    assert any("With 3 seeds an interval" in note for note in notes(result))
    # A seed that was left to the others makes no pair.
    elsewhere = compare_runs({**folders, "gain": [write_run(tmp_path / "gain0", line(0.002, 0.1), seed=0, epochs=9)]})
    assert not elsewhere.variant("gain").against["reward_final"].paired
    assert not any("Only one seed has been run" in note for note in notes(elsewhere))
    # With two variants there is nothing to compare but that seed.
    both = compare_runs({name: folders[name] for name in ("native", "gain")})
    assert [[run.seed for run in variant.runs] for variant in both.variants] == [[2], [2]]


def test_a_measure_that_some_runs_lack_is_compared_on_the_others(tmp_path: Path) -> None:
    runs = {
        name: [write_run(tmp_path / f"{name}{s}", line(slope, 0.1 * s), seed=s, epochs=9) for s in range(3)]
        for name, slope in (("native", 0.001), ("pcpo", 0.002))
    }
    metrics = runs["pcpo"][2] / "metrics.jsonl"
    metrics.write_text("".join(text for text in metrics.open() if "evaluation" not in text))
    result = compare_runs(runs)
    against = result.variant("pcpo").against["heldout_final"]
    assert against.paired and against.difference.n == 2
    assert against.difference.value == pytest.approx(against.means[0] - against.means[1]) == pytest.approx(0.009)
    row = next(row for row in difference_table(result.variant("pcpo"), result).rows if row[0].startswith("held-out"))
    assert float(row[2]) > float(row[1])


def test_clipping_and_gradient_numbers(tmp_path: Path) -> None:
    # 100 updates; the first ten are left out. Of the others 9 are ten times the median.
    def norms(update: int) -> float:
        return 50.0 if update < 10 else 10.0 if update % 10 == 0 else 1.0

    runs = {"a": [write_run(tmp_path / "a", line(0.01), epochs=50, clip=0.1, slope=0.05, norms=norms)]}
    values = {key: column[0] for key, column in compare_runs(runs).variant("a").values.items()}
    assert values["clip_fraction"] == pytest.approx(0.2)
    assert values["clip_unevenness"] == pytest.approx(0.05 * math.sqrt(2) / 0.2)
    assert values["grad_spikes"] == pytest.approx(9 / 90)
    kept = np.array([10.0] * 9 + [1.0] * 81)
    assert values["grad_variation"] == pytest.approx(kept.std(ddof=1) / kept.mean())


# What counts, and what is said


def test_unfinished_runs_are_named_and_left_out_or_cut_to_the_shortest(tmp_path: Path) -> None:
    runs = groups(tmp_path, native=0.05, pcpo=0.09)
    runs["pcpo"][4] = write_run(tmp_path / "stopped", noisy_rise(0.09, 4), seed=4, epochs=12, planned=40)
    result = compare_runs(runs)
    assert [len(variant.runs) for variant in result.variants] == [4, 4] and result.reading.horizon == 40
    assert [(run.variant, run.seed) for run in result.missing] == [("pcpo", 4), ("native", 4)]
    assert "not finished (12 of 40 epochs)" in result.missing[0].reason
    assert result.variant("pcpo").against["reward_final"].difference.n == 4
    assert result.variant("pcpo").against["epochs_to_target"].verdict == "probably better"
    cut = compare_runs(runs, ComparisonSettings(include_unfinished=True))
    assert cut.reading.horizon == 12 and cut.missing == ()
    assert any("compared over 12 epochs from the start (the longest has 40)" in note for note in notes(cut))
    with pytest.raises(UserError, match="--at-epoch: must be at most 12, the epochs of the shortest run, got 20"):
        compare_runs(runs, ComparisonSettings(include_unfinished=True, at_epoch=20))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (ComparisonSettings(baseline="natve"), "--baseline: must be one of a, got natve"),
        (ComparisonSettings(metric="heldout"), "--metric heldout: the runs have no held-out evaluations"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, settings: ComparisonSettings, said: str) -> None:
    folder = write_run(tmp_path / "run", line(0.01))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(text for text in lines if "evaluation" not in text))
    with pytest.raises(UserError, match=said):
        compare_runs({"a": [folder]}, settings)


def test_nothing_finished_is_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", line(0.01), epochs=3, planned=9)
    with pytest.raises(UserError, match=r"there is no finished run to compare \(a, seed 0: .*3 of 9 epochs\)\)"):
        compare_runs({"a": [folder]})


def test_a_baseline_that_does_not_learn_gives_no_target(tmp_path: Path) -> None:
    runs = {
        "flat": [write_run(tmp_path / "a", line(-0.01), epochs=9)],
        "up": [write_run(tmp_path / "b", line(0.01), epochs=9)],
    }
    result = compare_runs(runs)
    assert result.reading.target is None and "does not rise" in result.target_source
    assert "epochs to target" not in main_table(result).header
    assert any(
        note.startswith("Epochs to target are left out: none: the reward of the baseline flat")
        for note in notes(result)
    )
    assert "epochs_to_target" not in comparison_figures(result)


def test_differences_between_variants_and_what_they_do_to_the_comparison(tmp_path: Path) -> None:
    other = {
        "rollout__images_per_prompt": 12,
        "rewards": [{"name": "jpeg_compressibility"}],
        "model__dtype": "bfloat16",
    }
    runs = {
        "a": [write_run(tmp_path / "a", line(0.01), epochs=9, credit__rule="native")],
        "b": [write_run(tmp_path / "b", line(0.02), epochs=9, **other)],
    }
    result = compare_runs(runs)
    found = comparison_record(result)["differences"]
    assert found["credit.rule"] == {"a": "native", "b": "proportionate"}
    assert found["rewards.0.name"] == {"a": "caption_match", "b": "jpeg_compressibility"}
    assert "output_dir" not in found and "seed" not in found
    said = " ".join(notes(result))
    assert "differ in rewards.0.name: their rewards are not on the same scale" in said
    assert "rollout.images_per_prompt: an epoch is not the same amount of work" in said
    assert "model.dtype: they do not start from the same images" in said
    assert "A variant with one seed has no interval" in said


def test_runs_that_read_other_content_under_one_name_are_noticed(tmp_path: Path) -> None:
    runs = {name: [write_run(tmp_path / name, line(0.01), epochs=9)] for name in "abc"}
    for name, path in (("a", "p.txt"), ("b", "p.txt"), ("c", "q.txt")):
        write_record(runs[name][0], {"prompts.train": {"path": path, "count": 9, "hash": f"of {name}"}}, 0)
    assert "the content of prompts.train (p.txt) changed between them" in " ".join(notes(compare_runs(runs)))
    del runs["b"]
    assert "content" not in " ".join(notes(compare_runs(runs)))


def test_runs_of_a_variant_with_unlike_settings_or_the_same_seed_are_noticed(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(i), line(0.01), epochs=9, optimizer__lr=1e-4 * (i + 1)) for i in range(2)]
    said = " ".join(notes(compare_runs({"a": runs})))
    assert "a: its runs have different settings: optimizer.lr (0.0001, 0.0002)" in said
    assert "several runs have the same seed" in said


# Files


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    folder = tmp_path_factory.mktemp("comparison")
    result = compare_runs(groups(folder, native=0.03, pcpo=0.06, slow=0.004))
    (folder / "out" / "figures").mkdir(parents=True)
    (folder / "out" / "figures" / "stale.png").touch()
    write_comparison(result, folder / "out")
    return result, folder / "out"


def test_comparison_json_holds_every_number(written: tuple[Comparison, Path]) -> None:
    result, folder = written
    record = json.loads((folder / "comparison.json").read_text())
    assert record == json.loads(json.dumps(comparison_record(result)))
    assert list(record["variants"]) == ["native", "pcpo", "slow"] and record["settings"]["baseline"] == "native"
    pcpo = record["variants"]["pcpo"]
    assert [run["seed"] for run in pcpo["runs"]] == [0, 1, 2, 3, 4]
    column = [run["values"]["epochs_to_target"] for run in pcpo["runs"]]
    assert pcpo["means"]["epochs_to_target"]["value"] == pytest.approx(np.mean(column))
    assert len(pcpo["runs"][0]["curves"]["reward"]["values"]) == 40
    assert pcpo["against_baseline"]["epochs_to_target"]["verdict"] == "better"
    assert pcpo["speed_up"]["bound"] == "" and record["variants"]["slow"]["speed_up"]["bound"] == "at most"
    assert record["versions"]["pcpo_fast"] and set(record["measures"]) >= {"epochs_to_target", "grad_spikes"}
    assert "diversity" not in record["measures"]


def test_the_page_has_the_tables_and_a_chart_of_every_figure(written: tuple[Comparison, Path]) -> None:
    result, folder = written
    page = (folder / "comparison.html").read_text()
    text = re.sub("</?span>", "", page)
    for table in (main_table(result), difference_table(result.variant("pcpo"), result), seed_table(result)):
        for row in table.rows:
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
            assert f'<th scope="row">{row[0]}</th>{cells}' in text
    assert "Comparison of native, pcpo, slow" in page
    assert page.count('class="charts"') == len(comparison_figures(result))
    assert style.OTHERS[0] in page and style.PROPORTIONATE in page  # the first is meant, the others have to differ


def test_markdown_and_figures(written: tuple[Comparison, Path]) -> None:
    result, folder = written
    text = (folder / "comparison.md").read_text()
    parts = (
        "| pcpo | 5 |",
        "## pcpo minus native",
        "5 of 5 better | better |",
        "≥",
        "means over 5 epochs",
        "seed by seed",
    )
    for part in parts:
        assert part in text
    figures = sorted(path.name for path in (folder / "figures").iterdir())
    assert figures == ["clip_fraction.png", "epochs_to_target.png", "gradient_norm.png", "reward.png"]
    for name in figures:
        assert f"](figures/{name})" in text
        with Image.open(folder / "figures" / name) as picture:
            assert len(np.unique(np.asarray(picture.convert("L").resize((64, 24))))) > 5
    axes = comparison_figures(result)["reward"].axes
    assert [axis.get_title(loc="left") for axis in axes] == ["Training reward, mean over 5 epochs", "Held-out reward"]
    named = [line for line in axes[0].get_lines() if not line.get_label().startswith("_")]
    assert [line.get_label() for line in named] == ["native", "pcpo", "slow", "target"]
    expected = np.mean([read_run(run.folder).reward.values[0] for run in result.variant("pcpo").runs])
    assert named[1].get_ydata()[0] == pytest.approx(expected)


def test_figures_of_one_run_with_little_in_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", line(0.01), epochs=1, norms=lambda update: 0.0)
    result = compare_runs({"a $x$": [folder]}, ComparisonSettings(target=0.9))
    assert set(comparison_figures(result)) == {"reward", "epochs_to_target", "clip_fraction"}
    assert write_comparison(result, tmp_path / "out")


def test_names_that_do_not_fit_above_the_axes_stand_beside_them(tmp_path: Path) -> None:
    runs = {f"variant-{i}": [write_run(tmp_path / str(i), line(0.01 + 0.001 * i), epochs=6)] for i in range(10)}
    for name, figure in comparison_figures(compare_runs(runs)).items():
        if name != "epochs_to_target":
            assert [axes.get_legend() for axes in figure.axes] == [None] * len(figure.axes)
            texts = [text.get_text() for text in figure.legends[0].get_texts()]
            assert texts[:10] == list(runs) and len(texts) == len(set(texts))
