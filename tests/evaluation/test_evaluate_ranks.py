"""pcpo-fast evaluate in two processes: one dies, the rest goes on, and the result is that of one process."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import ROOT
from evaluation_models import write_clip
from evaluation_runs import evaluated_run, prompt_file  # noqa: F401 - fixtures
from PIL import Image

# Loads the libraries once, and forks the processes of every launch that it reads from its input. A process can be told
# to be killed when it begins its n-th batch, counted from 0.
DRIVER = """
import json, os, signal, sys
import pcpo_fast.evaluation.evaluator
import pcpo_fast.policies.flux
import deepspeed, transformers
import pcpo_fast.evaluation.candidate_images as generating
from pcpo_fast.cli import main

def work(arguments, environment, dies_at, answer):
    os.environ.update(environment)
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{answer}.{kind}", os.O_CREAT | os.O_WRONLY), descriptor)
    sample, left = generating.sample_rows, [dies_at]
    def counted(*arguments):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return sample(*arguments)
    generating.sample_rows = counted
    code = 1
    try:
        code = main(arguments)
    finally:
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)

for line in sys.stdin:
    children = []
    for process in json.loads(line):
        child = os.fork()
        if child == 0:
            work(**process)
        children.append(child)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


class Driver:
    """Launches of the command, with what their processes said."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self.process, self.folder = process, folder
        self.launches = 0

    def launch(self, arguments: Sequence[str], *dies_at: int) -> list[tuple[int, str, str]]:
        """(exit code, output, errors) of one process or of several ranks; -1: it is not killed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        size, self.launches = len(dies_at), self.launches + 1
        ranks = []
        for rank, when in enumerate(dies_at):
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if size > 1 else {}
            environment |= {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # Where `deepspeed --module pcpo_fast` puts it: before the command.
            words = [f"--local_rank={rank}", *arguments] if size > 1 else list(arguments)
            answer = str(self.folder / f"launch{self.launches}_rank{rank}")
            ranks.append({"arguments": words, "environment": environment, "dies_at": when, "answer": answer})
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(ranks) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self.process.stdout.readline())
        said = [[Path(f"{rank['answer']}.{kind}").read_text() for kind in ("out", "err")] for rank in ranks]
        return [(code, *texts) for code, texts in zip(codes, said, strict=True)]


@contextmanager
def driver(folder: Path) -> Iterator[Driver]:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tests/support"))
    environment["TRANSFORMERS_VERBOSITY"] = "error"
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield Driver(process, folder)
    finally:
        process.kill()
        process.wait()


def pictures(output: Path) -> dict[str, tuple[int, np.ndarray]]:
    """Time of change and pixels of every image, by its name."""
    return {
        str(file.relative_to(output)): (file.stat().st_mtime_ns, np.asarray(Image.open(file)))
        for file in sorted((output / "images").rglob("*.png"))
    }


def same(one: Any, other: Any, where: str = "") -> int:
    """Hold two records against each other, numbers to rounding; returns how many numbers there were."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        return sum(same(one[key], other[key], f"{where}.{key}") for key in one)
    if isinstance(one, list):
        assert len(one) == len(other), where
        return sum(same(*pair, f"{where}[{place}]") for place, pair in enumerate(zip(one, other, strict=True)))
    if isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-6, abs=1e-9), where
        return 1
    assert one == other, where
    return 0


@pytest.mark.slow
def test_two_ranks_go_on_after_a_kill_and_make_what_one_makes(
    evaluated_run: Path,  # noqa: F811 - the fixture
    prompt_file: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    arguments = ["evaluate", "--checkpoint", "base", "--checkpoint", f"tuned={evaluated_run}", "--count", "2"]
    arguments += ["--prompts", str(prompt_file), "--metric", f"cmmd={write_clip(tmp_path / 'clip')}"]
    arguments += ["--resamples", "5", "--batch-size", "1", "--output"]  # a batch of one rounds in one way only
    output = tmp_path / "two"
    with driver(tmp_path) as started:
        first, second = started.launch([*arguments, str(output)], -1, 4)
        assert second[0] == -9
        assert first[0] == 2 and "Traceback" not in first[2], first[2]
        (line,) = (line for line in first[2].splitlines() if line.startswith("error: "))
        assert "another rank has died" in line
        before = pictures(output)
        assert 0 < len(before) < 12 and not (output / "evaluation.json").exists()

        first, second = started.launch([*arguments, str(output)], -1, -1)
        assert (first[0], second[0]) == (0, 0), first[2] + second[2]
        assert "Page:" in first[1] and "Page:" not in second[1]
        made = pictures(output)
        assert len(made) == 12 and all(made[name][0] == time for name, (time, _) in before.items())

        (single,) = started.launch([*arguments, str(tmp_path / "one")], -1)
    assert single[0] == 0, single[2]
    alone = pictures(tmp_path / "one")
    assert made.keys() == alone.keys()
    assert all(np.array_equal(made[name][1], alone[name][1]) for name in alone)
    records = [json.loads((folder / "evaluation.json").read_text()) for folder in (tmp_path / "one", output)]
    assert same(*records) > 30
