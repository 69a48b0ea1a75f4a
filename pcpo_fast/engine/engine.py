"""The training engine: a thin layer over DeepSpeed, the same for one process and for many."""

import io
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pcpo_fast.config.schema import AUTO, Config, DistributedConfig
from pcpo_fast.config.shipped import find
from pcpo_fast.config.wording import counted
from pcpo_fast.distributed.collectives import own_gpu, rank, world_size
from pcpo_fast.distributed.launching import adopt_launch, launcher_rank
from pcpo_fast.distributed.rendezvous import connect, meet
from pcpo_fast.distributed.watchdog import Watchdog, note, set_watchdog
from pcpo_fast.engine.deepspeed_file import check_machine, read_deepspeed_file
from pcpo_fast.engine.eight_bit_adamw import EightBitAdamW
from pcpo_fast.engine.ema import Ema
from pcpo_fast.engine.offload import Offload
from pcpo_fast.engine.optimizers import GuardedAdamW, StochasticAdamW
from pcpo_fast.engine.whole_weights import needs_whole_weights
from pcpo_fast.errors import UserError
from pcpo_fast.profiling import profiler_ranges

MARGIN = timedelta(seconds=60)
"""Collectives time out this much later than the watchdog, whose message names the missing rank."""

STATE_FOLDER = "engine"
"""Folder of the engine state within a checkpoint."""


def start_distributed(settings: DistributedConfig | None = None) -> torch.device:
    """Join the launcher's process group, or create one of a single process, and return this rank's device.

    Args:
        settings: timeouts; None for the defaults.

    Raises:
        UserError: some ranks are missing, rank 0 cannot be reached, a rank has already failed, or this process's rank
            is unknown.
    """
    settings = DistributedConfig() if settings is None else settings
    adopt_launch()
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = _import_deepspeed()
    if on_gpu:
        torch.cuda.set_device(own_gpu())
    device = torch.device("cuda", own_gpu()) if on_gpu else torch.device("cpu")
    if not dist.is_initialized():
        backend = "nccl" if on_gpu else "gloo"
        if "MASTER_ADDR" in os.environ:
            patience, timeout = (timedelta(seconds=s) for s in (settings.start_timeout, settings.timeout))
            dist.init_process_group(
                backend,
                store=meet(patience),
                rank=launcher_rank(),
                world_size=int(os.environ["WORLD_SIZE"]),
                timeout=timeout + MARGIN,
                device_id=device if on_gpu else None,
            )
            if world_size() > 1:
                set_watchdog(Watchdog(connect(patience), rank(), world_size(), timeout))
        else:
            # No launcher: an in-memory store needs no port or host name. DeepSpeed reads the environment.
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=False)
    return device


def stop_distributed() -> None:
    """Leave the process group, if there is one; :func:`start_distributed` can create a new one later."""
    set_watchdog(None)
    if dist.is_available() and dist.is_initialized():
        _import_deepspeed().comm.destroy_process_group()  # also drops DeepSpeed's own references


@dataclass(frozen=True)
class StepOutcome:
    """Result of an optimizer step.

    Attributes:
        applied: False if a gradient was not finite and the step was skipped.
        grad_norm: global norm before clipping; infinite or NaN if the step was skipped.
        lr: learning rate of the step.
    """

    applied: bool
    grad_norm: float
    lr: float


class Engine:
    """A module with its optimizer, gradient accumulation, clipping and mixed precision.

    Args:
        module: the model; its trainable parameters are optimized. With ZeRO-3 it may be in host memory.
        config: sections ``optimizer``, ``model``, ``train`` and ``deepspeed`` are used.
        accumulation: micro-batches per optimizer step.

    Attributes:
        adapts: whether adapters are trained, and not the module's own weights.
        ema: the moving average of the trained weights; None without ``train.ema_decay``.
        alone: whether DeepSpeed only steps, because a single process with float32 weights and no DeepSpeed JSON has
            nothing to reduce and nothing to cast: gradients add up where autograd puts them.

    Raises:
        UserError: the DeepSpeed JSON is missing, malformed, rejected by DeepSpeed, or sets something that the
            configuration decides.
    """

    def __init__(self, module: nn.Module, config: Config, accumulation: int) -> None:
        deepspeed = _import_deepspeed()
        from deepspeed.runtime.zero.utils import ZeRORuntimeException

        settings = config.optimizer
        self.warmup, self.lr = settings.warmup_updates, settings.lr
        self.updates = 0
        self.adapts = config.model.finetune == "lora"
        self.last_step = StepOutcome(True, 0.0, 0.0)
        parameters = [p for p in module.parameters() if p.requires_grad]
        common: dict[str, Any] = {
            "lr": settings.lr,
            "betas": settings.betas,
            "eps": settings.eps,
            "weight_decay": settings.weight_decay,
        }
        if settings.moments == "8bit":
            self.optimizer: Any = EightBitAdamW(parameters, **common, seed=config.seed)
        elif settings.weights == "stochastic_rounding":
            self.optimizer = StochasticAdamW(parameters, **common, seed=config.seed)
        else:
            self.optimizer = GuardedAdamW(parameters, **common)
        ds_config = deepspeed_config(config, accumulation)
        _check_secondary_partition(ds_config, config.deepspeed)
        zero, trained = ds_config["zero_optimization"], sum(p.numel() for p in parameters)
        self.alone = config.deepspeed is None and world_size() == 1 and config.model.dtype == "float32"
        if self.alone:
            zero["contiguous_gradients"] = False  # DeepSpeed then hooks into no gradient
        bucket = zero.get("reduce_bucket_size", 500_000_000)
        if zero["stage"] < 3 and isinstance(bucket, int | float):
            # DeepSpeed allocates buffers of the maximal bucket size, two gigabytes by default, for any model.
            zero["reduce_bucket_size"] = int(min(bucket, trained))
        try:
            # DeepSpeed's bf16 optimizer prints memory statistics at every log level, into the progress display.
            with redirect_stdout(io.StringIO()):
                if zero["stage"] == 3:
                    # Partitioned one weight at a time, so that no device ever holds the full model.
                    deepspeed.zero.Init(module=module, config_dict_or_path=ds_config)
                    device = next(module.parameters()).device  # of the empty placeholder of a partitioned weight
                    for buffer in module.buffers():
                        buffer.data = buffer.data.to(device)
                self.deepspeed, *_ = deepspeed.initialize(
                    model=module,
                    optimizer=self.optimizer,
                    model_parameters=parameters,
                    config=ds_config,
                    dist_init_required=False,
                )
        except (ValueError, AssertionError, KeyError, deepspeed.DeepSpeedConfigError, ZeRORuntimeException) as error:
            if config.deepspeed is None:
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{config.deepspeed}: DeepSpeed rejects these settings: {reason}") from None
        self.offload = Offload()
        decay = config.train.ema_decay
        self.ema = None if decay is None else Ema(self._shards(), decay)

    @property
    def module(self) -> nn.Module:
        """The engine as a module: calling it runs the model with DeepSpeed's hooks, if there are any."""
        return self.deepspeed.module if self.alone else self.deepspeed  # type: ignore[no-any-return]

    def backward(self, loss: Tensor, last: bool | None = None) -> None:
        """Accumulate a micro-batch's gradient, divided by ``accumulation``.

        Args:
            loss: a scalar.
            last: whether the next :meth:`step` is an optimizer step. After fewer than ``accumulation`` micro-batches,
                the missing ones count as zero gradients. None: a step after every ``accumulation`` micro-batches.
        """
        self.deepspeed.set_gradient_accumulation_boundary(last)
        if not self.alone:
            self.deepspeed.backward(loss)
            return
        (loss / self.deepspeed.gradient_accumulation_steps()).backward()
        if self.deepspeed.is_gradient_accumulation_boundary():
            zero = self.deepspeed.optimizer
            zero.averaged_gradients[0] = _Gradients(zero.params_in_partition[0], zero.partition_size[0])

    def step(self) -> None:
        """End a micro-batch; after the last of an update, step the optimizer and set :attr:`last_step`."""
        note("update")
        boundary = self.deepspeed.is_gradient_accumulation_boundary()
        lr = self.lr * min(1.0, (self.updates + 1) / (self.warmup + 1))
        if boundary:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        with profiler_ranges.named("optimizer") if boundary else nullcontext():
            self.deepspeed.step()
        if boundary:
            norm = self.deepspeed.get_global_grad_norm()
            applied = not self.optimizer.skipped and self.deepspeed.was_step_applied()
            self.last_step = StepOutcome(applied, math.nan if norm is None else float(norm), lr)
            self.updates += int(applied)
            if self.ema is not None and applied:
                self.ema.update()

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage in use: 1, 2 or 3."""
        return int(self.deepspeed.zero_optimization_stage())

    def save(self, folder: Path) -> None:
        """Write trained weights and optimizer state to ``folder/engine``. Collective."""
        self.deepspeed.save_checkpoint(str(folder), tag=STATE_FOLDER, exclude_frozen_parameters=True)
        if self.ema is not None:
            state = self.ema.state_dict()
            tensors = {str(index): average for index, average in enumerate(state["average"])}
            save_file(tensors, average_file(folder, rank()), {"updates": str(state["updates"])})

    def load(self, folder: Path) -> bool:
        """Load what :meth:`save` wrote with the same number of ranks and ZeRO stage; False if there is nothing."""
        self.deepspeed.checkpoint_engine.load = read_state_file
        # The state has no frozen weights, so the load cannot be strict.
        loaded, _ = self.deepspeed.load_checkpoint(str(folder), tag=STATE_FOLDER, load_module_strict=False)
        if self.ema is not None and loaded is not None:
            stored = read_average(folder, rank())
            if stored is None:
                self.begin_average()
            else:
                self.ema.load_state_dict(stored)
        return loaded is not None

    def begin_average(self) -> None:
        """Restart the moving average, if there is one, from the current weights, because none was loaded."""
        self.ema = None if self.ema is None else Ema(self._shards(), self.ema.decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the model has the moving average's weights, or its own if there is no average. Collective.

        The optimizer must not step within it.
        """
        if self.ema is None:
            yield
            return
        self.ema.swap_in()
        self._refresh_weights()
        try:
            yield
        finally:
            self.ema.swap_out()
            self._refresh_weights()

    @contextmanager
    def offloaded(self, enabled: bool = True) -> Iterator[None]:
        """Within the block the optimizer's state, including master weights, is in host memory; it must not step.

        State that DeepSpeed already keeps in host memory stays there; without a GPU nothing moves.
        """
        if not enabled:
            yield
            return
        shards = [*self._shards(), *(self.ema.average if self.ema is not None else ())]
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [value for value in (*shards, *moments) if isinstance(value, Tensor) and value.dim() > 0]
        parameters = list(self.deepspeed.module.parameters())
        needed = [*parameters, *(p.ds_tensor for p in parameters if hasattr(p, "ds_tensor"))]
        with self.offload.without(tensors, needed):
            yield

    def _shards(self) -> list[Tensor]:
        """This rank's flat shards of the trained weights, which its optimizer updates."""
        names = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")
        return next(list(found) for name in names if (found := getattr(self.deepspeed.optimizer, name, None)))

    @torch.no_grad()
    def _refresh_weights(self) -> None:
        """Copy the shards into the model's weights, as DeepSpeed does after a step."""
        optimizer = self.deepspeed.optimizer
        if self.zero_stage < 3:
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
        optimizer.invalidate_secondary_tensor()

    def full_state(self) -> dict[str, Tensor]:
        """The full trained parameters on the CPU, for export; empty on ranks other than 0. Collective.

        They are those of the moving average, if there is one. With ZeRO 3 and without adapters, the parameters that are
        not trained are among them: no rank has them whole.
        """
        import deepspeed

        state: dict[str, Tensor] = {}
        with self.averaged():
            for name, parameter in self.deepspeed.module.named_parameters():
                if parameter.requires_grad or (self.zero_stage == 3 and not self.adapts):
                    with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero_stage == 3):
                        if rank() == 0:
                            state[name] = parameter.detach().to("cpu", copy=True)
        return state


class _Gradients(list[Tensor]):
    """All gradients as DeepSpeed's step takes them: in pieces, of which it adds up the norms, and flat.

    The pieces are as long as the largest parameter: DeepSpeed copies each in float64, and takes no more than there are
    parameters.

    Args:
        parameters: with their gradients; one that has none gets zeros.
        count: elements with the padding at the end.
    """

    def __init__(self, parameters: Sequence[Tensor], count: int) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = [cast(Tensor, parameter.grad).reshape(-1) for parameter in parameters]
        self.flat_partition = flat[0].new_zeros(count)
        torch.cat(flat, out=self.flat_partition[: sum(map(len, flat))])
        super().__init__(self.flat_partition.split(max(map(len, flat))))


def deepspeed_config(config: Config, accumulation: int) -> dict[str, Any]:
    """The DeepSpeed settings of a run: the user's JSON plus what the configuration decides.

    The ZeRO stage is at least 1, and at least 2 for stochastic rounding.

    Raises:
        UserError: as :func:`pcpo_fast.engine.deepspeed_file.read_deepspeed_file`; or the stage conflicts with the
            configuration.
    """
    settings: dict[str, Any] = {}
    if config.deepspeed is not None:
        settings = read_deepspeed_file(find(config.deepspeed), _section_models())
    zero = settings.setdefault("zero_optimization", {})
    zero.setdefault("stage", 1)
    if zero["stage"] == 3:
        for need, instead in needs_whole_weights(config):
            raise UserError(f"{need}, but {config.deepspeed} has ZeRO stage 3; use stage 1 or 2, or {instead}")
    offload = zero.get("offload_optimizer")
    if config.train.ema_decay is not None and isinstance(offload, dict) and offload.get("device") == "nvme":
        raise UserError(
            "train.ema_decay: a moving average needs the weights in memory, not on NVMe; set it to null, or "
            f"offload_optimizer.device to cpu in {config.deepspeed}"
        )
    if config.model.dtype == "bfloat16":
        settings["bf16"] = {"enabled": True}
        # A bf16 sum of a thousand micro-batches loses half of them to rounding.
        settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        if config.optimizer.weights == "stochastic_rounding":
            settings["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
            # With stage 1 and fp32 accumulation DeepSpeed would use an optimizer that keeps fp32 weights.
            zero["stage"] = max(zero["stage"], 2)
    size = config.train.micro_batch_size  # not yet resolved where a file is only checked
    return settings | {
        "train_micro_batch_size_per_gpu": 1 if size == AUTO else size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def read_state_file(path: Path | str, map_location: Any = None, **options: Any) -> Any:
    """Load a file that DeepSpeed wrote.

    Only tensors and DeepSpeed's three record types are unpickled, since the checkpoint may come from elsewhere.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location=map_location, weights_only=True, **options)


def average_file(folder: Path, of_rank: int) -> Path:
    """Path of a rank's part of the moving average in a checkpoint."""
    return folder / STATE_FOLDER / f"moving_average_rank_{of_rank:05d}.safetensors"


def read_average(folder: Path, of_rank: int) -> dict[str, Any] | None:
    """A rank's part of a checkpoint's moving average, for :meth:`Ema.load_state_dict`; None if it has none.

    The tensors are memory-mapped.

    Raises:
        ValueError: the file is corrupt.
    """
    file = average_file(folder, of_rank)
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as stored:
            average = [stored.get_tensor(str(index)) for index in range(len(stored.keys()))]
            return {"updates": int(stored.metadata()["updates"]), "average": average}
    except SafetensorError as error:
        raise ValueError(f"{file.name}: {error}") from None


def _check_secondary_partition(settings: dict[str, Any], file: str | None) -> None:
    """Fail if ZeRO++'s hpZ, a second copy of the weights per machine, would waste memory on a single machine."""
    size, ranks = settings["zero_optimization"].get("zero_hpz_partition_size", 1), world_size()
    if isinstance(size, int) and size > 1 and (size >= ranks or ranks % size):
        raise UserError(
            f"{file}: zero_optimization.zero_hpz_partition_size is {size}, but must be the number of ranks per machine "
            f"of several machines, and the run has {counted(ranks, 'rank')} in all; use ds_configs/zero3.json on one "
            "machine"
        )


def _section_models() -> dict[str, type[BaseModel]]:
    """DeepSpeed's pydantic models of its JSON's sections."""
    _import_deepspeed()
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "comms_logger": CommsLoggerConfig,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "csv_monitor": CSVConfig,
        "comet": CometConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }


def check_deepspeed(config: Config) -> None:
    """Check the DeepSpeed JSON, and that this machine can use it, before anything is loaded.

    Raises:
        UserError: as :func:`deepspeed_config`; or a required package, folder or library is missing on this machine.
    """
    settings = deepspeed_config(config, accumulation=1)

    def asynchronous_io() -> bool:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        with redirect_stdout(io.StringIO()):
            return bool(AsyncIOBuilder().is_compatible())

    check_machine(settings, config.deepspeed, asynchronous_io)


def _import_deepspeed() -> Any:
    """Import DeepSpeed quietly, and prevent it from compiling an op at the start of every CPU run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        from deepspeed.utils import logger

    logger.setLevel(logging.WARNING if os.environ.get("PCPO_DEEPSPEED_LOG") else logging.ERROR)
    if not torch.cuda.is_available():
        # Plain gloo suffices; the shared-memory op takes half a minute and a compiler. Newer versions of DeepSpeed
        # build this table on first access by running compilers, which takes seconds and prints their errors.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    return deepspeed
