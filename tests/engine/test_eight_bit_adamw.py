"""AdamW with 8-bit moments, on bitsandbytes' CPU kernel: it follows AdamW, for master weights and for bf16 weights."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipeline import tiny_config
from torch import Tensor

import pcpo_fast.engine.optimizers
from pcpo_fast.engine.eight_bit_adamw import BLOCK, EightBitAdamW, check_eight_bit
from pcpo_fast.engine.optimizers import GuardedAdamW, StochasticAdamW
from pcpo_fast.errors import UserError
from pcpo_fast.training.run_inputs import RunInputs

SETTINGS: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


def gradients(steps: int, size: int) -> list[Tensor]:
    """A drift under noise, its elements of very different sizes: what blocks with one scale must cope with."""
    generator = torch.Generator().manual_seed(1)
    drift = torch.randn(size, generator=generator)
    sizes = torch.logspace(-4, 0, size)
    return [(drift + 0.5 * torch.randn(size, generator=generator)) * sizes for _ in range(steps)]


def run(optimizer: torch.optim.Optimizer, given: list[Tensor]) -> Tensor:
    (weight,) = optimizer.param_groups[0]["params"]
    for gradient in given:
        weight.grad = gradient.to(weight.dtype)
        optimizer.step()
    return weight.detach().double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["master", "bf16"])
def test_it_follows_adamw_at_a_small_learning_rate(dtype: torch.dtype) -> None:
    """Plain bf16 would lose most of these steps, and moments in bytes change each of them a little."""
    size = 6000
    start = (0.03 * torch.randn(size, generator=torch.Generator().manual_seed(0))).bfloat16()
    given = gradients(60, size)
    way = run(torch.optim.AdamW([torch.nn.Parameter(start.float())], **SETTINGS), given) - start.double()
    optimizer = EightBitAdamW([torch.nn.Parameter(start.to(dtype, copy=True))], **SETTINGS)
    moved = run(optimizer, given) - start.double()
    assert float((moved * way).sum() / way.square().sum()) == pytest.approx(1, abs=0.1)
    if dtype == torch.float32:  # the rounding of bf16 is noise of a size of its own
        assert float((moved - way).norm() / way.norm()) < 0.15
    (state,) = optimizer.state.values()
    kept = sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, Tensor))
    assert kept == 2 * size + 2 * 4 * math.ceil(size / BLOCK), "two bytes a parameter, and the scales"


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [torch.cat(pair) for pair in zip(gradients(4, 1000), gradients(4, 300), strict=True)]
    once = run(EightBitAdamW([torch.nn.Parameter(torch.ones(1300))], **SETTINGS), given)
    monkeypatch.setattr("pcpo_fast.engine.eight_bit_adamw.CHUNK", 2 * BLOCK)
    assert torch.equal(run(EightBitAdamW([torch.nn.Parameter(torch.ones(1300))], **SETTINGS), given), once)
    assert not torch.equal(once, torch.ones(1300).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_taken_up_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    given = gradients(6, 700)

    def of(start: Tensor) -> EightBitAdamW:
        return EightBitAdamW([torch.nn.Parameter(start.clone())], **(SETTINGS | {"lr": 1e-3}), seed=4)

    start = torch.randn(700).to(dtype)
    whole = run(of(start), given)
    first = of(start)
    between = run(first, given[:3])
    second = of(between.to(dtype))  # double to dtype: a copy
    second.load_state_dict(first.state_dict())
    run(first, given[3:])  # the state was copied: what follows must not reach it
    assert torch.equal(run(second, given[3:]), whole) and not torch.equal(whole, between)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_everything_alone(bad: float) -> None:
    optimizer = EightBitAdamW([torch.nn.Parameter(torch.ones(300))], **SETTINGS)
    good = gradients(1, 300)
    run(optimizer, good)

    def snapshot() -> list[Tensor]:
        return [torch.as_tensor(value).clone() for state in optimizer.state.values() for value in state.values()]

    before, weights = snapshot(), run(optimizer, [])
    spoiled = good[0].clone()
    spoiled[7] = bad
    assert torch.equal(run(optimizer, [spoiled]), weights) and optimizer.skipped
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(), strict=True))
    assert not torch.equal(run(optimizer, good), weights) and not optimizer.skipped


@pytest.mark.parametrize("kind", [GuardedAdamW, StochasticAdamW])
def test_moments_of_the_other_kind_are_refused(kind: type) -> None:
    one = EightBitAdamW([torch.nn.Parameter(torch.ones(300))], **SETTINGS)
    other = kind([torch.nn.Parameter(torch.ones(300, dtype=torch.bfloat16))], **SETTINGS)
    for optimizer in (one, other):
        run(optimizer, gradients(1, 300))
    with pytest.raises(ValueError, match=r"its moments are 8bit, but this run has optimizer\.moments=full"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match=r"its moments are full, but this run has optimizer\.moments=8bit"):
        one.load_state_dict(other.state_dict())


def test_without_bitsandbytes_a_run_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    check_eight_bit()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(
        UserError, match=r"^optimizer\.moments: 8bit needs bitsandbytes: run `pip install bitsandbytes`"
    ):
        RunInputs.load(tiny_config(Path("unused"), "optimizer.moments=8bit"))


def test_sub_groups_round_with_noise_of_their_own() -> None:
    """ZeRO 3 shows the optimizer one sub-group after the other, each as the only parameter."""
    for kind in (EightBitAdamW, pcpo_fast.engine.optimizers.StochasticAdamW):
        parts = [torch.nn.Parameter(torch.full((4000,), 0.03).bfloat16()) for _ in range(2)]
        optimizer = kind(parts[:1], **SETTINGS)
        for part in parts:
            optimizer.param_groups[0]["params"] = [part]
            run(optimizer, [torch.ones(4000)] * 8)
        assert not torch.equal(*parts), kind
