"""Bytes per GPU of weights, gradients and optimizer state for each ZeRO stage, as this project's engine keeps them.

ZeRO (Rajbhandari et al. 2020) partitions over the ranks: in stage 1 the optimizer state, in stage 2 also the
gradients, in stage 3 also the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pcpo_fast.config.schema import Config
from pcpo_fast.engine.engine import deepspeed_config
from pcpo_fast.engine.whole_weights import needs_whole_weights

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
CHUNK_BYTES = (1 << 24) * 24
"""Temporaries of the optimizers that step in chunks: 24 bytes for each of the 2^24 elements of a chunk."""


class OptimizerBytes(NamedTuple):
    """Bytes per trained parameter.

    Attributes:
        gradient: the accumulated gradient.
        master: the copy of the weights that the optimizer updates.
        moments: both moments.
        step: temporaries during the optimizer step; 0 if it steps in chunks.
        average: the moving average of the weights.
    """

    gradient: float
    master: float
    moments: float
    step: float
    average: float = 0.0


def optimizer_bytes(config: Config) -> OptimizerBytes:
    """Bytes per trained parameter of the configuration's optimizer."""
    stochastic = config.optimizer.weights == "stochastic_rounding"
    eight_bit = getattr(config.optimizer, "moments", "full") == "8bit"
    master = 2.0 if stochastic else 4.0
    moments = 2.0 if eight_bit else 2 * master
    chunked = stochastic or eight_bit
    # DeepSpeed casts the fp32 gradient sum to the dtype of the master weights.
    step = (2.0 if stochastic else 0.0) if chunked else 4.0
    average = 4.0 if getattr(config.train, "ema_decay", None) is not None else 0.0
    return OptimizerBytes(4.0, master, moments, step, average)


@dataclass(frozen=True)
class Zero:
    """The settings of a DeepSpeed configuration that determine memory.

    Attributes:
        stage: ZeRO stage 1, 2 or 3.
        offload_optimizer, offload_parameters: what is kept in host memory.
        pinned_optimizer, pinned_parameters: whether that memory is page-locked.
        reduce_bucket: elements per reduction bucket.
        buffers: reduction buffers alive at a time; 2 if communication overlaps.
        live_parameters: ZeRO-3: maximum number of gathered parameters.
        prefetch: ZeRO-3: number of prefetched parameters.
    """

    stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    pinned_optimizer: bool = False
    pinned_parameters: bool = False
    reduce_bucket: int = 200_000_000
    buffers: int = 1
    live_parameters: int = 1_000_000_000
    prefetch: int = 50_000_000

    @classmethod
    def of(cls, config: Config) -> "Zero":
        """The ZeRO settings of a configuration, with DeepSpeed's defaults.

        Raises:
            UserError: as :func:`pcpo_fast.engine.engine.deepspeed_config`.
        """
        zero = deepspeed_config(config, accumulation=1)["zero_optimization"]
        stage = int(zero["stage"])
        overlap = zero.get("overlap_comm")
        return cls(
            stage,
            _offloads(zero, "offload_optimizer"),
            stage == 3 and _offloads(zero, "offload_param"),
            _pins(zero, "offload_optimizer"),
            stage == 3 and _pins(zero, "offload_param"),
            int(float(zero.get("reduce_bucket_size", 5e8))),
            2 if (stage == 3 if overlap is None else overlap) else 1,
            int(float(zero.get("stage3_max_live_parameters", 1e9))),
            int(float(zero.get("stage3_prefetch_bucket_size", 5e7))),
        )

    @property
    def name(self) -> str:
        """Name of the corresponding file in ds_configs."""
        return f"zero{self.stage}" + ("_offload" if self.offload_optimizer else "")


def _offloads(zero: Mapping[str, Any], key: str) -> bool:
    section = zero.get(key)
    return isinstance(section, Mapping) and section.get("device", "cpu") != "none"


def _pins(zero: Mapping[str, Any], key: str) -> bool:
    return _offloads(zero, key) and bool(zero[key].get("pin_memory"))


SHIPPED = {
    zero.name: zero
    for zero in (
        Zero(1),
        Zero(2, buffers=2),
        Zero(2, offload_optimizer=True, pinned_optimizer=True, buffers=2),
        Zero(3, buffers=2, prefetch=200_000_000),
        Zero(3, True, True, pinned_optimizer=True, pinned_parameters=True, buffers=2, prefetch=200_000_000),
    )
}
"""The shipped DeepSpeed configurations (ds_configs), from fastest to slowest."""


def usual_stages(config: Config) -> dict[str, Zero]:
    """Those of :data:`SHIPPED` that a run may have.

    The engine refuses to partition some weights, and DeepSpeed does not offload bf16 weights without a master copy.
    """
    stochastic, whole = config.optimizer.weights == "stochastic_rounding", any(needs_whole_weights(config))
    return {
        name: zero
        for name, zero in SHIPPED.items()
        if not (whole and zero.stage == 3) and not (stochastic and zero.offload_optimizer)
    }


class States(NamedTuple):
    """Bytes on one GPU.

    Attributes:
        weights: the network's weights, or this rank's share.
        gradients: accumulated gradients.
        flat_gradient: whether these are one flat tensor, which stays allocated during rollouts and, at the end of a
            backward, exists in addition to that backward's gradients.
        master, moments: optimizer state.
        average: the moving average of the weights.
        communication: reduction buffers during a backward.
        gathered: ZeRO-3: gathered weights of other ranks.
        step: temporaries of the optimizer step.
    """

    weights: float
    gradients: float
    flat_gradient: bool
    master: float
    moments: float
    average: float
    communication: float
    gathered: float
    step: float


def states_of(
    zero: Zero, ranks: int, *, total: int, trained: int, weight_bytes: int, optimizer: OptimizerBytes
) -> States:
    """Memory of weights, gradients and optimizer state on each of ``ranks`` GPUs.

    Args:
        zero: stage and offloading.
        ranks: number of GPUs.
        total: parameters of the network, with adapters.
        trained: number of trained parameters.
        weight_bytes: bytes per weight, 2 for bf16.
        optimizer: from :func:`optimizer_bytes`.
    """
    share = trained / ranks
    # For bf16 weights in stage 1 DeepSpeed uses its BF16 optimizer, with one flat fp32 gradient of all weights.
    flat = zero.stage == 1 and weight_bytes == 2 and not zero.offload_optimizer
    on_gpu = 0 if zero.offload_optimizer else 1
    # In stage 2 the float32 sum of bf16 gradients stays on the GPU until the step, even with an offloaded optimizer.
    summed = 1 if zero.stage == 2 and weight_bytes == 2 else on_gpu
    gathered = 0.0
    if zero.stage == 3 and (ranks > 1 or zero.offload_parameters):
        gathered = min(total, zero.live_parameters + zero.prefetch) * weight_bytes
    weights = float(total * weight_bytes)
    if zero.stage == 3:
        weights = 0.0 if zero.offload_parameters else weights / ranks
    if flat:
        communication = min(trained, zero.reduce_bucket) * optimizer.gradient if ranks > 1 else 0.0
    else:
        bucket = min(trained, zero.reduce_bucket) if zero.stage < 3 else zero.reduce_bucket
        communication = float(bucket * weight_bytes * zero.buffers)
    step = share * optimizer.step if optimizer.step >= 4 else min(share * 24, CHUNK_BYTES) + share * optimizer.step
    return States(
        weights=weights,
        gradients=trained * optimizer.gradient if zero.stage == 1 else share * optimizer.gradient * summed,
        flat_gradient=flat,
        master=share * optimizer.master * on_gpu,
        moments=share * optimizer.moments * on_gpu,
        average=share * optimizer.average * on_gpu,
        communication=communication,
        gathered=gathered,
        step=step * on_gpu,
    )
