"""``pcpo-fast sample``: images from a pipeline or a trained run."""

import argparse

from pcpo_fast.commands import add_settings, values_of

EXAMPLES = """examples:
  pcpo-fast sample --prompt "a red circle on a blue background" --output circle.png
  pcpo-fast sample --run runs/demo --prompts assets/prompts/scenes_heldout.txt --output heldout.png
  pcpo-fast sample --run runs/demo --reward caption_match --prompt "a white cross on a red background" --count 8
  pcpo-fast sample --run runs/demo --guidance-scale-reward 0.7 --prompt "a red cross on a blue background"
  pcpo-fast sample --run runs/demo --sweep 0,0.25,...,1.5 --reward caption_match --prompts heldout.txt
  pcpo-fast sample --run runs/a --run runs/b --guidance-scale-reward 0.7 --guidance-scale-reward 0.5 --prompt "a cat"
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "sample",
        help="make images",
        description="Generate images with a pipeline or with the weights of a run.",
        epilog=EXAMPLES,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--run",
        dest="runs",
        action="append",
        default=[],
        metavar="RUN",
        help="run directory: its model and its export; several runs of one base model are composed, each with its "
        "scale, and the sampler is the first one's",
    )
    source.add_argument("--config", metavar="FILE", help="configuration whose model and sampler are used, untrained")
    guidance = parser.add_mutually_exclusive_group()
    guidance.add_argument(
        "--guidance-scale-reward",
        dest="scales",
        action="append",
        default=[],
        type=float,
        metavar="SCALE",
        help="implicit reward guidance, once for all runs or once for each: 0 is the base model, 1 the trained one "
        "(default, of a single run), between them it interpolates, above 1 it extrapolates (useful up to about 3), "
        "below 0 it moves away from the reward",
    )
    guidance.add_argument(
        "--sweep",
        metavar="SCALES",
        help="the same prompts and noise at several scales, side by side; for example 0,0.25,...,1.5; several runs are "
        "all at the same scale; with --reward also a plot, OUTPUT_reward.png (write --sweep=-1,0,1 where the first is "
        "negative)",
    )
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    text.add_argument("--prompts", metavar="FILE", help="prompt file (text or JSONL)")
    parser.add_argument("--count", type=int, default=4, help="images per prompt (default 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="denoising steps (default: the configuration's)")
    parser.add_argument("--stochastic", action="store_true", help="sample with the rollout's noise instead of Euler")
    parser.add_argument("--batch-size", type=int, default=16, help="images at once (default 16)")
    parser.add_argument(
        "--reward",
        dest="rewards",
        metavar="REWARD",
        action="append",
        default=[],
        help="also score the images with this reward",
    )
    parser.add_argument("--output", default="samples.png", metavar="FILE.png", help="grid image (default samples.png)")
    parser.add_argument("--folder", metavar="FOLDER", help="also write every image as a file (a sweep: by scale)")
    parser.add_argument("--json", action="store_true", help="print files, prompts and scores as JSON")
    add_settings(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Sample the images and print where they are."""
    import json
    from pathlib import Path

    from pcpo_fast.interface.sampling import sample
    from pcpo_fast.reporting.tables import fixed_text

    values = values_of(arguments)
    texts, file = values.pop("prompt"), values.pop("prompts")
    samples = sample(texts if file is None else Path(file), **values)
    prompts = [prompt.text for prompt in samples.request.prompts]
    common = {"output": arguments.output, "runs": arguments.runs, "prompts": prompts, "seed": arguments.seed}
    result = common | dict(samples.written or {})
    if arguments.json:
        print(json.dumps(result))
        return 0
    for column in result.get("sweep", ()):
        scores = ", ".join(f"{name} mean {fixed_text(score['mean'], 4)}" for name, score in column["rewards"].items())
        if scores:
            print(f"scale {column['guidance_scale_reward']:g}: {scores}")
    for name, score in result.get("rewards", {}).items():
        print(f"{name}: mean {fixed_text(score['mean'], 4)}")
    print(f"Images: {result['output']}")
    if result.get("plot") is not None:
        print(f"Rewards: {result['plot']}")
    return 0
