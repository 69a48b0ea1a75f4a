"""Whether the kernels became slower on this GPU: against the card's kept times, or against another commit.

    python benchmarks/kernel_gate.py                       compare with what is kept for this card
    python benchmarks/kernel_gate.py --base REV            compare with another commit, measured in turn with this one
    python benchmarks/kernel_gate.py --write               keep this checkout's times for this card

The kernels' tests come first: where they fail, no time is measured or compared. Then ``benchmarks/kernel_times.py``
runs twice for each side, and the faster of both counts. A call that takes over 5 % longer fails; exit code 1.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from revisions import ROOT, checkout, environment

KEPT = ROOT / "benchmarks" / "results" / "kernels" / "gpus"
LIMIT = 1.05
ROUNDS = 2
Times = dict[str, float]


def card() -> str:
    """The GPU's name, as a file is named."""
    return torch.cuda.get_device_name().replace(" ", "_").lower()


def tests_pass(root: Path) -> bool:
    """Whether a checkout's kernel tests pass on this GPU; their output is shown."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "auto", "tests/kernels/device"]
    return subprocess.run(command, cwd=root, env=environment(root)).returncode == 0


def times(root: Path, seconds: float, *, tiny: bool = False) -> Times:
    """Milliseconds of each call of a checkout's kernels, measured by this checkout's script.

    Raises:
        SystemExit: a call failed.
    """
    script = [sys.executable, str(ROOT / "benchmarks" / "kernel_times.py"), "--seconds", f"{seconds}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*script, "--out", folder, "--ours", *(["--tiny"] if tiny else [])]
        run = subprocess.run(command, cwd=root, env=environment(root), stdout=subprocess.DEVNULL)
        if run.returncode:
            raise SystemExit("error: not every call could be measured, so that nothing is compared")
        records = json.loads(Path(folder, "kernels.json").read_text(encoding="utf-8"))["records"]
    return {
        " ".join(f"{record[part]}" for part in ("op", "way", "form", "size", "rows")): min(
            value for value in (record["milliseconds"], record["graph_milliseconds"]) if value is not None
        )
        for record in records
        if record["name"] == "ours"
    }


def measured(roots: list[Path], seconds: float) -> list[Times]:
    """The times of some checkouts, which take turns; of each call the smallest."""
    rounds = [[times(root, seconds) for root in roots] for _ in range(ROUNDS)]
    return [{name: min(time[name] for time in found) for name in found[0]} for found in zip(*rounds, strict=True)]


def compare(ours: Times, theirs: Times) -> tuple[list[str], bool]:
    """A line for each call, and whether none takes over 5 % longer or is missing."""
    lines, good = [], True
    for name, before in theirs.items():
        if name not in ours:
            lines.append(f"{name}: not measured")
            good = False
            continue
        growth = ours[name] / before
        good &= growth <= LIMIT
        verdict = "" if growth <= LIMIT else f"  slower: at most {LIMIT} allowed"
        lines.append(f"{name}: {before:.4f} -> {ours[name]:.4f} ms, {growth:.3f} of the time{verdict}")
    return lines, good


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", metavar="REV", help="commit to compare with")
    parser.add_argument("--write", action="store_true", help="keep this checkout's times for this card")
    parser.add_argument("--seconds", type=float, default=0.1, help="time for one median (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: no GPU that PyTorch can use", file=sys.stderr)
        return 2
    file = KEPT / f"{card()}.json"
    if not (chosen.base or chosen.write or file.is_file()):
        print(f"nothing is kept for this card ({file.name}): --write keeps it, --base REV compares with a commit")
        return 2
    with checkout(chosen.base) if chosen.base else nullcontext() as base:
        roots = [root for root in (ROOT, base) if root is not None]
        for root, name in zip(roots, ("this checkout", chosen.base), strict=False):
            if not tests_pass(root):
                print(f"the kernels' tests of {name} fail: no time is compared")
                return 1
        ours, *rest = measured(roots, chosen.seconds)
    if chosen.write:
        KEPT.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")
        print(f"kept in {file}")
        return 0
    theirs = rest[0] if rest else json.loads(file.read_text(encoding="utf-8"))
    lines, good = compare(ours, theirs)
    print("\n".join(lines))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
