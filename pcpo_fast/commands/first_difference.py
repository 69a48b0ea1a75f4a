"""``pcpo-fast first-difference``: the operation at which rollout and update, settings or versions begin to differ."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcpo_fast.commands import add_run_or_config, run_or_config, show_results
from pcpo_fast.config.wording import counted

if TYPE_CHECKING:
    from pcpo_fast.profiling.operations import ForwardComparison

EXAMPLES = """examples:
  pcpo-fast first-difference runs/flux                                  rollout against update, same weights
  pcpo-fast first-difference --config flux_dev_pcpo_lora --other model.block_kernels=true
  pcpo-fast first-difference runs/demo --other model.dtype=bfloat16 --step 2 --json
  pcpo-fast first-difference runs/flux --save forward.safetensors         with one version of a library ...
  pcpo-fast first-difference runs/flux --against forward.safetensors      ... and with another

`rollout/mismatch_log_ratio` measures how far apart the forwards are; this command finds where they diverge
(docs/performance.md)."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "first-difference",
        help="find the operation at which rollout and update, settings or versions begin to differ",
        description="Compare two forwards of one image at one step, operation by operation: that of the rollout with "
        "that of the update, or the update's with other settings, or with the same of another version or machine.",
        epilog=EXAMPLES,
    )
    add_run_or_config(parser)
    second = parser.add_mutually_exclusive_group()
    second.add_argument(
        "--other",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="compare the update's forward with the same under this setting of the model; may be repeated",
    )
    second.add_argument(
        "--save", type=Path, metavar="FILE", help="only write the update's forward and its inputs, as safetensors"
    )
    second.add_argument(
        "--against", type=Path, metavar="FILE", help="compare a forward written with --save with the same one here"
    )
    parser.add_argument("--step", type=int, metavar="I", help="sampler step of the image (default: the middle one)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare, and print what was found."""
    import json

    from pcpo_fast.distributed.collectives import lone_device
    from pcpo_fast.errors import UserError
    from pcpo_fast.training.forward_differences import compare_forwards, compare_with_saved, save_forward

    for text in arguments.other:
        if not text.startswith("model.") or "=" not in text:
            raise UserError(f"--other: must be a setting of the model, model.KEY=VALUE, got {text}")
    if arguments.against and arguments.step is not None:
        raise UserError("--step: a forward that is compared with --against has the step with which it was written")
    config, weights, epoch = run_or_config("first-difference", arguments)
    if arguments.save:
        count = save_forward(config, weights, arguments.step, lone_device(), arguments.save)
        print(f"wrote {arguments.save}: {counted(count, 'operation')}")
        return 0
    if arguments.against:
        found = compare_with_saved(config, weights, arguments.against, lone_device())
    else:
        other = run_or_config("first-difference", arguments, arguments.other)[0] if arguments.other else None
        found = compare_forwards(config, weights, arguments.step, lone_device(), other)
    if arguments.json:
        print(json.dumps({"epoch": epoch} | _record(found), indent=1, allow_nan=False))
    else:
        _print(found)
    return 0


def _record(found: "ForwardComparison") -> dict[str, Any]:
    first = None
    if found.first is not None:
        one, other = found.first
        first = {"module": one.module, "operation": one.name, "elements": one.size, "distance": one.distance(other)}
    return {
        "compared": found.compared,
        "unmatched": found.unmatched,
        "first": first,
        "distances": dict(found.distances),
    }


def _print(found: "ForwardComparison") -> None:
    from rich.console import Console

    from pcpo_fast.reporting.tables import Grid

    lines, tables = [], []
    if found.first is None:
        lines.append(f"no difference: {counted(found.compared, 'operation')} in both forwards, all with identical bits")
    else:
        one, other = found.first
        size = one.distance(other)
        amount = f"{size:.1e} of its size" if size else "less than the sampled elements show"
        lines.append(f"first difference: {one.name} in {one.module or 'the network itself'}, by {amount}")
        if found.before is not None:
            lines.append(
                f"last equal operation before it: {found.before.name} in {found.before.module or 'the network itself'}"
            )
        blocks = [(name, value) for name, value in found.distances.items() if name.count(".") <= 1]
        rows = tuple((name or "output", f"{value:.1e}" if value else "0") for name, value in blocks)
        tables.append(Grid("Relative difference of the output of each block", ("block", "difference"), rows))
        lines.append(f"{counted(found.compared, 'operation')} compared")
    if found.unmatched:
        lines.append(
            f"left out: {counted(found.unmatched, 'operation')}, in only one of the forwards or of different sizes"
        )
    show_results(Console(), tables, lines)
