"""``pcpo-fast plan``: memory and time of a run before it starts."""

import argparse

from pcpo_fast.commands import add_settings
from pcpo_fast.config.presets import DEFAULT_CONFIG

EXAMPLES = """examples:
  pcpo-fast plan --config configs/flux_dev_pcpo.yaml --gpus 8 --gpu-memory 80
  pcpo-fast plan --config configs/flux_dev_pcpo_lora.yaml --gpus 1 --gpu-memory 80 --json
  pcpo-fast plan --config run.yaml --gpus 4 --gpu-memory 48 --peak-tflops 362 model.height=1024 model.width=1024

GB are 1e9 bytes. FLUX.1-dev, FLUX.2-klein, SD3.5-medium and Stable Diffusion 1.x need neither a
download nor a license."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "plan",
        help="memory and time of a run before it starts",
        description="Estimate what a run needs on its GPUs, how long its phases take at best, and which settings fit.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--config", metavar="FILE", help=f"YAML file, or a name of `pcpo-fast configs` (default: {DEFAULT_CONFIG})"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="number of GPUs (default 1)")
    parser.add_argument("--gpu-memory", type=float, default=80, metavar="GB", help="memory of one (default 80)")
    parser.add_argument(
        "--peak-tflops", type=float, default=989, metavar="RATE", help="TFLOP/s of one (default 989, an H100 in bf16)"
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

    config = load_config(arguments.config or DEFAULT_CONFIG, arguments.settings)
    plan = make_plan(config, arguments.gpus, arguments.gpu_memory, arguments.peak_tflops, arguments.model_config)
    if arguments.json:
        print(json.dumps(plan, indent=1))
    else:
        show_plan(plan, Console())
    return 0
