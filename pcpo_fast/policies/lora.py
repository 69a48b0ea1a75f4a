"""LoRA adapters through peft, with the mistakes caught that peft lets pass."""

from pathlib import Path
from typing import Any

from peft import LoraConfig as PeftLoraConfig
from peft import set_peft_model_state_dict
from torch import nn

from pcpo_fast.config import LoraConfig
from pcpo_fast.errors import UserError


def add_lora(module: nn.Module, settings: LoraConfig) -> None:
    """Freeze ``module`` and add trainable adapters to every linear layer that a target names.

    Raises:
        UserError: a target matches no module.
    """
    names = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    for target in settings.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(f"model.lora.targets: {target} matches no linear layer of {type(module).__name__}")
    module.requires_grad_(False)
    adapted: Any = module
    adapted.add_adapter(
        PeftLoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(settings.targets),
            init_lora_weights="gaussian",
        )
    )


def load_lora(module: nn.Module, path: str, pipeline_class: Any) -> None:
    """Fill existing adapters from LoRA weights in diffusers' format.

    Args:
        module: a model with adapters.
        path: a safetensors file, or a folder that holds ``pytorch_lora_weights.safetensors``.
        pipeline_class: the diffusers pipeline whose loader reads the file.

    Raises:
        UserError: the file is missing, or does not fit the adapters.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "pytorch_lora_weights.safetensors"
    if not file.is_file():
        raise UserError(f"model.lora.init: {path} holds no pytorch_lora_weights.safetensors")
    state = pipeline_class.lora_state_dict(str(file.parent), weight_name=file.name)
    state = state[0] if isinstance(state, tuple) else state
    weights = {name.removeprefix("transformer."): value for name, value in state.items()}
    try:
        outcome = set_peft_model_state_dict(module, weights)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"model.lora.init: {file} does not fit model.lora (rank, targets): {reason}") from None
    missing = [name for name in (outcome.missing_keys if outcome else []) if "lora_" in name]
    if missing or (outcome and outcome.unexpected_keys):
        raise UserError(
            f"model.lora.init: {file} does not fit model.lora.targets: {len(missing)} adapter weights are not in it and "
            f"{len(outcome.unexpected_keys)} of its weights have no adapter"
        )
