"""A configuration's model without weights: the real classes on PyTorch's meta device."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pcpo_fast.config.schema import ModelConfig
from pcpo_fast.config.shipped import find
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.files.content import INDEX, MODULAR_INDEX
from pcpo_fast.planning.published import PUBLISHED
from pcpo_fast.policies.families import FAMILIES, family_of
from pcpo_fast.policies.folder_checks import single_file, used_parts
from pcpo_fast.policies.four_bit import frozen_layers, packed_bytes
from pcpo_fast.policies.lora import add_lora
from pcpo_fast.policies.low_precision import low_precision_layers
from pcpo_fast.policies.part_checks import about, check_config
from pcpo_fast.policies.pipeline_files import check_hub_id, clip_tokens, folder_here, pipeline_class_of
from pcpo_fast.policies.pipeline_policy import DTYPES, PipelinePolicy
from pcpo_fast.policies.quiet import quiet_libraries
from pcpo_fast.policies.speed import needed
from pcpo_fast.policies.weight_files import find_weights, read_headers, read_json

META = torch.device("meta")

STORED = {"float32": "F32", "bfloat16": "BF16"}
"""Names of dtypes in the headers of safetensors files."""


@dataclass(frozen=True)
class Architecture:
    """The class and configuration of each part of a pipeline.

    Attributes:
        pipeline: name of the diffusers pipeline.
        parts: (class name, configuration) by part: networks, VAE, text encoders and scheduler.
        clip_tokens: sequence length of CLIP's tokenizer; 0: the model has no CLIP.
        source: where the configuration was read, shown to the user.
    """

    pipeline: str
    parts: Mapping[str, tuple[str, Mapping[str, Any]]]
    clip_tokens: int
    source: str


@dataclass(frozen=True)
class ModelOnMeta:
    """A policy on the meta device.

    Attributes:
        policy: predicts and decodes on the meta device, with adapters if LoRA is trained.
        architecture: what it was built from.
        settings: the configuration's ``model`` section.
        encoders: number of parameters of each text encoder.
    """

    policy: PipelinePolicy
    architecture: Architecture
    settings: ModelConfig
    encoders: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def network_parameters(self) -> int:
        """Parameters of the transformer or UNet, without adapters."""
        return sum(p.numel() for name, p in self.policy.module.named_parameters() if "lora_" not in name)

    @cached_property
    def all_parameters(self) -> int:
        """Parameters of the network, with adapters."""
        return sum(p.numel() for p in self.policy.module.parameters())

    @cached_property
    def largest_weight(self) -> int:
        """Elements of the network's largest parameter."""
        return max(p.numel() for p in self.policy.module.parameters())

    @cached_property
    def packed_layers(self) -> list[tuple[int, float]]:
        """(weights, bytes) of each layer that is stored in four bits (``model.base_weights``)."""
        if self.settings.base_weights == "full":
            return []
        network = self.policy.module
        names = frozen_layers(network, self.policy.compiled_blocks(network))
        layers: list[Any] = [network.get_submodule(name) for name in names]
        return [(layer.weight.numel(), packed_bytes(layer)) for layer in layers]

    @cached_property
    def eight_bit_bytes(self) -> int:
        """Bytes of the layers that candidates are sampled with in 8 bits (``rollout.candidate_weights``)."""
        network = self.policy.module
        names = low_precision_layers(network, self.policy.compiled_blocks(network))
        layers: list[Any] = [network.get_submodule(name) for name in names]
        return sum(layer.weight.numel() + 4 * layer.out_features for layer in layers)

    @cached_property
    def trained_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.policy.module.parameters() if p.requires_grad)

    @cached_property
    def loaded_parts(self) -> set[str]:
        """Parts that are loaded: the network, the VAE and the text encoders."""
        return {self.policy.trained_part, "vae", *self.encoders}

    @cached_property
    def mapped_parts(self) -> set[str]:
        """Parts whose files are on this machine and store ``model.dtype``.

        Loading maps such files into memory: the ranks of a machine share these pages, and the system can drop them at
        any time. Other weights are converted, so every rank has a copy.
        """
        settings, family, found = self.settings, type(self.policy), set[str]()
        folder = folder_here(settings.path, settings.revision)
        if folder is None:
            return found
        file, _ = single_file(settings, family.trained_part)
        try:
            for part, kind in used_parts(folder, family).items():
                if part in ("vae", *self.encoders) or (part == family.trained_part and file is None):
                    library = kind.__module__.partition(".")[0]
                    weights = find_weights(folder / part, library, settings.variant)
                    kinds = {tensor.dtype for tensor in read_headers(weights.files).values()}
                    found |= {part} if kinds == {STORED[settings.dtype]} else set()
        except UserError:  # loading says what is wrong with the folder
            return set()
        return found

    @cached_property
    def vae_parameters(self) -> int:
        """Parameters of the VAE."""
        return sum(p.numel() for p in self.policy.vae.parameters())


def weights_are_here(settings: ModelConfig) -> bool:
    """Whether this machine has the pipeline with the weights of the trained network."""
    folder = folder_here(settings.path, settings.revision)
    if folder is None:
        return False
    try:
        family = family_of(pipeline_class_of(folder, FAMILIES))
    except UserError:  # another model is there
        return False
    return any((folder / family.trained_part).glob("*.safetensors"))


def find_architecture(settings: ModelConfig, folder: str | None = None) -> Architecture:
    """The architecture of ``model.path``: a folder, a published model, or the hub's configuration files.

    Args:
        settings: the configuration's ``model`` section.
        folder: a pipeline folder to read instead; it needs no weights.

    Raises:
        UserError: the model is unknown, or a file is missing or malformed.
    """
    path = find(settings.path if folder is None else folder)
    if folder is not None and not path.is_dir():
        raise UserError(f"--model-config {folder}: not a folder; expected one with model_index.json and */config.json")
    if path.is_dir():
        return _read_folder(path, "model.path" if folder is None else "--model-config")
    if settings.path in PUBLISHED:
        known = PUBLISHED[settings.path]
        return Architecture(known["pipeline"], known["parts"], known["clip_tokens"], "published configuration")
    return _read_folder(_download_configs(settings), "model.path")


def build_on_meta(
    architecture: Architecture, settings: ModelConfig, overrides: Mapping[str, Any] | None = None
) -> ModelOnMeta:
    """Build the policy of an architecture on the meta device.

    Args:
        architecture: from :func:`find_architecture`.
        settings: the configuration's ``model`` section.
        overrides: changes to the trained network's configuration, such as fewer blocks.

    Raises:
        UserError: the image size or a LoRA target does not match the model, or compilation, recomputation, block
            kernels or weights in four bits are enabled but the model has no blocks for them.
    """
    import diffusers

    family = family_of(architecture.pipeline)
    name, config = architecture.parts[family.trained_part]
    network = _network(name, {**config, **(overrides or {})}, DTYPES[settings.dtype])
    vae_name, vae_config = architecture.parts["vae"]
    vae = _network(vae_name, vae_config, DTYPES[settings.dtype]).requires_grad_(False)
    scheduler_name, scheduler_config = architecture.parts["scheduler"]
    with about(f"{architecture.source}: scheduler_config.json is not valid for {scheduler_name}"):
        scheduler = getattr(diffusers, scheduler_name).from_config(dict(scheduler_config))
    policy = family(network, vae, scheduler, settings)
    if settings.gradient_checkpointing:
        needed(network, policy.recomputed_blocks(network), "model.gradient_checkpointing")
    if settings.compile is True:
        needed(network, policy.compiled_blocks(network), "model.compile")
    if settings.block_kernels:
        needed(network, policy.accelerated_blocks(network), "model.block_kernels")
    if settings.base_weights == "nf4":
        needed(network, frozen_layers(network, policy.compiled_blocks(network)), "model.base_weights", "full")
    if settings.finetune == "lora":
        with META:
            targets = settings.lora.targets or family.lora_targets
            add_lora(network, settings.lora, targets, idle=family.idle_layers)
        with quiet_libraries():  # diffusers warns about layers kept in float32 although there are none
            network.to(DTYPES[settings.dtype])  # peft gives adapters the weights' dtype, but not on the meta device
    else:
        for weight_name, weight in network.named_parameters():
            weight.requires_grad_(not family.is_idle(weight_name))
    network.train()
    encoders = {} if overrides else _encoder_parameters(architecture, family)
    return ModelOnMeta(policy, architecture, settings, encoders)


def _network(name: str, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    import diffusers

    with about(f"the configuration is not valid for diffusers' {name}"), META:
        return getattr(diffusers, name).from_config(dict(config)).to(dtype)


def _encoder_parameters(architecture: Architecture, family: type[PipelinePolicy]) -> dict[str, int]:
    import transformers

    counts = {}
    for part in family.encoder_parts:
        if part not in architecture.parts:
            continue
        name, config = architecture.parts[part]
        kind = getattr(transformers, name)
        with about(f"{part}/config.json is not valid for {name}"), META:
            encoder: nn.Module = kind(kind.config_class.from_dict(dict(config)))
        counts[part] = sum(p.numel() for p in encoder.parameters())
    return counts


def _read_folder(folder: Path, key: str) -> Architecture:
    pipeline = pipeline_class_of(folder, FAMILIES, key)
    family, parts = family_of(pipeline), {}
    for name, kind in used_parts(folder, family, key).items():
        if name.startswith("tokenizer"):
            continue
        if name == "scheduler":
            parts[name] = (str(kind), read_json(folder / name / "scheduler_config.json", key))
        else:
            parts[name] = (kind.__name__, check_config(folder / name, kind, key))
    if "scheduler" not in parts and (default := family.default_scheduler()) is not None:
        parts["scheduler"] = default
    return Architecture(pipeline, parts, clip_tokens(folder, key), str(folder))


def _download_configs(settings: ModelConfig) -> Path:
    """Configuration files of a hub model, without its weights."""
    from huggingface_hub import snapshot_download

    check_hub_id(settings.path)
    patterns = [INDEX, MODULAR_INDEX, "*/config.json", "*/scheduler_config.json", "*/tokenizer_config.json"]
    try:
        return Path(snapshot_download(settings.path, revision=settings.revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds, which all mean the same here
        raise UserError(
            f"model.path: the configuration files of {settings.path} cannot be downloaded from the hub "
            f"({reason_of(error)}); available offline: {', '.join(PUBLISHED)}; or give a folder with "
            "--model-config"
        ) from None
