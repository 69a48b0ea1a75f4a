"""Judges `assets/tiny-flux` as plain diffusers runs it: how often are held-out captions drawn right?

python assets/measure_tiny_flux.py --json benchmarks/results/tiny_flux.json --grid docs/tiny_flux.png
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor

from pcpo_fast.rewards.caption_match import caption_match, measure_scenes
from pcpo_fast.scenes import IMAGE_SIZE, all_scenes, heldout_captions, render, train_captions


def sample(pipeline: FluxPipeline, captions: list[str], seed: int, steps: int, length: int) -> Tensor:
    """Images [B, 3, 32, 32] in 0..1."""
    return pipeline(
        captions,
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        num_inference_steps=steps,
        guidance_scale=3.5,
        max_sequence_length=length,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images.float()


def judge(images: Tensor, captions: list[str]) -> dict[str, float]:
    """Shares of right backgrounds, shape colors and shapes, and the mean caption-match reward."""
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
    pipeline = FluxPipeline.from_pretrained(arguments.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    size = sum(file.stat().st_size for file in arguments.pipeline.rglob("*") if file.is_file())
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
    results: dict[str, object] = {
        "bytes": size,
        "parameters": {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in parts},
    }
    scenes = all_scenes()
    rendered = judge(render(scenes, torch.Generator().manual_seed(0)), [scene.caption for scene in scenes])
    rows: list[dict[str, object]] = [{"captions": "rendered scenes", "images": len(scenes)} | rendered]
    print(rows[-1], flush=True)
    runs = [("held-out", 6, 16), ("held-out", 16, 8), ("held-out", 16, 16), ("held-out", 28, 16), ("held-out", 16, 512)]
    for kind, steps, length in [*runs, ("training", 6, 16)]:
        captions = heldout_captions() if kind == "held-out" else train_captions()[::6]
        images = [sample(pipeline, captions, seed, steps, length) for seed in range(arguments.seeds)]
        row: dict[str, object] = {"captions": kind, "steps": steps, "max_sequence_length": length}
        rows.append(row | {"images": 32 * arguments.seeds} | judge(torch.cat(images), captions * arguments.seeds))
        print(rows[-1], flush=True)
        if arguments.grid and (kind, steps, length) == ("held-out", 16, 16):
            save_grid(images[0], arguments.grid)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results | {"runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
