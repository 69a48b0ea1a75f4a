"""AdamW with moments of 8 bits each (Dettmers et al., 2022), by bitsandbytes' kernel; for float32 and bf16 weights."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.distributed.collectives import rank
from pcpo_fast.engine.optimizers import CHUNK, check_moments, gradients_are_finite, round_stochastically
from pcpo_fast.errors import UserError
from pcpo_fast.method.noise_keys import Purpose, random_key

BLOCK = 256
"""Elements that share a scale: bitsandbytes' kernel has no other for the moments."""


def check_eight_bit() -> None:
    """Refuse 8-bit moments where bitsandbytes is not installed, before anything is loaded.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "optimizer.moments: 8bit needs bitsandbytes: run `pip install bitsandbytes`, or set optimizer.moments=full"
        )


class EightBitAdamW(torch.optim.Optimizer):
    """AdamW whose two moments take one byte each, in blocks of 256 elements with a float32 scale.

    Float32 weights (the master copy of a bf16 model, or a float32 model) are updated in place. Bf16 weights are updated
    in float32 and rounded stochastically, as :class:`pcpo_fast.engine.optimizers.StochasticAdamW` does: 4 bytes a
    parameter.

    Args:
        params: float32 or bf16 parameters.
        lr, betas, eps, weight_decay: as in :class:`torch.optim.AdamW`.
        seed: fixes the rounding of bf16 weights.

    Attributes:
        skipped: whether the latest step was left out, for a gradient that is not finite.

    Raises:
        UserError: bitsandbytes is not installed.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, seed: int = 0
    ) -> None:
        check_eight_bit()
        from bitsandbytes import functional

        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed
        self.skipped = False
        self._update = functional.optimizer_update_8bit_blockwise
        self._signed = functional.create_dynamic_map(signed=True)
        self._unsigned = functional.create_dynamic_map(signed=False)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step, or none where a gradient of some rank is not finite."""
        pairs = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.skipped = not gradients_are_finite(p for p, _ in pairs)
        if not self.skipped:
            for p, group in pairs:
                self._step_parameter(p, group)
        return None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned; bytes stay bytes, where PyTorch would cast them to the weights."""
        check_moments(state_dict, eight_bit=True)
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, state in state_dict["state"].items():
            p = parameters[index]
            self.state[p] = {
                name: value.to(p.device, copy=True) if isinstance(value, Tensor) else value
                for name, value in state.items()
            }

    def _step_parameter(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state |= {"step": 0, "number": len(self.state) - 1}
            for name in ("exp_avg", "exp_avg_sq"):
                # Zero is a byte of its own in either map, and a scale of zero makes every byte a zero.
                state[name] = torch.zeros(p.numel(), dtype=torch.uint8, device=p.device)
                state[f"{name}_scale"] = torch.zeros(-(-p.numel() // BLOCK), device=p.device)
        state["step"] += 1
        if self._signed.device != p.device:
            self._signed, self._unsigned = self._signed.to(p.device), self._unsigned.to(p.device)
        generator = torch.Generator(p.device).manual_seed(
            random_key(Purpose.OPTIMIZER, self.seed, state["step"], state["number"], rank())
        )
        beta1, beta2 = group["betas"]
        flat = (p.view(-1), p.grad.view(-1), state["exp_avg"], state["exp_avg_sq"])  # type: ignore[union-attr]
        scales = (state["exp_avg_scale"], state["exp_avg_sq_scale"])
        parts = zip(*(x.split(CHUNK) for x in flat), *(x.split(CHUNK // BLOCK) for x in scales), strict=True)
        for weight, gradient, first, second, first_scale, second_scale in parts:
            exact = weight.float()  # the weights themselves where they are float32
            self._update(
                "adam",
                gradient.float(),
                exact,
                first,
                second,
                beta1,
                beta2,
                0.0,  # of optimisers with three moments, and of another one
                0.0,
                group["eps"],
                state["step"],
                group["lr"],
                self._signed,
                self._unsigned,
                first_scale,
                second_scale,
                group["weight_decay"],
            )
            if weight.dtype == torch.bfloat16:
                weight.copy_(round_stochastically(exact, generator))
