"""Kill a training run again and again, and see that it loses nothing: ``python tests/runs/kill_runs.py --kills 60``.

One process loads the libraries and forks one for every part of a run; each is killed with SIGKILL at a random moment,
two of three inside the writing of a checkpoint. After each kill every checkpoint must be whole and no more than the
interval between checkpoints lost; and a run that comes to its end must have the metrics and weights, bit for bit, of
one that was never killed.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

from tiny_pipeline import build_pipeline, tiny_config

EPOCHS, INTERVAL = 8, 2


class Killer:
    """The runs of one seed in one folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.kills: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.finished = 0

    def straight(self) -> None:
        """The run that is never killed: what the others are held against, and how long its parts take."""
        started, seen, written = time.monotonic(), 0.0, []
        process = self._start("straight")
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            now = time.monotonic()
            if ended:
                break
            if self._is_writing("straight"):
                seen = seen or now
            elif seen:
                written.append(now - seen)
                seen = 0.0
            time.sleep(0.003)
        if status:
            raise RuntimeError(f"the run that nobody kills failed: {self._said('straight')}")
        self.whole = time.monotonic() - started
        self.writing = sum(written) / len(written)
        self.expected = self.results("straight")

    def run_until(self, kills: int) -> None:
        """Kill runs of the same configuration, each until it is through, until there are enough kills."""
        while len(self.kills) < kills and not self.problems:
            name = f"run_{self.finished}"
            while self._part(name):
                self._check(name)
                if len(self.kills) > 3 * kills + 20:
                    self.problems.append(f"{name} does not come to its end")
                    return
            if self.problems:
                return
            self.finished += 1
            if self.results(name) != self.expected:
                self.problems.append(f"{name} ended with other metrics or weights than the run that was never killed")

    def results(self, name: str) -> tuple[list[dict[str, Any]], str]:
        """Metrics without what a clock measured, and a digest of the exported weights."""
        metrics = [
            {key: value for key, value in line.items() if not key.startswith(("time", "throughput", "memory"))}
            for line in map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        ]
        (file,) = (self.folder / name / "export").rglob("*.safetensors")
        return metrics, hashlib.sha256(file.read_bytes()).hexdigest()

    def _part(self, name: str) -> bool:
        """Start or resume a run; True if it was killed, False if it came to its end."""
        process, started = self._start(name), time.monotonic()
        in_write = len(self.kills) % 3 > 0
        after = self.random.uniform(0, self.writing if in_write else 0.5 * self.whole)
        writes = self.random.choice((1, 2))  # the second write of a part lets the run come forward
        since, writing = None if in_write else started, False
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            now = time.monotonic()
            if ended:
                if status:
                    self.problems.append(f"{name} ended with {os.waitstatus_to_exitcode(status)}: {self._said(name)}")
                return False
            if since is None and self._is_writing(name) != writing:
                writing = not writing
                writes -= writing
                since = now if writing and not writes else None
            if since is not None and now - since >= after:
                break
            time.sleep(0.003)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        hidden = {path.name.rpartition(".")[2] for path in (self.folder / name / "checkpoints").glob(".epoch_*")}
        self.kills.append({"run": name, "after_seconds": round(now - started, 3), "left_behind": sorted(hidden)})
        return True

    def _check(self, name: str) -> None:
        from pcpo_fast.runs.checkpoint import checkpoints, read_state
        from pcpo_fast.runs.manifest import damage_of

        found = checkpoints(self.folder / name / "checkpoints")
        damaged = [f"{path.name}: {problem}" for path in found if (problem := damage_of(path)) is not None]
        if damaged:
            self.problems.append(f"{name} has a damaged checkpoint: {damaged}")
        file = self.folder / name / "metrics.jsonl"
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        records = [json.loads(line) for line in lines if line.endswith(b"\n")]
        done = max((record["epoch"] + 1 for record in records if record["kind"] == "epoch"), default=0)
        saved = int(read_state(found[-1])["epoch"]) if found else 0
        self.kills[-1] |= {"epochs_done": done, "epochs_saved": saved, "epochs_lost": done - saved}
        if done - saved > INTERVAL:
            self.problems.append(f"{name} had done {done} epochs, but only {saved} are saved")

    def _is_writing(self, name: str) -> bool:
        return any((self.folder / name / "checkpoints").glob(".epoch_*.tmp"))

    def _said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-2000:]

    def _start(self, name: str) -> int:
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            log = os.open(self.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            from pcpo_fast.training.trainer import train

            train(
                tiny_config(
                    self.folder / "pipeline",
                    f"output_dir={self.folder / name}",
                    f"prompts.train={self.folder / 'prompts.txt'}",
                    "prompts.heldout=null",
                    f"train.epochs={EPOCHS}",
                    f"checkpoint.every={INTERVAL}",
                    "rollout.images_per_prompt=2",
                    "sampler.steps=3",
                    "train.micro_batch_size=2",
                    "train.ema_decay=0.9",
                )
            )
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(code)


def kill_runs(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill until there are ``kills`` kills and the last run is through; returns what happened."""
    import pcpo_fast.policies.flux
    import pcpo_fast.training.trainer  # noqa: F401 - loaded once, before the forks

    build_pipeline(folder / "pipeline")
    (folder / "prompts.txt").write_text("a red circle\na green square\n")
    killer = Killer(folder, seed)
    killer.straight()
    killer.run_until(kills)
    left = [kill["left_behind"] for kill in killer.kills]
    return {
        "kills": len(killer.kills),
        "kills_inside_a_checkpoint_write": sum("tmp" in names for names in left),
        "kills_inside_a_removal_or_exchange": sum(bool({"old", "removed"} & set(names)) for names in left),
        "runs_through_to_the_end_bit_identical": killer.finished,
        "epochs_per_run": EPOCHS,
        "interval": INTERVAL,
        "most_epochs_lost": max((kill.get("epochs_lost", 0) for kill in killer.kills), default=0),
        "problems": killer.problems,
        "seconds": {"uninterrupted_run": round(killer.whole, 2), "checkpoint_write": round(killer.writing, 3)},
        "seed": seed,
        "each": killer.kills,
    }


def in_jobs(jobs: int, kills: int, seed: int) -> dict[str, Any]:
    """The kills shared among processes, each with runs and a seed of its own; their results as one."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{job}.json" for job in range(jobs)]
        share = str(-(-kills // jobs))
        commands = [
            [sys.executable, __file__, "--kills", share, "--seed", str(seed + job), "--json", str(file)]
            for job, file in enumerate(files)
        ]
        processes = [subprocess.Popen(command, start_new_session=True) for command in commands]
        for process in processes:
            process.wait()
        parts = [json.loads(file.read_text()) for file in files]
    merged: dict[str, Any] = dict(parts[0])
    for name, value in parts[0].items():
        values = [part[name] for part in parts]
        if name == "most_epochs_lost":
            merged[name] = max(values)
        elif name in ("seconds", "seed"):
            merged[name] = values
        elif isinstance(value, int | list) and name not in ("epochs_per_run", "interval"):
            merged[name] = sum(values, type(value)())
    return merged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the kills")
    parser.add_argument("--json", metavar="FILE", required=True, help="where the counts go")
    arguments = parser.parse_args()
    if arguments.jobs > 1:
        result = in_jobs(arguments.jobs, arguments.kills, arguments.seed)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = kill_runs(arguments.kills, arguments.seed, Path(folder))
    result["command"] = " ".join(["python", "tests/runs/kill_runs.py", *sys.argv[1:]])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result["commit"] = os.environ.get("PCPO_COMMIT", commit)
    each = result.pop("each")
    text = json.dumps(result, indent=1)[:-2] + ',\n "each": [\n  '
    text += ",\n  ".join(json.dumps(kill) for kill in each) + "\n ]\n}\n"
    Path(arguments.json).write_text(text)
    print({key: value for key, value in result.items() if key != "each"})
    return int(bool(result["problems"]))


if __name__ == "__main__":
    raise SystemExit(main())
