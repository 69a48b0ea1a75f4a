"""Model operations per second of a run, and their share of the GPU's peak rate (MFU)."""

from collections.abc import Callable

import torch

from pcpo_fast.config.schema import Config
from pcpo_fast.errors import UserError
from pcpo_fast.planning.cards import card_of
from pcpo_fast.planning.costs import ModelCosts


class Utilization:
    """Turns a count of work into rates.

    Model operations are two per multiply-add of network and VAE, and a backward is twice a forward. Recomputation, text
    encoders and rewards do not count (Chowdhery et al., PaLM, 2022, appendix B).

    Args:
        config: the run.
        costs: of its model.
        peak: operations per second of one GPU; None: unknown, so that there is no MFU.
    """

    def __init__(self, config: Config, costs: ModelCosts, peak: float | None) -> None:
        rows = 1 if config.model.cfg_scale == 1 else 2  # of a prediction; the counts are of rows
        self.flops = (costs.forward(1).flops / rows, costs.training(1, False).flops / rows, costs.decoding(1).flops)
        self.peak = peak

    def metrics(self, forwards: float, trained: float, decodes: float, seconds: float, gpus: int) -> dict[str, float]:
        """``throughput/tflops``, 1e12 operations per second and GPU, and ``throughput/mfu`` where the peak is known.

        Args:
            forwards, trained, decodes: rows over all GPUs, as in :class:`~pcpo_fast.policies.base.PolicyWork`.
            seconds: that they took.
            gpus: number of GPUs.
        """
        counts = (forwards, trained, decodes)
        rate = sum(count * each for count, each in zip(counts, self.flops, strict=True)) / seconds / gpus
        return {"throughput/tflops": rate / 1e12} | ({} if self.peak is None else {"throughput/mfu": rate / self.peak})


def utilization_of(
    config: Config, device: torch.device, told: Callable[[str], None], costs: Callable[[], ModelCosts]
) -> Utilization | None:
    """Rates of a run on a GPU; None on a CPU, and for a model whose architecture is unknown, which `told` reports.

    Args:
        config: the run.
        device: where it works.
        told: shows a message.
        costs: counts those of the run's model; called on a GPU only.
    """
    if device.type != "cuda":
        return None
    card = card_of(torch.cuda.get_device_name(device))
    try:
        return Utilization(config, costs(), None if card is None else 1e12 * card.peak_tflops)
    except UserError as error:
        told(f"throughput/tflops and throughput/mfu are left out: {error}")
        return None
