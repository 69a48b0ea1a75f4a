"""Creates a policy from the configuration, importing only the family that is used."""

import copy
import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from pcpo_fast.config.schema import Config, ModelConfig
from pcpo_fast.distributed.collectives import local_rank, shared_errors
from pcpo_fast.errors import UserError
from pcpo_fast.files.content import index_of, pipeline_files
from pcpo_fast.method.noise_keys import Purpose, random_key
from pcpo_fast.method.samplers import check_sampler
from pcpo_fast.policies.attention import check_attention
from pcpo_fast.policies.automatic import settle
from pcpo_fast.policies.base import Policy
from pcpo_fast.policies.folder_checks import check_folder, single_file
from pcpo_fast.policies.four_bit import check_base_weights
from pcpo_fast.policies.lora import add_lora, fill_lora, keep_start
from pcpo_fast.policies.lora_files import describe_run, read_lora
from pcpo_fast.policies.pipeline_files import pipeline_folder
from pcpo_fast.policies.pipeline_policy import PipelinePolicy
from pcpo_fast.policies.speed import compile_blocks

FAMILIES = {
    "FluxPipeline": "pcpo_fast.policies.flux:FluxPolicy",
    "Flux2KleinPipeline": "pcpo_fast.policies.flux2_klein:Flux2KleinPolicy",
    "Flux2Pipeline": "pcpo_fast.policies.flux2_dev:Flux2DevPolicy",
    "Flux3ModularPipeline": "pcpo_fast.policies.flux3:Flux3Policy",
    "Krea2Pipeline": "pcpo_fast.policies.krea2:Krea2Policy",
    "QwenImagePipeline": "pcpo_fast.policies.qwen_image:QwenImagePolicy",
    "StableDiffusion3Pipeline": "pcpo_fast.policies.stable_diffusion_3:StableDiffusion3Policy",
    "StableDiffusionPipeline": "pcpo_fast.policies.stable_diffusion:StableDiffusionPolicy",
    "ZImagePipeline": "pcpo_fast.policies.z_image:ZImagePolicy",
}
"""The class of the policy for each diffusers pipeline."""


def find_family(settings: ModelConfig) -> tuple[Path, type[PipelinePolicy]]:
    """The pipeline's folder, and the policy class for it.

    Raises:
        UserError: as in :func:`pcpo_fast.policies.pipeline_files.pipeline_folder`.
    """
    folder, name = pipeline_folder(settings.path, settings.revision, FAMILIES, settings.variant)
    return folder, family_of(name)


def family_of(pipeline: str) -> type[PipelinePolicy]:
    """The policy class for a diffusers pipeline, one of :data:`FAMILIES`."""
    module, _, family = FAMILIES[pipeline].partition(":")
    found: type[PipelinePolicy] = getattr(importlib.import_module(module), family)
    return found


def family_of_network(name: str) -> type[PipelinePolicy]:
    """The policy class for a class of networks in diffusers that one of :data:`FAMILIES` trains."""
    return next(family for family in map(family_of, FAMILIES) if family.network_class() == name)


def model_files(settings: ModelConfig) -> dict[str, Path]:
    """The files of a pipeline that a policy loads, by their names in its folder.

    Raises:
        UserError: as :func:`find_family`.
    """
    folder, family = find_family(settings)
    parts = (family.trained_part, "vae", "scheduler", *family.encoder_parts)
    file, key = single_file(settings, family.trained_part)
    single = {} if file is None else {key: file}
    index = index_of(folder)
    return {index.name: index} | pipeline_files(folder, parts, settings.variant) | single


def check_base_model(config: Config) -> tuple[Path, type[PipelinePolicy]]:
    """The pipeline's folder and its policy class, as :func:`find_family`, after checking them.

    Collective; the first rank of each machine checks the folder.

    Raises:
        UserError: on every rank, as :func:`find_family` and :func:`~pcpo_fast.policies.folder_checks.check_folder`, or
            the sampler is for another kind of model, or bitsandbytes is missing.
    """
    folder, family = find_family(config.model)
    check_sampler(config.sampler, family.schedule_kind)
    check_base_weights(config.model)
    with shared_errors():
        if local_rank() == 0:
            check_folder(folder, family, config.model)
    return folder, family


def load_policy(
    config: Config, device: torch.device, prompts: Sequence[str] = (), network_device: torch.device | None = None
) -> Policy:
    """Load the model of a run onto a device, after encoding its prompts.

    Args:
        config: the run.
        device: where it runs.
        prompts: encoded first, so that text encoders and network are never on the device together.
        network_device: where to leave the network if not on ``device``: in host memory, for ZeRO-3 to partition.

    Raises:
        UserError: as :func:`check_base_model`, :func:`~pcpo_fast.policies.attention.check_attention` and the family's
            ``load``.
    """
    folder, family = check_base_model(config)
    config, _ = settle(config, folder, family, device, partitioned=network_device is not None)
    check_attention(config, folder, family, device)
    torch.manual_seed(random_key(Purpose.MODEL, config.seed))  # LoRA's initial weights, the same on every rank
    policy = family.load(folder, config.model, config.embedding_folder, device, prompts, network_device)
    policy.about = describe_run(config)
    return policy


def keep_reference(policy: Policy, config: Config, device: torch.device) -> None:
    """Keep a frozen copy of the initial network, or of its adapters, for the KL, unless these can just be disabled."""
    if config.credit.kl_reference == "start":
        keep_start(policy.module)
    if config.keeps_start:
        policy.reference_module = copy.deepcopy(policy.module).requires_grad_(False).to(device)
        if config.model.compile:
            # The copy is of the blocks, not of their code.
            compile_blocks(policy.reference_module, policy.compiled_blocks(policy.reference_module))


def load_trained_weights(module: nn.Module, config: Config, folder: Path, adapter: str = "default") -> None:
    """Load a run's exported weights into the network of a policy that was loaded with the run's configuration.

    Args:
        module: the network.
        config: of the run.
        folder: what the policy's ``save_weights`` wrote.
        adapter: name of the adapters for ``model.finetune: lora``; added if they do not exist.

    Raises:
        UserError: the folder has no weights of the kind of ``model.finetune``, or they do not match the network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _, family = find_family(config.model)
    part = family.trained_part
    if config.model.finetune == "lora":
        start, lora = read_lora(module, folder, "weights", family), config.model.lora
        if adapter in getattr(module, "peft_config", ()):
            fill_lora(module, start, adapter)
        else:
            add_lora(module, lora, lora.targets or family.lora_targets, adapter, start, family.idle_layers)
        return
    files = sorted((folder / part).glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no {part}/*.safetensors")
    try:
        module.load_state_dict({name: value for file in files for name, value in load_file(file).items()})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}/{part} cannot be read: {error}") from None
    except RuntimeError as error:
        raise UserError(f"{folder}/{part} does not match the model: {str(error).splitlines()[-1].strip()}") from None
