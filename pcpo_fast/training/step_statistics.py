"""Per-step sums on the device, transferred to the host once per optimizer step."""

import torch
from pcpo_kernels import PolicyLoss
from torch import Tensor

from pcpo_fast.distributed.collectives import sum_over_ranks

_ROWS = ("count", "clipped", "log_ratio_abs", "taylor_error", "kl", "divergence", "log_ratio_sum", "log_ratio_square")
_MISMATCH = ("mismatch_count", "output", "log_ratio", "mismatch_divergence")
_COLUMNS = (*_ROWS, *_MISMATCH)


class StepStatistics:
    """Accumulates the per-row results of one optimizer step.

    Args:
        steps: number of sampler steps N.
        device: device of the results.
        divergence: whether to report the divergence from the old policy.
        left_out: number of micro-batches that are not run because their loss is 0.
    """

    def __init__(self, steps: int, device: torch.device, *, divergence: bool = False, left_out: int = 0) -> None:
        # The extra column is for rows that are not counted; nothing reads it.
        self.sums = torch.zeros(len(_COLUMNS), steps + 1, dtype=torch.float64, device=device)
        self.loss = torch.zeros(2, dtype=torch.float64, device=device)
        self.loss[1] = left_out
        self.has_kl, self.has_divergence = False, divergence

    def add(self, steps: Tensor, result: PolicyLoss) -> None:
        """Add a micro-batch: its steps, int64 [M] with N for rows that are not counted, and its loss result."""
        self.has_kl = self.has_kl or result.kl is not None
        kl = torch.zeros_like(result.log_ratio) if result.kl is None else result.kl
        ones = torch.ones_like(result.log_ratio)
        ratio = result.log_ratio
        rows = [ones, result.clipped.to(ones.dtype), ratio.abs(), result.taylor_error, kl, result.divergence, ratio]
        sums = torch.stack(rows).detach().double()
        self.sums[: len(_ROWS)].index_add_(1, steps, torch.cat((sums, sums[-1:] ** 2)))
        self.loss += torch.stack((result.loss.detach().double(), torch.ones_like(self.loss[0])))

    def add_mismatch(self, steps: Tensor, relative: Tensor, result: PolicyLoss) -> None:
        """Add a micro-batch's mismatch of rollout and update: relative output change [M], and the resulting loss."""
        rows = torch.stack((torch.ones_like(relative), relative, result.log_ratio.abs(), result.divergence))
        self.sums[len(_ROWS) :].index_add_(1, steps, rows.double())

    def metrics(self) -> dict[str, float]:
        """Means over the counted rows of all ranks, overall and per step; only the loss if no row is counted."""
        packed = sum_over_ranks(torch.cat((self.sums.flatten(), self.loss))).cpu()
        loss, batches = packed[-2:].tolist()
        sums = dict(zip(_COLUMNS, packed[:-2].reshape(len(_COLUMNS), -1)[:, :-1], strict=True))
        count, mismatches = sums["count"], sums["mismatch_count"]
        names = {"clip_fraction": "clipped", "log_ratio_abs": "log_ratio_abs", "taylor_error": "taylor_error"}
        if self.has_kl:
            names["kl"] = "kl"
        if self.has_divergence:
            names["divergence"] = "divergence"
        metrics = {"policy/loss": loss / max(batches, 1.0)}
        if not count.any():
            return metrics
        for name, column in names.items():
            metrics[f"policy/{name}"] = float(sums[column].sum() / count.sum())
        total, square = sums["log_ratio_sum"], sums["log_ratio_square"]
        metrics["policy/log_ratio_std"] = _spread(total.sum(), square.sum(), count.sum())
        trained = [step for step, n in enumerate(count.tolist()) if n]
        for step in trained:
            metrics[f"policy/clip_fraction_step_{step}"] = float(sums["clipped"][step] / count[step])
            metrics[f"policy/log_ratio_std_step_{step}"] = _spread(total[step], square[step], count[step])
            metrics[f"policy/taylor_error_step_{step}"] = float(sums["taylor_error"][step] / count[step])
        if mismatches.sum() > 0:
            if self.has_divergence:
                metrics["rollout/mismatch_divergence"] = float(sums["mismatch_divergence"].sum() / mismatches.sum())
            for name in ("output", "log_ratio"):
                metrics[f"rollout/mismatch_{name}"] = float(sums[name].sum() / mismatches.sum())
                for step in (step for step in trained if mismatches[step] > 0):
                    metrics[f"rollout/mismatch_{name}_step_{step}"] = float(sums[name][step] / mismatches[step])
        return metrics


def _spread(total: Tensor, square: Tensor, count: Tensor) -> float:
    """Population standard deviation from sums of values and squares, in float64."""
    mean = total / count
    return float((square / count - mean**2).clamp(min=0).sqrt())
