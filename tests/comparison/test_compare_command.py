"""``pcpo-fast compare`` from end to end: real runs of the tiny pipeline, stopped, killed and called again."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from cli_runs import wait_for
from comparison_runs import noisy_rise, write_planned, write_run

from pcpo_fast.cli import main
from pcpo_fast.comparison import scheduling
from pcpo_fast.comparison.lock import only_one
from pcpo_fast.comparison.scheduling import Failure, HowToRun
from pcpo_fast.comparison.variants import PlannedRun
from pcpo_fast.config.schema import Config
from pcpo_fast.files.locks import lock_folder
from pcpo_fast.runs import run_directory

ROOT = Path(__file__).resolve().parents[2]
pytest_plugins = ["cli_fixtures"]

# It waits in the second epoch of a run as long as its seed has a gate.
GATED_REWARD = """
import os, pathlib, sys, time
calls = 0
def redness(images, prompts, metadata):
    global calls
    calls += 1
    here, seed = pathlib.Path(os.environ["PYTHONPATH"]), next(a for a in sys.argv if a.startswith("seed="))
    while calls == 3 and (here / f"gate.{seed}").exists():  # after the first evaluation and the first rollout
        (here / f"waiting.{os.getpid()}").touch()
        time.sleep(0.01)
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))
"""

SMALL = (
    "rewards=[{name: 'gated:redness'}]", "sampler.steps=2", "train.epochs=2", "rollout.prompts_per_epoch=2",
    "rollout.images_per_prompt=2", "train.updates_per_epoch=1", "train.micro_batch_size=4", "evaluation.prompts=2",
    "evaluation.images_per_prompt=1", "logging.tensorboard=false", "checkpoint.every=1", "evaluation.every=0",
)  # fmt: skip


class Output(NamedTuple):
    """What a command answered."""

    code: int
    out: str
    err: str


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Output:
    """Run a command in this process."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as left:  # argparse
        code = int(left.code or 0)
    return Output(code, *capsys.readouterr())


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the gated reward; commands run in the project's folder."""
    (tmp_path / "gated.py").write_text(GATED_REWARD)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def start() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts the command in a process of its own."""
    started = []

    def begin(*arguments: str | Path) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "pcpo_fast", "compare", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def folders_checked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A list that gets the folder of every run that is checked from now on."""
    folders: list[Path] = []
    check = run_directory.claim

    def noted(config: Config, resume: str) -> run_directory.RunStart:
        folders.append(Path(config.output_dir))
        return check(config, resume)

    monkeypatch.setattr(run_directory, "claim", noted)
    return folders


def alive(process: int) -> bool:
    """Whether a process that need not be our child is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def waiting(folder: Path) -> list[Path]:
    return list(folder.glob("waiting.*"))


def is_unlocked(folder: Path) -> bool:
    attempt = lock_folder(folder, inherited=True)
    assert attempt is not None
    os.close(attempt.descriptor)
    return attempt.holder is None


@pytest.mark.slow
def test_a_comparison_that_is_stopped_and_killed_ends_as_if_it_had_not_been(
    project: Path,
    launcher: str,
    start: Callable[..., "subprocess.Popen[str]"],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = project / "out"
    variants = ("--variant", "native: algorithm=dancegrpo", "--variant", "pcpo:")
    options = ("--output", output, "--jobs", "2", "--launcher", launcher)

    for seed in (0, 1):
        (project / f"gate.seed={seed}").touch()
    process = start(*variants, *options, "--seeds", "2", *SMALL)
    wait_for(lambda: len(waiting(project)) == 2, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == f"interrupted with 0 of 4 runs done: `pcpo-fast compare --output {output}` continues\n"
    assert "the same command resumes the run after epoch 1" in (output / "native" / "seed_0.log").read_text()

    # The command is in comparison.yaml now.
    (project / "gate.seed=0").unlink()
    for path in waiting(project):
        path.unlink()
    process = start(*options)
    wait_for(lambda: len(waiting(project)) == 2, process)
    assert all((output / name / "seed_0" / "summary.json").exists() for name in ("native", "pcpo"))
    process.kill()
    process.communicate()
    at_work = [int(path.suffix[1:]) for path in waiting(project)]
    wait_for(lambda: not any(map(alive, at_work)))  # the runs end with the command
    wait_for(lambda: is_unlocked(output))  # and so do the launchers that started them

    (project / "gate.seed=1").unlink()
    answer = call(capsys, "compare", *options)
    assert answer.code == 0, answer.out + answer.err
    assert "seed 0: training" not in answer.out and answer.out.count("training (log:") == 2
    for name in ("native", "pcpo"):
        for seed in (0, 1):
            log = (output / name / f"seed_{seed}.log").read_text()
            assert log.count("Resuming after epoch 1 from") == 1, log
            lines = (output / name / f"seed_{seed}" / "metrics.jsonl").read_text().splitlines()
            kinds = [json.loads(line)["kind"] for line in lines]
            assert kinds == ["evaluation", "update", "epoch"] * 2 + ["evaluation"]  # it evaluates where it resumes
    assert (output / "embeddings").is_dir() and not list(output.glob("*/embeddings"))
    record = json.loads((output / "comparison.json").read_text())
    assert record["differences"].keys() >= {"algorithm", "credit.rule", "credit.objective"}
    assert [run["seed"] for run in record["variants"]["pcpo"]["runs"]] == [0, 1]
    # Before anything is trained the same seed gives the same images, of either variant.
    first = [
        [record["variants"][name]["runs"][seed]["curves"]["reward"]["values"][0] for seed in (0, 1)]
        for name in ("native", "pcpo")
    ]
    assert first[0] == first[1] and first[0][0] != first[0][1]
    assert "With 2 seeds an interval covers the true mean at most 50 % of the time" in answer.out

    # A finished comparison has nothing to train, and another one is refused.
    answer = call(capsys, "compare", *options, "--json")
    assert answer.code == 0 and json.loads(answer.out) == record and "training (log:" not in answer.err
    answer = call(capsys, "compare", "--output", output, "optimizer.lr=0.1")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: native, seed 0: optimizer.lr: the run in ")
    assert "has 0.0001, this configuration 0.1; choose another output_dir" in answer.err


@pytest.mark.slow
def test_a_variant_that_fails_is_named_and_the_rest_reported(
    project: Path, launcher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = project / "out"
    options = ("--output", output, "--launcher", launcher, "--seeds", "1", *SMALL)
    answer = call(capsys, "compare", "--variant", "good:", "--variant", "bad: prompts.train=nowhere.txt", *options)
    assert answer.code == 2
    log = output / "bad" / "seed_0.log"
    assert answer.err == f"error: 1 of 2 runs failed: bad, seed 0 (log: {log})\n"
    assert "bad, seed 0: failed: " in answer.out and "nowhere.txt" in answer.out
    assert "nowhere.txt" in log.read_text()
    record = json.loads((output / "comparison.json").read_text())
    assert [len(record["variants"][name]["runs"]) for name in ("good", "bad")] == [1, 0]
    assert record["missing"] == [{"variant": "bad", "seed": 0, "reason": "has not been trained"}]
    assert "not included: bad, seed 0: has not been trained" in answer.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--variant", "a: credit.rul=1"),
         "variant a: setting (credit.rul=1): unknown key credit.rul, did you mean credit.rule?"),
        (("--variant", "a:", "--baseline", "b"), "--baseline: must be one of a, got b"),
        (("--variant", "a:", "--seeds", "x"),
         "--seeds: must be a number of seeds (5), or a list of them (3,7,11), got 'x'"),
        (("--variant", "a:", "--jobs", "0"), "--jobs: must be at least 1, got 0"),
        (("--variant", "a:", "--primary", "heldout_area", "prompts.heldout=null"),
         "primary: heldout_area needs held-out prompts, but a, seed 0 has no prompts.heldout"),
        (("--variant", "a:", "--variant", "b: credit.rule=native train.micro_batch_size=7"),
         "variant b: train.micro_batch_size: 7 does not divide the 120 (image, step) pairs that each rank trains in an "
         "update; allowed: auto, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 24, 30, 40, 60, 120"),
        (("--variant", "a:", "seed=1"), "variant a: seed cannot be set here (seed=1): use --seeds"),
        ((), "there is nothing to compare: give variants with --variant 'NAME: key=value' or a --file; {} has "
        "no comparison to continue"),
        (("--variant", "a:", "--report-only", "--seeds", "1"),
         "there is no finished run to compare (a, seed 0: has not been trained)"),
        (("--runs", "a=nowhere"), "nowhere is not a run directory"),
        (("--runs", "a=no*where"), "--runs 'a=no*where': no run directory matches no*where"),
        (("--runs", "a"), "--runs 'a': must have the form NAME=RUN,RUN, for example native=runs/n0,runs/n1"),
        (("--runs", "$a$=b"), "variant '$a$': a name is also the name of a folder: it must consist of letters, digits, "
         "'.', '_' and '-', and must not be embeddings, tuning or figures"),
        (("--runs", "a=b", "--seeds", "3"), "--runs compares existing runs, so it cannot be combined with --seeds"),
        (("--runs", "a=b", "x.y=1"), "--runs compares existing runs, so it cannot be combined with key=value"),
        (("--runs", "a=b", "--minutes", "3"), "--runs compares existing runs, so it cannot be combined with --minutes"),
        (("--runs", "a=b", "--jobs", "1"), "--runs compares existing runs, so it cannot be combined with --jobs"),
        (("--runs", "a=b", "--report-only"),
         "--runs compares existing runs, so it cannot be combined with --report-only"),
        (("--variant", "a:", "--report-only", "--threads", "1"),
         "--report-only trains nothing, so it cannot be combined with --threads"),
        (("--variant", "a: demo", "--config", "demo"),
         "--config: has no effect, because every variant has its own file: remove it"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_before_anything_runs(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    output = project / "out"
    answer = call(capsys, "compare", "--output", output, *arguments)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == f"error: {said.format(output)}\n"
    assert not output.exists()


def test_output_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "compare", "--variant", "a:").err.startswith("error: --output: missing; give the fo")
    assert call(capsys, "compare", "--runs", "a=b").err.startswith("error: --output: missing; give the fo")


def test_runs_made_elsewhere_and_a_report_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, speed in (("native", 0.05), ("pcpo", 0.09)):
        for seed in range(3):
            write_run(tmp_path / f"{name}{seed}", noisy_rise(speed, seed), seed=seed)
    runs = ("--runs", f"native={tmp_path}/native*", "--runs", f"pcpo={tmp_path}/pcpo0,{tmp_path}/pcpo1")
    answer = call(capsys, "compare", *runs, "--output", tmp_path / "out", "--target", "0.7", "--at-epoch", "10")
    assert (answer.code, answer.err) == (0, "")
    assert "│ native  │     2 │" in answer.out and "reward, epoch 10" in answer.out
    assert "not included: native, seed 2: left out, because pcpo has no run to match" in answer.out
    assert "target 0.7 (training reward)" in answer.out
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [run["seed"] for run in record["variants"]["native"]["runs"]] == [0, 1]
    assert record["settings"]["target"] == 0.7 and record["settings"]["target_source"] == "as given"
    assert not (tmp_path / "out" / "comparison.yaml").exists()


def test_a_file_and_the_command_line_over_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for name, speed in (("native", 0.05), ("pcpo", 0.09)):
        for seed in (0, 1):
            write_run(tmp_path / "out" / name / f"seed_{seed}", noisy_rise(speed, seed), seed=seed)
    (tmp_path / "comparison.yaml").write_text(
        f"output: {tmp_path}/out\nseeds: 2\ntarget: 0.6\nvariants:\n  native: {{algorithm: dancegrpo}}\n  pcpo:\n"
    )
    arguments = ("compare", "--file", tmp_path / "comparison.yaml", "--report-only", "--json")
    answer = call(capsys, *arguments)
    assert answer.code == 0, answer.err
    settings = json.loads(answer.out)["settings"]
    assert (settings["target"], settings["baseline"], settings["smoothing_epochs"]) == (0.6, "native", 5)
    answer = call(capsys, *arguments, "--target", "0.65", "--baseline", "pcpo", "--smoothing", "2", "--seeds", "3")
    record = json.loads(answer.out)
    settings = record["settings"]
    assert (settings["target"], settings["baseline"], settings["smoothing_epochs"]) == (0.65, "pcpo", 2)
    assert [run["variant"] for run in record["missing"]] == ["native", "pcpo"]


PLANNED = """output: {output}
seeds: 2
settings: {{train.epochs: 20}}
primary: heldout_final
variants: {{native: {{credit.rule: native}}, pcpo: }}
"""


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("tuning", ["", "tuning: {lr: [1e-5, 1e-4], seeds: [100]}\n"])
def test_a_call_that_is_refused_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tuning: str
) -> None:
    monkeypatch.chdir(ROOT)
    output = tmp_path / "out"
    (tmp_path / "c.yaml").write_text(PLANNED.format(output=output) + tuning)
    with only_one(output):
        (output / "comparison.yaml").write_text("seeds: 3\n")
        before = files_in(tmp_path)
        answer = call(capsys, "compare", "--file", tmp_path / "c.yaml", "--records", tmp_path / "kept")
        assert (answer.code, answer.out) == (2, "")
        assert "another comparison, or runs that it left behind, are still running here (process" in answer.err
        assert files_in(tmp_path) == before


def test_a_primary_measure_that_is_named_late_is_reported_as_such_and_not_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)

    def train(runs: list[PlannedRun], *_: object) -> list[Failure]:
        for run in runs:
            write_planned(run, lambda epoch: 0.6 if epoch else 0.5)
        return []

    monkeypatch.setattr(scheduling, "run_all", train)
    output = tmp_path / "out"
    (tmp_path / "c.yaml").write_text(PLANNED.format(output=output))
    report = ("compare", "--output", output, "--report-only")
    beforehand = "The primary measure was named beforehand; only its p-values"
    assert beforehand in call(capsys, "compare", "--file", tmp_path / "c.yaml").out
    assert beforehand in call(capsys, *report).out and beforehand in (output / "comparison.html").read_text()
    recorded = (output / "comparison.yaml").read_bytes()

    late = "The primary measure was named when there already were runs"
    answer = call(capsys, *report, "--primary", "reward_final")
    assert f"{late} (before, it was held-out reward at the end)" in answer.out
    for name in ("comparison.html", "comparison.md"):
        assert late in (output / name).read_text() and beforehand not in (output / name).read_text()
    answer = call(capsys, "compare", "--output", output, "--seeds", "3", "--primary", "reward_final")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == (
        f"error: --primary: must stay heldout_final, as it was before there were runs in {output}, got reward_final; "
        "a report may use another one (--report-only), and says so\n"
    )
    assert (output / "comparison.yaml").read_bytes() == recorded
    (output / "comparison.yaml").unlink()  # as where only the runs were copied
    answer = call(capsys, "compare", "--file", tmp_path / "c.yaml")
    assert answer.err == (
        f"error: --primary: must stay unset, since {output} has runs but no comparison.yaml, which says what was named "
        "before them (copy it too), got heldout_final; a report may use another one (--report-only), and says so\n"
    )
    (output / "comparison.yaml").write_bytes(recorded)
    runs = [f"--runs={name}={output}/{name}/*" for name in ("native", "pcpo")]
    answer = call(capsys, "compare", *runs, "--primary", "heldout_final", "--output", tmp_path / "report")
    assert f"{late}, perhaps" in answer.out


def test_settings_of_a_file_may_list_several_rewards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "c.yaml").write_text(
        f"output: {tmp_path}/out\nseeds: 1\nsettings:\n  rewards: [{{name: caption_match}}, "
        "{name: jpeg_compressibility, weight: 0.5}]\nvariants: {a: {optimizer.lr: 1e-4}, b: {rewards.1.weight: 2}}\n"
    )
    answer = call(capsys, "compare", "--file", tmp_path / "c.yaml", "--report-only")
    missing = "a, seed 0: has not been trained; b, seed 0: has not been trained"
    assert answer.err == f"error: there is no finished run to compare ({missing})\n"


TUNED = """output: {output}
seeds: 3
settings: {{train.epochs: 20}}
variants:
  native: {{credit.rule: native}}
  pcpo: {{search: {{credit.clip_range: [1e-4, 1e-3]}}}}
tuning: {{lr: [1e-5, 1e-4, 1e-3], seeds: [100, 101]}}
"""


@pytest.mark.slow
def test_a_tuned_comparison_goes_on_in_portions_and_decides_on_its_own_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every portion has time for five runs. PCPO is better by 0.1 with the larger clip range, and both rates are best
    at 1e-4."""
    monkeypatch.chdir(ROOT)
    made: list[str] = []

    def train_five(runs: list[PlannedRun], done: int, folder: Path, how: HowToRun, *_: object) -> list[Failure]:
        for run in runs[:5]:
            made.append(run.name)
            level = 0.8 - 0.1 * abs(math.log10(run.config.optimizer.lr / 1e-4)) + 0.01 * math.sin(len(made))
            level += 0.1 * ("pcpo" in run.name) * (run.config.credit.clip_range == 1e-3)
            write_planned(run, lambda epoch, level=level: level if epoch else 0.5)  # type: ignore[misc]
        object.__setattr__(how, "until", 0.0)
        return []

    monkeypatch.setattr(scheduling, "run_all", train_five)
    output = tmp_path / "out"
    (tmp_path / "c.yaml").write_text(TUNED.format(output=output))
    answer = call(capsys, "compare", "--file", tmp_path / "c.yaml", "--report-only")
    assert answer.code == 0 and "tuning: not finished, 18 runs left until the next choice" in answer.out
    assert not made and not (output / "comparison.json").exists()
    answer = call(capsys, "compare", "--file", tmp_path / "c.yaml", "--minutes", "5")
    assert answer.code == 0 and "tuning: not finished, 13 runs left until the next choice" in answer.out
    calls = 1
    while len(made) < 2 * 2 * 6 + 2 * 3:
        answer = call(capsys, "compare", "--output", output, "--minutes", "5")  # goes on from comparison.yaml
        assert answer.code == 0, answer.err
        calls += 1
    assert calls == 7 and len(set(made)) == len(made)
    assert made[-6:] == [f"{name}, seed {seed}" for seed in (0, 1, 2) for name in ("native", "pcpo")]
    record = json.loads((output / "comparison.json").read_text())
    assert record["notes"][0].startswith("The settings of each variant were chosen from 6 trials, with seeds that")
    assert record["decisions"]["pcpo"]["verdict"] == "better" and record["decisions"]["pcpo"]["difference"]["n"] == 3
    assert record["settings"]["primary"] == "heldout_area"
    chosen = json.loads((output / "tuning.json").read_text())["variants"]["pcpo"]["chosen"]
    assert chosen == ["credit.clip_range=0.001", "optimizer.lr=0.0001"]
    assert "Verdict: held-out reward over compute" in answer.out
    assert "## Verdict: held-out reward over compute" in (output / "comparison.md").read_text()
    checked = folders_checked(monkeypatch)
    assert call(capsys, "compare", "--output", output).code == 0
    assert len(checked) == len(set(checked)) == len(made)  # with everything done, each run once
    assert call(capsys, "compare", "--file", tmp_path / "c.yaml", "--minutes", "0").err.startswith(
        "error: --minutes: must be above 0, got 0"
    )


def test_a_comparison_continues_elsewhere_from_its_small_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    made: list[Path] = []

    def train_three(runs: list[PlannedRun], *_: object) -> list[Failure]:
        for run in runs[:3]:
            made.append(run.folder.relative_to(tmp_path))
            write_planned(run, lambda epoch, end=0.6 + run.seed / 10: end if epoch else 0.5)  # type: ignore[misc]
        return []

    monkeypatch.setattr(scheduling, "run_all", train_three)
    (tmp_path / "c.yaml").write_text(
        f"output: {tmp_path}/out\nseeds: 2\nsettings: {{train.epochs: 20}}\nprimary: heldout_area\n"
        "variants: {native: {credit.rule: native}, pcpo: }\n"
    )
    answer = call(capsys, "compare", "--file", tmp_path / "c.yaml", "--records", tmp_path / "kept")
    assert answer.code == 0 and f"records: 3 finished runs added to {tmp_path}/kept" in answer.out
    assert "not included: native, seed 1: left out, because pcpo has no run to match" in answer.out
    shutil.copytree(tmp_path / "kept", tmp_path / "elsewhere")
    assert not list((tmp_path / "elsewhere").rglob("checkpoints"))
    reports = [
        call(capsys, "compare", "--output", tmp_path / name, "--report-only", "--json").out
        for name in ("out", "elsewhere")
    ]
    assert reports[0] == reports[1]
    checked = folders_checked(monkeypatch)
    answer = call(capsys, "compare", "--output", tmp_path / "elsewhere", "--json", "--records", tmp_path / "kept")
    assert sorted(checked) == [
        tmp_path / "elsewhere" / name for name in ("native/seed_0", "native/seed_1", "pcpo/seed_0")
    ]
    assert [len(variant["runs"]) for variant in json.loads(answer.out)["variants"].values()] == [2, 2]
    assert made[3:] == [Path("elsewhere/pcpo/seed_1")]
    assert (tmp_path / "kept" / "pcpo" / "seed_1" / "summary.json").is_file()


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    answer = call(capsys, "compare", "--help")
    assert answer.code == 0 and "pcpo-fast compare --variant" in answer.out
