"""From the configuration to a policy, without importing the families that are not used."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch

from pcpo_fast.config import Config
from pcpo_fast.errors import UserError
from pcpo_fast.noise_keys import Purpose, random_key
from pcpo_fast.policies.base import Policy


def load_policy(config: Config, device: torch.device, prompts: Sequence[str] = ()) -> Policy:
    """Load the model of a run onto a device, after encoding the prompts that it will need.

    Raises:
        UserError: as the family's ``load``.
    """
    from pcpo_fast.policies.flux import FluxPolicy

    cache = config.model.embedding_cache
    folder = Path(cache) if cache is not None else Path(config.output_dir).parent / "embeddings"
    torch.manual_seed(random_key(Purpose.MODEL, config.seed))  # LoRA's initial weights, the same on every rank
    return FluxPolicy.load(config.model, folder, device, prompts)


def keep_reference(policy: Policy, config: Config) -> None:
    """Where a KL is asked for, keep the frozen start: adapters can be switched off, full weights need a copy."""
    if config.credit.kl_coefficient > 0 and config.model.finetune == "full":
        policy.reference_module = copy.deepcopy(policy.module).requires_grad_(False)


def load_trained_weights(policy: Policy, config: Config, folder: Path) -> None:
    """Put weights that a run exported into a policy loaded with the run's configuration.

    Raises:
        UserError: the folder does not hold the weights that ``model.finetune`` promises, or they do not fit.
    """
    from diffusers import FluxPipeline
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from pcpo_fast.policies.lora import load_lora

    if config.model.finetune == "lora":
        load_lora(policy.module, str(folder), FluxPipeline, "weights")
        return
    files = sorted((folder / "transformer").glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no transformer/*.safetensors")
    try:
        policy.module.load_state_dict({name: value for file in files for name, value in load_file(file).items()})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}/transformer cannot be read: {error}") from None
    except RuntimeError as error:
        raise UserError(f"{folder}/transformer does not fit the model: {str(error).splitlines()[-1].strip()}") from None
