"""How well the predictions of each step foretell how much of a text can be read.

    python benchmarks/step_ocr.py --json FILE --plot FILE.png

None of the tiny pipelines writes text. So a small network learns here to draw four letters, each of which is drawn at
random with probability 0.3 in what it learns from, and therefore in what it draws. Its frozen weights are sampled in
groups, as a rollout would (16 steps, Dance SDE), and OCR reads the clean prediction of every step and the image. By
step: the correlation of the predictions' rewards with the final ones within groups, the slope beta, the correlation of
a gain with the next one, and the mean reward (docs/stepwise.md). Needs the extra `rewards`; takes half an hour.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from pcpo_fast.errors import UserError
from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.method.transitions import dance_sde, shifted_times
from pcpo_fast.reporting.plots import save_figure
from pcpo_fast.reporting.style import OTHERS, legend, new_figure, styled
from pcpo_fast.rewards.ocr_accuracy import OcrAccuracy

LETTERS = "ACEFHKLMNPRTUXY"
SLOTS, HEIGHT, SLOT, PATCH = 4, 32, 20, 4
WRONG = 0.3
STEPS, NOISE, SHIFT = 16, 0.7, 3
CHANNELS, BLOCKS = 96, 6


def drawn(words: Tensor, rng: np.random.Generator) -> Tensor:
    """Black letters on white, not quite in the middle: [B, 4] indices of letters -> [B, 1, 32, 80] in -1..1."""
    font, images = ImageFont.load_default(size=22), []
    for word in words.tolist():
        image = Image.new("L", (SLOTS * SLOT, HEIGHT), 255)
        pen = ImageDraw.Draw(image)
        shift, drop = rng.integers(-1, 2, size=2).tolist()
        for slot, letter in enumerate(word):
            at = (slot * SLOT + SLOT // 2 + shift, HEIGHT // 2 + drop)
            pen.text(at, LETTERS[letter], font=font, fill=0, anchor="mm")
        images.append(np.asarray(image))
    return torch.from_numpy(np.stack(images)).float()[:, None] / 127.5 - 1


class Block(nn.Module):
    """A residual block of two convolutions, scaled and moved by the time."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(32, 2 * CHANNELS)
        self.norm = nn.GroupNorm(8, CHANNELS)
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, hidden: Tensor, times: Tensor) -> Tensor:
        """Hidden [B, C, H, W], times [B, 32] -> hidden."""
        scale, move = self.time(times)[:, :, None, None].chunk(2, dim=1)
        inner = F.silu(self.norm(hidden) * (1 + scale) + move)
        return hidden + self.second(F.silu(self.first(inner)))


class Writer(nn.Module):
    """A convolutional velocity model of images [B, 1, 32, 80], given the letters [B, 4] and the time [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(LETTERS), CHANNELS)
        self.place = nn.Parameter(torch.zeros(1, CHANNELS, HEIGHT // PATCH, SLOTS * SLOT // PATCH))
        self.enter = nn.Conv2d(PATCH**2, CHANNELS, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.leave = nn.Conv2d(CHANNELS, PATCH**2, 1)

    def forward(self, x: Tensor, words: Tensor, time: Tensor) -> Tensor:
        """The velocity, noise minus image."""
        waves = time[:, None] * 2.0 ** torch.arange(16) * 0.1
        times = torch.cat([waves.sin(), waves.cos()], dim=1)
        letters = self.letters(words).movedim(1, 2).repeat_interleave(SLOT // PATCH, dim=2)[:, :, None]
        hidden = self.enter(F.pixel_unshuffle(x, PATCH)) + letters + self.place
        for block in self.blocks:
            hidden = block(hidden, times)
        return F.pixel_shuffle(self.leave(hidden), PATCH)


def learn(updates: int, generator: torch.Generator) -> Writer:
    """Flow matching on words with wrong letters."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    writer = Writer()
    optimizer = torch.optim.AdamW(writer.parameters(), lr=1e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for update in range(updates):
        asked = torch.randint(len(LETTERS), (32, SLOTS), generator=generator)
        other = torch.randint(len(LETTERS), (32, SLOTS), generator=generator)
        images = drawn(asked.where(torch.rand(32, SLOTS, generator=generator) >= WRONG, other), rng)
        noise = torch.randn(images.shape, generator=generator)
        time = torch.rand(32, generator=generator)
        time = SHIFT * time / (1 + (SHIFT - 1) * time)  # most of a rollout's steps are noisy, too
        mixed = images.lerp(noise, time[:, None, None, None])
        loss = F.mse_loss(writer(mixed, asked, time), noise - images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if update % 250 == 249:
            print(f"update {update + 1} of {updates}: loss {loss.item():.4f}", flush=True)
    return writer.eval()


@torch.no_grad()
def rollout(writer: Writer, words: Tensor, generator: torch.Generator) -> Tensor:
    """The clean prediction of each step, and last the image: [STEPS + 1, B, 1, 32, 80] in 0..1."""
    table = dance_sde(shifted_times(STEPS, SHIFT), NOISE)
    assert table.clean_predictions is not None
    x = torch.randn(len(words), 1, HEIGHT, SLOTS * SLOT, generator=generator)
    seen = []
    for step in range(STEPS):
        velocity = writer(x, words, table.times[step].float().expand(len(words)))
        p, q = table.clean_predictions[step].tolist()
        seen.append(p * x + q * velocity)
        a, b, std = (float(column[step]) for column in (table.a, table.b, table.std))
        if step == STEPS - 1:
            a, b, std = table.final_row
        x = a * x + b * velocity + std * torch.randn(x.shape, generator=generator)
    return (torch.stack([*seen, x]) / 2 + 0.5).clamp(0, 1)


def measures(rewards: Tensor) -> dict[str, Any]:
    """Of rewards [STEPS + 1, groups, images], the last row being the images': what they foretell, within groups."""
    centred = rewards - rewards.mean(2, keepdim=True)
    centred = centred[:, centred[-1].std(1) > 0]
    centred = (centred / centred[-1].std(1)[:, None]).flatten(1)
    predicted, final = centred[:-1], centred[-1]
    product, squares = (predicted * final).sum(1), predicted.square().sum(1)
    gains = centred.diff(dim=0)
    lengths = gains.norm(dim=1)
    return {
        "correlation": _numbers(product / (squares.sqrt() * final.norm())),
        "slope": _numbers(product / squares),
        "next_gain": _numbers((gains[:-1] * gains[1:]).sum(1) / (lengths[:-1] * lengths[1:])),
        "mean": _numbers(rewards[:-1].mean((1, 2))),
        "final_mean": float(rewards[-1].mean()),
        "final_std_within_groups": float(rewards[-1].std(1).mean()),
    }


def _numbers(values: Tensor) -> list[float | None]:
    """null where predictions have no spread."""
    return [value if np.isfinite(value) else None for value in values.tolist()]


def figure_of(strips: Tensor, scores: Tensor, found: dict[str, Any]) -> Any:
    """Predictions of a few images [STEPS + 1, B, 1, 32, 80] with their scores [STEPS + 1, B], over the curves."""
    shown = [*range(0, STEPS, 3), STEPS]
    figure = new_figure(5.2)
    grid = figure.add_gridspec(2, 1, height_ratios=(len(scores[0]), 2.6))
    cells = grid[0].subgridspec(len(scores[0]), len(shown))
    for row in range(len(scores[0])):
        for column, step in enumerate(shown):
            axes = figure.add_subplot(cells[row, column])
            axes.imshow(strips[step, row, 0].numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            label = "image" if step == STEPS else f"step {step}"
            axes.set_title(f"{label}: {float(scores[step, row]):.2f}", fontsize=7)
    axes = figure.add_subplot(grid[1])
    styled(axes, "What can be read in a prediction, and what it foretells", "step (0 = noise)", "", with_legend=True)
    for name, label, color in (("mean", "mean reward", OTHERS[1]), ("correlation", "correlation", OTHERS[0])):
        axes.plot([np.nan if value is None else value for value in found[name]], color=color, label=label)
    axes.plot([np.nan if value is None else value for value in found["slope"]], color=OTHERS[2], label="slope")
    legend(axes)
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the numbers")
    parser.add_argument("--plot", type=Path, required=True, metavar="FILE.png", help="draw them")
    parser.add_argument("--updates", type=int, default=4000, help="of the network that writes (default: 4000)")
    parser.add_argument("--groups", type=int, default=12, help="words, each drawn 12 times (default: 12)")
    chosen = parser.parse_args(arguments)
    for option in ("json", "plot"):
        if not getattr(chosen, option).absolute().parent.is_dir():
            parser.error(f"--{option} {getattr(chosen, option)}: its folder does not exist")
    try:
        reward = OcrAccuracy()
    except UserError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    writer = learn(chosen.updates, generator)
    words = torch.randint(len(LETTERS), (chosen.groups, SLOTS), generator=generator).repeat_interleave(12, dim=0)
    images = rollout(writer, words, generator)
    prompts = ['"' + "".join(LETTERS[letter] for letter in word) + '"' for word in words.tolist()]
    scores = []
    for step, batch in enumerate(images):
        scores.append(reward(batch.expand(-1, 3, -1, -1), prompts, [{} for _ in prompts]))
        print(f"step {step} of {STEPS}: mean reward {float(scores[-1].mean()):.3f}", flush=True)
    rewards = torch.stack(scores)
    found = measures(rewards.double().unflatten(1, (chosen.groups, 12)))
    write_atomically(chosen.json, json.dumps(found, indent=1) + "\n")
    few = slice(0, 48, 12)
    save_figure(figure_of(images[:, few], rewards[:, few], found), chosen.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
