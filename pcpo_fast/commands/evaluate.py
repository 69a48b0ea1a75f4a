"""``pcpo-fast evaluate``: checkpoints judged by their images."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from pcpo_fast.config.schema import Config, RewardConfig
    from pcpo_fast.evaluation.result import Evaluation

EXAMPLES = """examples:
  pcpo-fast evaluate --checkpoint base --checkpoint pcpo=runs/pcpo --checkpoint grpo=runs/grpo --output runs/evaluation
  pcpo-fast evaluate --checkpoint base --checkpoint pcpo=runs/pcpo@0.5,1,1.5 --metric fd-dinov2 --metric cmmd
  pcpo-fast evaluate --checkpoint runs/pcpo --reference coco/val2014 --metric fid --metric is --prompts coco.txt
  pcpo-fast evaluate --checkpoint runs/pcpo --checkpoint other=images/other --reward jpeg_compressibility
  pcpo-fast evaluate --checkpoint base --checkpoint runs/pcpo --metric fd-dinov2=models/dinov2-large \\
      --metric lpips=models/vgg16.safetensors,models/lpips_vgg.pth
  deepspeed --num_gpus 8 --module pcpo_fast evaluate --checkpoint base --checkpoint runs/pcpo

Images that are there are not made again: called again, the command goes on. It writes evaluation.html, evaluation.md,
evaluation.json and images/ into OUTPUT. docs/evaluating.md explains the numbers."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "evaluate",
        help="judge checkpoints by their images",
        description="Sample the same prompts and noise from several checkpoints, and measure rewards, distances to a "
        "reference and diversity.",
        epilog=EXAMPLES,
    )
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--checkpoint",
        dest="checkpoints",
        action="append",
        default=[],
        metavar="[NAME=]WHAT[@SCALES]",
        help="base, a run directory, a checkpoint or export of one, a pipeline (folder or hub id), or a folder of "
        "finished images; SCALES of reward guidance of a run, for example 0.5,1 or 0,0.25,...,1.5; repeat for each, "
        "the first is what differences are to",
    )
    what.add_argument("--config", metavar="FILE", help="model and sampler of all (default: the first run's)")
    what.add_argument("--prompts", metavar="FILE", help="prompt file (default: the configuration's prompts.heldout)")
    what.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    what.add_argument("--count", type=int, default=4, help="images per prompt (default 4)")
    what.add_argument("--seed", type=int, default=0)
    what.add_argument("--stochastic", action="store_true", help="sample with the rollout's noise instead of without")
    measured = parser.add_argument_group("what is measured")
    measured.add_argument(
        "--reward",
        action="append",
        default=[],
        help="score with this reward, by its name or label (default: the configuration's)",
    )
    measured.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME[=MODEL]",
        help="fd-dinov2, cmmd, fid, is or lpips, with the folder, file or hub id of its model (default: the published "
        "one, from the hub)",
    )
    measured.add_argument(
        "--reference", metavar="base|FOLDER", help="what distances are to (default: base if compared)"
    )
    measured.add_argument("--resamples", type=int, default=200, metavar="N", help="of the distances' bootstrap (200)")
    measured.add_argument(
        "--preference",
        metavar="A,B",
        help="also write preference.html, a blind comparison of two checkpoints for people (see the votes command)",
    )
    running = parser.add_argument_group("how it is run")
    running.add_argument("--output", default="runs/evaluation", metavar="FOLDER", help="default: runs/evaluation")
    running.add_argument("--cache", metavar="FOLDER", help="of features, shared by evaluations (default: in OUTPUT)")
    running.add_argument("--batch-size", type=int, default=16, help="images at once (default 16)")
    running.add_argument("--shown", type=int, default=48, metavar="N", help="prompts in evaluation.html (default 48)")
    running.add_argument("--remake", action="store_true", help="replace images that were made otherwise")
    running.add_argument("--json", action="store_true", help="print evaluation.json at the end")
    # DeepSpeed's launcher adds this; the rank that counts is in the environment.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key.subkey=value", help="settings that win over the file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, and say where everything is."""
    import json
    import os

    from rich.console import Console

    from pcpo_fast.errors import UserError
    from pcpo_fast.evaluation.metrics import parse_metrics

    _check(arguments)
    metrics = parse_metrics(arguments.metric)
    reference = arguments.reference
    if reference is not None and reference != "base" and not Path(reference).is_dir():
        raise UserError(f"--reference: {reference} is neither base nor a folder of images")

    import torch

    from pcpo_fast.evaluation.candidate_images import Request
    from pcpo_fast.evaluation.evaluator import EvaluationSettings, evaluate, with_reference
    from pcpo_fast.prompts import load_prompts

    cache = None if arguments.cache is None else Path(arguments.cache)
    settings = EvaluationSettings(
        Path(arguments.output),
        metrics,
        reference,
        cache=cache,
        batch_size=arguments.batch_size,
        resamples=arguments.resamples,
        shown=arguments.shown,
    )
    candidates = with_reference(arguments.checkpoints, arguments.config, arguments.overrides, settings)
    pair = None
    if arguments.preference is not None:
        from pcpo_fast.evaluation.preference import parse_pair

        pair = parse_pair(arguments.preference, [one.name for one in candidates])
    config = _shared(arguments)
    file = arguments.prompts or config.prompts.heldout
    if file is None:
        raise UserError("--prompts: the configuration has no prompts.heldout; name a prompt file")
    prompts = load_prompts(file)[: arguments.limit]
    settings = replace(settings, rewards=_rewards(arguments, config), timeout=config.scoring.timeout)
    request = Request(
        prompts, arguments.count, arguments.seed, arguments.stochastic, arguments.batch_size, arguments.remake
    )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from pcpo_fast.engine.engine import start_distributed

        device = start_distributed(config.distributed)
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = evaluate(candidates, request, settings, device)
    if result is None:
        return 0
    console = Console(stderr=arguments.json)  # with --json, stdout is for the program that reads it
    if arguments.json:
        print(json.dumps(result.record(), allow_nan=False))
    _say(result, settings.output, console)
    if pair is not None:
        from pcpo_fast.evaluation.preference import write_preference

        page, key = write_preference(result, pair, settings.output)
        text = f"Blind comparison: give people {page}, keep {key}; then: pcpo-fast votes {key} VOTES..."
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    from pcpo_fast.errors import UserError

    if not arguments.checkpoints:
        raise UserError("--checkpoint: say what is to be judged, for example --checkpoint base --checkpoint runs/demo")
    for name, least in (("count", 1), ("batch_size", 1), ("limit", 1), ("shown", 0), ("resamples", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}: must be at least {least}, got {value}")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed: must lie in 0..2^63 - 1, got {arguments.seed}")


def _shared(arguments: argparse.Namespace) -> "Config":
    """The configuration whose held-out prompts and rewards are the default."""
    from pcpo_fast.config.loading import load_config
    from pcpo_fast.evaluation.candidates import shared_config_file

    file = shared_config_file(arguments.checkpoints) if arguments.config is None else arguments.config
    return load_config(file, arguments.overrides)


def _rewards(arguments: argparse.Namespace, config: "Config") -> "list[RewardConfig]":
    """Those of the configuration, with their options, or those that are named."""
    from pcpo_fast.config.schema import RewardConfig

    if not arguments.reward:
        return list(config.rewards)
    chosen: dict[str, RewardConfig] = {}
    for name in arguments.reward:
        known = [reward for reward in config.rewards if name in (reward.name, reward.label)]
        chosen |= {reward.column: reward for reward in known or [RewardConfig(name=name)]}
    return list(chosen.values())


def _say(result: "Evaluation", folder: Path, console: "Console") -> None:
    from pcpo_fast.evaluation.evaluator import JSON_FILE, MARKDOWN_FILE, PAGE_FILE
    from pcpo_fast.evaluation.result_tables import difference_table, main_table, matched_table

    if not console.is_terminal:
        console.width = 240  # a table in a file or pipe is not cut into narrow columns
    for table in (main_table(result), difference_table(result), matched_table(result)):
        if table is not None:
            console.print(table.rich())
    lines = [f"note: {note}" for note in result.notes]
    lines.append(f"Page: {folder / PAGE_FILE}, {MARKDOWN_FILE} and {JSON_FILE} beside it")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
