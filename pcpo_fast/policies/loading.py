"""From the configuration to a policy, without importing the families that are not used."""

import copy
from pathlib import Path

import torch

from pcpo_fast.config import Config
from pcpo_fast.policies.base import Policy


def load_policy(config: Config, device: torch.device) -> Policy:
    """Load the model of a run onto a device.

    Raises:
        UserError: as the family's ``load``.
    """
    from pcpo_fast.policies.flux import FluxPolicy

    cache = config.model.embedding_cache
    folder = Path(cache) if cache is not None else Path(config.output_dir).parent / "embeddings"
    torch.manual_seed(config.seed)  # LoRA's initial weights, the same on every rank
    return FluxPolicy.load(config.model, folder, device)


def keep_reference(policy: Policy, config: Config) -> None:
    """Where a KL is asked for, keep the frozen start: adapters can be switched off, full weights need a copy."""
    if config.credit.kl_coefficient > 0 and config.model.finetune == "full":
        policy.reference_module = copy.deepcopy(policy.module).requires_grad_(False)
