"""AdamW that skips steps with non-finite gradients, in full precision and for bf16 weights without a master copy."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pcpo_fast.distributed.collectives import is_distributed, rank
from pcpo_fast.method.noise_keys import Purpose, random_key

CHUNK = 1 << 24
"""Elements processed at a time, to bound the size of float32 temporaries."""


def gradients_are_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether every gradient is finite on every rank; one transfer to the host."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    # The flag must be on a device that the backend supports: offloaded gradients are on the CPU, which NCCL cannot use.
    on_gpu = is_distributed() and dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    # A norm is finite if and only if all elements are, unless a square overflows, which must be skipped as well.
    finite = torch.ones((), device=device)
    if gradients:
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])
        finite = torch.isfinite(norms).all().float().to(device)
    if is_distributed():
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite.item())


def check_moments(state_dict: dict[str, Any], eight_bit: bool) -> None:
    """Fail if an optimizer state has the other kind of moments, which PyTorch would cast silently.

    Raises:
        ValueError: the moments are 8-bit and should not be, or the reverse.
    """
    if any(("exp_avg_scale" in state) != eight_bit for state in state_dict["state"].values()):
        kinds = ("full", "8bit")
        raise ValueError(
            f"its moments are {kinds[not eight_bit]}, but this run has optimizer.moments={kinds[eight_bit]}"
        )


class GuardedAdamW(torch.optim.AdamW):
    """:class:`torch.optim.AdamW` that skips the step when a gradient is not finite.

    In host memory the step is PyTorch's fused one, which passes over the weights once and needs no temporaries.

    Attributes:
        skipped: whether the latest step was left out.
    """

    skipped: bool = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One AdamW step; skipped on all ranks if a gradient of any rank is not finite."""
        self.skipped = not gradients_are_finite(p for group in self.param_groups for p in group["params"])
        if self.skipped:
            return None
        for group in self.param_groups:  # now: DeepSpeed replaces the parameters, and loading a checkpoint the options
            group["fused"] = all(p.device.type == "cpu" for p in group["params"]) or None
        return super().step(closure)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in PyTorch; 8-bit moments are refused with a ValueError."""
        check_moments(state_dict, eight_bit=False)
        super().load_state_dict(state_dict)


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16 stochastically, so that the expectation is exact.

    Args:
        values: float32, finite.
        generator: on the device of ``values``.
    """
    bits = values.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


class OwnAdamW(torch.optim.Optimizer):
    """Base of the AdamW variants here: skips steps with non-finite gradients, and rounds by a seed.

    Args:
        params: the parameters.
        lr, betas, eps, weight_decay: as in :class:`torch.optim.AdamW`.
        seed: of the rounding, together with the step count, so that a resumed run repeats the same roundings.

    Attributes:
        skipped: whether the latest step was skipped.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, seed: int = 0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed
        self.skipped = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; skipped on all ranks if a gradient of any rank is not finite."""
        pairs = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.skipped = not gradients_are_finite(p for p, _ in pairs)
        if not self.skipped:
            for p, group in pairs:
                self._step_parameter(p, group)
        return None

    @abstractmethod
    def _step_parameter(self, p: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter and its state; its gradient is finite."""

    def _generator(self, p: Tensor, state: dict[str, Any]) -> torch.Generator:
        """Generator for the rounding of one parameter in one step."""
        key = random_key(Purpose.OPTIMIZER, self.seed, int(state["step"]), state.get("number", 0), rank())
        return torch.Generator(p.device).manual_seed(key)


class StochasticAdamW(OwnAdamW):
    """AdamW for bf16 weights: arithmetic in float32; weights and moments stored in bf16 with stochastic rounding.

    Plain bf16 loses updates smaller than half a unit in the last place (at lr 1e-5, most of them); stochastic rounding
    preserves them in expectation. The weight and two moments take 6 bytes per parameter.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in PyTorch; 8-bit moments are refused with a ValueError."""
        check_moments(state_dict, eight_bit=False)
        super().load_state_dict(state_dict)

    def _step_parameter(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            # Not the index in the group: ZeRO-3 puts each sub-group there in turn, and each needs different noise.
            state["number"] = len(self.state) - 1
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        state["step"] += 1
        count, generator = int(state["step"]), self._generator(p, state)
        beta1, beta2 = group["betas"]
        root, rate = (1 - beta2**count) ** 0.5, group["lr"] / (1 - beta1**count)
        flat = (p.view(-1), p.grad.view(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1))  # type: ignore[union-attr]
        for weight, gradient, first, second in zip(*(tensor.split(CHUNK) for tensor in flat), strict=True):
            g = gradient.float()
            m = first.float().lerp_(g, 1 - beta1)
            v = second.float().mul_(beta2).addcmul_(g, g, value=1 - beta2)
            decayed = weight.float() * (1 - group["lr"] * group["weight_decay"])
            w = decayed - rate * m / (v.sqrt() / root + group["eps"])
            weight.copy_(round_stochastically(w, generator))
            first.copy_(round_stochastically(m, generator))
            second.copy_(round_stochastically(v, generator))
