"""Measure this GPU's ceilings: a copy, a bf16 matrix product, and attention at FLUX's sizes by PyTorch's backends.

    python benchmarks/gpu_ceilings.py --out benchmarks/results/my_gpu

All other measurements are compared with these, made on the same card at the same time.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from kernel_times import Clock, failure, options, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
HEADS, HEAD_SIZE = 24, 128
SHAPES = [("flux_720", 4, 512 + 2025), ("flux_720", 12, 512 + 2025), ("flux_1024", 4, 512 + 4096)]
"""(size, images, tokens): a micro-batch of an update, a group in a rollout, and larger images."""
TINY = [("tiny", 2, 24)]


def ceilings(clock: Clock, matrix: int, shapes: list[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    """A record for each, with its rate in TFLOP/s; the copy's is in the file's head."""
    left, right = (torch.randn(matrix, matrix, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    milliseconds = clock.milliseconds(lambda: left @ right)
    rate = 2 * matrix**3 / milliseconds * 1e-9
    yield {"op": "matrix product", "name": "bf16", "size": matrix, "milliseconds": milliseconds, "tflops": rate}
    for size, images, tokens in shapes:
        for name, backend in BACKENDS.items():
            facts = {"op": "attention", "size": size, "rows": images, "tokens": tokens}
            try:
                yield from attention(clock, name, backend, facts)
            except Exception as error:
                yield failure(name, error, **facts)


def attention(clock: Clock, name: str, backend: SDPBackend, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Forward, and forward with backward: 4 and 14 operations per pair of tokens, head and channel."""
    shape = facts["rows"], HEADS, facts["tokens"], HEAD_SIZE
    states = [torch.randn(shape, device=clock.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    incoming = torch.randn(shape, device=clock.device, dtype=torch.bfloat16)
    chosen = [backend, SDPBackend.MATH] if not clock.gpu else backend  # a CPU has no cuDNN
    pairs = facts["rows"] * HEADS * HEAD_SIZE * facts["tokens"] ** 2

    def forward() -> torch.Tensor:
        with sdpa_kernel(chosen):
            return scaled_dot_product_attention(*states)

    ways = {"forward": forward, "forward+backward": lambda: torch.autograd.grad(forward(), states, incoming)}
    for (way, call), operations in zip(ways.items(), (4, 14), strict=True):
        with torch.set_grad_enabled(way != "forward"):
            milliseconds = clock.milliseconds(call)
        yield facts | {
            "name": name, "way": way, "milliseconds": milliseconds, "tflops": operations * pairs / milliseconds * 1e-9,
        }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    chosen = options(__doc__, "ceilings.json", 30, 0.3, "tiny sizes, to try the script on any machine").parse_args(
        arguments
    )
    matrix, shapes = (64, TINY) if chosen.tiny else (8192, SHAPES)
    return run(
        chosen,
        "ceilings.json",
        lambda clock, _: ceilings(clock, matrix, shapes),
        lambda record: "{op:15} {size:10} x{rows:<3} {way:17}".format(**{"size": "", "rows": 1, "way": ""} | record),
    )


if __name__ == "__main__":
    sys.exit(main())
