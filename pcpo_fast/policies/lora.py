"""LoRA adapters through peft, with the mistakes caught that peft lets pass."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig as PeftLoraConfig
from peft import set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn

from pcpo_fast.config import LoraConfig
from pcpo_fast.errors import UserError


def add_lora(module: nn.Module, settings: LoraConfig, targets: Sequence[str], adapter: str = "default") -> None:
    """Freeze ``module`` and add trainable adapters to every linear layer whose name ends in a target.

    Args:
        module: a diffusers model; what it has of other adapters stays, and is no longer active.
        settings: rank and alpha.
        targets: ends of layer names.
        adapter: peft's name of the new adapters; :func:`only_adapter` switches between several.

    Raises:
        UserError: a target matches no module.
    """
    # A layer that already has an adapter is wrapped, and no longer a Linear itself.
    names = [name for name, child in module.named_modules() if isinstance(child, nn.Linear | BaseTunerLayer)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(f"model.lora.targets: {target} matches no linear layer of {type(module).__name__}")
    module.requires_grad_(False)
    adapted: Any = module
    config = PeftLoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(targets),
        init_lora_weights="gaussian",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is meant
        adapted.add_adapter(config, adapter_name=adapter)


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Within the block the adapters of ``module`` take no part in its forward.

    Raises:
        ValueError: the module has no adapters.
    """
    with _switched(module, None):
        yield


@contextmanager
def only_adapter(module: nn.Module, adapter: str) -> Iterator[None]:
    """Within the block one adapter of ``module`` takes part in its forward, whichever were active.

    Raises:
        ValueError: the module has no adapter of this name.
    """
    if adapter not in getattr(module, "peft_config", ()):
        raise ValueError(f"{type(module).__name__} has no adapter {adapter!r}")
    with _switched(module, adapter):
        yield


@contextmanager
def _switched(module: nn.Module, adapter: str | None) -> Iterator[None]:
    """Nothing but two fields of each layer change, and are put back: peft's own switch also turns ``requires_grad`` off
    and on, which the hooks of a distributed engine need not survive."""
    layers = _adapted_layers(module)
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]  # a layer without this one adds nothing
    try:
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


@contextmanager
def merged_adapters(module: nn.Module) -> Iterator[None]:
    """Within the block the active adapters are part of the weights: a forward has the operations of the base alone.

    In bf16 the sum is rounded to the weight's eight bits, so the merged model is not quite the adapted one. Afterwards
    the weights are the same bits as before: they are put back from a copy in host memory, which is kept.

    Raises:
        ValueError: the module has no adapters.
    """
    layers = [layer for layer in _adapted_layers(module) if not layer.merged]
    for layer in layers:
        weight = layer.get_base_layer().weight
        if not hasattr(layer, "unmerged_weight"):
            layer.unmerged_weight = weight.detach().to("cpu", copy=True)
            if weight.device.type == "cuda":
                layer.unmerged_weight = layer.unmerged_weight.pin_memory()
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer in layers:
            layer.get_base_layer().weight.data.copy_(layer.unmerged_weight)
            layer.merged_adapters.clear()


def switch_adapters_off(module: nn.Module) -> None:
    """From now on ``module`` is the base model, but for the blocks of :func:`only_adapter`.

    Raises:
        ValueError: the module has no adapters.
    """
    for layer in _adapted_layers(module):
        layer._disable_adapters = True


def _adapted_layers(module: nn.Module) -> list[Any]:
    layers: list[Any] = [child for child in module.modules() if isinstance(child, BaseTunerLayer)]
    if not layers:
        raise ValueError(f"{type(module).__name__} has no adapters to switch off")
    return layers


def load_lora(
    module: nn.Module,
    path: str,
    pipeline_class: Any,
    part: str,
    key: str = "model.lora.init",
    adapter: str = "default",
) -> None:
    """Fill existing adapters from LoRA weights in diffusers' format.

    Args:
        module: a model with adapters.
        path: a safetensors file, or a folder that holds ``pytorch_lora_weights.safetensors``.
        pipeline_class: the diffusers pipeline whose loader reads the file.
        part: the pipeline's part that ``module`` is.
        key: what named the path, for the messages.
        adapter: which adapters are filled.

    Raises:
        UserError: the file is missing or damaged, or does not fit the adapters (rank, alpha, targets).
    """
    file = Path(path)
    if file.is_dir():
        file = file / "pytorch_lora_weights.safetensors"
    if not file.is_file() or file.suffix != ".safetensors":
        raise UserError(f"{key}: {path} is not a .safetensors file, nor a folder with pytorch_lora_weights.safetensors")
    try:
        # Some pipelines return network alphas between the two.
        state, *_, metadata = pipeline_class.lora_state_dict(
            str(file.parent), weight_name=file.name, return_lora_metadata=True, local_files_only=True
        )
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{key}: {file} cannot be read as LoRA weights: {str(error).splitlines()[0]}") from None
    weights = {name.removeprefix(f"{part}."): value for name, value in state.items()}
    try:
        outcome = set_peft_model_state_dict(module, weights, adapter_name=adapter)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{key}: {file} does not fit model.lora (rank, targets): {reason}") from None
    own = re.compile(rf"\.lora_\w+\.{re.escape(adapter)}(\.|$)")
    missing = [name for name in (outcome.missing_keys if outcome else []) if own.search(name)]
    if missing or (outcome and outcome.unexpected_keys):
        raise UserError(
            f"{key}: {file} does not fit model.lora.targets: {len(missing)} adapter weights are not in it and "
            f"{len(outcome.unexpected_keys)} of its weights have no adapter"
        )
    alpha, here = (metadata or {}).get(f"{part}.lora_alpha"), cast(Any, module).peft_config[adapter].lora_alpha
    if alpha is not None and float(alpha) != float(here):
        raise UserError(f"{key}: {file} was made with alpha {alpha}, but model.lora.alpha is {here}")
