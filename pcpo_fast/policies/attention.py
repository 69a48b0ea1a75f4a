"""Selects diffusers' attention backends, checked before the run instead of failing in its first forward."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_dispatch import attention_backend as library_backend
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pcpo_fast.config.schema import AUTO, Config
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.policies.attention_needs import lacking
from pcpo_fast.policies.quiet import quiet_libraries
from pcpo_fast.policies.weight_files import read_json

if TYPE_CHECKING:
    from pcpo_fast.policies.pipeline_policy import PipelinePolicy

SDPA_KERNELS = {
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
"""The kernels of PyTorch's scaled dot product attention, among which ``native`` chooses."""
PLAIN = ("native", *SDPA_KERNELS, "xformers")
"""Backends for layers that do not use diffusers' dispatcher (:attr:`PipelinePolicy.dispatches_attention`)."""


class HeldProcessor:
    """The processor of an attention layer that knows no backends, held to one of :data:`PLAIN`."""

    def __init__(self, original: Any, used: Any, kernel: SDPBackend | None) -> None:
        self.original, self.used, self.kernel = original, used, kernel

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with nullcontext() if self.kernel is None else sdpa_kernel(self.kernel):
            return self.used(*arguments, **options)


def choose_attention(module: Any, backend: str, device: torch.device | None = None, *, masked: bool = False) -> None:
    """Make a diffusers model use an attention backend; ``native`` is PyTorch's scaled dot product.

    The backend is tried with the model's dtype and head sizes on ``device`` (default: the model's), forward and
    backward, and with a mask if ``masked``. diffusers' UNet and its transformer of Stable Diffusion 3 do not use the
    dispatcher; they support :data:`PLAIN` only.

    Raises:
        UserError: the backend does not exist, lacks a requirement, or cannot train this model here.
    """
    layers = attention_layers(module)
    _known(backend)
    if not all(map(_dispatches, layers)):
        _serves(type(module).__name__, backend)
    weight = next(module.parameters())
    device = weight.device if device is None else device
    for head_dim in sorted(set(map(_head_dim, layers))) if not weight.is_meta else ():
        check_backend(backend, device, head_dim, needs_backward=True, dtype=weight.dtype, masked=masked)
    try:
        set_backend(module, backend)
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        raise UserError(f"model.attention: {backend} cannot be used here: {reason_of(error)}") from None


def _head_dim(layer: Any) -> int:
    """Elements of a head of an attention layer, which only diffusers' older classes do not say."""
    return int(layer.head_dim if hasattr(layer, "head_dim") else layer.inner_dim // layer.heads)


def check_attention(config: Config, folder: Path, family: "type[PipelinePolicy]", device: torch.device) -> None:
    """Check the attention backends of a run before its model is loaded.

    Args:
        config: ``model.attention`` is for training, ``rollout.attention`` for sampling.
        folder: the pipeline.
        family: of the pipeline.
        device: where it will run.

    Raises:
        UserError: as :func:`check_backend`, or the network's layers do not support the backend.
    """
    check_names(config, family)
    head_dim = family.head_dim(read_json(folder / family.trained_part / "config.json"))
    dtype = getattr(torch, config.model.dtype)
    masked = family.masks_prompts
    for key, backend, trains in _named(config):
        check_backend(backend, device, head_dim, needs_backward=trains, dtype=dtype, key=key, masked=masked)


def check_names(config: Config, family: "type[PipelinePolicy]") -> None:
    """Check the names of a run's attention backends, on any machine; ``model.attention: auto`` is left to the run.

    Raises:
        UserError: diffusers has no backend of that name, or the network's layers do not support it.
    """
    for key, backend, trains in _named(config):
        if trains and backend == AUTO:
            continue
        _known(backend, key)
        if not family.dispatches_attention:
            _serves(family.network_class(), backend, key)


def _named(config: Config) -> list[tuple[str, str, bool]]:
    """The settings of a run that name a backend, what they name, and whether it has to have a backward."""
    chosen = [("model.attention", config.model.attention, True)]
    if config.rollout.attention is not None:
        chosen.append(("rollout.attention", config.rollout.attention, False))
    return chosen


def check_backend(
    name: str,
    device: torch.device,
    head_dim: int | None,
    needs_backward: bool,
    dtype: torch.dtype = torch.bfloat16,
    key: str = "model.attention",
    masked: bool = False,
) -> None:
    """Check an attention backend without a model: first by its known requirements, then by trying it.

    Args:
        name: diffusers' name of the backend.
        device: where it will run.
        head_dim: elements of an attention head; None: unknown, tried with 64.
        needs_backward: whether gradients are needed, as in the update, or not, as in a rollout.
        dtype: of queries, keys and values.
        key: the setting that names it.
        masked: whether it has to leave out the padding of prompts.

    Raises:
        UserError: the backend does not exist; there is no GPU, or it is too old; a package is missing; or the head
            size, the dtype, gradients or masks are not supported.
    """
    _known(name, key)
    reason = lacking(name, device, head_dim, needs_backward, dtype)
    if reason is None:
        try:
            with quiet_libraries():
                _try(name, device, 64 if head_dim is None else head_dim, needs_backward, dtype, masked)
        except (ImportError, RuntimeError, ValueError, TypeError, OSError, NotImplementedError) as error:
            reason = reason_of(error)
    if reason is not None:
        raise UserError(f"{key}: {name} cannot be used here: {reason}")


def attention_layers(network: nn.Module) -> list[Any]:
    """diffusers' attention layers of a model."""
    return [child for child in network.modules() if hasattr(child, "processor")]


def set_backend(network: nn.Module, name: str) -> None:
    """Set the backend of every attention layer of a diffusers model.

    The backend is not checked; call :func:`choose_attention` or :func:`check_backend` first.

    Raises:
        UserError: the backend does not exist.
        ValueError: the model's layers support only :data:`PLAIN`, and it is not one of these.
    """
    _known(name)
    for layer in attention_layers(network):
        if _dispatches(layer):
            layer.processor._attention_backend = AttentionBackendName(name)
            continue
        if name not in PLAIN:
            raise ValueError(f"{name} does not serve a {type(network).__name__}")
        if isinstance(layer.processor, HeldProcessor):
            layer.processor = layer.processor.original
        original = layer.processor
        if name == "xformers":
            layer.set_use_memory_efficient_attention_xformers(True)  # looks at the processor for its counterpart
        if name != "native":
            layer.processor = HeldProcessor(original, layer.processor, SDPA_KERNELS.get(name))


@contextmanager
def attention_backend(network: nn.Module, name: str | None) -> Iterator[None]:
    """Use another attention backend within the block; None changes nothing.

    The switch sets one attribute per layer, so that a phase of a run can have a backend of its own.

    Raises:
        UserError, ValueError: as :func:`set_backend`; the model is as before.
    """
    layers = [] if name is None else attention_layers(network)
    before = [(layer, layer.processor, getattr(layer.processor, "_attention_backend", None)) for layer in layers]
    try:
        if name is not None:
            set_backend(network, name)
        yield
    finally:
        for layer, processor, backend in before:
            layer.processor = processor
            if _dispatches(layer):
                processor._attention_backend = backend


def _known(name: str, key: str = "model.attention") -> None:
    known = [str(member.value) for member in AttentionBackendName]
    if name not in known:
        raise UserError(f"{key}: unknown backend {name!r}; diffusers offers {', '.join(sorted(known))}")


def _serves(kind: str, name: str, key: str = "model.attention") -> None:
    if name not in PLAIN:
        raise UserError(f"{key}: {name} does not serve a {kind}; allowed are {', '.join(PLAIN)}")


def _dispatches(layer: Any) -> bool:
    """Whether a layer uses diffusers' dispatcher; diffusers silently skips those that do not."""
    return hasattr(layer.processor, "_attention_backend")


@torch.inference_mode(False)
def _try(
    name: str, device: torch.device, head_dim: int, needs_backward: bool, dtype: torch.dtype, masked: bool
) -> None:
    """Try attention with 64 tokens and two heads, its mask and its backward if needed."""
    states = torch.zeros(1, 64, 2, head_dim, device=device, dtype=dtype, requires_grad=needs_backward)
    # diffusers' own switch looks whether packages are there, and fetches kernels that come from its Hub.
    with library_backend(name), torch.set_grad_enabled(needs_backward):
        values, mask = states, None
        if masked:  # what is masked would be seen
            mask = torch.arange(64, device=device)[None, None, None] < 32
            values = states + ~mask.view(1, 64, 1, 1)
        result = dispatch_attention_fn(states, states, values, attn_mask=mask, backend=AttentionBackendName(name))
        if masked and not result.is_meta and bool(result.detach().abs().max() > 1e-3):
            raise RuntimeError("it does not leave out the padding of prompts (attn_mask), as this model needs")
        if needs_backward:
            if not result.requires_grad:
                raise RuntimeError("it computes no gradients, so it serves rollouts only (rollout.attention)")
            result.sum().backward()
