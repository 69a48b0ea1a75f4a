"""What the engine costs around a backward of the demo's model, on a CPU.

    python benchmarks/engine_cost.py --json FILE

CPU milliseconds of an update of one micro-batch, from the loss to the new weights, less those of the bare backward.
The loss is the sum of all weights, whose backward is next to nothing. The ways take turns, so that a busy machine slows
all: ``alone`` (a single process without a DeepSpeed JSON), ``reduced`` (the same with ``ds_configs/zero1.json``, whose
reductions have nothing to reduce), and ``plain`` (``clip_grad_norm_`` and AdamW on single weights, as plain PyTorch
loops have it).
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from diffusers import FluxTransformer2DModel
from host_cost import processor
from torch import Tensor, nn

from pcpo_fast.config.loading import load_config
from pcpo_fast.engine.engine import Engine, start_distributed

NETWORK = "assets/tiny-flux/transformer"


def loss_of(network: nn.Module) -> Tensor:
    """The sum of all weights."""
    return torch.stack([p.sum() for p in network.parameters()]).sum()


def with_engine(*overrides: str) -> Callable[[], float]:
    """An update through the engine; returns its CPU seconds."""
    config = load_config("configs/tiny_flux.yaml", ["train.micro_batch_size=120", *overrides])
    network = FluxTransformer2DModel.from_pretrained(NETWORK)
    engine = Engine(network, config, accumulation=1)

    def update() -> float:
        if not engine.alone:
            engine.deepspeed.optimizer.clear_backward_seen_flag()  # as DeepSpeed's forward does
        loss, began = loss_of(network), time.process_time()
        engine.backward(loss, last=True)
        engine.step()
        return time.process_time() - began

    return update


def plain() -> Callable[[], float]:
    """An update in plain PyTorch; returns its CPU seconds."""
    settings = load_config("configs/tiny_flux.yaml").optimizer
    network = FluxTransformer2DModel.from_pretrained(NETWORK)
    weights = list(network.parameters())
    optimizer = torch.optim.AdamW(
        weights, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )

    def update() -> float:
        loss, began = loss_of(network), time.process_time()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - began

    return update


def bare() -> Callable[[], float]:
    """The backward by itself; returns its CPU seconds."""
    network = FluxTransformer2DModel.from_pretrained(NETWORK)

    def backward() -> float:
        loss, began = loss_of(network), time.process_time()
        loss.backward()
        spent = time.process_time() - began
        network.zero_grad()
        return spent

    return backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--updates", type=int, default=60, help="of each way (%(default)s)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    start_distributed()
    ways = {"alone": with_engine(), "reduced": with_engine("deepspeed=ds_configs/zero1.json"), "plain": plain()}
    floor, rounds = bare(), []
    for number in range(chosen.updates + 3):
        least = floor()
        spent = {name: way() - least for name, way in ways.items()}
        if number >= 3:  # the first ones allocate
            rounds.append(spent)
    content = {
        "cpu": processor(),
        "torch": torch.__version__,
        "updates": chosen.updates,
        "milliseconds": {name: round(1e3 * median(spent[name] for spent in rounds), 2) for name in ways},
        "alone_of": {name: round(median(s["alone"] / s[name] for s in rounds), 3) for name in ("reduced", "plain")},
    }
    print(json.dumps(content, indent=1))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
