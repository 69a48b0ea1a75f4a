"""What the benchmarks compare with computes the same as we do; the benchmark scripts run."""

import json
import subprocess
import sys
from pathlib import Path

import kernel_baseline as baseline
import pytest
import torch
from kernel_cases import CLIP_RANGE, NOISE, Case, make_case
from pcpo_kernels import guidance, policy_loss, sample_step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def case() -> Case:
    made = make_case(20, 300, "cpu", torch.float32, difference=0.02)
    fields = {}
    for name, value in vars(made).items():
        fields[name] = value.double() if isinstance(value, torch.Tensor) else value
    return Case(**fields)


def test_loss_of_the_public_trainers_is_ours(case) -> None:
    output = case.output.requires_grad_()
    old = baseline.log_density(
        case.next_latents, *baseline.transition_mean(case.old_output, case.latents, case.time, case.following, NOISE)
    )
    rest = case.latents, case.next_latents, old, case.time, case.following, NOISE, case.advantage, CLIP_RANGE
    loss, log_ratio = baseline.policy_loss(output, *rest)
    columns = case.linear, case.quadratic, case.scale, case.advantage
    ours = policy_loss(output, case.old_output, case.endpoints, *columns, clip_range=CLIP_RANGE, objective="clip")
    # The trainers cast to float32 on the way: their log-densities of size 1 to 4 keep 7 digits.
    torch.testing.assert_close(log_ratio, ours.log_ratio, rtol=0, atol=4e-6)
    assert log_ratio.abs().max().item() > 1e-4
    assert 0 < int(ours.clipped.sum()) < 20
    torch.testing.assert_close(loss, ours.loss, rtol=0, atol=4e-6)
    away = ((log_ratio.expm1() * case.advantage.sign() - CLIP_RANGE).abs() > 8e-6)[:, None]
    theirs, mine = (torch.autograd.grad(value, [output], retain_graph=True)[0] for value in (loss, ours.loss))
    torch.testing.assert_close(theirs * away, mine * away, rtol=1e-4, atol=1e-8)


def test_step_of_the_public_trainers_is_ours(case) -> None:
    mean, std = baseline.transition_mean(case.output, case.latents, case.time, case.following, NOISE)
    ours = sample_step(case.latents, case.output, case.a, case.b, case.std, case.key)
    z = (ours.next_latents - mean) / std
    assert abs(z.mean().item()) < 4 / 6000**0.5
    assert abs(z.var().item() - 1) < 4 * (2 / 6000) ** 0.5
    torch.testing.assert_close(baseline.log_density(ours.next_latents, mean, std), ours.log_prob, rtol=0, atol=1e-5)
    torch.testing.assert_close(std.flatten(), case.std, rtol=1e-6, atol=0)


def test_guidance_of_the_public_trainers_is_ours(case) -> None:
    torch.testing.assert_close(
        baseline.guidance(case.unconditional, case.output, 4.5), guidance(case.unconditional, case.output, 4.5)
    )


@pytest.mark.slow
def test_benchmark_scripts_run(tmp_path) -> None:
    """Tiny sizes, then the plot of what came out."""

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(str(BENCHMARKS / "kernel_times.py"), "--tiny", "--seconds", "0.01", "--out", str(tmp_path))
    content = json.loads((tmp_path / "kernels.json").read_text())
    assert content["complete"]
    assert {record["op"] for record in content["records"]} == {"policy_loss", "sample_step", "guidance"}
    assert all(record["milliseconds"] > 0 for record in content["records"])
    run(str(BENCHMARKS / "plot_kernels.py"), str(tmp_path / "kernels.json"), "--out", str(tmp_path))
    assert (tmp_path / "kernel_speed_cpu.png").stat().st_size > 10_000


def test_traffic_of_the_public_trainers() -> None:
    """What docs/kernels.md says of it: operations, and bytes if every operand of every operation is counted."""

    class Count(TorchDispatchMode):
        operations, bytes = 0, 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if not function.is_view and function.overloadpacket.__name__ != "detach":
                self.operations += 1
                leaves = tree_leaves((arguments, keywords, result))
                # A broadcast operand is as large as its storage.
                sizes = [min(t.untyped_storage().nbytes(), t.nbytes) for t in leaves if isinstance(t, torch.Tensor)]
                self.bytes += sum(sizes)
            return result

    elements = 4096
    case = make_case(4, elements, "cpu", torch.bfloat16)
    output = case.output.requires_grad_()
    rest = case.latents, case.next_latents, torch.zeros(4), case.time, case.following, NOISE, case.advantage, CLIP_RANGE
    with Count() as count:
        torch.autograd.grad(baseline.policy_loss(output, *rest)[0], [output])
    assert 60 <= count.operations <= 90  # 77 with torch 2.13
    assert 280 <= count.bytes / (4 * elements) <= 360  # 320 with torch 2.13
