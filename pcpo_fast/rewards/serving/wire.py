"""The format of requests to a reward server: one safetensors file with images, prompts and metadata."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pcpo_fast.config.wording import counted
from pcpo_fast.errors import reason_of

CONTENT_TYPE = "application/octet-stream"
TOKEN_VARIABLE = "PCPO_REWARD_TOKEN"
PROTOCOL = 1
_LARGEST_SIDE = 16384


@dataclass(frozen=True)
class Batch:
    """Images to score.

    Attributes:
        images: float32 [B, 3, H, W] in 0..1, on the CPU.
        prompts, metadata: B of each.
    """

    images: Tensor
    prompts: list[str]
    metadata: list[dict[str, Any]]


def pack(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> bytes:
    """The body of a request; ``images`` [B, 3, H, W] are float32 or uint8 (0..255).

    Raises:
        TypeError, ValueError: the metadata cannot be represented in JSON.
    """
    texts = {"prompts": json.dumps(prompts), "metadata": json.dumps(metadata, allow_nan=False)}
    return save({"images": images.detach().cpu().contiguous()}, metadata=texts)


def unpack(body: bytes, most_images: int) -> Batch:
    """Parse the body of an untrusted request: nothing in it is executed, and all sizes are checked.

    Raises:
        ValueError: the body is invalid.
    """
    texts = _texts(body)
    try:
        tensors = load(body)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"the body is not a safetensors file: {reason_of(error)}") from None
    if set(tensors) != {"images"}:
        raise ValueError("the body must hold one tensor named images")
    images = tensors["images"]
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype not in (torch.float32, torch.uint8):
        raise ValueError(f"images must be float32 or uint8 [B, 3, H, W], got {images.dtype} {list(images.shape)}")
    count, _, height, width = images.shape
    if not 1 <= count <= most_images:
        raise ValueError(f"{counted(count, 'image')} in a request, but 1 to {most_images} are allowed")
    if not (1 <= height <= _LARGEST_SIDE and 1 <= width <= _LARGEST_SIDE):
        raise ValueError(f"images of {height} x {width} pixels, but sides of 1 to {_LARGEST_SIDE} are allowed")
    prompts, metadata = (_list(texts, name, kind, count) for name, kind in (("prompts", str), ("metadata", dict)))
    if images.dtype == torch.uint8:
        images = images.float() / 255
    return Batch(images, prompts, metadata)


def _texts(body: bytes) -> dict[str, Any]:
    """The file's metadata, which the safetensors library can only read from disk."""
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or length > len(body) - 8:
        raise ValueError("the body is not a safetensors file: its header is cut off")
    try:
        header = json.loads(body[8 : 8 + length])
    except (ValueError, RecursionError):
        raise ValueError("the body is not a safetensors file: its header is not valid JSON") from None
    texts = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(texts, dict):
        raise ValueError("the body has no prompts and metadata")
    return texts


def _list(texts: dict[str, Any], name: str, kind: type, count: int) -> list[Any]:
    try:
        found = json.loads(texts.get(name, ""))
    except (TypeError, ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or len(found) != count or not all(isinstance(item, kind) for item in found):
        what = "strings" if kind is str else "objects"
        raise ValueError(f"{name} must be a JSON list of {count} {what}, one for each image")
    return found
