"""Error of the log-ratio against float64: differences of log-densities, bf16 storage, and ours.

    python benchmarks/kernel_precision.py

Writes benchmarks/results/kernels/precision.json and docs/figures/kernel_precision.png. Outputs are bf16 and the same
for every method; the truth is the float64 value for exactly these outputs and the noise that made x'. Without a GPU the
kernel runs in Triton's interpreter, on the first rows of a case alone.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

sys.path.insert(0, str(Path(__file__).parent))

import kernel_baseline as baseline
from json_files import read_json
from kernel_cases import CLIP_RANGE, NOISE, SIZES, Case, make_case, noise_tensor
from pcpo_kernels import Endpoints, NoiseKey, policy_loss

from pcpo_fast.reporting.plots import save_figure
from pcpo_fast.reporting.style import OTHERS, SOFT, new_figure, point_label, styled

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METHODS = {
    "stored_bf16": "x' stored in bf16, difference of log-densities",
    "eager_fp32": "fp32 x', difference of log-densities (public trainers)",
    "reference_endpoints": "ours, reference path, noise from x and x'",
    "kernel_endpoints": "ours, Triton kernel, noise from x and x'",
    "kernel_key": "ours, Triton kernel, noise made in the kernel",
}
ROWS = 8
KERNEL_ROWS = ROWS if DEVICE == "cuda" else 2


def log_ratios(case: Case) -> dict[str, torch.Tensor]:
    """Log-ratio [B] by every method, and the truth in float64."""
    z = noise_tensor(case).double()
    delta = case.output.double() - case.old_output.double()
    linear, quadratic = case.linear.double(), case.quadratic.double()
    found = {"truth": linear * (delta * z).mean(1) - quadratic * delta.square().mean(1)}

    def density(output: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        mean, std = baseline.transition_mean(output, case.latents, case.time, case.following, NOISE)
        return baseline.log_density(following, mean, std)

    old = density(case.old_output, case.next_latents)
    found["eager_fp32"] = density(case.output, case.next_latents) - old
    found["stored_bf16"] = density(case.output, case.next_latents.bfloat16()) - old

    def ours(backend: str, noise: NoiseKey | Endpoints) -> torch.Tensor:
        os.environ["PCPO_KERNELS"] = backend
        rows = KERNEL_ROWS if backend == "triton" else ROWS
        columns = (column[:rows] for column in (case.linear, case.quadratic, case.scale, case.advantage))
        part = type(noise)(*(value[:rows] for value in noise))
        old = case.old_output[:rows]
        return policy_loss(case.output[:rows], old, part, *columns, clip_range=CLIP_RANGE).log_ratio

    found["reference_endpoints"] = ours("reference", case.endpoints)
    found["kernel_endpoints"] = ours("triton", case.endpoints)
    found["kernel_key"] = ours("triton", case.key)
    return found


def study(name: str, elements: int, difference: float) -> dict[str, Any]:
    """Largest and root-mean-square error over the rows of one case."""
    os.environ["PCPO_KERNELS"] = "reference"  # inputs and truth
    case = make_case(ROWS, elements, DEVICE, torch.bfloat16, difference=difference, seed=1)
    found = log_ratios(case)
    truth = found.pop("truth")
    record: dict[str, Any] = {"size": name, "elements": elements, "difference": difference}
    record["log_ratio"] = truth.abs().mean().item()
    for method, value in found.items():
        error = (value.double() - truth[: len(value)]).abs()
        record[method] = {"largest": error.max().item(), "rms": error.square().mean().sqrt().item()}
    return record


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Error against the size of the log-ratio, and against the size of the image."""
    figure = new_figure(4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    styled(left, "By the size of the log-ratio", "mean |log-ratio| (FLUX 1024 x 1024)", "largest error of a row")
    elements = [r["elements"] for r in records]
    size = f"image ({min(elements)} to {max(elements)} elements, outputs 1 % apart)"
    styled(right, "By the size of the image", size, "")
    # Theirs dashed, ours solid.
    colours = (SOFT, *OTHERS)
    looks = {m: {"color": colour, "linestyle": "-"} for m, colour in zip(METHODS, colours, strict=True)}
    looks["stored_bf16"]["linestyle"] = looks["eager_fp32"]["linestyle"] = "--"
    by_ratio = [r for r in records if r["size"] == "flux_1024"]
    by_size = [r for r in records if r["difference"] == 0.01]
    for method, label in METHODS.items():
        look: dict[str, Any] = looks[method] | {"marker": "o", "markersize": 3.5, "linewidth": 1.6}
        left.plot([r["log_ratio"] for r in by_ratio], [r[method]["largest"] for r in by_ratio], label=label, **look)
        right.plot([r["elements"] for r in by_size], [r[method]["largest"] for r in by_size], **look)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        for clip_range in (1e-4, 1e-5):
            axes.axhline(clip_range, color=SOFT, linewidth=0.9, linestyle=":")
            where: dict[str, Any] = {"xycoords": ("axes fraction", "data")}
            point_label(axes, f"clip range {clip_range:.0e}", (0.01, clip_range), (0, 2), **where)
    right.set_xticks([r["elements"] for r in by_size], [r["size"] for r in by_size])
    right.minorticks_off()
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    save_figure(figure, path, dpi=130)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT, help="folder instead of the repository")
    parser.add_argument("--quick", action="store_true", help="small images alone")
    parser.add_argument("--redraw", action="store_true", help="only the figure, from the numbers that are there")
    chosen = parser.parse_args(arguments)
    results = chosen.out / "benchmarks" / "results" / "kernels" / "precision.json"
    figure = chosen.out / "docs" / "figures" / "kernel_precision.png"
    if chosen.redraw:
        plot(read_json(results), figure)
        print(figure)
        return 0
    if chosen.quick:
        cases = [("flux_1024", 1024, d) for d in (0.003, 0.01)]
    else:
        cases = [("flux_1024", SIZES["flux_1024"], d) for d in (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)]
        cases += [(name, SIZES[name], 0.01) for name in ("sd15_512", "flux_512", "flux_720")]
    records = [study(*case) for case in cases]
    records.sort(key=lambda r: (r["elements"], r["difference"]))
    results.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(record) for record in records)
    results.write_text(f"[\n{lines}\n]\n")
    plot(records, figure)
    print(results, figure, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
