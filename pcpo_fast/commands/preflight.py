"""``pcpo-fast preflight``: checks before a run starts."""

import argparse

from pcpo_fast.commands import add_config, add_settings

EXAMPLES = """examples:
  pcpo-fast preflight                                       the demo, on a CPU
  pcpo-fast preflight --config examples/8x80gb_flux_full/config.yaml --gpus 8
  pcpo-fast preflight --config run.yaml --gpus 16 --nodes 2 --gpu-memory 80 --no-dry-run

Exit code 0: nothing failed; 1: something did."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "preflight",
        help="check everything that can be checked before a run",
        description="Check versions, GPUs, prompts, rewards, model access, memory and disk, and train two steps.",
        epilog=EXAMPLES,
    )
    add_config(parser)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of the whole run (default 1)")
    parser.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="machines that they are distributed over (default 1)"
    )
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="memory per GPU (default: what the GPU reports)")
    parser.add_argument("--no-dry-run", action="store_true", help="do not train two steps")
    parser.add_argument(
        "--timeout", type=float, default=1800, metavar="SECONDS", help="time limit for the two steps (default 1800)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_settings(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print each check; the exit code is 1 if one failed."""
    import json

    from pcpo_fast.config.loading import load_config
    from pcpo_fast.preflight.run import check_arguments, run_checks

    ranks_here = check_arguments(arguments.gpus, arguments.nodes, arguments.timeout)
    config = load_config(arguments.config, arguments.settings)
    results = []
    for check in run_checks(
        config, arguments.gpus, ranks_here, arguments.gpu_memory, not arguments.no_dry_run, arguments.timeout
    ):
        results.append(check)
        if not arguments.json:
            print(f"{check.status:8} {check.name}: {check.says}", flush=True)
    failed = [check.name for check in results if check.status == "failed"]
    if arguments.json:
        print(json.dumps({"passed": not failed, "checks": [check._asdict() for check in results]}, indent=1))
    else:
        print(f"failed: {', '.join(failed)}" if failed else "ready to train")
    return 1 if failed else 0
