"""The command line: help, mistakes in the command itself, and ``credit``."""

import atexit
import errno
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import (
    ROOT,
    Output,
    call,
)
from PIL import Image

from pcpo_fast import __version__
from pcpo_fast.cli import COMMANDS, build_parser, parse, program
from pcpo_fast.commands import report
from pcpo_fast.config.loading import load_config
from pcpo_fast.prompts import epoch_prompts
from pcpo_fast.reporting import plots
from pcpo_fast.training.run_inputs import RunInputs

Capture = pytest.CaptureFixture[str]
NAMES = tuple(command.__name__.rpartition(".")[2].replace("_", "-") for command in COMMANDS)


# Help


def test_help_lists_every_command(capsys: Capture) -> None:
    answer = call(capsys, "--help")
    assert answer.code == 0
    for name in NAMES:
        assert re.search(rf"\n    {name}[ \n]", answer.out)  # argparse puts the longest name on a line of its own
    assert NAMES == (
        "train",
        "configs",
        "plan",
        "preflight",
        "reproduce",
        "sample",
        "evaluate",
        "votes",
        "compare",
        "credit",
        "step-gradients",
        "first-difference",
        "report",
        "export",
        "serve-reward",
    )


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command_has_an_example_that_parses(name: str, capsys: Capture) -> None:
    answer = call(capsys, name, "--help")
    assert answer.code == 0
    assert "--json" in answer.out
    lines = re.sub(r" \\\n +", " ", answer.out).splitlines()  # examples that go on in the next line
    examples = [line for line in lines if line.startswith(f"  pcpo-fast {name} ")]
    examples += [line.replace("python train.py", "pcpo-fast train") for line in lines if "train.py" in line]
    assert examples
    for line in examples:
        words = shlex.split(line.split("      ")[0].replace("deepspeed train.py", "pcpo-fast train"))
        build_parser().parse_args(words[1:])


def test_version(capsys: Capture) -> None:
    assert call(capsys, "--version").out == f"pcpo-fast {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "required: COMMAND"),
        (("trian",), "invalid choice: 'trian', did you mean train? (choose from"),
        (("train", "--nope"), "unknown arguments: --nope (see pcpo-fast train --help)"),
        (("train", "--confg", "f"), "unknown arguments: --confg, did you mean --config? (see pcpo-fast train --help"),
        (("plan", "--gpu-memry=8"), "--gpu-memry=8, did you mean --gpu-memory? (see pcpo-fast plan --help"),
        (("export", "runs/a", "--fromat", "kohya"), "did you mean --format? (see pcpo-fast export --help"),
        (("train", "--micro_batch_siz", "3"), "; a setting is written train.micro_batch_size=VALUE"),
        (("train", "--res", "never"), "unknown arguments: --res"),
        (("train", "--deepspeed", "ds.json"), "--deepspeed; a setting is written deepspeed=ds.json"),
        (("train", "--deepspeed=ds.json"), "--deepspeed=ds.json; a setting is written deepspeed=ds.json"),
        (("train", "--output-dir", "runs/a"), "--output-dir; a setting is written output_dir=runs/a"),
        (("train", "--lr=1e-4"), "--lr=1e-4; a setting is written optimizer.lr=1e-4"),
        (("plan", "--gpus", "0_8"), "--gpus: invalid int value: '0_8'"),
        (("plan", "--gpus", "08"), "--gpus: invalid int value: '08'"),
        (("plan", "--gpu-memory", "8_0"), "--gpu-memory: invalid float value: '8_0'"),
        (("credit", "--sampler", "euler"), "invalid choice: 'euler'"),
        (("credit", "x=1"), "unknown arguments: x=1"),
        (("report",), "required: RUN"),
        (("sample",), "one of the arguments --prompt --prompts is required"),
        (("sample", "--prompt", "a", "--run", "r", "--config", "c"), "not allowed with"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(arguments: tuple[str, ...], words: str, capsys: Capture) -> None:
    answer = call(capsys, *arguments)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert words in answer.err
    assert "(see pcpo-fast" in answer.err and "--help)" in answer.err


def test_a_path_given_as_an_option_may_begin_with_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    arguments = parse(["train", "--config=~/run.yaml", "--resume=~/old", "output_dir=~/new"])
    assert (arguments.config, arguments.resume) == ("/somewhere/run.yaml", "/somewhere/old")


def test_settings_may_stand_anywhere() -> None:
    arguments = parse(
        ["train", "a.b=1", "--config", "f", "c=2", "--resume", "never", "d=-1", "--local_rank=3", "--json", "e=x y"]
    )
    assert arguments.settings == ["a.b=1", "c=2", "d=-1", "e=x y"]
    assert (arguments.config, arguments.resume, arguments.json, arguments.local_rank) == ("f", "never", True, 3)


def test_warnings_are_one_line_without_source(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: Any) -> int:
        warnings.warn("look\n  out", stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        warnings.warn("soon", FutureWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(report, "run", run)
    answer = call(capsys, "report", "x")
    assert answer == Output(0, "", "warning: look out\n")


def test_another_python_is_one_sentence(tmp_path: Path) -> None:
    """One that has none of the packages, as where the environment was not activated."""
    bare = subprocess.run(
        [sys.executable, "-S", str(ROOT / "train.py"), f"output_dir={tmp_path}"], capture_output=True, text=True
    )
    assert bare.returncode == 2 and bare.stdout == ""
    assert bare.stderr.count("\n") == 1 and f"is not installed for {sys.executable}: activate" in bare.stderr


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_cannot_write_is_one_line_and_a_fault_has_its_traceback(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[Exception] = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events"), KeyError("fault")]

    def fail() -> None:
        raise errors.pop(0)

    def run(arguments: Any) -> int:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        return 0

    monkeypatch.setattr(report, "run", run)
    assert call(capsys, "report", "x").err == "warning: [Errno 28] No space left on device: 'events'\n"
    error = call(capsys, "report", "x").err
    assert "Traceback" in error and error.endswith("KeyError: 'fault'\n")


def test_a_fault_of_the_program_is_a_sentence_that_names_its_traceback(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(arguments: Any) -> int:
        return int({}["no\nsuch"])

    monkeypatch.setattr(report, "run", run)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(atexit, "register", lambda function: None)
    with pytest.raises(SystemExit) as left:
        program(["report", "x"])
    error = capsys.readouterr().err
    [file] = tmp_path.iterdir()
    assert left.value.code == 1 and error.count("\n") == 1
    assert error.startswith("error: KeyError: 'no\\nsuch' ") and str(file) in error
    assert "Traceback" in file.read_text() and __version__ in file.read_text()

    file.unlink()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))  # nowhere to write: better told than lost
    with pytest.raises(SystemExit):
        program(["report", "x"])
    assert "Traceback" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m pcpo_fast credit --steps 1000 | head -n 1"
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert answer.stderr == ""
    assert "credit per step" in answer.stdout


# credit


def test_credit_json_has_the_published_numbers(capsys: Capture) -> None:
    answer = call(
        capsys, *["credit", "--sampler", "dance", "--steps", "16", "--noise", "0.3", "--shift", "3", "--json"]
    )
    assert (answer.code, answer.err) == (0, "")
    record = json.loads(answer.out)
    assert record["zeta"] == pytest.approx(13.343190914766362, rel=1e-14)
    assert (min(record["native"]), max(record["native"])) == (
        pytest.approx(0.4915, abs=5e-5),
        pytest.approx(1.667, abs=5e-5),
    )
    lengths = -np.diff(record["times"])
    assert record["proportionate"] == pytest.approx(list(record["zeta"] * lengths), rel=1e-12)
    assert record["used"] == record["proportionate"]
    assert (record["times"][0], record["times"][-1], len(record["times"])) == (1.0, 0.0, 17)
    assert record["trained_steps"] == list(range(16))


@pytest.mark.parametrize(
    ("arguments", "check"),
    [
        ("--sampler ddim --steps 50", lambda r: np.mean(r["native"]) == pytest.approx(0.5168997, abs=5e-8)),
        (
            "--sampler ddim --steps 50 --variance reshaped --weight 4.5 --rule uniform",
            lambda r: len(set(r["used"])) == 1,
        ),
        ("--sampler flow --steps 10", lambda r: r["zeta"] == pytest.approx(4.29675, abs=5e-6)),
        ("--sampler cps --steps 10", lambda r: r["native"][-1] == 0 and 9 not in r["trained_steps"]),
        ("--rule grpo_guard", lambda r: r["rule"] == "grpo_guard" and r["used"] != r["native"]),
    ],
)
def test_credit_of_every_sampler(arguments: str, check: Any, capsys: Capture) -> None:
    answer = call(capsys, "credit", "--json", *arguments.split())
    assert answer.code == 0, answer.err
    assert check(json.loads(answer.out))


def test_credit_table_and_plot(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 80 columns every heading is whole; the rule is in the picture, too."""
    monkeypatch.setenv("COLUMNS", "80")
    drawn: list[list[str]] = []
    save = plots.save_figure

    def saved(figure: Any, path: Path) -> None:
        drawn.append([text.get_text() for text in figure.axes[0].get_legend().get_texts()])
        save(figure, path)

    monkeypatch.setattr(plots, "save_figure", saved)
    wide = call(capsys, "credit", "--rule", "cps_published").out
    assert "…" not in wide and all(name in wide for name in ("native", " proportionate ", "cps_published"))
    plot = tmp_path / "new" / "credit.png"
    answer = call(capsys, "credit", "--sampler", "cps", "--steps", "5", "--rule", "grpo_guard", "--plot", plot)
    assert answer.code == 0
    assert "zeta" in answer.out and "no noise" in answer.out and "grpo_guard" in answer.out
    assert f"Plot: {plot}" in answer.out
    assert [name.partition(":")[0] for name in drawn[0]] == ["native", "proportionate", "grpo_guard"]
    with Image.open(plot) as image:
        assert image.format == "PNG"
        assert min(image.size) > 100
        assert len(np.unique(np.asarray(image.convert("L")))) > 10  # something is drawn


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--sampler dance --eta 1", "--eta does not apply to dance, which accepts --noise, --shift"),
        ("--sampler cps --weight 1", "--weight does not apply to cps"),
        ("--sampler ddim --noise 0.3", "--noise does not apply to ddim, which accepts --eta, --variance, --weight"),
        ("--sampler ddim --shift 3", "--shift does not apply to ddim"),
        ("--steps 1", "--steps: must be from 2 to 1000, got 1"),
        ("--noise 0", "noise"),
        ("--noise -1", "noise"),
        ("--shift 0", "shift"),
        ("--rule best", "argument --rule: invalid choice: 'best'"),
        ("--rule fair_clipp", "did you mean fair_clip?"),
        ("--sampler ddim --steps 25 --variance reshaped --weight 4.5", "credit: "),
        ("--sampler ddim --steps 50 --variance exact --weight 0.1", "credit: "),
        ("--plot file/credit.png", "--plot file/credit.png: cannot be written"),
        ("--plot credit.xyz", "--plot credit.xyz: cannot be written"),
    ],
)
def test_credit_refuses(
    arguments: str, words: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    answer = call(capsys, "credit", *arguments.split())
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert words in answer.err


def test_only_the_prompts_that_some_epoch_samples_are_needed(tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("".join(f"a red circle {index}\n" for index in range(1000)))
    config = load_config(
        None,
        [
            f"prompts.train={tmp_path / 'many.txt'}",
            "prompts.heldout=null",
            "train.epochs=3",
            "rewards=[{name: jpeg_compressibility}]",
        ],
    )
    inputs = RunInputs.load(config)
    sampled = {inputs.prompts[i].text for epoch in range(3) for i in epoch_prompts(1000, 4, epoch, config.seed)}
    assert set(inputs.texts) == sampled and len(inputs.texts) == 12


# The end of the process


LEAVING = """
import threading, torch
from pcpo_fast import cli

begun = threading.Event()

def reward():
    square = torch.randn(700, 700)
    while True:
        square @ square
        begun.set()

def main(arguments):
    threading.Thread(target=reward, daemon=True).start()
    begun.wait()
    print("said")
    return 75

cli.main = main
cli.program()
"""


def test_the_exit_code_is_the_commands_whatever_its_threads_are_at() -> None:
    """One that comes back from C++ while Python is being taken down would abort the process."""
    ended = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=200)
    assert (ended.returncode, ended.stdout, ended.stderr) == (75, "said\n", "")
