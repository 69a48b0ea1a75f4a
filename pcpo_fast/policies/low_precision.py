"""A cheaper version of the policy for a while: the linear layers of its blocks compute in 8-bit floating point.

Weights have one scale for each output, inputs one for each row, and products are summed in higher precision. Adapters,
embeddings, norms and the output layer stay as they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm

from pcpo_fast.errors import UserError
from pcpo_fast.policies.speed import linear_layers, needed

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
MULTIPLE = 16
"""Both sizes of a layer are multiples of this, which the matrix units require."""
SETTING = "rollout.candidate_weights"


def check_fp8(device: torch.device) -> None:
    """Fail if a device has no units for 8-bit floating point; CPUs compute the same more slowly.

    Raises:
        UserError: it has none.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            f"{SETTING}: fp8 needs a GPU of compute capability 8.9 or newer (RTX 4090, L40S, H100), and this one "
            f"({torch.cuda.get_device_name(device)}) has {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
            f"; set {SETTING}=full"
        )


def low_precision_layers(network: nn.Module, blocks: Sequence[nn.Module]) -> list[str]:
    """Names of the linear layers within some blocks of a network that can compute in 8 bits, without adapters."""
    return [
        name
        for name, layer in linear_layers(network, blocks).items()
        if layer.in_features % MULTIPLE == 0 == layer.out_features % MULTIPLE
    ]


@contextmanager
def low_precision(network: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block, the linear layers of a network's blocks compute in 8 bits, without gradients.

    Raises:
        UserError: there are no such layers.
    """
    names = low_precision_layers(network, blocks)
    needed(network, names, SETTING, "full")
    own = {name: network.get_submodule(name) for name in names}
    # Modules are replaced, not their forward: compiled blocks notice that.
    for name, layer in own.items():
        network.set_submodule(name, LowPrecisionLinear(layer))
    try:
        yield
    finally:
        for name, layer in own.items():
            network.set_submodule(name, layer)


class LowPrecisionLinear(nn.Module):
    """A linear layer for inference that multiplies in 8-bit floating point (e4m3).

    Args:
        layer: the layer to copy; sizes are multiples of 16.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        assert isinstance(layer, nn.Linear)
        weight, scale = _quantized(layer.weight.detach())
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale.T, persistent=False)
        self.bias = layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] in any floating-point type to [..., out] in the same type, computed in bf16."""
        rows, scale = _quantized(inputs.flatten(0, -2))
        row_wise = ScalingType.RowWise
        products = scaled_mm(rows, self.weight.T, scale, row_wise, self.scale, row_wise, output_dtype=torch.bfloat16)
        outputs = products.to(inputs.dtype).unflatten(0, inputs.shape[:-1])
        return outputs if self.bias is None else outputs + self.bias


def _quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[n, k] in 8 bits, and the float32 scales [n, 1] that give each row's largest magnitude the largest number."""
    rows = rows.float()
    scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return (rows / scale).to(FP8), scale
