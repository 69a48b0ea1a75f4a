"""Under torch.compile the launches are visible: the same as eager's, and known for what they write.

Compiled for a GPU and launched at a stub, since ``torch.library.triton_op`` sees nothing of the interpreter's kernels.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from pcpo_kernels import (
    NoiseKey,
    gated_residual_norm,
    guidance,
    modulated_norm,
    norm_rope,
    philox_normal,
    policy_loss,
    sample_step,
    swiglu,
)
from pcpo_kernels.dispatch import interpreting

pytest.importorskip("triton")

from stub_driver import stubbed

pytestmark = pytest.mark.skipif(interpreting(), reason="triton_op needs compiled kernels")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    from pcpo_kernels import operators

    monkeypatch.setattr(operators, "_SEEN", True)
    noted: list = []
    with stubbed(noted):
        yield noted
    torch._dynamo.reset()


def low(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.bfloat16)


def loss(output, unconditional, reference, rows, key):
    return policy_loss(
        output, reference, NoiseKey(*key), *rows[:4], clip_range=1e-4, objective="clip",
        reference=reference, kl=rows[4], unconditional=unconditional, guidance_scale=rows[5],
    ).loss  # fmt: skip


def step(f, x, rows, key):
    return sample_step(x, guidance(x, f, rows[0]), *rows[:3], NoiseKey(*key)).next_latents + philox_normal(*key, 40)


def norms(x, branch, modulation):
    gate, shift, scale = modulation.chunk(3, 1)
    hidden, normed = gated_residual_norm(modulated_norm(x, shift, scale), branch, gate, shift, scale)
    return hidden + normed


def heads(x, weight, second, table):
    return norm_rope(x, weight, table, table, second=second, second_weight=weight)


def cases(rows: int = 3) -> dict[str, tuple[Callable, list, int]]:
    """A function, its arguments, and how many of the first want a gradient."""
    key = torch.arange(rows), torch.arange(rows) * 40
    columns = [torch.rand(rows) for _ in range(6)]
    return {
        "loss": (loss, [low(rows, 40), low(rows, 40), torch.randn(rows, 40), columns, key], 2),
        "step": (step, [low(rows, 40), torch.randn(rows, 40), columns, key], 0),
        "norms": (norms, [low(rows, 5, 32), low(rows, 5, 32), low(rows, 96)], 3),
        "swiglu": (swiglu, [low(rows, 5, 32)], 1),
        "heads": (heads, [low(rows, 3, 2, 8), low(8), low(rows, 2, 2, 8), torch.randn(5, 8)], 3),
    }


def run(function, given, wanted) -> None:
    leaves = [value.requires_grad_() if place < wanted else value for place, value in enumerate(given)]
    result = function(*leaves)
    if wanted:
        torch.autograd.grad(result, leaves[:wanted], torch.ones_like(result))


def described(launches: list) -> list:
    """Compiled code, programs, and every argument; tensors by what a kernel sees of them."""
    return [
        (*one[:2], [(a.dtype, tuple(a.shape), a.stride()) if isinstance(a, torch.Tensor) else a for a in one.arguments])
        for one in launches
    ]


@pytest.mark.parametrize("name", list(cases()))
def test_compiled_calls_launch_what_eager_ones_do(launches, name) -> None:
    function, given, wanted = cases()[name]
    run(function, given, wanted)
    eager = described(launches)
    assert eager
    launches.clear()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    run(compiled, given, wanted)
    assert described(launches) == eager


def test_a_batch_of_any_size_is_one_graph(launches) -> None:
    compiled = torch.compile(norms, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5, 8):
        function, given, wanted = cases(rows)["norms"]
        launches.clear()
        run(function, given, wanted)
        eager = described(launches)
        launches.clear()
        with torch.compiler.set_stance("fail_on_recompile" if rows > 3 else "default"):
            run(compiled, given, wanted)
        assert described(launches) == eager


WRITTEN = {
    "guidance_forward_kernel": {"result"},
    "sample_step_kernel": {"next_latents", "log_prob", "partial_sums", "counters"},
    "philox_normal_kernel": {"result"},
    "adaptive_norm_forward_kernel": {"hidden", "normed", "mean", "rstd"},
    "adaptive_norm_backward_kernel": {"grad_source", "grad_branch", "partials"},
    "norm_rope_forward_kernel": {"result"},
    "norm_rope_backward_kernel": {"gradient", "partials"},
    "swiglu_forward_kernel": {"result"},
    "swiglu_backward_kernel": {"gradient"},
    "token_sums_kernel": {"result"},
}


@pytest.mark.parametrize("name", ["step", "norms", "swiglu", "heads"])
def test_the_tracer_knows_what_a_kernel_writes(launches, name) -> None:
    """Of every launch in the graphs, forward and backward: what is written and nothing else becomes a new value."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    found: list[tuple[str, set[str], set[str]]] = []

    def note(graph, _):
        for node in graph.graph.nodes:
            if "triton_kernel_wrapper" in str(node.target):
                kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
                function = getattr(kernel.fn, "fn", kernel.fn)
                there = {name for name, value in node.kwargs["kwargs"].items() if value is not None}
                found.append((function.__name__, set(node.kwargs["tensors_to_clone"]), there))
        return graph

    function, given, wanted = cases()[name]
    run(torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=note)), given, wanted)
    assert len(found) >= 2
    for kernel, written, there in found:
        assert written == WRITTEN[kernel] & there
