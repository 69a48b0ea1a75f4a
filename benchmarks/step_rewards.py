"""How well the predictions of each step foretell a reward, on the frozen weights of tiny FLUX.

    python benchmarks/step_rewards.py --json FILE

samples five epochs of 8 prompts x 24 images with each reward; the learning rate is so small that no weight changes. By
step: the correlation of the predictions' rewards with the final ones, the slope beta, and the correlation of a gain
with the next one (docs/stepwise.md).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parents[1]))

from revisions import ROOT, environment

from pcpo_fast.reporting.metrics_file import find_metrics, read_metrics
from pcpo_fast.reporting.series import step_series

REWARDS = ("caption_match", "jpeg_compressibility")
SERIES = {"correlation": "stepwise/correlation", "slope": "stepwise/beta", "next_gain": "stepwise/gain_correlation"}
SETTINGS = (
    *("sampler.steps=16", "sampler.noise=0.7", "rollout.prompts_per_epoch=8", "rollout.images_per_prompt=24"),
    *("advantage.steps=gain", "optimizer.lr=1e-30", "train.epochs=5", "train.updates_per_epoch=1"),
    *("credit.fraction=0.1", "prompts.heldout=null", "checkpoint.every=0", "logging.tensorboard=false"),
)


def foretold(folder: Path) -> dict[str, dict[int, float]]:
    """By measure and step: means over a run's epochs; of the slope, which is over all epochs, the last value."""
    path = find_metrics(folder)
    assert path is not None, folder
    records = read_metrics(path)
    found: dict[str, dict[int, float]] = {}
    for name, prefix in SERIES.items():
        curves = sorted(step_series(records, prefix).items())
        found[name] = {step: curve.values[-1] if name == "slope" else fmean(curve.values) for step, curve in curves}
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the numbers")
    chosen = parser.parse_args(arguments)
    if not chosen.json.absolute().parent.is_dir():
        parser.error(f"--json {chosen.json}: its folder does not exist")
    results = {}
    for reward in REWARDS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pcpo_fast", "train", "--config", "configs/tiny_flux.yaml", *SETTINGS]
            run = [*command, f'rewards=[{{name: "{reward}"}}]', f"output_dir={folder}/run"]
            subprocess.run(run, cwd=ROOT, env=environment(ROOT), stdout=subprocess.DEVNULL, check=True)
            results[reward] = foretold(Path(folder) / "run")
    chosen.json.write_text(json.dumps(results, indent=1) + "\n")
    for reward, found in results.items():
        for name, values in found.items():
            print(f"{reward} {name}: {' '.join(f'{value:.2f}' for value in values.values())}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
