"""What a plan says of offloaded optimizers and checkpoints: DeepSpeed's tensors, and the files it writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import allocations
from deepspeed.accelerator import get_accelerator
from test_engine import config_of, loss_of
from torch import Tensor, nn

from pcpo_fast.config.schema import Config
from pcpo_fast.engine.engine import Engine
from pcpo_fast.engine.optimizers import GuardedAdamW
from pcpo_fast.planning.disk import state_bytes
from pcpo_fast.planning.host import optimizer_on_host
from pcpo_fast.planning.states import Zero, optimizer_bytes, states_of

pytestmark = [
    pytest.mark.usefixtures("process_group"),
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),  # of what DeepSpeed calls
]
FOLDER = Path(__file__).parents[2] / "ds_configs"
TWO_PERCENT = 0.02  # paddings, and what a file says of its tensors
FOUND = {
    2: (
        "single_partition_of_fp32_groups",
        "param_buffer_of_bit16_for_cpu_offload_groups",
        "accumulated_grads_in_cpu",
    ),
    3: ("fp32_partitioned_groups_flat", "grad_partitions_flat_buffer"),
}


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.grad is None else [value, value.grad]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for one in values for tensor in tensors(one)]


def size(value: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors(value))


def settings_of(name: str, tmp_path: Path, *overrides: str) -> Config:
    settings = json.loads((FOLDER / f"{name}.json").read_text())
    zero = settings["zero_optimization"]
    zero |= {key: min(value, 1000) for key, value in zero.items() if type(value) is int}
    for part in ("offload_optimizer", "offload_param"):
        if part in zero:
            zero[part]["pin_memory"] = False  # it has no effect without a GPU
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(settings))
    return config_of(f"deepspeed={file}", *overrides)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("zero1", ("model.dtype=bfloat16", "train.ema_decay=0.9")),
        ("zero2_offload", ("model.dtype=bfloat16", "train.ema_decay=0.9")),
        ("zero2_offload", ()),
        ("zero3_offload", ("model.dtype=bfloat16", "optimizer.moments=8bit")),
        ("zero3_offload", ()),
    ],
)
def test_an_offloaded_optimizer_and_a_checkpoint_are_as_large_as_planned(
    name: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    config = settings_of(name, tmp_path, *overrides)
    zero, dtype = Zero.of(config), getattr(torch, config.model.dtype)
    module = nn.Sequential(nn.Linear(4, 1000), nn.Linear(1000, 300), nn.Linear(300, 2)).to(dtype)
    count = sum(p.numel() for p in module.parameters())
    engine = Engine(module, config, accumulation=2)
    optimizer = engine.deepspeed.optimizer

    engine.backward(loss_of(engine.module, torch.randn(3, 4)))
    engine.step()
    if zero.stage > 1:
        summed = [tensor for group in getattr(optimizer, "averaged_gradients", {}).values() for tensor in group or ()]
        assert {str(tensor.device) for tensor in summed} <= {get_accelerator().current_device_name()}
        width = {"total": count, "trained": count, "weight_bytes": dtype.itemsize}
        planned = states_of(zero, 1, optimizer=optimizer_bytes(config), **width)
        assert size(summed) == pytest.approx(planned.gradients, rel=TWO_PERCENT)
    engine.backward(loss_of(engine.module, torch.randn(3, 4)))
    engine.step()

    moments = [value for state in engine.optimizer.state.values() for value in state.values()]
    held = size([value for value in moments if isinstance(value, Tensor) and value.dim()])
    held += size([getattr(optimizer, place) for place in FOUND.get(zero.stage, ())])
    held += size(engine.ema.average) if engine.ema is not None else 0
    offloaded, _ = optimizer_on_host(config, zero, count)
    assert offloaded == pytest.approx(held if zero.offload_optimizer else 0, rel=TWO_PERCENT)
    if zero.offload_parameters:
        assert size(optimizer.param_groups_fp16_flat_cpu_memory) == pytest.approx(count * dtype.itemsize)

    engine.save(tmp_path / "saved")
    files = [file.stat().st_size for file in (tmp_path / "saved" / "engine").iterdir()]
    assert sum(files) == pytest.approx(count * state_bytes(config, zero), rel=TWO_PERCENT)


def test_a_step_on_the_host_has_no_temporaries() -> None:
    weights = nn.Parameter(torch.zeros(1 << 20))
    weights.grad = torch.ones_like(weights)
    optimizer = GuardedAdamW([weights])
    optimizer.step()  # makes the moments
    _, planned = optimizer_on_host(config_of(), Zero(2, offload_optimizer=True), weights.numel())
    assert planned == 0 and allocations(optimizer.step).peak < 0.001 * weights.nbytes
