"""Tuning before a comparison: which trials are made, what is chosen, and what a plan may not say."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from comparison_runs import write_planned

from pcpo_fast.comparison.analysis import ComparisonSettings
from pcpo_fast.comparison.comparison_file import read_plan_file, seeds_of, tuning_of, variants_of, write_plan_file
from pcpo_fast.comparison.tuning import Search, Trial, look, tuned, tuning_notes, write_search
from pcpo_fast.comparison.variants import ComparisonPlan, PlannedRun, Tuning, Variant, planned_runs, settings_from
from pcpo_fast.errors import UserError
from pcpo_fast.rollout.epoch_plan import pairs_per_update

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ComparisonSettings(primary="heldout_area")
NATIVE, PCPO = Variant("native", None, ("credit.rule=native",)), Variant("pcpo")


def plan(folder: Path, *variants: Variant, lr: tuple[float, ...] = (1e-5, 1e-4), **tuning: int) -> ComparisonPlan:
    tuned = Tuning(lr=lr, seeds=(100, 101), **tuning)
    return ComparisonPlan(folder, None, ("train.epochs=20",), variants or (NATIVE, PCPO), (0, 1), tuned)


def peak_at(best: dict[str, float], bonus: Callable[[PlannedRun], float] = lambda run: 0.0) -> Callable[..., float]:
    """The level of a run: highest at its variant's best rate, falling with the square of the distance in decades."""

    def level(run: PlannedRun) -> float:
        distance = math.log10(run.config.optimizer.lr / best[run.variant.split()[0]])
        return 0.8 - 0.1 * distance**2 + bonus(run) + 0.01 * (run.seed - 100)

    return level


def search_with(plan: ComparisonPlan, level: Callable[[PlannedRun], float], settings: ComparisonSettings) -> Search:
    """Make what the search asks for, in two portions of each round."""
    for _ in range(40):
        search = look(plan, settings)
        if not search.waiting:
            return search
        for run in search.waiting[: len(search.waiting) // 2 + 1]:
            write_planned(run, partial(curve, level(run)))
    raise AssertionError("the search does not end")


def curve(level: float, epoch: int) -> float:
    """Held-out reward: the same start for all, and the run's own level from the second evaluation on."""
    return 0.5 if epoch == 0 else level


def rates(search: Search, name: str) -> list[float]:
    return sorted(trial.lr for trial in search.trials[name])


def test_a_list_is_extended_until_the_best_is_inside_and_the_others_get_as_many_trials(tmp_path: Path) -> None:
    whole = plan(tmp_path, lr=(1e-5, 1e-4, 1e-3))
    search = search_with(whole, peak_at({"native": 1e-4, "pcpo": 1e-7}), SETTINGS)
    # pcpo goes down from 1e-5 to one beyond its best; native's best is inside, and its neighbourhood is filled.
    assert rates(search, "pcpo") == pytest.approx([1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
    assert rates(search, "native") == pytest.approx([1e-5, 3.16e-5, 5.62e-5, 1e-4, 3.16e-4, 1e-3], rel=0.02)
    assert (search.chosen["native"].lr, search.chosen["pcpo"].lr) == (1e-4, 1e-7)
    assert search.at_edge == ()
    # The level from the first evaluation on, which is half-way between the two until then: 20 epochs in two halves.
    level = 0.8 + 0.01 * 1
    assert search.scores[search.chosen["pcpo"]][1] == pytest.approx(0.75 * level + 0.25 * 0.5)


def test_a_search_ends_at_its_trials_and_says_that_the_best_is_at_the_end(tmp_path: Path) -> None:
    whole = plan(tmp_path, max_trials=4)
    search = search_with(whole, peak_at({"native": 3e-5, "pcpo": 10.0}), SETTINGS)
    assert rates(search, "pcpo") == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2])
    assert len(search.trials["native"]) == 4 and search.at_edge == ("pcpo",)
    notes = tuning_notes(whole, search)
    assert notes[0].startswith("The settings of each variant were chosen from 4 trials, with seeds that")
    assert notes[1].startswith("The best learning rate of pcpo lies at the end of its list")
    write_search(whole, SETTINGS, search)
    record = json.loads((tmp_path / "tuning.json").read_text())
    assert record["variants"]["pcpo"]["chosen"] == ["optimizer.lr=0.01"] and record["variants"]["pcpo"]["at_edge"]
    assert record["waiting_runs"] == 0 and record["seeds"] == [100, 101]
    assert "| pcpo (chosen) | optimizer.lr=0.01 |" in (tmp_path / "tuning.md").read_text()
    assert "tuning.md" not in (tmp_path / "tuning.md").read_text()


def test_other_settings_are_searched_with_every_rate_and_the_rest_get_as_many_trials(tmp_path: Path) -> None:
    variants = (NATIVE, Variant("pcpo", None, (), {"credit.clip_range": [1e-4, 1e-3]}))
    whole = plan(tmp_path, *variants, lr=(1e-5, 1e-4, 1e-3))
    better = peak_at(
        {"native": 1e-4, "pcpo": 1e-4},
        lambda run: 0.05 * ("pcpo" in run.variant) * (run.config.credit.clip_range == 1e-3),
    )
    search = search_with(whole, better, SETTINGS)
    assert {name: len(own) for name, own in search.trials.items()} == {"native": 6, "pcpo": 6}
    assert search.chosen["pcpo"] == Trial("pcpo", ("credit.clip_range=0.001",), 1e-4)
    runs = planned_runs(tuned(whole, search), twins=True)
    assert [(run.variant, run.seed) for run in runs] == [("native", 0), ("pcpo", 0), ("native", 1), ("pcpo", 1)]
    assert [run.config.credit.clip_range for run in runs[:2]] == [planned_runs(whole)[0].config.credit.clip_range, 1e-3]
    assert {run.config.optimizer.lr for run in runs} == {1e-4}
    assert runs[0].folder == tmp_path / "native" / "seed_0"


def test_the_first_trials_go_seed_by_seed_and_are_scored_together(tmp_path: Path) -> None:
    whole = plan(tmp_path)
    search = look(whole, SETTINGS)
    named = [(run.variant, run.seed) for run in search.waiting[:3]]
    assert named == [
        ("native with optimizer.lr=1e-05", 100), ("pcpo with optimizer.lr=1e-05", 100),
        ("native with optimizer.lr=0.0001", 100),
    ]  # fmt: skip
    assert len(search.waiting) == 8 and not search.scores and not search.chosen
    assert search.waiting[0].folder == tmp_path / "tuning" / "native" / "optimizer.lr_1e-05" / "seed_100"
    for run in search.waiting[:-1]:
        write_planned(run, lambda epoch: 0.5)
    assert [run.name for run in look(whole, SETTINGS).waiting] == ["pcpo with optimizer.lr=0.0001, seed 101"]
    write_search(whole, SETTINGS, look(whole, SETTINGS))
    assert "1 run must finish" in (tmp_path / "tuning.md").read_text()
    # A run that was made with other settings is refused rather than taken.
    with pytest.raises(UserError, match=r"the run in .* has"):
        look(replace(whole, settings=("train.epochs=20", "credit.clip_range=0.5")), SETTINGS)


PLAN = """output: {output}
seeds: 2
settings: {{train.epochs: 20}}
variants:
  native: {{credit.rule: native}}
  pcpo: {{search: {{credit: {{clip_range: [1e-4, 1e-3]}}}}}}
tuning: {{lr: [1e-4, 1e-5], seeds: [100, 101], max_trials: 5}}
costs: {{decode: 0.5}}
"""


def test_a_plan_with_tuning_is_read_written_and_read_again(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(PLAN.format(output=tmp_path / "out"))
    file = read_plan_file(tmp_path / "c.yaml")
    assert tuning_of(file, seeds_of(file)) == Tuning(lr=(1e-5, 1e-4), seeds=(100, 101), max_trials=5)
    assert dict(variants_of(file)[1].search) == {"credit.clip_range": [1e-4, 1e-3]}
    whole = ComparisonPlan(
        tmp_path / "out", None, (), variants_of(file), seeds_of(file), tuning_of(file, seeds_of(file))
    )
    again = read_plan_file(write_plan_file(whole, ComparisonSettings(primary="heldout_area")))
    assert variants_of(again) == variants_of(file) and again.primary == "heldout_area"
    assert tuning_of(again, seeds_of(again)) == whole.tuning


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[100, 101]", "[1, 100]", "tuning.seeds: 1 is also a seed of the comparison (seeds)"),
        ("[100, 101]", "[]", "tuning.seeds: must be distinct numbers from 0, got []"),
        ("[100, 101]", "two", "c.yaml line 7: tuning.seeds: must be a list of integers, got 'two'"),
        ("[1e-4, 1e-5]", "[1e-4]", "tuning.lr: must be two or more distinct numbers above 0, got [0.0001]"),
        ("[1e-4, 1e-5]", "[1e-4, x]", "c.yaml line 7: tuning.lr: must be a list of numbers, got 'x'"),
        ("lr: [1e-4, 1e-5], ", "", "c.yaml line 7: tuning.lr is missing"),
        ("max_trials: 5", "trials: 5", "c.yaml line 7: unknown key tuning.trials, did you mean max_trials?"),
        ("max_trials: 5", "max_trials: 3", "tuning.max_trials: must be at least 4, the trials of the largest grid"),
        ("decode", "decoding", "c.yaml line 8: unknown key costs.decoding, did you mean decode?"),
        ("[1e-4, 1e-3]", "0.1", "variants.pcpo.search.credit.clip_range: must be a list of values to choose from"),
        ("clip_range: [1e-4, 1e-3]", "clip: [1]", "variant pcpo: setting (credit.clip=1): unknown key credit.clip"),
        ("credit.rule: native", "optimizer.lr: 1e-4",
         "variant native: optimizer.lr is searched (tuning.lr), so nothing else may set it"),
        ("pcpo: {", "pcpo: {credit.clip_range: 1, ",
         "variant pcpo: credit.clip_range is searched (variants.pcpo.search), so nothing else may set it"),
        ("tuning:", "# ", "variants.pcpo.search: needs a section tuning with lr and seeds"),
        ("costs:", "primary: area\ncosts:", "c.yaml line 8: primary: must be one of heldout_area, heldout_final"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(tmp_path: Path, old: str, new: str, said: str) -> None:
    text = PLAN.format(output=tmp_path / "out")
    assert old in text
    (tmp_path / "c.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        file = read_plan_file(tmp_path / "c.yaml")
        seeds = seeds_of(file)
        look(ComparisonPlan(tmp_path / "out", None, (), variants_of(file), seeds, tuning_of(file, seeds)), SETTINGS)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "comparisons").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plans_that_come_with_the_project_can_be_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their settings are read, and updates divide into micro-batches."""
    monkeypatch.chdir(ROOT)
    file = read_plan_file(path)
    seeds = seeds_of(file)
    whole = ComparisonPlan(
        tmp_path, file.config, settings_from(file.settings), variants_of(file), seeds[:1], tuning_of(file, seeds)
    )
    for run in planned_runs(whole) if whole.tuning is None else look(whole, SETTINGS).waiting:
        trained = run.config.sampler.steps - (not run.config.credit.train_last_step)
        assert pairs_per_update(run.config, trained, 1) >= 1
