"""What diffusers' attention backends need: known before a model is loaded, and said in one sentence."""

import importlib.util
from dataclasses import dataclass

import torch

LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Needs:
    """What a backend needs; what it does not say is left to a trial.

    Attributes:
        module, package: what is imported, and what is installed to have it; empty: PyTorch has it.
        capability: least compute capability of the GPU; None: no GPU is needed, or which one is not known.
        family: the one major number of compute capabilities that it serves; None: all above ``capability``.
        largest_head: in elements; None: any.
        backward: whether gradients come back through diffusers' call of it.
        low_precision: whether it takes nothing but bfloat16 and float16 on a GPU.
        hardware: what it serves where that is no NVIDIA GPU.
    """

    module: str = ""
    package: str = ""
    capability: tuple[int, int] | None = None
    family: int | None = None
    largest_head: int | None = None
    backward: bool = True
    low_precision: bool = False
    hardware: str = ""


def _flash(package: str, capability: tuple[int, int], module: str = "", **others: object) -> Needs:
    needs = {"largest_head": 256, "low_precision": True} | others
    return Needs(module or package.replace("-", "_"), package, capability, **needs)  # type: ignore[arg-type]


_SAGE = _flash("sageattention", (8, 0), backward=False)  # quantises queries and keys: for inference
_SAGE_HUB = _flash("kernels", (8, 0), backward=False)
NEEDS: dict[str, Needs] = {
    "native": Needs(),
    "flex": Needs(),
    "_native_math": Needs(),
    "_native_efficient": Needs(capability=(5, 0)),
    "_native_flash": Needs(low_precision=True, largest_head=256),  # on a CPU PyTorch has a kernel of that name
    "_native_cudnn": Needs(capability=(8, 0), low_precision=True, largest_head=256),
    # Heads up to 256 from Ampere on: the project's README. diffusers 0.42 calls its version 3 by the operator without
    # the backward; the function for packed sequences and those from the Hub have one.
    "flash": _flash("flash-attn", (8, 0)),
    "flash_varlen": _flash("flash-attn", (8, 0)),
    "flash_hub": _flash("kernels", (8, 0)),
    "flash_varlen_hub": _flash("kernels", (8, 0)),
    "_flash_3": _flash("flash_attn_3", (9, 0), "flash_attn_interface", family=9, backward=False),
    "_flash_varlen_3": _flash("flash_attn_3", (9, 0), "flash_attn_interface", family=9),
    "_flash_3_hub": _flash("kernels", (9, 0), family=9),
    "_flash_3_varlen_hub": _flash("kernels", (9, 0), family=9),
    "flash_4_hub": _flash("kernels", (9, 0)),
    "xformers": Needs("xformers", "xformers", (7, 0)),
    "sage": _SAGE,
    "sage_varlen": _SAGE,
    "_sage_qk_int8_pv_fp8_cuda": _flash("sageattention", (9, 0), backward=False),
    "_sage_qk_int8_pv_fp8_cuda_sm90": _flash("sageattention", (9, 0), family=9, backward=False),
    "_sage_qk_int8_pv_fp16_cuda": _SAGE,
    "_sage_qk_int8_pv_fp16_triton": _SAGE,
    "sage_hub": _SAGE_HUB,
    "sage_blackwell_hub": _flash("kernels", (10, 0), backward=False, largest_head=128),
    "aiter_fa2_hub": Needs("kernels", "kernels", hardware="AMD GPUs"),
    "_native_npu": Needs("torch_npu", "torch_npu", hardware="Ascend NPUs"),
    "_native_xla": Needs("torch_xla", "torch_xla", hardware="XLA devices"),
}


def lacking(
    name: str, device: torch.device, head_dim: int | None, needs_backward: bool, dtype: torch.dtype
) -> str | None:
    """Why a backend of :data:`NEEDS` cannot be used, as the end of a sentence; None: nothing speaks against it.

    Args:
        name: the backend; one that is not listed lacks nothing that is known.
        device: where it is to run.
        head_dim: elements of an attention head; None: not known.
        needs_backward: whether gradients are wanted.
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
    if problem is None and needs.module and importlib.util.find_spec(needs.module) is None:
        problem = f"the package {needs.package} is not installed"
    return problem


def _wrong_hardware(needs: Needs, device: torch.device) -> str | None:
    if needs.hardware and (device.type != "cuda" or needs.hardware != "AMD GPUs" or torch.version.hip is None):
        return f"it serves {needs.hardware}, and this run is on {_called(device)}"
    if needs.capability is None or torch.version.hip is not None:
        return None
    wanted = f"of compute capability {'.'.join(map(str, needs.capability))}" + (" or newer" if not needs.family else "")
    if device.type != "cuda":
        return f"it needs a GPU {wanted}, and this run is on {_called(device)}"
    has = torch.cuda.get_device_capability(device)
    if has >= needs.capability and needs.family in (None, has[0]):
        return None
    return f"it needs a GPU {wanted}, and the {torch.cuda.get_device_name(device)} has {has[0]}.{has[1]}"


def _called(device: torch.device) -> str:
    return "a CPU" if device.type == "cpu" else f"{device.type}"
