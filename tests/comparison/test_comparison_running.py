"""What a comparison runs, and how: plans and files, mistakes found before anything runs, processes, progress."""

import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from pcpo_fast.cli import parse
from pcpo_fast.comparison import processes, scheduling
from pcpo_fast.comparison.analysis import ComparisonSettings
from pcpo_fast.comparison.comparison_file import read_plan_file, seeds_of, variants_of, write_plan_file
from pcpo_fast.comparison.lock import only_one
from pcpo_fast.comparison.processes import command_of, last_words
from pcpo_fast.comparison.run_progress import ComparisonProgress, RunProgress
from pcpo_fast.comparison.scheduling import HowToRun, Interrupted, check_folders, environment_of, run_all
from pcpo_fast.comparison.variants import (
    ComparisonPlan,
    PlannedRun,
    Variant,
    parse_seeds,
    parse_variant,
    planned_runs,
    settings_from,
)
from pcpo_fast.config.loading import dump_config, load_config
from pcpo_fast.errors import UserError
from pcpo_fast.runs.manifest import write_manifest

NATIVE, PCPO = Variant("native", None, ("credit.rule=native",)), Variant("pcpo")

# A trainer that takes no time. Its arguments are those of train.py, its behaviour goes by the seed.
TRAINER = """
import json, os, pathlib, signal, sys, time
values = dict(text.split("=", 1) for text in sys.argv[2:] if "=" in text)
folder, seed = pathlib.Path(json.loads(values["output_dir"])), int(values["seed"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "process").write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}")
print("hello from seed", seed)
if seed == 1:
    print("error: there is no luck; allowed: some", file=sys.stderr)
    sys.exit(2)
if seed == 2:
    os.kill(os.getpid(), signal.SIGTERM)
if seed == 3:
    raise RuntimeError("a bug")
if seed in (10, 11):  # each waits for the other: only two at once come through
    other = folder.parent / f"seed_{21 - seed}" / "process"
    until = time.monotonic() + 60
    while not other.exists():
        assert time.monotonic() < until, "alone"
        time.sleep(0.01)
    time.sleep(0.2)
elif seed >= 8:
    if seed == 9:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    (folder / "ready").touch()
    time.sleep(60)
(folder / "metrics.jsonl").write_text(json.dumps({"kind": "epoch", "epoch": 1, "reward/mean": 0.5}) + "\\n")
(folder / "summary.json").write_text("{}")
"""


def plan(
    folder: Path, *variants: Variant, seeds: tuple[int, ...] = (0,), settings: tuple[str, ...] = ()
) -> ComparisonPlan:
    return ComparisonPlan(folder / "out", None, settings, variants or (NATIVE, PCPO), seeds)


# Variants and seeds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("native: credit.rule=native a=b", Variant("native", None, ("credit.rule=native", "a=b"))),
        ("pcpo:", Variant("pcpo")),
        ("a: my.yaml optimizer.lr=1e-4", Variant("a", "my.yaml", ("optimizer.lr=1e-4",))),
        ("""b: 'rewards=[{name: "my:r"}]'""", Variant("b", None, ('rewards=[{name: "my:r"}]',))),
    ],
)  # fmt: skip
def test_variants_on_the_command_line(text: str, expected: Variant) -> None:
    assert parse_variant(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("credit.rule=native", "must have the form 'NAME: key=value key=value'"),
        ("a credit.rule=b:c", "must have the form 'NAME"),
        ("a: credit.rule=native clip", "clip is not a setting"),
        ("a: x='1", "No closing quotation; close the quotes"),
    ],
)
def test_variants_that_are_not_written_so(text: str, said: str) -> None:
    with pytest.raises(UserError, match="--variant.*" + said):
        parse_variant(text)


def test_seeds() -> None:
    assert parse_seeds("3") == (0, 1, 2)
    assert parse_seeds("3,7, 11") == (3, 7, 11)
    assert parse_seeds("3,") == (3,)
    for text in ("0", "-1", "two", "1,x", "1.5", "", ","):
        with pytest.raises(UserError, match="--seeds: must be"):
            parse_seeds(text)
    with pytest.raises(UserError, match="only once"):
        parse_seeds("1,1")


def test_settings_of_a_file_come_out_as_on_the_command_line() -> None:
    values = {"credit": {"rule": "native", "clip_range": 1e-4}, "optimizer.lr": 1e-5, "rewards": [{"name": "a:b"}]}
    config = load_config(None, settings_from(values))
    assert (config.credit.rule, config.credit.clip_range, config.optimizer.lr) == ("native", 1e-4, 1e-5)
    assert [reward.name for reward in load_config(None, settings_from({"rewards": [{"name": "a:b"}]})).rewards] == [
        "a:b"
    ]


# Plans


def test_runs_of_a_plan_go_seed_by_seed_and_share_the_embeddings(tmp_path: Path) -> None:
    runs = planned_runs(plan(tmp_path, seeds=(0, 4), settings=("train.epochs=7", "credit.rule=uniform")))
    assert [(run.variant, run.seed) for run in runs] == [("native", 0), ("pcpo", 0), ("native", 4), ("pcpo", 4)]
    last = runs[3]
    assert last.folder == tmp_path / "out" / "pcpo" / "seed_4" and last.log == tmp_path / "out/pcpo/seed_4.log"
    assert (last.config.seed, last.config.output_dir) == (4, str(last.folder))
    assert {run.config.model.embedding_cache for run in runs} == {str(tmp_path / "out" / "embeddings")}
    assert {run.config.train.epochs for run in runs} == {7}
    assert [run.config.credit.rule for run in runs[:2]] == ["native", "uniform"]  # a variant's own setting wins
    own = planned_runs(plan(tmp_path, settings=(f"model.embedding_cache={tmp_path}",)))
    assert own[0].config.model.embedding_cache == str(tmp_path)


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ((NATIVE, Variant("b", None, ("credit.rul=1",))), r"variant b: setting \(credit.rul=1\): unknown key"),
        ((NATIVE, Variant("b", "nowhere.yaml")), "variant b: config file nowhere.yaml does not exist"),
        ((NATIVE, Variant("native")), "variant native: duplicate name"),
        ((NATIVE, Variant("a/b")), "variant 'a/b': a name is also the name of a folder"),
        ((NATIVE, Variant("figures")), "and must not be embeddings, tuning or figures"),
        ((NATIVE, Variant("b", None, ("seed=3",))), "variant b: seed cannot be set here .seed=3.: use --seeds"),
        ((NATIVE, Variant("b", None, ("credit.rule=native",))), "variants native and b train the same thing$"),
        ((PCPO, Variant("b", None, ("checkpoint.every=3",))), "same thing .they differ in checkpoint.every alone"),
        ((PCPO, Variant("b", None, ("model.attention=flash",))), "same thing .they differ in model.attention alone"),
    ],
)  # fmt: skip
def test_mistakes_in_a_plan_are_found_before_anything_runs(
    tmp_path: Path, variants: tuple[Variant, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        planned_runs(plan(tmp_path, *variants))
    assert list(tmp_path.iterdir()) == []


def test_a_preset_that_the_file_overrules_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("credit: {rule: native, objective: clip}\nadvantage: {unbiased: false}\n")
    variants = (Variant("native", None, ("algorithm=dancegrpo",)), PCPO)
    with pytest.raises(
        UserError, match=r"native and pcpo train the same thing \(they differ in algorithm alone\); the"
    ):
        planned_runs(ComparisonPlan(tmp_path / "out", str(tmp_path / "base.yaml"), (), variants, (0,)))


def test_a_plan_is_written_and_read_back(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {epochs: 9}\n")
    variants = (
        Variant("a", None, ("credit.rule=native", 'rewards=[{name: "jpeg_compressibility", weight: 1e-2}]')),
        Variant("b", str(tmp_path / "base.yaml"), ("sampler.shift=2", "optimizer.lr=1e-4", "optimizer={lr: 2e-4}")),
    )
    whole = ComparisonPlan(
        tmp_path / "out", str(tmp_path / "base.yaml"), ("train.updates_per_epoch=1",), variants, (3, 1)
    )
    path = write_plan_file(whole, ComparisonSettings(target=0.7, metric="heldout", baseline="b"))
    file = read_plan_file(path)
    assert (file.output, file.target, file.metric, file.baseline) == (str(tmp_path / "out"), 0.7, "heldout", "b")
    again = ComparisonPlan(
        Path(str(file.output)), file.config, settings_from(file.settings), variants_of(file), seeds_of(file)
    )
    assert [run.config for run in planned_runs(again)] == [run.config for run in planned_runs(whole)]
    assert planned_runs(whole)[1].config.optimizer.lr == 2e-4


def test_the_example_of_the_documentation_is_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(root)
    text = (root / "docs" / "comparing.md").read_text(encoding="utf-8")
    (tmp_path / "c.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    file = read_plan_file(tmp_path / "c.yaml")
    runs = planned_runs(
        ComparisonPlan(
            Path(str(file.output)), file.config, settings_from(file.settings), variants_of(file), seeds_of(file)
        )
    )
    assert len(runs) == 10 and {run.config.train.epochs for run in runs} == {100}
    assert [run.config.credit.objective for run in runs[:2]] == ["clip", "hinge"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("variant: {a: {}}", "line 1: unknown key variant, did you mean variants?"),
        ("output: x\nseeds: two", "line 2: seeds: must be a number of seeds, or a list of them, got 'two'"),
        ("metric: test", "line 1: metric: must be training or heldout, got 'test'"),
        ("variants: [a, b]", "line 1: variants: must be a mapping of names"),
        ("target: high", "line 1: target: must be a number, got 'high'"),
    ],
)
def test_mistakes_in_a_file_have_a_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=f"c.yaml {said}".replace("?", r"\?")):
        read_plan_file(tmp_path / "c.yaml")


def test_other_mistakes_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seeds: [1, 1]\nvariants: {a: {config: 3}}")
    file = read_plan_file(tmp_path / "c.yaml")
    with pytest.raises(UserError, match="seeds: must be"):
        seeds_of(file)
    with pytest.raises(UserError, match=r"variants.a.config: must be the name of a YAML file, got 3"):
        variants_of(file)


# Processes


def one_run(tmp_path: Path) -> PlannedRun:
    return planned_runs(plan(tmp_path, settings=("train.epochs=2",)))[0]


def test_the_command_of_a_run_is_the_trainers_and_gives_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("sampler: {steps: 5}")
    run = planned_runs(ComparisonPlan(tmp_path, str(tmp_path / "base.yaml"), (), (NATIVE,), (2,)))[0]
    command = command_of(run, None, 0)
    assert command[:4] == [sys.executable, "-m", "pcpo_fast", "train"]
    arguments = parse(command[3:])
    assert load_config(arguments.config, arguments.settings) == run.config
    assert run.config.sampler.steps == 5


def test_a_launcher_is_given_the_script_and_its_own_numbers(tmp_path: Path) -> None:
    run = one_run(tmp_path)
    command = command_of(run, 'deepspeed --include "localhost:{slot}" --master_port {port}', 3)
    assert command[:5] == ["deepspeed", "--include", "localhost:3", "--master_port", "29503"]
    assert Path(command[5]).name == "train.py" and Path(command[5]).is_file()
    assert command[6:] == list(run.overrides)


def test_threads_and_gpus_are_divided_among_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(scheduling, "_gpus", lambda outside: ["0", "2", "5"])

    def of(how: HowToRun, slot: int = 0, **outside: str) -> tuple[str | None, str | None]:
        environment = environment_of(how, slot, outside)
        return environment.get("OMP_NUM_THREADS"), environment.get("CUDA_VISIBLE_DEVICES")

    assert of(HowToRun(jobs=1)) == ("16", None)
    assert [of(HowToRun(jobs=5), slot) for slot in (0, 2, 4)] == [("3", "0"), ("3", "5"), ("3", "2")]
    assert of(HowToRun(jobs=5), OMP_NUM_THREADS="7")[0] == "7"
    assert of(HowToRun(jobs=5, threads=2), OMP_NUM_THREADS="7")[0] == "2"
    assert of(HowToRun(jobs=4, launcher="deepspeed")) == (None, None)


def test_gpus_are_those_that_the_environment_leaves() -> None:
    assert scheduling._gpus({"CUDA_VISIBLE_DEVICES": "3, 5"}) == ["3", "5"]
    assert scheduling._gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


def test_last_words_are_the_error_or_the_last_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("epoch 1\nerror: the disk is full\nmore words\n")
    assert last_words(log) == "the disk is full"
    log.write_text("epoch 1\nRuntimeError: a bug\n\n")
    assert last_words(log) == "RuntimeError: a bug"
    log.write_text("")
    assert last_words(log) == last_words(tmp_path / "none") == ""


# Running, with a trainer that takes no time


@pytest.fixture
def launcher(tmp_path: Path) -> str:
    (tmp_path / "trainer.py").write_text(TRAINER)
    return f"{sys.executable} -S {tmp_path / 'trainer.py'}"


def shown() -> Console:
    return Console(file=io.StringIO(), width=300)


def text_of(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_failing_runs_are_named_and_the_others_go_on(tmp_path: Path, launcher: str) -> None:
    runs = planned_runs(plan(tmp_path, NATIVE, seeds=(1, 2, 3, 4, 0)))
    console = shown()
    failures = run_all(runs, 0, tmp_path / "out", HowToRun(1, 1, launcher), console, poll=0.01)
    assert [(failure.run.seed, failure.code) for failure in failures] == [(1, 2), (2, -signal.SIGTERM), (3, 1)]
    assert [failure.sentence for failure in failures] == [
        "there is no luck; allowed: some",
        "ended by signal 15 (SIGTERM)",
        "RuntimeError: a bug",
    ]
    said = text_of(console)
    assert f"native, seed 1: failed: there is no luck; allowed: some (log: {runs[0].log})" in said
    assert "native, seed 0: finished, reward 0.500 (2 of 5 runs done, 3 failed)" in said
    log = runs[4].log.read_text()
    assert log.startswith("--- 2") and "hello from seed 0" in log


def test_a_run_without_a_summary_has_failed(tmp_path: Path) -> None:
    (tmp_path / "nothing.py").write_text("print('done nothing')")
    how = HowToRun(1, 1, f"{sys.executable} -S {tmp_path / 'nothing.py'}")
    failures = run_all(planned_runs(plan(tmp_path, NATIVE)), 0, tmp_path / "out", how, shown(), poll=0.01)
    assert [(failure.code, failure.sentence) for failure in failures] == [(0, "done nothing")]


def test_as_many_runs_as_jobs_are_at_work(tmp_path: Path, launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at_work = []
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # what the caller has set is what each run gets
    monkeypatch.setattr(ComparisonProgress, "tick", lambda self, jobs: at_work.append(len(jobs)))
    runs = planned_runs(plan(tmp_path, NATIVE, seeds=(4, 10, 11, 5, 6)))
    assert run_all(runs, 0, tmp_path / "out", HowToRun(2, None, launcher), shown(), poll=0.01) == []
    assert max(at_work) == 2
    assert all((run.folder / "summary.json").is_file() for run in runs)
    assert all((run.folder / "process").read_text().split()[1] == os.environ["OMP_NUM_THREADS"] for run in runs)


def test_no_run_begins_after_its_time_and_those_at_work_end(tmp_path: Path, launcher: str) -> None:
    runs = planned_runs(plan(tmp_path, NATIVE, seeds=(4, 5)))
    console = shown()
    begun = HowToRun(1, 1, launcher, until=time.monotonic() + 1e6)

    def first_only(*arguments: object, **named: object) -> None:
        object.__setattr__(begun, "until", 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ComparisonProgress, "tick", first_only)
        assert run_all(runs, 0, tmp_path / "out", begun, console, poll=0.01) == []
    assert [(run.folder / "summary.json").is_file() for run in runs] == [True, False]
    assert "time is up: 1 run left for the next call" in text_of(console)


def test_a_launcher_that_is_not_there_is_a_users_mistake(tmp_path: Path) -> None:
    how = HowToRun(1, None, "depspeed --num_gpus 8")
    with pytest.raises(UserError, match="--launcher: depspeed cannot be started: No such file"):
        run_all(planned_runs(plan(tmp_path, NATIVE)), 0, tmp_path / "out", how, shown())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_children_and_raises(
    tmp_path: Path, launcher: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seed 8 listens to an interrupt, seed 9 has to be ended."""
    monkeypatch.setattr(processes, "PATIENCE", 4.0)  # a busy machine takes its time to end a child that listens
    runs = planned_runs(plan(tmp_path, NATIVE, seeds=(8, 9)))

    ended = []
    tick = ComparisonProgress.tick
    # Python was perhaps started in a shell's background, where Ctrl-C is ignored.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupting(self: ComparisonProgress, jobs: list[processes.RunningRun]) -> None:
        tick(self, jobs)
        if all((run.folder / "ready").exists() for run in runs):
            ended.extend(jobs)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(ComparisonProgress, "tick", interrupting)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Interrupted, match="interrupted with 1 of 3 runs done"):
            run_all(runs, 1, tmp_path / "out", HowToRun(2, 1, launcher), shown(), poll=0.01)
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert signal.getsignal(signal.SIGTERM) is before
    assert [job.process.poll() for job in ended[:2]] == [-signal.SIGINT, -signal.SIGTERM]
    assert "KeyboardInterrupt" in runs[0].log.read_text()


def test_a_child_that_is_left_behind_keeps_the_lock(tmp_path: Path, launcher: str) -> None:
    run = planned_runs(plan(tmp_path, NATIVE, seeds=(8,)))[0]
    with only_one(tmp_path / "out") as lock:
        job = processes.start_run(
            run, 0, launcher=launcher, environment=os.environ | {"OMP_NUM_THREADS": "1"}, keep_open=lock
        )
    try:
        with pytest.raises(UserError, match="or runs that it left behind"), only_one(tmp_path / "out"):
            pass
    finally:
        job.process.kill()
        job.process.wait()
    with only_one(tmp_path / "out"):
        pass


# Folders that hold something


def test_folders_are_finished_to_be_done_or_refused(tmp_path: Path) -> None:
    runs = planned_runs(plan(tmp_path, seeds=(0, 1)))
    assert check_folders(runs) == runs
    for run, epochs in ((runs[0], runs[0].config.train.epochs), (runs[1], 3)):
        (run.folder / "checkpoints" / "epoch_000003").mkdir(parents=True)
        (run.folder / "checkpoints" / "epoch_000003" / "state.json").write_text(
            json.dumps({"epoch": 3, "updates": 6, "engine": {}})
        )
        write_manifest(run.folder / "checkpoints" / "epoch_000003")
        (run.folder / "config.yaml").write_text(dump_config(run.config))
        (run.folder / "summary.json").write_text(json.dumps({"epochs": epochs}))
    assert check_folders(runs) == runs[1:]
    other = planned_runs(plan(tmp_path, seeds=(0,), settings=("optimizer.lr=0.5",)))
    with pytest.raises(
        UserError, match=r"native, seed 0: optimizer.lr: the run in .* has 1.0e-05, this configuration 0.5"
    ):
        check_folders(other)


# Progress


class Job:
    """A run at work, as it is shown."""

    def __init__(self, run: PlannedRun) -> None:
        self.run, self.progress = run, RunProgress(run.folder)

    def write(self, epochs: int) -> None:
        self.run.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"kind": "epoch", "epoch": epoch, "reward/mean": 0.1 * epoch}) for epoch in range(epochs)]
        (self.run.folder / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "upd']))


def test_progress_of_a_run_is_read_from_its_metrics(tmp_path: Path) -> None:
    job = Job(one_run(tmp_path))
    job.progress.update()
    assert (job.progress.epochs, job.progress.reward) == (0, None)
    job.write(3)
    job.progress.update()
    assert (job.progress.epochs, job.progress.reward) == (3, pytest.approx(0.2))
    job.write(0)  # the trainer took back what it will do again
    job.progress.update()
    assert job.progress.epochs == 0


def test_plain_lines_and_the_time_left(tmp_path: Path) -> None:
    runs = planned_runs(plan(tmp_path, settings=("train.epochs=10",)))
    now, console = [0.0], shown()
    first, second = Job(runs[0]), Job(runs[1])
    with ComparisonProgress(console, 2, 20, plain_interval=30, clock=lambda: now[0]) as progress:
        assert progress.seconds_left() is None
        first.write(4)  # of an earlier call
        progress.began(first)
        first.write(6)
        now[0] = 20.0
        progress.tick([first])
        assert progress.seconds_left() == pytest.approx((20 - 2) * 10)
        first.write(10)
        progress.ended(first)
        progress.began(second)
        second.write(4)
        now[0] = 50.0
        progress.tick([second])
        assert progress.seconds_left() == pytest.approx(10 * 50 / 10)
        progress.ended(second, "the disk is full")
    lines = text_of(console).splitlines()
    assert lines[0] == f"native, seed 0: training (log: {runs[0].log})"
    assert lines[1] == "native, seed 0: finished, reward 0.900 (1 of 2 runs done, about 47 s left)"
    assert lines[3] == "1 of 2 runs done, about 50 s left; pcpo, seed 0: epoch 4/10"
    assert lines[4].startswith("pcpo, seed 0: failed: the disk is full (log: ") and len(lines) == 5


def test_no_time_left_is_said_while_a_run_is_evaluated_and_epochs_taken_back_count_again(tmp_path: Path) -> None:
    runs = planned_runs(plan(tmp_path, settings=("train.epochs=10",)))
    now, console = [0.0], shown()
    first, second = Job(runs[0]), Job(runs[1])
    second.write(8)  # of an earlier call, whose last checkpoint was after 2
    with ComparisonProgress(console, 2, 12, clock=lambda: now[0]) as progress:
        for job in (first, second):
            progress.began(job)
        first.write(10)
        second.write(2)
        now[0] = 20.0
        progress.tick([first, second])
        assert progress.seconds_left() == pytest.approx((10 - 2) * 20 / 10)
        second.write(10)
        progress.tick([first, second])
        progress.ended(first)
    assert "finished, reward 0.900 (1 of 2 runs done)" in text_of(console)


def test_the_live_display_shows_all_runs_at_work(tmp_path: Path) -> None:
    runs = planned_runs(plan(tmp_path, settings=("train.epochs=10",)))
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    job = Job(runs[1])
    with ComparisonProgress(console, 4, 40) as progress:
        progress.began(job)
        job.write(3)
        progress.tick([job])
        time.sleep(0.01)
    said = text_of(console)
    assert "0 of 4 runs done" in said and "epoch 3/10  reward 0.200" in said and "all runs" in said
