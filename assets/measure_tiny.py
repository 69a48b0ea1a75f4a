"""Measures how often a tiny pipeline, run with plain diffusers, draws held-out captions correctly.

python assets/measure_tiny.py --pipeline assets/tiny-sd --json benchmarks/results/tiny_sd.json --grid docs/tiny_sd.png
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from pcpo_fast.rewards.caption_match import caption_match, measure_scenes
from pcpo_fast.rewards.scenes import IMAGE_SIZE, all_scenes, heldout_captions, render, train_captions

# (which captions, steps, guidance, max_sequence_length) per class; the first is drawn as the grid.
RUNS: dict[str, list[tuple[str, int, float, int | None]]] = {
    "FluxPipeline": [
        ("held-out", 16, 3.5, 16),
        ("held-out", 6, 3.5, 16),
        ("held-out", 16, 3.5, 8),
        ("held-out", 28, 3.5, 16),
        ("held-out", 16, 3.5, 512),
        ("training", 6, 3.5, 16),
    ],
    "StableDiffusionPipeline": [
        ("held-out", 16, 4.0, None),
        ("held-out", 4, 4.0, None),
        ("held-out", 6, 3.0, None),
        ("held-out", 6, 4.0, None),
        ("held-out", 10, 1.0, None),
        ("held-out", 10, 2.0, None),
        ("held-out", 10, 3.0, None),
        ("held-out", 10, 4.0, None),
        ("held-out", 10, 5.0, None),
        ("held-out", 16, 1.0, None),
        ("held-out", 50, 4.0, None),
        ("training", 10, 4.0, None),
    ],
    "StableDiffusion3Pipeline": [
        ("held-out", 16, 4.5, 16),
        ("held-out", 4, 4.5, 16),
        ("held-out", 6, 3.0, 16),
        ("held-out", 6, 4.5, 16),
        ("held-out", 10, 1.0, 16),
        ("held-out", 10, 2.0, 16),
        ("held-out", 10, 3.0, 16),
        ("held-out", 10, 4.5, 16),
        ("held-out", 10, 4.5, 8),
        ("held-out", 10, 4.5, 256),
        ("held-out", 28, 4.5, 16),
        ("training", 10, 4.5, 16),
    ],
    "Flux2KleinPipeline": [
        ("held-out", 16, 2.0, 16),
        ("held-out", 6, 1.0, 9),
        ("held-out", 10, 4.0, 16),
        ("training", 6, 1.0, 9),
    ],
    # Its guidance is one less than that of the others.
    "ZImagePipeline": [
        ("held-out", 16, 2.0, 16),
        ("held-out", 6, 0.0, 9),
        ("held-out", 10, 3.0, 16),
        ("training", 6, 0.0, 9),
    ],
}


def sample(
    pipeline: DiffusionPipeline, captions: list[str], seed: int, steps: int, guidance: float, length: int | None
) -> Tensor:
    """Images [B, 3, 32, 32] in 0..1; `length` is `max_sequence_length`, None where the pipeline has none."""
    return pipeline(
        prompt=list(captions),  # ZImagePipeline writes into it
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        **({} if length is None else {"max_sequence_length": length}),
    ).images.float()


def judge(images: Tensor, captions: list[str]) -> dict[str, float]:
    """Shares of correct backgrounds, shape colors and shapes, and the mean caption-match reward."""
    found = measure_scenes(images, captions)
    scores = {"background": found.background, "color": found.color, "shape": found.shape}
    scores["reward"] = caption_match(images, captions)
    return {name: round(values.float().mean().item(), 4) for name, values in scores.items()}


def save_grid(images: Tensor, file: Path, columns: int = 8, zoom: int = 3) -> None:
    rows = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    picture = Image.fromarray((rows * 255).round().byte().numpy())
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pipeline", type=Path, default=Path("assets/tiny-flux"))
    parser.add_argument("--seeds", type=int, default=8, help="images per caption")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--grid", type=Path, help="PNG file: one image of every held-out caption")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipeline = DiffusionPipeline.from_pretrained(arguments.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    size = sum(file.stat().st_size for file in arguments.pipeline.rglob("*") if file.is_file())
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    results: dict[str, object] = {
        "pipeline": type(pipeline).__name__,
        "bytes": size,
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
    }
    scenes = all_scenes()
    rendered = judge(render(scenes, torch.Generator().manual_seed(0)), [scene.caption for scene in scenes])
    rows: list[dict[str, object]] = [{"captions": "rendered scenes", "images": len(scenes)} | rendered]
    print(rows[-1], flush=True)
    for kind, steps, guidance, length in RUNS[type(pipeline).__name__]:
        captions = heldout_captions() if kind == "held-out" else train_captions()[::6]
        images = [sample(pipeline, captions, seed, steps, guidance, length) for seed in range(arguments.seeds)]
        row: dict[str, object] = {"captions": kind, "steps": steps, "guidance": guidance}
        row |= {} if length is None else {"max_sequence_length": length}
        rows.append(
            row | {"images": len(captions) * arguments.seeds} | judge(torch.cat(images), captions * arguments.seeds)
        )
        print(rows[-1], flush=True)
        if arguments.grid and len(rows) == 2:
            save_grid(images[0], arguments.grid)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results | {"runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
