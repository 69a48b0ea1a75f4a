"""Reads LoRA files of all common formats for a network, and writes them for diffusers, ComfyUI and the WebUIs.

A layer's update is ``scale * up @ down``. A file may give the scale in three ways, in order of precedence: ``.alpha``
beside the layer (kohya), peft's ``adapter_config.json`` next to the file, diffusers' metadata in its header. Without
any of them all readers set alpha to the rank, so the scale is 1.
"""

import json
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pcpo_fast import __version__
from pcpo_fast.config.schema import Config
from pcpo_fast.config.shipped import find
from pcpo_fast.distributed.collectives import rank
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.policies.lora_names import (
    TEXT_ENCODER,
    flat,
    halves_swapped,
    kohya_name,
    shares,
    spellings,
    unet_layer,
)

if TYPE_CHECKING:
    from pcpo_fast.policies.pipeline_policy import PipelinePolicy

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name by which diffusers finds LoRA weights in a folder."""
PEFT_FILE = "adapter_model.safetensors"

Format = Literal["diffusers", "comfyui", "kohya"]

_WEIGHT = re.compile(
    r"(?P<layer>.+?)(\.lora_(?P<new>A|B|down|up)(\.[^.]+)?\.weight|[._]lora(_linear_layer)?\.(?P<old>down|up)\.weight"
    r"|\.(lora_)?(?P<alpha>alpha))"
)
_OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "a DoRA adapter",
    r"lokr_": "a LoKr adapter",
    r"hada_": "a LoHa adapter",
    r"lora_mid\.": "a LoCon adapter with a Tucker core",
    r"oft_|boft_": "an OFT adapter",
    r"\.[ab][12]\.weight$": "a GLoRA adapter",
    r"vera_": "a VeRA adapter",
    r"\.diff(_b)?$|\.[wb]_norm$|set_weight$": "an adapter with changes of whole weights",
    r"lora_(A|B|up|down)(\.[^.]+)?\.bias$": "an adapter with biases",
}
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq")


class LowRank(NamedTuple):
    """The update of one linear layer, ``scale * up @ down``.

    Attributes:
        down: [rank, inputs].
        up: [outputs, rank].
        scale: alpha over rank, of whoever trained it.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def scaled_up(self) -> Tensor:
        """``up`` in float32, multiplied by the scale, so that alpha equals the rank."""
        return self.up.float() * self.scale

    @property
    def trimmed(self) -> "LowRank":
        """The update as two matrices, without the zero ranks that ours are padded with."""
        down, up = self.down.flatten(1), self.up.flatten(1)  # some write linear layers as convolutions of one pixel
        used = (down.float() != 0).any(dim=1) | (up.float() != 0).any(dim=0)
        used[0] = True
        return LowRank(down[used], up[:, used], self.scale)


def find_lora_file(path: str | Path, key: str) -> Path:
    """The safetensors file of a path: the path itself, the folder's LoRA weights, or the only such file in it.

    Raises:
        UserError: there is none, or it is ambiguous.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        for name in (LORA_FILE, PEFT_FILE):
            if (file / name).is_file():
                return file / name
        found = sorted(entry for entry in file.glob("*.safetensors") if not entry.name.startswith("."))
        if len(found) > 1:
            raise UserError(
                f"{key}: {path} holds {len(found)} .safetensors files ({found[0].name}, {found[1].name}, ...) and none "
                f"is called {LORA_FILE} or {PEFT_FILE}; name the file"
            )
        if found:
            return found[0]
        names = (LORA_FILE, PEFT_FILE)
        below = next((entry for entry in sorted(file.glob("*/*.safetensors")) if entry.name in names), None)
        hint = "" if below is None else f"; there is {below.relative_to(file)} in it"
        raise UserError(
            f"{key}: {path} is a folder without {LORA_FILE}, {PEFT_FILE} or another .safetensors file{hint}"
        )
    if not file.is_file() or file.suffix != ".safetensors":
        raise UserError(f"{key}: {path} is neither a .safetensors file nor a folder with {LORA_FILE} or another one")
    return file


def read_lora(module: nn.Module, path: str | Path, key: str, family: "type[PipelinePolicy]") -> dict[str, LowRank]:
    """LoRA weights for the linear layers of a network, from a file of diffusers, peft, kohya, ComfyUI or ours.

    Args:
        module: a diffusers network, with or without adapters.
        path: a safetensors file, or a folder with one.
        key: what named the path, for the messages.
        family: of the network.

    Returns:
        By the layers' names.

    Raises:
        UserError: the file cannot be read, is no plain LoRA, or holds something that the network has no place for.
    """
    file = find_lora_file(path, key)
    # A layer with adapters is a container, with the layer itself in base_layer.
    named = {name.removesuffix(".base_layer"): child for name, child in module.named_modules()}
    linear = {name: child for name, child in named.items() if isinstance(child, nn.Linear) and "lora_" not in name}
    network = type(module).__name__
    known = spellings(family.release_weights(list(linear)), list(linear))
    found: dict[str, LowRank] = {}
    updates = _parse(file, key)
    strangers = {name: update for name, update in updates.items() if flat(name) not in known}
    if strangers:
        raise UserError(f"{key}: {file} {_strangers(strangers, named, network)}")
    for name, update in updates.items():
        for layer, part in _split(update.trimmed, *known[flat(name)]).items():
            if layer in found:
                raise UserError(f"{key}: {file} has layer {layer} twice, under different names ({name})")
            weight = linear[layer]
            if (part.up.shape[0], part.down.shape[1]) != (weight.out_features, weight.in_features):
                raise UserError(
                    f"{key}: {file} was made for another model: {name} is an update of "
                    f"{part.up.shape[0]} x {part.down.shape[1]}, but {layer} of this {network} has "
                    f"{weight.out_features} x {weight.in_features}"
                )
            found[layer] = part
    return found


def _strangers(updates: Mapping[str, LowRank], named: Collection[str], network: str) -> str:
    """Describes a file's layers that the network does not have."""
    kinds: dict[str, list[str]] = defaultdict(list)
    flats = {flat(other) for other in named}
    for name, update in updates.items():
        if TEXT_ENCODER.match(name):
            kinds["of text encoders"].append(name)
        elif update.down.dim() == 4 or flat(name) in flats:
            kinds["that are convolutions, or not linear for another reason"].append(name)
        else:
            kinds[f"that the {network} does not have"].append(name)
    counted = [f"{len(names)} {kind} ({names[0]}{', ...' * (len(names) > 1)})" for kind, names in kinds.items()]
    return f"has layers that no adapter here can be for ({network}, linear layers): {'; '.join(counted)}"


def _parse(file: Path, key: str) -> dict[str, LowRank]:
    """Every layer's update by the name that the file gives it."""
    try:
        with file.open("rb") as opened:
            if opened.read(24).startswith(b"version https://git-lfs"):
                raise UserError(f"{key}: {file} is a git-lfs pointer, not the weights; fetch them with: git lfs pull")
        with safe_open(file, framework="pt") as opened_weights:
            metadata = opened_weights.metadata() or {}
            tensors = {name: opened_weights.get_tensor(name) for name in opened_weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{key}: {file} cannot be read as LoRA weights: {reason_of(error)}") from None
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        for pattern, kind in _OTHER_KINDS.items():
            if re.search(pattern, name):
                raise UserError(
                    f"{key}: {file} is {kind} ({name}), and only plain LoRA is supported: "
                    "two matrices for each linear layer"
                )
        match = _WEIGHT.fullmatch(name)
        if match is None:
            raise UserError(f"{key}: {file}: {name} is not a LoRA weight")
        which = match["alpha"] or match["old"] or {"A": "down", "B": "up"}.get(match["new"], match["new"])
        if which in parts[match["layer"]]:
            raise UserError(f"{key}: {file} holds several adapters of {match['layer']}; keep one of them")
        parts[match["layer"]][which] = tensor
    if not parts:
        raise UserError(f"{key}: {file} holds no weights")
    settings = _adapter_settings(file, key, metadata, all(name.startswith("base_model.") for name in parts))
    return {name: _update(name, part, settings, f"{key}: {file}") for name, part in parts.items()}


def _update(name: str, part: Mapping[str, Tensor], settings: Mapping[str, Any], where: str) -> LowRank:
    for which in ("down", "up"):
        if which not in part:
            raise UserError(f"{where}: {name} lacks its lora_{'A' if which == 'down' else 'B'} (lora_{which}) weight")
        value = part[which]
        matrix = value.is_floating_point() and value.dim() >= 2 and value.numel() > 0
        if not matrix or not value.float().isfinite().all():
            raise UserError(f"{where}: lora_{which} of {name} is not a matrix of finite numbers")
    update = LowRank(part["down"], part["up"])
    size = update.down.shape[0]
    if update.up.shape[1] != size:
        raise UserError(f"{where}: lora_down of {name} has rank {size}, but its lora_up has {update.up.shape[1]}")
    if "alpha" in part:
        if part["alpha"].numel() != 1 or not math.isfinite(float(part["alpha"])):
            raise UserError(f"{where}: alpha of {name} is not a number")
        return update._replace(scale=float(part["alpha"]) / size)
    pattern = settings.get("alpha_pattern") or {}
    layer = re.sub(r"^(base_model\.model|transformer|unet)\.", "", name)
    alpha = pattern.get(get_pattern_key(list(pattern), layer), settings.get("lora_alpha"))
    if alpha is None:
        return update
    return update._replace(scale=float(alpha) / (math.sqrt(size) if settings.get("use_rslora") else size))


def _adapter_settings(file: Path, key: str, metadata: Mapping[str, str], peft: bool) -> dict[str, Any]:
    """peft's settings of the adapter: its ``adapter_config.json``, or what diffusers put into the header."""
    beside = file.with_name("adapter_config.json")
    peft_wrote = (peft or file.name == PEFT_FILE) and beside.is_file()
    try:
        if peft_wrote:
            settings = json.loads(beside.read_text(encoding="utf-8"))
        else:
            packed = json.loads(metadata.get("lora_adapter_metadata", "{}"))
            settings = {re.sub(r"^(transformer|unet)\.", "", name): value for name, value in packed.items()}
    except (OSError, ValueError, AttributeError) as error:
        source = beside if peft_wrote else f"the header of {file}"
        raise UserError(f"{key}: {source} cannot be read as an adapter's settings: {reason_of(error)}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{key}: {beside} must hold an adapter's settings, got a {type(settings).__name__}")
    kind = settings.get("peft_type") or "LORA"
    changed = str(settings.get("init_lora_weights")).lower()
    if kind != "LORA" or settings.get("use_dora"):
        kind = "DoRA" if settings.get("use_dora") else kind
        raise UserError(f"{key}: {file} is an adapter of type {kind}, and only plain LoRA is supported")
    pattern = settings.get("alpha_pattern") or {}
    alphas = [settings.get("lora_alpha"), *(pattern.values() if isinstance(pattern, dict) else ["?"])]
    if not all(alpha is None or (isinstance(alpha, int | float) and math.isfinite(alpha)) for alpha in alphas):
        raise UserError(f"{key}: lora_alpha or alpha_pattern in the settings of {file} is not a number")
    if changed.startswith(_CHANGED_BASES):
        raise UserError(
            f"{key}: {file} was trained on base weights modified by {changed}; save it as a plain LoRA with "
            "peft's path_initial_model_for_weight_conversion"
        )
    if peft and settings.get("lora_alpha") is None and rank() == 0:
        warnings.warn(
            f"{key}: {file} does not say its alpha (peft has it in adapter_config.json, which is not there), so it is "
            "taken to be the rank",
            stacklevel=2,
        )
    return settings


def _split(update: LowRank, original: str, layers: tuple[str, ...]) -> dict[str, LowRank]:
    """What an update of a weight of the original release is to each layer that has some of its rows."""
    if halves_swapped(original, update.up, update.down):
        update = update._replace(up=torch.cat(update.up.chunk(2)[::-1]))
    parts = shares(original, len(layers))
    if len(layers) == 1 or update.up.shape[0] % sum(parts):
        return dict.fromkeys(layers, update)
    unit = update.up.shape[0] // sum(parts)
    rows = update.up.split([unit * share for share in parts])
    found = {}
    for layer, up in zip(layers, rows, strict=True):
        used = up.float().abs().sum(dim=0) > 0  # where layers were fused, a layer's rows have few columns
        if used.any():
            found[layer] = LowRank(update.down[used], up[:, used], update.scale)
    return found


# ------------------------------------------------------------------------------------------------------- writing


def describe_run(config: Config) -> dict[str, str]:
    """What a LoRA file's header says of the run that made it."""
    path = Path(config.model.path)
    model = (
        path.name if path.is_absolute() or find(path).exists() else config.model.path
    )  # nobody's folders are published
    revision = "" if config.model.revision is None else f"@{config.model.revision}"
    file = config.model.transformer or config.model.unet
    single = "" if file is None else f" with {Path(file).name}"
    rewards = [f"{reward.weight:g} * {reward.column}" for reward in config.rewards if reward.trained_on]
    return {"base_model": model + revision + single, "reward": " + ".join(rewards), "pcpo_fast_version": __version__}


def write_lora(
    file: Path,
    layers: Mapping[str, LowRank],
    family: "type[PipelinePolicy]",
    names: Format | None = None,
    dtype: torch.dtype | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write LoRA weights with the scale folded in, so that every reader applies them at the trained strength.

    Args:
        file: what to write.
        layers: updates, by the layers' names in diffusers.
        family: of the network.
        names: "diffusers": diffusers' own; "kohya": those of kohya's sd-scripts and the WebUIs, with ``.alpha``;
            "comfyui" or None: whichever of the two both diffusers and ComfyUI read.
        dtype: of the weights; None: float32.
        about: goes into the header.

    Raises:
        UserError: a weight does not fit ``dtype``.
    """
    highest = max(update.down.shape[0] for update in layers.values())
    layers = {name: _padded(update, highest) for name, update in layers.items()}
    if names in (None, "comfyui"):
        names = "kohya" if family.kohya_keeps_names else "diffusers"
    tensors: dict[str, Tensor] = {}
    if names == "diffusers":
        for layer, update in layers.items():
            name = f"{family.trained_part}.{layer}"
            tensors[f"{name}.lora_A.weight"] = update.down
            tensors[f"{name}.lora_B.weight"] = update.scaled_up
    else:
        own = {layer: (layer,) for layer in layers}
        grouped = own if family.kohya_keeps_names else family.release_weights(list(layers))
        for original, ends in grouped.items():
            down, up = _fuse(layers, original, ends)
            tensors[f"{kohya_name(original)}.lora_down.weight"] = down
            tensors[f"{kohya_name(original)}.lora_up.weight"] = up
            tensors[f"{kohya_name(original)}.alpha"] = torch.tensor(float(down.shape[0]))
    for name, value in tensors.items():
        cast = value if name.endswith(".alpha") else value.to(dtype or torch.float32)
        if not cast.isfinite().all():
            raise UserError(f"--dtype {str(cast.dtype).removeprefix('torch.')}: {name} has values beyond its range")
        tensors[name] = cast.contiguous().cpu()
    save_file(tensors, file, {"format": "pt", "network": family.network_class(), **(about or {})})
    file.chmod(0o644)


def _padded(update: LowRank, size: int) -> LowRank:
    """The update padded to a higher rank: with unequal ranks, diffusers assigns alphas to the wrong layers."""
    more = size - update.down.shape[0]
    return update._replace(
        down=nn.functional.pad(update.down.float(), (0, 0, 0, more)), up=nn.functional.pad(update.up, (0, more))
    )


def _fuse(layers: Mapping[str, LowRank], original: str, ends: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """The layers that are one weight of the original release as one update, of the sum of their ranks."""
    there = [(layers[end], place) for place, end in enumerate(ends) if end in layers]
    down = torch.cat([update.down.float() for update, _ in there])
    if len(ends) == 1:
        up = there[0][0].scaled_up
        return down, torch.cat(up.chunk(2)[::-1]) if halves_swapped(original, up, down) else up
    parts = shares(original, len(ends))
    unit = there[0][0].up.shape[0] // parts[there[0][1]]
    up = down.new_zeros(unit * sum(parts), down.shape[0])
    column = 0
    for update, place in there:
        row, size = unit * sum(parts[:place]), update.down.shape[0]
        up[row : row + unit * parts[place], column : column + size] = update.scaled_up
        column += size
    return down, up


def read_own_lora(file: Path, key: str) -> tuple[str | None, dict[str, LowRank]]:
    """LoRA weights that a policy wrote, read without the network.

    Returns:
        diffusers' class of the network, None where an older version wrote of a transformer without saying which; and
        the updates by the layers' names.

    Raises:
        UserError: the file cannot be read.
    """
    parsed = _parse(file, key)
    with safe_open(file, framework="pt") as opened:
        network = (opened.metadata() or {}).get("network")
    first = next(iter(parsed))
    if first.startswith("lora_unet_"):
        return network, {unet_layer(flat(name)): update.trimmed for name, update in parsed.items()}
    if network is None and first.startswith("unet."):
        network = "UNet2DConditionModel"
    return network, {re.sub(r"^(transformer|unet)\.", "", name): update.trimmed for name, update in parsed.items()}
