"""AdamW that refuses non-finite gradients, and stochastic rounding that keeps what bf16 would lose."""

import math

import pytest
import torch
from torch import Tensor

from pcpo_fast.engine.optimizers import GuardedAdamW, StochasticAdamW, gradients_are_finite, round_stochastically

SETTINGS = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("value", [1.0 + 2**-9, -0.0317, 3.3e-6, 1e20, 7.7e-39])
def test_rounding_is_unbiased_and_to_a_neighbour(value: float) -> None:
    values = torch.full((200_000,), value)
    rounded = round_stochastically(values, generator()).float()
    below = torch.tensor(value).view(torch.int32) & -(1 << 16)
    neighbours = {below.view(torch.float32).item(), (below + (1 << 16)).view(torch.float32).item()}
    assert set(rounded.unique().tolist()) == neighbours
    gap = max(neighbours) - min(neighbours)
    assert abs(float(rounded.double().mean()) - float(values[0].double())) < 5 * gap / 2 / math.sqrt(len(values))


def test_what_bf16_represents_is_left_exactly_alone() -> None:
    values = torch.randn(10_000, generator=generator()).bfloat16()
    special = torch.tensor([0.0, -0.0, 1.0, -2.5, 2**-126, -(2**-133)]).bfloat16()
    for exact in (values, special):
        assert torch.equal(round_stochastically(exact.float(), generator(1)).view(torch.int16), exact.view(torch.int16))


def gradients(steps: int, size: int) -> list[Tensor]:
    """A drift that keeps its sign, under noise: what a run at a small learning rate adds up."""
    drift = torch.randn(size, generator=generator(1))
    return [drift + torch.randn(size, generator=generator(2 + step)) for step in range(steps)]


def test_stochastic_adamw_follows_float32_where_plain_bf16_stands_still() -> None:
    size, steps = 4096, 60
    start = (0.03 * torch.randn(size, generator=generator())).bfloat16()
    weights = {name: torch.nn.Parameter(start.clone()) for name in ("plain", "stochastic")}
    weights["exact"] = torch.nn.Parameter(start.float())
    optimizers = {
        "plain": torch.optim.AdamW([weights["plain"]], **SETTINGS),
        "stochastic": StochasticAdamW([weights["stochastic"]], **SETTINGS),
        "exact": torch.optim.AdamW([weights["exact"]], **SETTINGS),
    }
    for gradient in gradients(steps, size):
        for name, optimizer in optimizers.items():
            weights[name].grad = gradient.to(weights[name].dtype)
            optimizer.step()
    moved = {name: (weight.detach().double() - start.double()) for name, weight in weights.items()}
    way = moved["exact"]
    along = {name: float((moved[name] * way).sum() / way.square().sum()) for name in moved}
    assert along["plain"] < 0.5  # most of the way is lost
    # Rounding adds noise of half a unit in the last place; along the way it averages out.
    assert along["stochastic"] == pytest.approx(1, abs=0.1)
    error = {name: abs(float((moved[name] - way).sum())) for name in moved}
    assert error["stochastic"] < 3e-2 * float(way.abs().sum())


def test_stochastic_adamw_is_adamw_where_rounding_matters_little() -> None:
    """At a learning rate far above bf16's resolution, weights agree to a few units in the last place."""
    settings = SETTINGS | {"lr": 1e-2}
    start = torch.randn(1000, generator=generator()).bfloat16()
    ours, exact = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    optimizers = StochasticAdamW([ours], **settings), torch.optim.AdamW([exact], **settings)
    for gradient in gradients(20, 1000):
        for weight, optimizer in zip((ours, exact), optimizers, strict=True):
            weight.grad = gradient.to(weight.dtype)
            optimizer.step()
    assert float((exact.detach() - start.float()).abs().mean()) > 0.05
    assert float((ours.detach().float() - exact.detach()).abs().mean()) < 0.01
    state = optimizers[0].state[ours]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == ours.dtype == torch.bfloat16
    assert int(state["step"]) == 20


def test_stochastic_adamw_works_in_chunks_and_repeats_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    start = torch.randn(300, generator=generator()).bfloat16()

    def run(seed: int) -> Tensor:
        weight = torch.nn.Parameter(start.clone())
        optimizer = StochasticAdamW([weight], **(SETTINGS | {"lr": 1e-2}), seed=seed)
        for gradient in gradients(3, 300):
            weight.grad = gradient.bfloat16()
            optimizer.step()
        return weight.detach()

    once = run(0)
    assert torch.equal(run(0), once) and not torch.equal(run(1), once)
    monkeypatch.setattr("pcpo_fast.engine.optimizers.CHUNK", 7)
    assert float((run(0).float() - once.float()).abs().max()) < 0.05 and not torch.equal(run(0), start)


@pytest.mark.parametrize("kind", [GuardedAdamW, StochasticAdamW])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_leaves_weights_and_moments_alone(kind: type, bad: float) -> None:
    dtype = torch.bfloat16 if kind is StochasticAdamW else torch.float32
    weights = [torch.nn.Parameter(torch.ones(8, dtype=dtype)) for _ in range(2)]
    optimizer = kind(weights, **SETTINGS)

    def step(value: float) -> None:
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        weights[1].grad[3] = value  # type: ignore[index]
        optimizer.step()

    def snapshot() -> list[Tensor]:
        states = [optimizer.state[weight] for weight in weights]
        return [w.detach().clone() for w in weights] + [
            torch.as_tensor(value).clone() for state in states for value in state.values()
        ]

    step(1.0)
    assert not optimizer.skipped
    before = snapshot()
    step(bad)
    assert optimizer.skipped
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(), strict=True))
    step(1.0)
    assert not optimizer.skipped and not all(torch.equal(a, b) for a, b in zip(before, snapshot(), strict=True))


def test_guarded_adamw_is_adamw_and_as_exact() -> None:
    """In host memory it takes PyTorch's fused step, whose roundings differ: float64 is the judge."""
    settings = SETTINGS | {"lr": 1e-2, "weight_decay": 0.1}
    start = torch.randn(997, generator=generator())
    weights = [torch.nn.Parameter(start.clone().to(dtype)) for dtype in (torch.float32, torch.float32, torch.float64)]
    ours, plain, exact = weights
    optimizers = [GuardedAdamW([ours], **settings)]
    optimizers += [torch.optim.AdamW([weight], **settings) for weight in (plain, exact)]
    for gradient in gradients(30, 997):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.to(weight.dtype)
            optimizer.step()
    errors = [float((weight.double() - exact).detach().square().mean().sqrt()) for weight in (ours, plain)]
    assert optimizers[0].param_groups[0]["fused"] is True
    assert 0 < errors[0] < 1.1 * errors[1] < 1e-6 < float((exact.detach() - start).abs().mean())


def test_finite_gradients() -> None:
    weight, unused = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    assert gradients_are_finite([unused])
    weight.grad = torch.tensor([1.0, 2.0, 3.0])
    assert gradients_are_finite([weight, unused])
    weight.grad[1] = math.nan
    assert not gradients_are_finite([unused, weight])
