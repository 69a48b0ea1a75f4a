"""Find the fastest plan of each launch of the norms' kernels on this GPU, and keep it for this card.

    python benchmarks/tune_norms.py                        FLUX's width, in bf16: a table
    python benchmarks/tune_norms.py --channels 1536 6144   other widths
    python benchmarks/tune_norms.py --write                keep what is faster than the rule's plan

A plan whose results differ from the rule's by more than rounding is an error. Only plans that are over 2 % faster are
kept, in ``kernels/pcpo_kernels/tuned.json``, which the kernels read; the rest follows the rule.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import triton
from kernel_times import Clock
from pcpo_kernels import gated_residual, gated_residual_norm, modulated_norm, tuning
from pcpo_kernels.ops.adaptive_norm import triton as op
from pcpo_kernels.tuning import NormPlan, default_plan
from torch import Tensor

GAIN = 1.02
KINDS: dict[str, Callable[..., Any]] = {
    op.NORM: modulated_norm,
    op.RESIDUAL: gated_residual,
    op.BOTH: gated_residual_norm,
}
ELEMENT = 2
"""Bytes: tuned in bf16."""


def candidates(channels: int) -> Iterator[NormPlan]:
    """One or three blocks, 8 to 32 channels per thread, with and without tokens on their way."""
    whole = triton.next_power_of_2(channels)
    for parts, block in ((1, whole), (3, whole // 4)):
        for warps in (1, 2, 4, 8, 16):
            if parts * block >= channels and block // (32 * warps) >= 8 and parts * block // (32 * warps) <= 32:
                yield from (NormPlan(stages, parts, block, warps) for stages in (1, 3))


def launches(kind: str, tokens: int, channels: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is tuned of a kind: its forward, and its backward with frozen modulation and with all gradients."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(torch.bfloat16)

    rows = {op.NORM: 2, op.RESIDUAL: 1, op.BOTH: 3}[kind]
    bulk = [normal(4, tokens, channels) for _ in range(1 if kind == op.NORM else 2)]
    inputs = [*bulk, *normal(4, rows * channels).chunk(rows, dim=1)]
    yield f"forward-{kind}", lambda: KINDS[kind](*inputs)
    for name, wanted in ((f"backward-{kind}-frozen", len(bulk)), (f"backward-{kind}", len(inputs))):
        leaves = [value.detach().requires_grad_(place < wanted) for place, value in enumerate(inputs)]
        results = KINDS[kind](*leaves)
        results = results if isinstance(results, tuple) else (results,)
        incoming = [normal(*result.shape) for result in results]
        yield name, lambda r=results, x=leaves[:wanted], g=incoming: torch.autograd.grad(r, x, g, retain_graph=True)


def fastest(launched: str, channels: int, call: Callable[[], Any], clock: Clock) -> tuple[NormPlan, float, float]:
    """The fastest plan, its milliseconds, and those of the rule's plan, which the kernels use meanwhile.

    Raises:
        SystemExit: two plans disagree.
    """
    rule = default_plan(launched, channels, ELEMENT)
    times, expected = {}, None
    for plan in (rule, *(one for one in candidates(channels) if one != rule)):
        with planned(launched, plan):
            try:
                results = call()
            except triton.runtime.errors.OutOfResources:  # of shared memory or registers, on this card
                continue
            results = results if isinstance(results, tuple) else (results,)
            if expected is None:
                expected = results
            for result, other in zip(results, expected, strict=True):
                if not torch.allclose(result.float(), other.float(), rtol=2e-2, atol=2e-2):
                    raise SystemExit(f"error: {launched} with {plan} differs from {rule}; nothing is kept")
            times[plan] = clock.milliseconds(call)
    best = min(times, key=times.__getitem__)
    return best, times[best], times[rule]


@contextmanager
def planned(launched: str, plan: NormPlan) -> Iterator[None]:
    """Launches of one kind follow this plan."""
    before = op.norm_plan
    op.norm_plan = lambda name, *rest: plan if name == launched else before(name, *rest)
    try:
        yield
    finally:
        op.norm_plan = before


def tune(device: torch.device, widths: list[int], tokens: int, clock: Clock) -> dict[str, NormPlan]:
    """The plans worth keeping; prints a line for each launch."""
    found = {}
    for channels in widths:
        for kind in KINDS:
            for launched, call in launches(kind, tokens, channels, device):
                best, shortest, ruled = fastest(launched, channels, call, clock)
                kept = ruled > GAIN * shortest
                print(f"{launched}, {channels} channels: {ruled:.4f} ms by the rule, {shortest:.4f} ms with {best}"
                      f"{' (kept)' if kept else ''}")  # fmt: skip
                if kept:
                    found[f"{launched}-{channels}x{ELEMENT}"] = best
    return found


def write(card: str, found: dict[str, NormPlan]) -> None:
    """Keep plans for a card beside those that the table has; a line each."""
    table = json.loads(tuning.TABLE.read_text(encoding="utf-8"))
    table[card] = table.get(card, {}) | {name: list(plan) for name, plan in found.items()}
    cards = []
    for name, plans in sorted(table.items()):
        lines = ",\n".join(f"  {json.dumps(launched)}: {json.dumps(plan)}" for launched, plan in sorted(plans.items()))
        cards.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    tuning.TABLE.write_text("{\n" + ",\n".join(cards) + "\n}\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=[3072], help="widths (default: FLUX's, 3072)")
    parser.add_argument("--tokens", type=int, default=4608, help="of each of 4 images (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.05, help="time for one median (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="keep the plans for this card")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: no GPU that PyTorch can use", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    found = tune(device, chosen.channels, chosen.tokens, Clock(device, chosen.seconds))
    if chosen.write:
        write(torch.cuda.get_device_name(device), found)
        print(f"{len(found)} plans kept in {tuning.TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
