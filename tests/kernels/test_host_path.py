"""The host's side of the kernels, compiled for a GPU and launched at a stub: eager calls, registered ops, no repeats.

The interpreter compiles nothing, so none of this is seen there; whether the kernels are right is proved there.
"""

import json
from collections.abc import Iterator

import pytest
import torch
from pcpo_kernels.dispatch import interpreting
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import host_cost
from stub_driver import stubbed

pytestmark = pytest.mark.skipif(interpreting(), reason="the interpreter compiles nothing")


@pytest.fixture
def launches() -> Iterator[list]:
    noted: list = []
    with stubbed(noted):
        yield noted


def described(launches: list) -> list:
    """Compiled code, programs, and every argument; tensors by what a kernel sees of them."""
    return [
        (*one[:2], [(a.dtype, tuple(a.shape), a.stride()) if isinstance(a, torch.Tensor) else a for a in one.arguments])
        for one in launches
    ]


class Registered(TorchDispatchMode):
    """Under any dispatch mode the registered ops are called, so that the mode sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "pcpo_kernels":
            self.ops.append(function.overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("name", [name for name in host_cost.calls() if name != host_cost.FLOOR])
def test_eager_calls_launch_what_the_registered_ops_launch(launches, name) -> None:
    """Once each way; the same code with the same arguments gives the same bits."""
    call = host_cost.calls()[name]
    call()
    eager = described(launches)
    launches.clear()
    call()
    assert described(launches) == eager  # from memory
    launches.clear()
    with Registered() as mode:
        call()
    assert described(launches) == eager
    ways = 1 if name.startswith("sample_step") else 2
    assert len(mode.ops) == ways
    assert len(eager) == ways * (2 if "two sequences" in name else 1)


def test_what_is_remembered_is_what_triton_chooses(launches) -> None:
    """Over dtypes, alignments, lengths that Triton treats alone (1, divisible by 16) and missing pointers."""
    from pcpo_kernels.launch import launch
    from pcpo_kernels.ops.guidance.triton import guidance_backward_kernel as kernel

    whole, scale = torch.zeros(64), torch.ones(2)
    low = whole.to(torch.bfloat16)
    usual = [whole[:32], scale, whole[32:], whole[:32], 16, 16, 128, 1]
    changes = [{}, {0: whole[1:33]}, {0: low[:32]}, {0: low[4:36]}, {1: scale.half()}, {2: None}]
    changes += [{4: 17}, {5: 17}, {5: 1}, {4: 32}, {6: 256}]
    cases = [[change.get(place, value) for place, value in enumerate(usual)] for change in changes]
    chosen = []
    for arguments in cases:
        kernel[2, 1, 1](*arguments, num_warps=1, enable_fp_fusion=False)
        chosen.append(launches.pop())
    assert len({one.function for one in chosen}) > 6
    for _ in range(2):
        for arguments, expected in zip(cases, chosen, strict=True):
            launch(kernel, whole, (2, 1, 1), 1, arguments[:4], *arguments[4:])
            assert described([launches.pop()]) == described([expected])
    assert not launches


def test_a_profiler_of_triton_is_told_of_launches(launches) -> None:
    """Launches go through Triton, which tells it."""
    import triton
    from pcpo_kernels import launch

    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(print)
    try:
        assert launch._hooked()
        host_cost.calls()["guidance"]()
        assert not launch._compiled
    finally:
        hooks.remove(print)
    assert not launch._hooked()


def test_meta_tensors_launch_nothing(launches) -> None:
    from pcpo_kernels import guidance

    halves = [torch.empty(2, 8, device="meta", requires_grad=True) for _ in range(2)]
    result = guidance(*halves, torch.empty(2, device="meta"))
    gradients = torch.autograd.grad(result.sum(), halves)
    assert [(one.device.type, one.shape) for one in (result, *gradients)] == [("meta", (2, 8))] * 3
    assert not launches


def test_a_second_derivative_is_an_error(launches) -> None:
    from pcpo_kernels import guidance

    halves = [torch.ones(2, 8, requires_grad=True) for _ in range(2)]
    incoming = torch.ones(2, 8, requires_grad=True)
    gradient, _ = torch.autograd.grad(guidance(*halves, torch.ones(2)), halves, incoming, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_the_gate(tmp_path, capsys) -> None:
    before = {"calls": {"a": {"ratio": 2.0}, "b": {"ratio": 1.0}, "c": {"ratio": 1.0}}}
    now = {"calls": {"a": {"ratio": 2.29}, "b": {"ratio": 1.16}}}
    assert host_cost.dearer(now, before) == [
        "b: 1.16 times the host time of the baseline, at most 1.15 allowed",
        "c: not measured",
    ]
    file = tmp_path / "host.json"
    assert host_cost.main(["--times", "1", "--repeats", "1", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["calls"].keys() == host_cost.calls().keys()
    assert all(record["microseconds"] > 0 for record in written["calls"].values())
    cheap, dear = ({name: {"ratio": ratio} for name in written["calls"]} for ratio in (0.001, 1000))
    other = tmp_path / "other.json"
    against = ["--times", "1", "--repeats", "1", "--against", str(other), str(file)]
    file.write_text(json.dumps({**written, "calls": dear}))
    other.write_text(json.dumps({"cpu": "another", "calls": cheap}))
    assert host_cost.main(against) == 0
    file.write_text(json.dumps({**written, "cpu": "a third", "calls": dear}))
    assert host_cost.main(against) == 1
    assert "sample_step, key: " in capsys.readouterr().err


def test_the_registered_ops_are_measured_where_asked_for(monkeypatch) -> None:
    from pcpo_kernels.operators import Operator

    noted, original = [], Operator._dispatch
    monkeypatch.setattr(Operator, "_dispatch", lambda op, given: noted.append(op.opaque) or original(op, given))
    quick = ["--times", "1", "--repeats", "1"]
    assert host_cost.main(quick) == 0 and not noted
    assert host_cost.main([*quick, "--registered"]) == 0
    assert {torch.ops.pcpo_kernels.policy_loss.default, torch.ops.pcpo_kernels.sample_step.default} < set(noted)
