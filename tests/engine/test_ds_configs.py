"""The DeepSpeed files that come with the project: each trains, in every precision that it is meant for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from test_engine import batches, config_of, module_of, train_step

from pcpo_fast.engine.deepspeed_file import OWNED_KEYS
from pcpo_fast.engine.engine import Engine
from pcpo_fast.errors import UserError

pytestmark = [
    pytest.mark.usefixtures("process_group"),
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),  # of what DeepSpeed calls
]
FOLDER = Path(__file__).parents[2] / "ds_configs"
FILES = sorted(path.stem for path in FOLDER.glob("*.json"))
PRECISIONS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "bf16-master": ("model.dtype=bfloat16",),
    "bf16-stochastic": ("model.dtype=bfloat16", "optimizer.weights=stochastic_rounding"),
    "bf16-8bit": ("model.dtype=bfloat16", "optimizer.moments=8bit"),
    "bf16-8bit-stochastic": (
        "model.dtype=bfloat16",
        "optimizer.weights=stochastic_rounding",
        "optimizer.moments=8bit",
    ),
}


def settings_of(name: str) -> dict[str, Any]:
    """A file's settings with buffers that suit a module of 37 numbers."""
    settings: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    zero = settings["zero_optimization"]
    return settings | {"zero_optimization": {key: min(v, 1000) if type(v) is int else v for key, v in zero.items()}}


def test_the_files_are_the_documented_ones() -> None:
    assert FILES == ["zero1", "zero2", "zero2_offload", "zero3", "zero3_hpz", "zero3_offload"]
    text = (FOLDER.parent / "docs" / "scaling.md").read_text()
    for name in FILES:
        assert f"ds_configs/{name}.json" in text
        settings = json.loads((FOLDER / f"{name}.json").read_text())
        assert not settings.keys() & set(OWNED_KEYS)
        assert settings["zero_optimization"]["stage"] == int(name[4])


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "bf16-master") for name in FILES if name != "zero3_hpz"),
        ("zero2_offload", "bf16-stochastic"),
        ("zero3_offload", "bf16-8bit-stochastic"),
        *(
            pytest.param(zero, name, marks=pytest.mark.slow)
            for zero in ("zero2", "zero3")
            for name in PRECISIONS
            if name != "bf16-master"
        ),
    ],
)
def test_each_trains_as_zero_1_does(tmp_path: Path, name: str, precision: str) -> None:
    overrides = PRECISIONS[precision]
    dtype = torch.bfloat16 if overrides else torch.float32
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(settings_of(name)))

    def engine(*deepspeed: str) -> Engine:
        return Engine(module_of(dtype), config_of("optimizer.lr=1e-2", *overrides, *deepspeed), accumulation=2)

    if "offload" in name and "stochastic" in precision:
        # DeepSpeed offloads bf16 weights without a master copy for its own optimizer only.
        with pytest.raises(UserError, match="DeepSpeed rejects these settings: Master weights feature requires"):
            engine(f"deepspeed={file}")
        return
    ours, plain = engine(f"deepspeed={file}"), engine()
    for one in (ours, plain):
        train_step(one, batches(4))
        assert one.last_step.applied and one.updates == 2
    assert ours.zero_stage == int(name[4])
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    for p, q in zip(ours.deepspeed.module.parameters(), plain.deepspeed.module.parameters(), strict=True):
        now, expected = safe_get_full_fp32_param(p).float(), safe_get_full_fp32_param(q).float()
        # Two steps of 0.01: bytes and stochastic rounding may differ by a part of one, the same arithmetic may not.
        atol = 1e-2 if "8bit" in precision or "stochastic" in precision else 1e-2 * rounding
        assert torch.allclose(now, expected, atol=atol, rtol=2 * rounding)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("precision", ["bf16-8bit", "bf16-8bit-stochastic"])
def test_eight_bit_moments_survive_a_checkpoint(tmp_path: Path, stage: int, precision: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(settings_of(f"zero{stage}")))
    data = batches(6)

    def engine() -> Engine:
        overrides = ("optimizer.lr=1e-2", *PRECISIONS[precision], f"deepspeed={file}")
        return Engine(module_of(torch.bfloat16), config_of(*overrides), accumulation=2)

    def weights(one: Engine) -> list[torch.Tensor]:
        return [safe_get_full_fp32_param(p) for p in one.deepspeed.module.parameters()]

    whole = engine()
    train_step(whole, data[:4])
    whole.save(tmp_path / "checkpoint")
    before = weights(whole)
    train_step(whole, data[4:])
    resumed = engine()
    assert resumed.load(tmp_path / "checkpoint")
    train_step(resumed, data[4:])
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(whole), before, strict=True))


def test_a_secondary_partition_as_large_as_the_run_is_refused(tmp_path: Path) -> None:
    """hpZ keeps a second copy of the weights within each machine: on one machine it costs memory and saves nothing."""
    with pytest.raises(UserError, match=r"zero_hpz_partition_size.* ranks.*zero3\.json"):
        Engine(module_of(), config_of(f"deepspeed={FOLDER / 'zero3_hpz.json'}"), accumulation=2)
