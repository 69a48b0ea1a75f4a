"""Planned against measured peaks: ``python benchmarks/planned_peaks.py --json benchmarks/results/planned_peaks.json``.

The measured peak is that of PyTorch's CPU allocator in a forward and backward of the tiny pipelines. Their operations
are counted with PyTorch's counter. For FLUX.1-dev, whose weights are not needed, both are the plan's.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from allocations import allocations, trained_once
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pcpo_fast.config.loading import load_config
from pcpo_fast.config.schema import Checkpointing
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.models import find_architecture
from pcpo_fast.planning.tracing import ATTENTION, ATTENTION_BACKWARD, checkpointing
from pcpo_fast.policies.families import load_policy

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("tiny_flux", "tiny_sd3", "tiny_sd")
FINETUNES = ("full", "lora")
KINDS: tuple[Checkpointing, ...] = (False, "selective", True)
IMAGES = 6


def operations(call: Callable[[], Any]) -> int:
    """Floating-point operations of a call on a CPU, whose attention PyTorch's counter does not know."""
    attention: Any = {
        ATTENTION: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
        ATTENTION_BACKWARD: lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(
            gradient, query, key, value
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        call()
    return counter.get_total_flops()


def peaks(model: str, finetune: str, cache: Path) -> list[dict[str, Any]]:
    """Planned and measured peak bytes and counted operations of a forward and backward, by gradient checkpointing.

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

    def predict() -> torch.Tensor:
        return policy.predict_halves(latents, times, conditioning).conditional  # type: ignore[no-any-return]

    def once() -> None:
        trained_once(predict, policy.module)

    for kind in KINDS:
        with checkpointing(policy, kind):
            once()  # allocate everything that is allocated only once
            measured, counted = allocations(once).peak, operations(once)
        planned = costs.training_peak(IMAGES, kind)
        row = {"model": model, "finetune": finetune, "checkpointing": kind, "operations": counted}
        rows.append(row | {"planned": round(planned), "measured": measured, "ratio": round(planned / measured, 4)})
    return rows


def flux(finetune: str) -> list[dict[str, Any]]:
    """Planned peak bytes and operations of one pair of FLUX.1-dev, 720 x 720 in bf16, by gradient checkpointing."""
    config = load_config(ROOT / "configs" / "flux_dev_pcpo.yaml", [f"model.finetune={finetune}"])
    costs = ModelCosts(find_architecture(config.model), config.model)
    rows = []
    for kind in KINDS:
        cost = costs.training(1, kind)
        row = {"model": "FLUX.1-dev", "finetune": finetune, "checkpointing": kind}
        rows.append(row | {"operations": round(cost.flops + cost.recomputed), "planned": round(cost.peak)})
    return rows


def _on(row: dict[str, Any]) -> str:
    return {False: "off", True: "on"}.get(row["checkpointing"], row["checkpointing"])


def render(rows: list[dict[str, Any]]) -> str:
    """The measured rows as a table in Markdown, in MB."""
    lines = [
        "| pipeline | trained | checkpointing | planned | measured | planned / measured |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = f"{row['planned'] / 1e6:.2f} MB | {row['measured'] / 1e6:.2f} MB | {row['ratio']:.2f}"
        lines.append(f"| {row['model'].replace('_', '-')} | {row['finetune']} | {_on(row)} | {numbers} |")
    return "\n".join(lines) + "\n"


def render_gain(measured: list[dict[str, Any]], planned: list[dict[str, Any]]) -> str:
    """What each kind of checkpointing needs of both, relative to none, as a table in Markdown."""
    lines = ["| | trained | checkpointing | activations | operations |", "|---|---|---|---|---|"]
    for rows, size, name in ((measured, "measured", "measured"), (planned, "planned", "planned, 720 x 720")):
        for row in rows:
            if not row["checkpointing"]:
                none = row
                continue
            sizes = f"{row[size] / none[size]:.0%} | {row['operations'] / none['operations']:.1%}"
            lines.append(f"| {row['model'].replace('_', '-')}, {name} | {row['finetune']} | {_on(row)} | {sizes} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", required=True, help="where the numbers go")
    file = Path(parser.parse_args().json)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for model in MODELS for finetune in FINETUNES for row in peaks(model, finetune, Path(folder))]
    planned = [row for finetune in FINETUNES for row in flux(finetune)]
    machine = {"architecture": platform.machine(), "torch": torch.__version__}
    command = " ".join(["python", "benchmarks/planned_peaks.py", *sys.argv[1:]])
    result = {"command": command, "machine": machine, "images": IMAGES, "rows": rows, "planned": planned}
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(render(rows), render_gain(rows, planned), sep="\n", end="")


if __name__ == "__main__":
    main()
