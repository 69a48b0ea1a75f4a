"""AdamW with 8-bit moments (Dettmers et al., 2022) using bitsandbytes' kernel, for float32 and bf16 weights."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.engine.optimizers import CHUNK, OwnAdamW, check_moments, round_stochastically
from pcpo_fast.errors import UserError

BLOCK = 256
"""Elements that share a scale; the only block size of bitsandbytes' kernel."""


def check_eight_bit() -> None:
    """Fail if bitsandbytes is not installed, before anything is loaded.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "optimizer.moments: 8bit needs bitsandbytes: run `pip install bitsandbytes`, or set optimizer.moments=full"
        )


class EightBitAdamW(OwnAdamW):
    """AdamW whose two moments take one byte each, in blocks of 256 elements with a float32 scale.

    Float32 weights (the master copy of a bf16 model, or a float32 model) are updated in place. Bf16 weights are updated
    in float32 and rounded stochastically, as in :class:`pcpo_fast.engine.optimizers.StochasticAdamW`; weight and
    moments then take 4 bytes per parameter.

    Raises:
        UserError: bitsandbytes is not installed.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        check_eight_bit()
        from bitsandbytes import functional

        super().__init__(params, **settings)
        self._update = functional.optimizer_update_8bit_blockwise
        self._signed = functional.create_dynamic_map(signed=True)
        self._unsigned = functional.create_dynamic_map(signed=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict without casting the uint8 moments to the weights' dtype, as PyTorch would."""
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
                # A scale of zero decodes every byte to zero, so the initial bytes do not matter.
                state[name] = torch.zeros(p.numel(), dtype=torch.uint8, device=p.device)
                state[f"{name}_scale"] = torch.zeros(-(-p.numel() // BLOCK), device=p.device)
        state["step"] += 1
        if self._signed.device != p.device:
            self._signed, self._unsigned = self._signed.to(p.device), self._unsigned.to(p.device)
        generator = self._generator(p, state)
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
                0.0,  # beta3 and alpha, which AdamW does not use
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
