"""Runs the demo for several seeds and records what it reaches: ``python benchmarks/demo_seeds.py --seeds 3``.

Another demo: ``--config configs/tiny_sd3.yaml --json benchmarks/results/demo_sd3.json``.

Writes ``benchmarks/results/demo.json``: held-out reward before and after, epochs, seconds and images per second of
each seed, on this machine. Seconds count from the start of training; loading is apart.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
KEPT = ("heldout_reward_before", "heldout_reward_after", "epochs", "seconds", "images_per_second")


def run_seed(seed: int, folder: Path, config: str, overrides: list[str]) -> dict[str, float]:
    """One run of the demo; its summary."""
    command = [sys.executable, "train.py", "--config", config, "--json", "--resume", "never"]
    command += [f"seed={seed}", f"output_dir={folder}/{seed}", *overrides]
    done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"seed {seed} failed with exit code {done.returncode}")
    summary = json.loads((folder / str(seed) / "summary.json").read_text())
    return {"seed": seed} | {name: summary[name] for name in KEPT}


def main() -> None:
    """Run the seeds and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--config", default="configs/tiny_flux.yaml", help="the demo (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=PROJECT / "benchmarks/results/demo.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for train.py")
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            runs.append(run_seed(seed, Path(folder), arguments.config, arguments.overrides))
            print(json.dumps(runs[-1]), flush=True)
    before, after = ([run[name] for run in runs] for name in KEPT[:2])
    result = {
        "command": "python benchmarks/demo_seeds.py " + " ".join(sys.argv[1:]),
        "machine": {"processors": os.cpu_count(), "architecture": platform.machine()},
        "runs": runs,
        "median": {name: statistics.median(run[name] for run in runs) for name in KEPT},
        "smallest_rise": min(b - a for a, b in zip(before, after, strict=True)),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"Held-out reward, median: {result['median'][KEPT[0]]:.3f} before, {result['median'][KEPT[1]]:.3f} after")


if __name__ == "__main__":
    main()
