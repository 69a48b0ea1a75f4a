"""``pcpo-fast train``: the training run."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcpo_fast.commands import add_config, add_settings, values_of
from pcpo_fast.errors import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from pcpo_fast.config.schema import Config

EXAMPLES = """examples:
  pcpo-fast train                                            the demo: tiny FLUX on a CPU
  pcpo-fast train --config flux_dev_pcpo prompts.train=P.txt prompts.heldout=H.txt output_dir=runs/flux
  deepspeed --module pcpo_fast train --config mine.yaml      one process per GPU
  pcpo-fast train train.epochs=20 credit.rule=native output_dir=runs/native
  pcpo-fast train --profile train.epochs=2 output_dir=runs/profiled
  pcpo-fast train --config mine.yaml --dry-run               try it first

exit codes:
  0 trained; 2 an error; 75 stopped cleanly by SIGTERM, run it again to continue; 130 the same by Ctrl-C; 143 or 130
  immediately after a second signal"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "train",
        help="train a policy",
        description="Train a policy; without arguments, the demo.",
        epilog=EXAMPLES,
    )
    add_config(parser)
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|accept-changes|never|PATH",
        help="auto: continue where the run in output_dir stopped; accept-changes: the same, even if the content of "
        "prompts, rewards or model has changed; never: refuse to touch it; PATH: a checkpoint or a run",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the model's files again, even those with an unchanged inode, size and times",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="record where the time of one epoch goes: a trace for Perfetto in output_dir/profile, a summary here",
    )
    parser.add_argument(
        "--profile-epoch", type=int, metavar="N", help="the epoch to record (default: the second that is trained)"
    )
    parser.add_argument(
        "--profile-updates",
        type=int,
        metavar="N",
        help="optimizer steps of the epoch to record (default: 1)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only try it: two optimizer steps on a handful of images in a temporary folder, an evaluation, a "
        "checkpoint and an export, in one process (pcpo-fast preflight checks more, and several GPUs)",
    )
    # DeepSpeed's launcher adds this; the actual rank is in the environment.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON at the end")
    add_settings(parser)
    parser.set_defaults(run=partial(run, default_of=parser.get_default))


def run(arguments: argparse.Namespace, default_of: Callable[[str], object]) -> int:
    """Train, and print the results."""
    import json
    import signal
    import sys

    from rich.console import Console

    from pcpo_fast.config.arguments import check_idle
    from pcpo_fast.distributed.launching import launcher_rank
    from pcpo_fast.distributed.preemption import Stopped
    from pcpo_fast.interface.configuration import load_config
    from pcpo_fast.interface.training import train

    config = load_config(arguments.config, arguments.settings)
    if arguments.dry_run:
        values = {name: value for name, value in values_of(arguments).items() if value != default_of(name)}
        idle = {name.replace("_", "-"): True for name in values.keys() - {"config", "settings", "dry_run"}}
        check_idle("--dry-run trains in a temporary folder", idle)
        return _dry_run(config, as_json=arguments.json)
    del arguments.dry_run  # the rest is what train takes
    try:
        console = Console(stderr=arguments.json)  # with --json, stdout carries only the JSON
        run = train(**values_of(arguments) | {"config": config, "settings": (), "console": console})
    except KeyboardInterrupt:
        if launcher_rank() == 0:
            print(_how_to_continue("interrupted", Path(config.output_dir)), file=sys.stderr)
        return EXIT_INTERRUPTED
    except Stopped as stopped:
        if launcher_rank() == 0:
            word = "interrupted" if stopped.number == signal.SIGINT else str(stopped)
            print(_how_to_continue(word, Path(config.output_dir)), file=sys.stderr)
        return stopped.exit_code
    if launcher_rank() == 0:
        print(json.dumps(run.summary, indent=2) if arguments.json else _closing_words(run.summary, run.folder))
    return 0


def _dry_run(config: "Config", *, as_json: bool) -> int:
    import json

    from pcpo_fast.distributed.launching import launcher_world_size
    from pcpo_fast.errors import UserError
    from pcpo_fast.preflight.dry_run import dry_run_here

    if launcher_world_size() > 1:
        raise UserError("--dry-run: runs in a single process; pcpo-fast preflight --gpus N tries several")
    status, says = dry_run_here(config)
    if status != "ok":
        raise UserError(says.removeprefix("error: "))
    print(json.dumps({"status": status, "says": says}) if as_json else f"dry run: {says}: ready to train")
    return 0


def _how_to_continue(stopped: str, folder: Path) -> str:
    from pcpo_fast.runs.checkpoint import checkpoints, read_state

    found = checkpoints(folder / "checkpoints")
    if not found:
        return f"{stopped} before the first checkpoint: the same command starts the run again"
    return f"{stopped}: the same command resumes the run after epoch {read_state(found[-1])['epoch']}"


def _closing_words(summary: dict[str, Any], folder: Path) -> str:
    from pcpo_fast.reporting.tables import fixed_text

    lines = []
    for kind, before, after in (
        ("Held-out reward", summary.get("heldout_reward_before"), summary.get("heldout_reward_after")),
        ("Training reward", summary.get("reward_before"), summary.get("reward_after")),
    ):
        if isinstance(before, float) and isinstance(after, float):
            change = fixed_text(after - before, signed=True)
            lines.append(f"{kind}:  {fixed_text(before)} before, {fixed_text(after)} after ({change})")
            break
    for what, name in (
        ("Before and after:", "images/before_after.png"),
        ("Report:          ", "report.html"),
        ("Weights:         ", "export"),
    ):
        if (folder / name).exists():
            lines.append(f"{what} {folder / name}")
    return "\n".join(lines)
