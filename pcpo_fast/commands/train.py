"""``pcpo-fast train``: the training run."""

import argparse
import warnings

DEFAULT_CONFIG = "configs/tiny_flux.yaml"

EXAMPLES = """examples:
  python train.py                                            the demo: tiny FLUX on a CPU
  python train.py --config configs/flux_dev_pcpo.yaml output_dir=runs/flux
  deepspeed train.py --config configs/flux_dev_pcpo.yaml     one process per GPU
  python train.py train.epochs=20 credit.rule=native output_dir=runs/native"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "train",
        help="train a policy",
        description="Train a policy; without arguments, the demo.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help=f"YAML configuration (default: {DEFAULT_CONFIG})")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: go on where the run in output_dir stopped; never: refuse to touch it; PATH: a checkpoint or a run",
    )
    # DeepSpeed's launcher adds this; the rank that counts is in the environment.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON at the end")
    parser.add_argument("overrides", nargs="*", metavar="key.subkey=value", help="settings that win over the file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train and say what came of it."""
    import json
    from pathlib import Path

    from pcpo_fast.config_loading import load_config
    from pcpo_fast.distributed import launcher_rank
    from pcpo_fast.errors import UserError

    path = arguments.config or DEFAULT_CONFIG
    if arguments.config is None and not Path(path).is_file():
        raise UserError(f"there is no {path} here; run from the project's folder, or name a file with --config FILE")
    config = load_config(path, arguments.overrides)
    if launcher_rank() == 0 and not arguments.json:
        print(f"{config.algorithm} on {config.model.path}, run directory {config.output_dir}", flush=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        from pcpo_fast.trainer import train

        summary = train(config, arguments.resume)
    if launcher_rank() == 0:
        print(json.dumps(summary, indent=2) if arguments.json else _closing_words(summary, config.output_dir))
    return 0


def _closing_words(summary: dict[str, object], folder: str) -> str:
    before, after = summary.get("heldout_reward_before"), summary.get("heldout_reward_after")
    lines = []
    if isinstance(before, float) and isinstance(after, float):
        lines.append(f"Held-out reward: {before:.3f} before, {after:.3f} after ({after - before:+.3f})")
        lines.append(f"Before and after: {folder}/images/before_after.png")
    lines.append(f"Report:           {folder}/report.html")
    lines.append(f"Weights:          {folder}/export")
    return "\n".join(lines)
