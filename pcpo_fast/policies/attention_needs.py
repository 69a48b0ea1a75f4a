"""Hardware requirements of diffusers' attention backends, checked before a model is loaded.

Missing packages are reported by diffusers itself when the backend is tried.
"""

from dataclasses import dataclass
from functools import partial

import torch

LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Needs:
    """Known requirements of a backend; others are found by trying it.

    Attributes:
        capability: minimum compute capability of the GPU; None: no GPU is needed, or unknown.
        family: the only major compute capability that it supports; None: all from ``capability`` on.
        largest_head: maximum head size in elements; None: any.
        backward: whether it supports gradients as diffusers calls it.
        low_precision: whether it supports only bfloat16 and float16 on a GPU.
        hardware: what it runs on, if not on an NVIDIA GPU.
    """

    capability: tuple[int, int] | None = None
    family: int | None = None
    largest_head: int | None = None
    backward: bool = True
    low_precision: bool = False
    hardware: str = ""


_flash = partial(Needs, largest_head=256, low_precision=True)
_sage = partial(_flash, backward=False)  # quantises queries and keys: for inference
NEEDS: dict[str, Needs] = {
    "native": Needs(),
    "flex": Needs(),
    "_native_math": Needs(),
    "_native_efficient": Needs((5, 0)),
    "_native_flash": _flash(),  # on a CPU PyTorch has a kernel of that name
    "_native_cudnn": _flash((8, 0)),
    # Heads up to 256 from Ampere on: the project's README. diffusers 0.42 calls its version 3 by the operator without
    # the backward; the function for packed sequences and those from the Hub have one.
    "flash": _flash((8, 0)),
    "flash_varlen": _flash((8, 0)),
    "flash_hub": _flash((8, 0)),
    "flash_varlen_hub": _flash((8, 0)),
    "_flash_3": _flash((9, 0), family=9, backward=False),
    "_flash_varlen_3": _flash((9, 0), family=9),
    "_flash_3_hub": _flash((9, 0), family=9),
    "_flash_3_varlen_hub": _flash((9, 0), family=9),
    "flash_4_hub": _flash((9, 0)),
    "xformers": Needs((7, 0)),
    "sage": _sage((8, 0)),
    "sage_varlen": _sage((8, 0)),
    "_sage_qk_int8_pv_fp8_cuda": _sage((9, 0)),
    "_sage_qk_int8_pv_fp8_cuda_sm90": _sage((9, 0), family=9),
    "_sage_qk_int8_pv_fp16_cuda": _sage((8, 0)),
    "_sage_qk_int8_pv_fp16_triton": _sage((8, 0)),
    "sage_hub": _sage((8, 0)),
    "sage_blackwell_hub": _sage((10, 0), largest_head=128),
    "aiter_fa2_hub": Needs(hardware="AMD GPUs"),
    "_native_npu": Needs(hardware="Ascend NPUs"),
    "_native_xla": Needs(hardware="XLA devices"),
}


def lacking(
    name: str, device: torch.device, head_dim: int | None, needs_backward: bool, dtype: torch.dtype
) -> str | None:
    """Why a backend cannot be used, as the end of a sentence; None if no known requirement is violated.

    Args:
        name: the backend; one that is not in :data:`NEEDS` has no known requirements.
        device: where it will run.
        head_dim: elements of an attention head; None: unknown.
        needs_backward: whether gradients are needed.
        dtype: of queries, keys and values.
    """
    needs = NEEDS.get(name, Needs())
    if needs_backward and not needs.backward:
        return "it computes no gradients, so it serves rollouts only (rollout.attention)"
    if head_dim is not None and needs.largest_head is not None and head_dim > needs.largest_head:
        return f"it takes heads of at most {needs.largest_head}, and this model's have {head_dim}"
    problem = _wrong_hardware(needs, device)
    if problem is None and device.type == "cuda" and needs.low_precision and dtype not in LOW:
        problem = f"it takes bfloat16 and float16, and the model is in {str(dtype).removeprefix('torch.')}"
    return problem


def _wrong_hardware(needs: Needs, device: torch.device) -> str | None:
    called = "a CPU" if device.type == "cpu" else device.type
    if needs.hardware and (device.type != "cuda" or needs.hardware != "AMD GPUs" or torch.version.hip is None):
        return f"it serves {needs.hardware}, and this run is on {called}"
    if needs.capability is None or torch.version.hip is not None:
        return None
    wanted = f"of compute capability {'.'.join(map(str, needs.capability))}" + (" or newer" if not needs.family else "")
    if device.type != "cuda":
        return f"it needs a GPU {wanted}, and this run is on {called}"
    has = torch.cuda.get_device_capability(device)
    if has >= needs.capability and needs.family in (None, has[0]):
        return None
    return f"it needs a GPU {wanted}, and the {torch.cuda.get_device_name(device)} has {has[0]}.{has[1]}"
