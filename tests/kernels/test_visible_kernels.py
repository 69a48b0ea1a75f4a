"""Under torch.compile the launches are visible: the same as eager's, and known for what they write.

Compiled for a GPU and launched at a stub, since ``torch.library.triton_op`` sees nothing of the interpreter's kernels.
"""

import pytest
import torch
from pcpo_kernels.dispatch import interpreting

pytest.importorskip("triton")

from visible_cases import cases, norms, run

pytestmark = pytest.mark.skipif(interpreting(), reason="triton_op needs compiled kernels")


def described(launches: list) -> list:
    """Compiled code, programs, and every argument; tensors by what a kernel sees of them."""
    return [
        (*one[:2], [(a.dtype, tuple(a.shape), a.stride()) if isinstance(a, torch.Tensor) else a for a in one.arguments])
        for one in launches
    ]


@pytest.mark.parametrize("name", list(cases()))
def test_compiled_calls_launch_what_eager_ones_do(shown_launches, name) -> None:
    function, given, wanted = cases()[name]
    run(function, given, wanted)
    eager = described(shown_launches)
    assert eager
    shown_launches.clear()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    run(compiled, given, wanted)
    assert described(shown_launches) == eager


def test_a_batch_of_any_size_is_one_graph(shown_launches) -> None:
    compiled = torch.compile(norms, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5, 8):
        function, given, wanted = cases(rows)["norms"]
        shown_launches.clear()
        run(function, given, wanted)
        eager = described(shown_launches)
        shown_launches.clear()
        with torch.compiler.set_stance("fail_on_recompile" if rows > 3 else "default"):
            run(compiled, given, wanted)
        assert described(shown_launches) == eager


WRITTEN = {
    "policy_loss_forward_kernel": {"scratch", "counters", "loss", "clipped_out", "statistics"},
    "policy_loss_backward_kernel": {"gradient", "unconditional_gradient"},
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


@pytest.mark.parametrize("name", list(cases()))
def test_the_tracer_knows_what_a_kernel_writes(shown_launches, name) -> None:
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
