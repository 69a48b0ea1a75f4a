"""Loads several fine-tunes of one model together: as adapters of its network, or as networks of their own."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pcpo_fast.config.schema import Config
from pcpo_fast.policies.base import Conditioning, Policy
from pcpo_fast.policies.families import load_policy, load_trained_weights
from pcpo_fast.policies.lora import only_adapter

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""Signature of :meth:`pcpo_fast.policies.Policy.predict`: (latents, times, conditioning) to output after guidance."""


class FineTune(NamedTuple):
    """A run's fine-tuned weights.

    Attributes:
        config: of the run.
        weights: folder that the policy's ``save_weights`` wrote.
    """

    config: Config
    weights: Path


def predicting(policy: Policy, switch: Callable[[], AbstractContextManager[None]]) -> Predict:
    """A policy's prediction within a context, such as that of :meth:`Policy.as_reference`."""

    def predict(latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        with switch():
            return policy.predict(latents, times, conditioning)

    return predict


def load_fine_tunes(
    fine_tunes: Sequence[FineTune],
    wanted: Sequence[bool],
    device: torch.device,
    prompts: Sequence[str] = (),
    *,
    keep_base: bool = True,
) -> tuple[Policy, list[Predict | None]]:
    """Load a base model and fine-tunes of it.

    LoRA runs become adapters, each with its own rank, alpha and targets, of one network. A full fine-tune becomes a
    second network, or replaces the base model's weights if these are not needed.

    Args:
        fine_tunes: runs of the same model; the first one's configuration says how it is loaded.
        wanted: which of them to load.
        device: where everything goes.
        prompts: encoded first, so that text encoders and network are never on the device together.
        keep_base: whether predictions of the base model are needed.

    Returns:
        A policy for the base model, if kept; and the predictor of each fine-tune, with the policy's prompts and
        guidance, None for those not in ``wanted``.

    Raises:
        UserError: as :func:`pcpo_fast.policies.families.load_policy`, or weights do not match.
    """
    config = fine_tunes[0].config
    model = config.model.model_copy(update={"finetune": "full"})  # the network without adapters
    base = config.model_copy(update={"model": model})
    policy = load_policy(base, device, prompts)
    network: Any = policy.module.requires_grad_(False)
    predictions: list[Predict | None] = [None] * len(fine_tunes)
    chosen = [number for number, is_wanted in enumerate(wanted) if is_wanted]
    whole = [number for number in chosen if fine_tunes[number].config.model.finetune == "full"]
    adapted = [number for number in chosen if number not in whole]
    for number in whole:
        in_place = number == whole[-1] and not (keep_base or adapted)
        # Loaded, not copied: on a CPU the last bits depend on the weights' memory layout, and a fine-tune must give
        # the same results alone and among others.
        own = network if in_place else load_policy(base, device).module.requires_grad_(False)
        load_trained_weights(own, *fine_tunes[number])
        predictions[number] = predicting(policy, partial(policy.running, own))
    for number in adapted:
        adapter = f"run_{number}"
        load_trained_weights(network, *fine_tunes[number], adapter)
        predictions[number] = predicting(policy, partial(only_adapter, network, adapter))
    if adapted:
        network.disable_adapters()
        network.requires_grad_(False)
    return policy, predictions
