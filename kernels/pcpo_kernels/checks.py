"""Argument checks shared by all ops and backends."""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: object) -> Tensor:
    """Return ``value``; raises TypeError unless it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    return value


def check_float(name: str, value: object) -> Tensor:
    """Return ``value``; raises TypeError unless it is a tensor of fp16, bf16, fp32 or fp64."""
    tensor = check_tensor(name, value)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    return tensor


Named = tuple[str, object]


def check_like(output: Tensor, *tensors: Named) -> None:
    """Raise unless every (name, tensor) is a float tensor with the shape and device of ``output``."""
    shape, device = output.shape, output.device
    for name, tensor in tensors:
        if not fits(tensor, FLOATS, shape, device):
            tensor = check_float(name, tensor)
            if tensor.shape != shape:
                raise ValueError(f"{name} must have the output's shape {tuple(shape)}, got {tuple(tensor.shape)}")
            check_device(name, tensor, output)


def check_rows(output: Tensor, *tensors: Named) -> None:
    """Raise unless every (name, tensor) holds one float per row of ``output``, on its device."""
    shape, device = output.shape[:1], output.device
    for name, tensor in tensors:
        if not fits(tensor, FLOATS, shape, device):
            _check_shape_of_rows(name, check_float(name, tensor), output)


def check_integer_rows(output: Tensor, *tensors: Named) -> None:
    """Raise unless every (name, tensor) holds one int64 per row of ``output``, on its device."""
    shape, device = output.shape[:1], output.device
    for name, tensor in tensors:
        if not fits(tensor, (torch.int64,), shape, device):
            tensor = check_tensor(name, tensor)
            if tensor.dtype != torch.int64:
                raise TypeError(f"{name} must be int64, got {tensor.dtype}")
            _check_shape_of_rows(name, tensor, output)


def fits(tensor: object, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether a value is such a tensor: what is right is found so in one go, and only the rest looked at in detail."""
    return isinstance(tensor, Tensor) and tensor.dtype in dtypes and tensor.shape == shape and tensor.device == device


def _check_shape_of_rows(name: str, tensor: Tensor, output: Tensor) -> None:
    if tensor.shape != output.shape[:1]:
        raise ValueError(f"{name} must hold one value per row, shape ({output.shape[0]},), got {tuple(tensor.shape)}")
    check_device(name, tensor, output)


def check_device(name: str, tensor: Tensor, output: Tensor) -> None:
    """Raise ValueError if the two tensors are on different devices."""
    if tensor.device != output.device:
        raise ValueError(f"{name} is on {tensor.device} but the output is on {output.device}")


def check_batched(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is a tensor with a row axis and at least one more axis."""
    check_tensor(name, tensor)
    if tensor.dim() < 2:
        raise ValueError(f"{name} must be [B, ...] with at least two axes, got shape {tuple(tensor.shape)}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
