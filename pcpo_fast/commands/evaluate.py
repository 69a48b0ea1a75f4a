"""``pcpo-fast evaluate``: compare checkpoints by their images."""

import argparse

from pcpo_fast.commands import add_settings, show_results, values_of

EXAMPLES = """examples:
  pcpo-fast evaluate --checkpoint base --checkpoint pcpo=runs/pcpo --checkpoint grpo=runs/grpo --output runs/evaluation
  pcpo-fast evaluate --checkpoint base --checkpoint pcpo=runs/pcpo@0.5,1,1.5 --metric fd-dinov2 --metric cmmd
  pcpo-fast evaluate --checkpoint runs/pcpo --reference coco/val2014 --metric fid --metric is --prompts coco.txt
  pcpo-fast evaluate --checkpoint runs/pcpo --checkpoint other=images/other --reward jpeg_compressibility
  pcpo-fast evaluate --checkpoint base --checkpoint runs/pcpo --metric fd-dinov2=models/dinov2-large \\
      --metric lpips=models/vgg16.safetensors,models/lpips_vgg.pth
  deepspeed --num_gpus 8 --module pcpo_fast evaluate --checkpoint base --checkpoint runs/pcpo

Existing images are not generated again, so calling the command again continues. It writes evaluation.html,
evaluation.md, evaluation.json and images/ into OUTPUT. docs/evaluating.md explains the numbers."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "evaluate",
        help="compare checkpoints by their images",
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
        "differences are relative to the first",
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
        dest="rewards",
        metavar="REWARD",
        action="append",
        default=[],
        help="score with this reward, by its name or label (default: the configuration's)",
    )
    measured.add_argument(
        "--metric",
        dest="metrics",
        action="append",
        default=[],
        metavar="NAME[=MODEL]",
        help="fd-dinov2, cmmd, fid, is or lpips, with the folder, file or hub id of its model (default: the published "
        "one, from the hub)",
    )
    measured.add_argument(
        "--reference", metavar="base|FOLDER", help="what distances are measured to (default: base if compared)"
    )
    measured.add_argument(
        "--resamples", type=int, default=200, metavar="N", help="bootstrap resamples of the distances (default 200)"
    )
    measured.add_argument(
        "--preference",
        metavar="A,B",
        help="also write preference.html, a blind comparison of two checkpoints for people (see the votes command)",
    )
    running = parser.add_argument_group("how it is run")
    running.add_argument("--output", default="runs/evaluation", metavar="FOLDER", help="default: runs/evaluation")
    running.add_argument(
        "--cache", metavar="FOLDER", help="cache of features, can be shared by evaluations (default: in OUTPUT)"
    )
    running.add_argument("--batch-size", type=int, default=16, help="images at once (default 16)")
    running.add_argument("--shown", type=int, default=48, metavar="N", help="prompts in evaluation.html (default 48)")
    running.add_argument("--remake", action="store_true", help="replace images that were made with different settings")
    running.add_argument("--json", action="store_true", help="print evaluation.json at the end")
    # DeepSpeed's launcher adds this; the actual rank is in the environment.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    add_settings(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, and print the results and where they are."""
    import json

    from rich.console import Console

    from pcpo_fast.interface.evaluating import evaluate

    done = evaluate(**values_of(arguments))
    if done is None:
        return 0

    from pcpo_fast.evaluation.evaluator import JSON_FILE, MARKDOWN_FILE
    from pcpo_fast.evaluation.result_tables import evaluation_tables

    if arguments.json:
        print(json.dumps(done.record, allow_nan=False))
    lines = [f"note: {note}" for note in done.result.notes]
    lines.append(f"Page: {done.page}, with {MARKDOWN_FILE} and {JSON_FILE} in the same folder")
    if done.preference is not None:
        page, key = done.preference
        lines.append(f"Blind comparison: give people {page}, keep {key}; then: pcpo-fast votes {key} VOTES...")
    # With --json, stdout carries only the JSON.
    show_results(Console(stderr=arguments.json), evaluation_tables(done.result), lines)
    return 0
