"""Row results of micro-batches to metrics, against means taken by hand."""

from statistics import pstdev

import pytest
import torch
from pcpo_kernels import PolicyLoss
from torch import Tensor

from pcpo_fast.training.step_statistics import StepStatistics

CPU = torch.device("cpu")


def result(log_ratio: list[float], clipped: list[bool], loss: float, kl: list[float] | None = None) -> PolicyLoss:
    ratios = torch.tensor(log_ratio)
    divergence: Tensor | None = None if kl is None else torch.tensor(kl)
    return PolicyLoss(
        torch.tensor(loss, requires_grad=True),
        ratios,
        torch.tensor(clipped),
        ratios.abs() / 2,
        divergence,
        3 * ratios.abs(),
    )


def test_means_over_rows_and_per_step() -> None:
    statistics = StepStatistics(5, CPU)
    statistics.add(torch.tensor([0, 3, 3]), result([0.1, -0.2, 0.3], [True, False, True], 2.0))
    statistics.add(torch.tensor([3]), result([-0.4], [False], 4.0))
    metrics = statistics.metrics()
    assert metrics == pytest.approx(
        {
            "policy/loss": 3.0,
            "policy/clip_fraction": 0.5,
            "policy/log_ratio_abs": 0.25,
            "policy/log_ratio_std": pstdev([0.1, -0.2, 0.3, -0.4]),
            "policy/taylor_error": 0.125,
            "policy/clip_fraction_step_0": 1.0,
            "policy/clip_fraction_step_3": 1 / 3,
            "policy/log_ratio_std_step_0": 0.0,
            "policy/log_ratio_std_step_3": pstdev([-0.2, 0.3, -0.4]),
            "policy/taylor_error_step_0": 0.05,
            "policy/taylor_error_step_3": 0.15,
        },
        abs=1e-8,
    )


def test_the_spread_of_log_ratios_per_step() -> None:
    """Against the population standard deviation of all rows, also where the mean is large beside it."""
    statistics = StepStatistics(3, CPU)
    steps = torch.randint(0, 3, (4, 25))
    ratios = 0.5 + 1e-3 * torch.randn(4, 25)
    for row in range(4):
        statistics.add(steps[row], result(ratios[row].tolist(), [False] * 25, 0.0))
    metrics = statistics.metrics()
    assert metrics["policy/log_ratio_std"] == pytest.approx(pstdev(ratios.flatten().tolist()), rel=1e-6)
    for step in range(3):
        values = ratios[steps == step].tolist()
        assert metrics[f"policy/log_ratio_std_step_{step}"] == pytest.approx(pstdev(values), rel=1e-6)


def test_kl_is_a_metric_only_with_a_reference() -> None:
    statistics = StepStatistics(2, CPU)
    statistics.add(torch.tensor([0, 1]), result([0.0, 0.0], [False, False], 1.0, [0.5, 1.5]))
    assert statistics.metrics()["policy/kl"] == pytest.approx(1.0)
    other = StepStatistics(2, CPU)
    other.add(torch.tensor([0]), result([0.0], [False], 1.0))
    assert "policy/kl" not in other.metrics()


def test_mismatch_per_step() -> None:
    statistics = StepStatistics(4, CPU)
    statistics.add(torch.tensor([1, 1, 2, 3]), result([0.0] * 4, [False] * 4, 0.0))
    made = result([-1e-4, 3e-4, 2e-4], [False] * 3, 0.0)
    statistics.add_mismatch(torch.tensor([1, 1, 2]), torch.tensor([0.01, 0.03, 0.05]), made)
    metrics = {name: value for name, value in statistics.metrics().items() if name.startswith("rollout/")}
    assert metrics == pytest.approx(
        {
            "rollout/mismatch_output": 0.03,
            "rollout/mismatch_output_step_1": 0.02,
            "rollout/mismatch_output_step_2": 0.05,
            "rollout/mismatch_log_ratio": 2e-4,
            "rollout/mismatch_log_ratio_step_1": 2e-4,
            "rollout/mismatch_log_ratio_step_2": 2e-4,
        }
    )


def test_the_divergence_is_a_metric_where_it_is_asked_for() -> None:
    statistics = StepStatistics(2, CPU, divergence=True)
    statistics.add(torch.tensor([0, 1]), result([0.1, -0.3], [False, False], 1.0))
    statistics.add_mismatch(torch.tensor([0, 1]), torch.ones(2), result([1e-3, 0.0], [False, False], 0.0))
    metrics = statistics.metrics()
    assert metrics["policy/divergence"] == pytest.approx(0.6)
    assert metrics["rollout/mismatch_divergence"] == pytest.approx(1.5e-3)


def test_no_mismatch_measured_is_no_metric() -> None:
    statistics = StepStatistics(2, CPU)
    statistics.add(torch.tensor([0]), result([0.0], [False], 0.0))
    assert not any(name.startswith("rollout/") for name in statistics.metrics())
