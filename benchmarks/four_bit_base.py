"""Adapters trained on a base in four bits, used on it and on the original one:
``python benchmarks/four_bit_base.py --json benchmarks/results/four_bit_base.json``.

The demo with LoRA, with ``model.base_weights`` full and nf4; held-out rewards of every run on both bases.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import pcpo_fast

BASES = ("full", "nf4")
LORA = {"model.finetune": "lora", "model.lora.rank": 16, "model.lora.alpha": 32.0, "optimizer.lr": 1e-3}


def rewards(checkpoint: str | Path, base: str, output: Path, config: dict[str, Any]) -> float:
    """Mean held-out reward of a checkpoint's images on a base."""
    settings = config | {"model.base_weights": base}
    found = pcpo_fast.evaluate({"it": checkpoint}, config="tiny_flux", settings=settings, count=4, output=output)
    assert found is not None
    return float(found.record["checkpoints"][0]["rewards"]["caption_match"]["mean"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--runs", type=Path, default=Path("runs/four_bit_base"), help="folder of the runs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = LORA | {"model.embedding_cache": str(arguments.runs / "embeddings")}
    before = {base: rewards("base", base, arguments.runs / f"base_{base}", config) for base in BASES}
    rows = []
    for seed in range(arguments.seeds):
        for trained in BASES:
            folder = arguments.runs / f"{trained}_{seed}"
            settings = config | {"seed": seed, "model.base_weights": trained, "output_dir": str(folder)}
            settings |= {"train.epochs": arguments.epochs, "evaluation.every": 0}
            pcpo_fast.train("tiny_flux", settings, console=Console(quiet=True))
            on = {base: rewards(folder, base, arguments.runs / f"{trained}_{seed}_on_{base}", config) for base in BASES}
            rows.append({"seed": seed, "trained_on": trained, "reward_on": on})
            print(rows[-1], flush=True)
    made = {"torch": torch.__version__, "python": platform.python_version(), "epochs": arguments.epochs}
    text = json.dumps({"made_with": made | LORA, "before": before, "runs": rows}, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
