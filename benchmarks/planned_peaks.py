"""Planned against measured peaks: ``python benchmarks/planned_peaks.py --json benchmarks/results/planned_peaks.json``.

The measured peak is that of PyTorch's CPU allocator in a forward and backward of the tiny pipelines.
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from allocations import allocations, trained_once

from pcpo_fast.config.loading import load_config
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.models import find_architecture
from pcpo_fast.policies.families import load_policy

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("tiny_flux", "tiny_sd3", "tiny_sd")
FINETUNES = ("full", "lora")
IMAGES = 6


def peaks(model: str, finetune: str, cache: Path) -> list[dict[str, Any]]:
    """Planned and measured peak bytes of a forward and backward, without and with gradient checkpointing.

    Args:
        model: a configuration, whose pipeline lies in ``assets``.
        finetune: ``full`` or ``lora``.
        cache: folder for encoded prompts.
    """
    config = load_config(
        ROOT / "configs" / f"{model}.yaml",
        [
            f"model.path={ROOT / 'assets' / model.replace('_', '-')}",
            f"model.finetune={finetune}",
            *(["model.lora.rank=8"] if finetune == "lora" else []),
            f"model.embedding_cache={cache}",
        ],
    )
    costs = ModelCosts(find_architecture(config.model), config.model, on_gpu=False)
    policy: Any = load_policy(config, torch.device("cpu"))
    shapes = policy.conditioning_shapes(costs.architecture.clip_tokens)
    conditioning = {name: torch.randn(IMAGES, *shape) for name, shape in shapes.items()}
    latents, times = torch.randn(IMAGES, *policy.latent_shape), torch.full((IMAGES,), 0.5)
    rows = []
    for checkpointed in (False, True):
        if checkpointed:
            policy.network.enable_gradient_checkpointing()

        def predict() -> torch.Tensor:
            return policy.predict_halves(latents, times, conditioning).conditional  # type: ignore[no-any-return]

        trained_once(predict, policy.module)  # allocate everything that is allocated only once
        measured = allocations(lambda: trained_once(predict, policy.module)).peak
        planned = costs.training_peak(IMAGES, checkpointed)
        row = {"model": model, "finetune": finetune, "checkpointing": checkpointed}
        rows.append(row | {"planned": round(planned), "measured": measured, "ratio": round(planned / measured, 4)})
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown, in MB."""
    lines = [
        "| pipeline | trained | checkpointing | planned | measured | planned / measured |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = f"{row['planned'] / 1e6:.2f} MB | {row['measured'] / 1e6:.2f} MB | {row['ratio']:.2f}"
        on = "on" if row["checkpointing"] else "off"
        lines.append(f"| {row['model'].replace('_', '-')} | {row['finetune']} | {on} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", required=True, help="where the numbers go")
    file = Path(parser.parse_args().json)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for model in MODELS for finetune in FINETUNES for row in peaks(model, finetune, Path(folder))]
    machine = {"architecture": platform.machine(), "torch": torch.__version__}
    command = " ".join(["python", "benchmarks/planned_peaks.py", *sys.argv[1:]])
    result = {"command": command, "machine": machine, "images": IMAGES, "rows": rows}
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(render(rows), end="")


if __name__ == "__main__":
    main()
