"""LoRA adapters through peft, with checks for errors that peft ignores."""

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pcpo_fast.config.schema import LoraConfig
from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.policies.lora_files import LowRank

START = "start"
"""peft's name of the adapters of :func:`keep_start`."""


def add_lora(
    module: nn.Module,
    settings: LoraConfig,
    targets: Sequence[str],
    adapter: str = "default",
    start: Mapping[str, LowRank] | None = None,
    idle: Sequence[str] = (),
) -> None:
    """Freeze ``module`` and add trainable adapters to every linear layer whose name ends in a target.

    Args:
        module: a diffusers model; what it has of other adapters stays, and is no longer active.
        settings: rank and alpha.
        targets: ends of layer names.
        adapter: peft's name of the new adapters; :func:`only_adapter` switches between several.
        start: updates that the adapters begin with, of :func:`~pcpo_fast.policies.lora_files.read_lora`. A layer of
            theirs gets an adapter whether or not it is a target, of the larger of the two ranks and with the
            settings' alpha / rank; a layer that they lack begins without effect.
        idle: what is in the names of layers that get no adapter though they are targets.

    Raises:
        UserError: a target matches no module.
    """
    # A layer that already has an adapter is wrapped, and no longer a Linear itself.
    layers = [name for name, child in module.named_modules() if isinstance(child, nn.Linear | BaseTunerLayer)]
    names = [name for name in layers if not any(part in name for part in idle)]
    start = start or {}
    chosen = dict.fromkeys(start)
    for target in targets:
        found = [name for name in names if name == target or name.endswith(f".{target}")]
        if not found:
            raise UserError(f"model.lora.targets: {target} matches no linear layer of {type(module).__name__}")
        chosen.update(dict.fromkeys(found))
    larger: dict[int, list[str]] = {}
    for name, update in start.items():
        if update.down.shape[0] > settings.rank:
            larger.setdefault(update.down.shape[0], []).append(name)
    # One pattern for each rank: peft tries them all on every layer.
    patterns = {rank: f"^(?:{'|'.join(map(re.escape, layers))})" for rank, layers in larger.items()}
    module.requires_grad_(False)
    adapted: Any = module
    config = PeftLoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        # Whole names: what ends in a target need not be a linear layer (FLUX.2's attn.to_out is one in single blocks).
        target_modules="|".join(map(re.escape, chosen)),
        rank_pattern={pattern: rank for rank, pattern in patterns.items()},
        alpha_pattern={pattern: settings.alpha / settings.rank * rank for rank, pattern in patterns.items()},
        init_lora_weights="gaussian",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is meant
        adapted.add_adapter(config, adapter_name=adapter)
    for layer in _adapted_layers(module):
        base = layer.get_base_layer()
        if adapter in layer.lora_A and not base.weight.is_floating_point():
            # peft gives adapters the dtype of their layer's weights, but not that of weights in four bits.
            layer.lora_A[adapter].to(base.compute_dtype)
            layer.lora_B[adapter].to(base.compute_dtype)
    if start:
        fill_lora(module, start, adapter)


def differing_from(
    settings: LoraConfig, targets: Sequence[str], module: nn.Module, start: Mapping[str, LowRank]
) -> str:
    """How ``model.lora`` differs from the weights that a run starts from, and what is done about it; "" if it does not.

    Args:
        settings: the configuration's ``model.lora``.
        targets: ends of layer names that get an adapter.
        module: the network with its adapters.
        start: the weights.
    """
    ranks = [update.down.shape[0] for update in start.values()]
    lower, higher = {rank for rank in ranks if rank < settings.rank}, {rank for rank in ranks if rank > settings.rank}
    wanted = {
        name
        for name, child in module.named_modules()
        if isinstance(child, BaseTunerLayer) and any(name == end or name.endswith(f".{end}") for end in targets)
    }
    extra = sorted(start.keys() - wanted)
    missing = sorted(wanted - start.keys())

    def some(values: Iterable[int]) -> str:
        return ", ".join(map(str, sorted(values)))

    notes = [
        f"rank {some(lower)} is padded to model.lora.rank={settings.rank}" if lower else "",
        f"layers of rank {some(higher)} keep it instead of model.lora.rank={settings.rank}" if higher else "",
        f"adapters also for {counted(len(extra), 'layer')} that model.lora.targets does not name ({extra[0]}, ...)"
        if extra
        else "",
        f"no effect at first in {counted(len(missing), 'layer')} that it lacks ({missing[0]}, ...)" if missing else "",
    ]
    return "; ".join(filter(None, notes))


@contextmanager
def only_adapter(module: nn.Module, adapter: str | None) -> Iterator[None]:
    """Within the block one adapter of ``module`` takes part in its forward, whichever were active; None: no adapter.

    Nothing but two fields of each layer change, and are put back: peft's own switch also turns ``requires_grad`` off
    and on, which the hooks of a distributed engine need not survive.

    Raises:
        ValueError: the module has no adapters, or none of this name.
    """
    if adapter is not None and adapter not in getattr(module, "peft_config", ()):
        raise ValueError(f"{type(module).__name__} has no adapter {adapter!r}")
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


def keep_start(module: nn.Module) -> None:
    """Keep frozen copies of the adapters as they are now, as adapters named :data:`START`.

    They take no part in a forward but within :func:`only_adapter`.

    Raises:
        ValueError: the module has no adapters.
    """
    for layer in _adapted_layers(module):
        for parts in (layer.lora_A, layer.lora_B, layer.lora_dropout):
            parts[START] = copy.deepcopy(parts["default"]).requires_grad_(False)
        layer.scaling[START] = layer.scaling["default"]
    adapted: Any = module
    adapted.peft_config[START] = adapted.peft_config["default"]


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


def _adapted_layers(module: nn.Module) -> list[Any]:
    layers: list[Any] = [child for child in module.modules() if isinstance(child, BaseTunerLayer)]
    if not layers:
        raise ValueError(f"{type(module).__name__} has no adapters to switch off")
    return layers


def fill_lora(module: nn.Module, start: Mapping[str, LowRank], adapter: str = "default") -> None:
    """Give existing adapters the effect of some updates; layers without one have none.

    Args:
        module: a model with adapters, of at least the updates' ranks.
        start: by the layers' names.
        adapter: which adapters are filled.

    Raises:
        UserError: a layer has no adapter, or one of a smaller rank.
    """
    layers = {name: child for name, child in _named_adapters(module) if adapter in child.lora_A}
    with torch.no_grad():
        for name, update in start.items():
            size, there = update.down.shape[0], layers[name].r[adapter] if name in layers else 0
            if size > there:
                raise UserError(
                    f"the weights have rank {size} in {name}, which does not fit an adapter of rank {there}"
                )
        for name, layer in layers.items():
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            up.zero_()
            if name in start:
                update = start[name]
                size = update.down.shape[0]
                down[:size].copy_(update.down)
                up[:, :size].copy_(update.up.float() * (update.scale / layer.scaling[adapter]))


def trained_updates(module: nn.Module, state: Mapping[str, Tensor], adapter: str = "default") -> dict[str, LowRank]:
    """The adapters' updates, by the layers' names.

    Args:
        module: a model with adapters.
        state: their weights, by parameter name.
        adapter: whose.
    """
    return {
        name: LowRank(
            state[f"{name}.lora_A.{adapter}.weight"], state[f"{name}.lora_B.{adapter}.weight"], layer.scaling[adapter]
        )
        for name, layer in _named_adapters(module)
        if adapter in layer.lora_A
    }


def _named_adapters(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, child) for name, child in module.named_modules() if isinstance(child, BaseTunerLayer)]
