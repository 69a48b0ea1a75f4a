"""``import pcpo_fast``: six functions, loaded when they are called, on values, with results and one-sentence errors."""

import gc
import inspect
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cli_runs import write_config
from notebook_cells import execute
from rich.console import Console
from tiny_pipeline import PROMPTS, redness

import pcpo_fast
from pcpo_fast.config.loading import load_config as load_file
from pcpo_fast.distributed.preemption import EXIT_PREEMPTED, Stopped
from pcpo_fast.engine.engine import Engine
from pcpo_fast.errors import UserError
from pcpo_fast.interface.for_python import for_python, in_python
from pcpo_fast.interface.training import TrainedRun

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "tiny_flux.yaml"
QUIET = Console(quiet=True)


def test_importing_loads_no_library(record_property: Callable[[str, object], None]) -> None:
    code = (
        "import json, sys, time\n"
        "start = time.perf_counter()\n"
        "import pcpo_fast\n"
        "heavy = {'diffusers', 'numpy', 'pydantic', 'rich', 'torch', 'transformers', 'triton', 'yaml'}\n"
        "print(json.dumps([time.perf_counter() - start, sorted(heavy & set(sys.modules)), dir(pcpo_fast)]))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, heavy, names = json.loads(answer.stdout)
    record_property("seconds", seconds)
    assert heavy == []
    assert names == ["__version__", "compare", "evaluate", "export", "load_config", "sample", "train"]


def test_the_stub_names_what_is_there() -> None:
    stub = (ROOT / "pcpo_fast" / "__init__.pyi").read_text(encoding="utf-8")
    for name in pcpo_fast.__all__:  # type: ignore[attr-defined]
        if name != "__version__":
            function = getattr(pcpo_fast, name)
            assert f"from {function.__module__} import {name} as {name}\n" in stub
            assert function.__doc__ and list(inspect.signature(function).parameters), name
    with pytest.raises(AttributeError, match="'pcpo_fast' has no attribute 'fit'"):
        _ = pcpo_fast.fit  # type: ignore[attr-defined]


def test_settings_may_be_written_in_every_form() -> None:
    expected = load_file(TINY, ["train.epochs=7", "optimizer.lr=1e-3", "rewards=[{name: jpeg_compressibility}]"])
    rewards = [{"name": "jpeg_compressibility"}]
    for settings in (
        {"train.epochs": 7, "optimizer.lr": 1e-3, "rewards": rewards},
        {"train": {"epochs": 7}, "optimizer": {"lr": 1e-3}, "rewards": "jpeg_compressibility"},
        ["train.epochs=7", "optimizer.lr=1e-3", "rewards=[{name: jpeg_compressibility}]"],
    ):
        assert pcpo_fast.load_config(TINY, settings) == expected
    config = pcpo_fast.load_config(str(TINY), {"train.epochs": 7}, rewards="jpeg_compressibility")
    assert pcpo_fast.load_config(config, {"optimizer.lr": 1e-3}) == expected
    assert pcpo_fast.load_config(config) == config
    assert config.train.epochs == 7 and pcpo_fast.load_config(config, {"train.epochs": 8}).train.epochs == 8
    mapping = {"model": {"path": Path("somewhere")}, "train.epochs": 3}
    assert pcpo_fast.load_config(mapping) == load_file(None, ["model.path=somewhere", "train.epochs=3"])


def test_rewards_are_named_by_their_module() -> None:
    config = pcpo_fast.load_config(TINY, rewards=[redness, {"name": redness, "label": "half", "weight": 0.5}])
    found = [(reward.name, reward.label, reward.weight) for reward in config.rewards]
    assert found == [("tiny_pipeline:redness", "redness", 1.0), ("tiny_pipeline:redness", "half", 0.5)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f("nowhere.yaml"), "config file nowhere.yaml does not exist"),
        (
            lambda f: f({"train.epoch": 1}),
            "setting (train.epoch=1): unknown key train.epoch, did you mean train.epochs?",
        ),
        (lambda f: f(TINY, {"train.epochs": "x"}), 'setting (train.epochs="x"): train.epochs: must be '),
        (lambda f: f(TINY, ["train.epochs=x"]), "setting (train.epochs=x): train.epochs: must be "),
        (lambda f: f(TINY, "train.epochs=3"), "settings: must be a mapping such as "),
        (
            lambda f: f(TINY, {"train.epochs": {1, 2}}),
            "setting train.epochs: {1, 2} of type set is not a configuration value",
        ),
        (lambda f: f(f(TINY), {"algorithm": "dancegrpo"}), "algorithm: a loaded configuration already contains "),
        (lambda f: f(TINY, rewards=lambda i, p, m: i), "reward <lambda>.<locals>.<lambda>: must be a function or a "),
        (lambda f: f(TINY, {"rewards": [{"name": redness, "wait": 2}]}), "setting (rewards="),
    ],
)
def test_a_wrong_configuration_is_one_sentence(call: Callable[[Any], object], message: str) -> None:
    with pytest.raises(UserError) as refused:
        call(pcpo_fast.load_config)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)
    assert refused.value._render_traceback_() == [f"error: {refused.value}"]  # IPython's protocol


@pytest.mark.parametrize(
    ("message", "python"),
    [
        ("--batch-size: must be at least 1, got 0", "batch_size: must be at least 1, got 0"),
        ("--guidance-scale-reward: give one with --run RUN", "scales: give one with runs=RUN"),
        ("accept it with --resume accept-changes", "accept it with resume=accept-changes"),
        ("it with --epoch; or --resume auto", "it with epoch; or resume=auto"),
        ("lower --batch-size; `pcpo-fast plan --run A` says", "lower batch_size; `pcpo-fast plan --run A` says"),
        ("command line (train.epochs=x): wrong", "setting (train.epochs=x): wrong"),
    ],
)
def test_messages_name_arguments(message: str, python: str) -> None:
    assert in_python(message, ("batch_size", "runs", "scales", "epoch", "resume")) == python


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_run_that_a_signal_ends_raises_what_python_raises(number: int, raised: type[BaseException]) -> None:
    def stop() -> None:
        raise Stopped(number)

    with pytest.raises(raised) as left:
        for_python(stop)()
    assert number == signal.SIGINT or left.value.args == (EXIT_PREEMPTED,)


# Runs.


@pytest.fixture(scope="module")
def config_file(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("python"), pipeline_folder)


@pytest.fixture(scope="module")
def run(config_file: Path) -> TrainedRun:
    return pcpo_fast.train(config_file, rewards=redness, console=QUIET)


def test_training_returns_the_run(run: TrainedRun, config_file: Path) -> None:
    assert run.folder == config_file.parent / "run"
    assert run.summary == json.loads((run.folder / "summary.json").read_text())
    assert {record["kind"] for record in run.metrics} == {"epoch", "update", "evaluation"}
    assert run.before_after is not None and run.report.is_file() and any(run.weights.iterdir())


def test_training_twice_in_a_process(run: TrainedRun, config_file: Path, tmp_path: Path) -> None:
    """The second run has the numbers of the first, whatever the global generator did, and leaves nothing behind."""
    torch.rand(3)
    handler = signal.getsignal(signal.SIGINT)
    again = pcpo_fast.train(config_file, {"output_dir": tmp_path / "again"}, rewards=redness, console=QUIET)
    times = {"seconds", "images_per_second"}
    assert {key: again.summary[key] for key in again.summary if key not in times} == {
        key: run.summary[key] for key in run.summary if key not in times
    }
    assert signal.getsignal(signal.SIGINT) is handler
    assert not torch.distributed.is_initialized()
    del again
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is Engine], "a model stays in memory"


def test_a_finished_run_is_not_trained_again(run: TrainedRun, config_file: Path) -> None:
    before = (run.folder / "metrics.jsonl").read_bytes()
    assert pcpo_fast.train(config_file, rewards=redness, console=QUIET) == run
    assert (run.folder / "metrics.jsonl").read_bytes() == before


def test_samples(run: TrainedRun, tmp_path: Path) -> None:
    prompts = [PROMPTS[0], {"prompt": PROMPTS[1], "metadata": {"n": 1}}]
    samples = pcpo_fast.sample(prompts, runs=run, count=2, rewards=redness)
    assert samples.captions == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert [image.size for image in samples.images] == [(24, 16)] * 4
    assert [len(scores) for scores in samples.scores.values()] == [4] and samples.written is None
    expected = redness(samples.columns[0].images, samples.captions, [{}] * 4)
    assert samples.scores["redness"] == pytest.approx(expected.tolist())
    swept = pcpo_fast.sample(PROMPTS[0], runs=[run], count=1, sweep=[0, 1], output=tmp_path / "s.png")
    assert len(swept.images) == 2 and (tmp_path / "s.png").is_file()
    tuned = pcpo_fast.sample(PROMPTS[0], runs=run, count=1, scales=1)
    assert (swept.columns[1].images == tuned.columns[0].images).all()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    assert len(pcpo_fast.sample(tmp_path / "prompts.txt", config=run.folder / "config.yaml", count=1).images) == 4


def test_evaluation_export_and_comparison_take_runs(run: TrainedRun, tmp_path: Path) -> None:
    judged = pcpo_fast.evaluate(
        {"start": "base", "red": run}, count=2, limit=2, rewards=redness, preference=("red", "start"), output=tmp_path
    )
    assert judged is not None and judged.result.names == ["start", "red"]
    assert judged.page.is_file() and judged.preference is not None and judged.preference[0].is_file()
    assert list(judged.record["checkpoints"][1]["rewards"]) == ["redness"]
    exported = pcpo_fast.export(run, tmp_path / "weights", epoch=1)
    assert (exported.kind, exported.epoch) == ("transformer", 1) and any(exported.folder.iterdir())
    compared = pcpo_fast.compare(runs={"one": run, "other": [run]}, output=tmp_path / "comparison")
    assert [variant.name for variant in compared.result.variants] == ["one", "other"]
    assert compared.report.is_file() and all(figure.is_file() for figure in compared.figures)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: pcpo_fast.sample("a", runs=run, count=0), "count: must be at least 1, got 0"),
        (lambda run: pcpo_fast.sample([], runs=run), "prompts: must not be empty"),
        (lambda run: pcpo_fast.sample("a", runs="nowhere"), "runs: nowhere is not a run directory"),
        (lambda run: pcpo_fast.sample("a", runs=run, config=TINY), "config: a run has its own configuration"),
        (lambda run: pcpo_fast.sample("a", config=TINY, scales=1), "scales: needs a trained run to scale; give one "),
        (lambda run: pcpo_fast.sample("a", runs=run, folder="x"), "folder: also needs output, the image file"),
        (lambda run: pcpo_fast.evaluate([]), "checkpoints: missing; for example checkpoints=base"),
        (lambda run: pcpo_fast.evaluate("base", shown=-1), "shown: must be at least 0, got -1"),
        (
            lambda run: pcpo_fast.export(run, format="koya"),
            "format: must be one of diffusers, comfyui, kohya, got 'koya', did you mean kohya?",
        ),
        (lambda run: pcpo_fast.export(run, epoch=9), "epoch: "),
        (
            lambda run: pcpo_fast.compare(runs={"a": run}),
            "output: missing; give the folder of the comparison",
        ),
        (lambda run: pcpo_fast.compare(runs={"a": run}, seeds=2, output="x"), "runs compares existing runs, so "),
        (
            lambda run: pcpo_fast.compare({"a": {}}, metric="x", output="x"),
            "metric: must be one of training, heldout, got 'x'",
        ),
        (
            lambda run: pcpo_fast.compare({"a": {"seed": 3}}, config=TINY, output="x"),
            "variant a: seed cannot be set here",
        ),
        (lambda run: pcpo_fast.train(run.folder / "config.yaml", resume="gone"), "resume: gone is not a folder"),
    ],
)
def test_misuse_is_one_sentence(call: Callable[[TrainedRun], object], message: str, run: TrainedRun) -> None:
    with pytest.raises(UserError) as refused:
        call(run)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


CELL = """
class Reward:
    def __init__(self, sign=1):
        self.sign = sign

    def __call__(self, images, prompts, metadata):
        return self.sign * images.mean((1, 2, 3))
"""


def test_a_reward_of_a_notebook(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known by its code: a run does not go on with another one, and runs of other processes are refused."""
    notebook = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    execute(CELL, "<cell 1>", notebook)
    settings = {"output_dir": tmp_path / "run", "train.epochs": 1}

    def rewards() -> dict[str, Any]:
        return {"name": notebook.__dict__["Reward"], "options": {"sign": -1}}

    run = pcpo_fast.train(config_file, settings, rewards=rewards(), console=QUIET)
    assert "heldout/reward/Reward" in run.metrics[-1]
    execute(CELL.replace("mean(", "amax("), "<cell 2>", notebook)
    with pytest.raises(
        UserError, match=r"reward Reward, module __main__ \(Reward in the notebook\).*resume=accept-cha"
    ):
        pcpo_fast.train(config_file, settings | {"train.epochs": 2}, rewards=rewards(), console=QUIET)
    execute(CELL, "<cell 3>", notebook)
    more = pcpo_fast.train(config_file, settings | {"train.epochs": 2}, rewards=rewards(), console=QUIET)
    assert more.summary["epochs"] == 2
    with pytest.raises(
        UserError, match="variant a: every run is a separate process, which cannot import __main__:Reward"
    ):
        pcpo_fast.compare({"a": {"rewards": rewards()}}, config=config_file, output=tmp_path / "comparison", seeds=1)
