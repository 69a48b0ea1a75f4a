"""Losses of a short run, to the last bit: kept for each platform, and compared between commits.

    python benchmarks/golden_losses.py                     compare with what is kept for this platform
    python benchmarks/golden_losses.py --base REV          compare with another commit, which runs here, too
    python benchmarks/golden_losses.py --write             keep the losses of this checkout

A change that should not change numbers changes none of these: what differs first is named, and the exit code is 1.
``--limit`` allows for a relative difference, as between other orders of summation.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from revisions import ROOT, checkout, environment

KEPT = ROOT / "benchmarks" / "results" / "golden"
SETTINGS = (
    "prompts.heldout=null",
    "rollout.prompts_per_epoch=2",
    "rollout.images_per_prompt=6",
    "train.epochs=2",
    "train.updates_per_epoch=2",
    "train.micro_batch_size=6",
    "optimizer.lr=1e-3",
    "logging.tensorboard=false",
)
CASES = {
    "full": (),
    "lora": ("model.finetune=lora", "model.lora.rank=4", "credit.objective=clip", "credit.kl_coefficient=0.01"),
}
NAMES = ("reward/mean", "policy/loss", "policy/log_ratio_abs", "policy/grad_norm")
Losses = dict[str, list[dict[str, float]]]


# Without these an x86 CPU sums in the order of its own generation, and rounds square roots as its maker's MKL does.
PINNED = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "AVX2"}
TRAIN = """
import numpy, torch
from pcpo_fast.cli import main
own = torch.sqrt
def exact(x):
    return own(x) if x.is_cuda or x.requires_grad else torch.as_tensor(numpy.sqrt(x.numpy()))
torch.sqrt = torch.Tensor.sqrt = exact
def power(x, exponent, own=torch.Tensor.pow):
    return exact(x) if isinstance(exponent, float) and exponent == 0.5 else own(x, exponent)
torch.Tensor.pow = torch.Tensor.__pow__ = power
raise SystemExit(main())
"""


def platform_name() -> str:
    """What decides the bits: the device, its instruction set (on x86 AVX2) and the version of PyTorch."""
    capability = torch.backends.cpu.get_cpu_capability().replace("AVX512", "AVX2")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else capability
    parts = (platform.machine(), device, f"torch-{torch.__version__.partition('+')[0]}")
    return "-".join(parts).replace(" ", "_").lower()


def losses(root: Path) -> Losses:
    """What a short run of a checkout reports of each epoch and update, by case."""
    found: Losses = {}
    for case, settings in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", TRAIN, "train", "--config", "configs/tiny_flux.yaml", *SETTINGS]
            run = subprocess.run(
                [*command, *settings, f"output_dir={folder}/run"],
                cwd=root,
                env=environment(root) | PINNED | {"OMP_NUM_THREADS": "1"},  # other threads sum in another order, too
                capture_output=True,
                text=True,
            )
            if run.returncode:
                raise SystemExit(f"error: the run {case} of {root} ended with {run.returncode}:\n{run.stderr[-2000:]}")
            lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        found[case] = [{name: record[name] for name in NAMES if name in record} for record in records]
    return found


def differences(ours: Losses, theirs: Losses) -> tuple[str | None, float]:
    """Where two runs differ first, in words, and the largest relative difference; (None, 0) for the same bits."""
    first, largest = None, 0.0
    for case in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(case, []), theirs.get(case, [])
        if [record.keys() for record in one] != [record.keys() for record in other]:
            return first or f"{case}: other values are reported", float("inf")
        for number, (mine, kept) in enumerate(zip(one, other, strict=True)):
            for name, value in mine.items():
                if value == kept[name]:
                    continue
                gap = abs(value - kept[name]) / max(abs(value), abs(kept[name]))
                first = first or f"{case}, record {number}: {name} is {value!r} instead of {kept[name]!r} ({gap:.1e})"
                largest = max(largest, gap)
    return first, largest


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", metavar="REV", help="commit to compare with; its runs are made here, too")
    parser.add_argument("--write", action="store_true", help="keep this checkout's losses for this platform")
    parser.add_argument(
        "--limit", type=float, default=0.0, metavar="R", help="relative difference allowed (default: 0)"
    )
    chosen = parser.parse_args(arguments)
    file = KEPT / f"{platform_name()}.json"
    if not (chosen.base or chosen.write or file.is_file()):
        print(f"nothing is kept for this platform ({file.name}): --write keeps it, --base REV compares with a commit")
        return 2
    ours = losses(ROOT)
    if chosen.write:
        KEPT.mkdir(exist_ok=True)
        file.write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")
        print(f"kept in {file.relative_to(ROOT)}")
        return 0
    if chosen.base:
        with checkout(chosen.base) as root:
            theirs: Losses = losses(root)
    else:
        theirs = json.loads(file.read_text(encoding="utf-8"))
    first, largest = differences(ours, theirs)
    against = chosen.base or file.name
    if first is None:
        print(f"the same bits as {against}: {sum(map(len, ours.values()))} records of {len(ours)} runs")
        return 0
    print(f"first difference from {against}: {first}; the largest is {largest:.1e}")
    return int(largest > chosen.limit)


if __name__ == "__main__":
    sys.exit(main())
