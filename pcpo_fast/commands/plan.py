"""``pcpo-fast plan``: memory, disk space and time of a run before it starts."""

import argparse

from pcpo_fast.commands import add_config, add_settings
from pcpo_fast.planning.cards import CARDS, MFU, find_card

EXIT_NOTHING_FITS = 3

EXAMPLES = """examples:
  pcpo-fast plan --config flux_dev_pcpo --gpus 8 --gpu H100
  pcpo-fast plan --config 1x24gb_flux_lora --gpu 4090 --host-memory 64 --disk 500
  pcpo-fast plan --config flux_dev_pcpo --gpus 16 --nodes 2 --json
  pcpo-fast plan --config run.yaml --gpus 4 --gpu-memory 48 --peak-tflops 362 model.height=1024 model.width=1024

GB are 1e9 bytes. The published models of the shipped configurations need neither a download nor a license
(docs/planning.md lists them).

Exit code 0: the recommended settings fit; 3: nothing fits; 2: an error."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "plan",
        help="estimate memory, disk space and time of a run before it starts",
        description="Estimate what a run needs on GPUs, host and disk, how long it takes, and which settings fit.",
        epilog=EXAMPLES,
    )
    add_config(parser)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="number of GPUs (default 1)")
    parser.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="machines that they are distributed over (default 1)"
    )
    parser.add_argument("--gpu", metavar="NAME", help=f"GPU model: {', '.join(CARDS)} (default H100, of 80 GB)")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="memory per GPU (default: that of --gpu)")
    parser.add_argument(
        "--host-memory", type=float, metavar="GB", help="host memory of each machine (default: not compared)"
    )
    parser.add_argument(
        "--disk", type=float, metavar="GB", help="free disk space where the run writes (default: not compared)"
    )
    parser.add_argument(
        "--peak-tflops", type=float, metavar="RATE", help="dense bf16 TFLOP/s per GPU (default: those of --gpu)"
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=MFU,
        metavar="SHARE",
        help=f"share of the peak rate that the whole run is assumed to reach (default {MFU}; docs/planning.md)",
    )
    parser.add_argument(
        "--model-config", metavar="FOLDER", help="read the architecture from this pipeline folder; no weights needed"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_settings(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    import json

    from rich.console import Console

    from pcpo_fast.config.loading import load_config
    from pcpo_fast.planning.plan_table import show_plan
    from pcpo_fast.planning.run_plan import make_plan

    config = load_config(arguments.config, arguments.settings)
    card = find_card(arguments.gpu or "H100")
    memory = card.memory_gb if arguments.gpu_memory is None else arguments.gpu_memory
    rate = card.peak_tflops if arguments.peak_tflops is None else arguments.peak_tflops
    plan = make_plan(
        config,
        arguments.gpus,
        memory,
        rate,
        arguments.model_config,
        arguments.mfu,
        nodes=arguments.nodes,
        host_gb=arguments.host_memory,
        disk_gb=arguments.disk,
    )
    if arguments.json:
        print(json.dumps(plan, indent=1))
    else:
        show_plan(plan, Console())
        if arguments.gpu is None and arguments.gpu_memory is not None and arguments.peak_tflops is None:
            print("The times are those of an H100: --gpu names another card, --peak-tflops gives its rate")
    return 0 if plan["recommendation"]["fits"] else EXIT_NOTHING_FITS
