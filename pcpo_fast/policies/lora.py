"""LoRA adapters through peft, with the mistakes caught that peft lets pass."""

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


def add_lora(module: nn.Module, settings: LoraConfig, targets: Sequence[str]) -> None:
    """Freeze ``module`` and add trainable adapters to every linear layer whose name ends in a target.

    Raises:
        UserError: a target matches no module.
    """
    names = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(f"model.lora.targets: {target} matches no linear layer of {type(module).__name__}")
    module.requires_grad_(False)
    adapted: Any = module
    adapted.add_adapter(
        PeftLoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(targets),
            init_lora_weights="gaussian",
        )
    )


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Within the block the adapters of ``module`` take no part in its forward.

    Nothing but a flag of each layer changes: peft's own switch also turns ``requires_grad`` off and on, which the hooks
    of a distributed engine need not survive.

    Raises:
        ValueError: the module has no adapters.
    """
    layers: list[Any] = [child for child in module.modules() if isinstance(child, BaseTunerLayer)]
    if not layers:
        raise ValueError(f"{type(module).__name__} has no adapters to switch off")
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def load_lora(module: nn.Module, path: str, pipeline_class: Any, part: str, key: str = "model.lora.init") -> None:
    """Fill existing adapters from LoRA weights in diffusers' format.

    Args:
        module: a model with adapters.
        path: a safetensors file, or a folder that holds ``pytorch_lora_weights.safetensors``.
        pipeline_class: the diffusers pipeline whose loader reads the file.
        part: the pipeline's part that ``module`` is.
        key: what named the path, for the messages.

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
        outcome = set_peft_model_state_dict(module, weights)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{key}: {file} does not fit model.lora (rank, targets): {reason}") from None
    missing = [name for name in (outcome.missing_keys if outcome else []) if "lora_" in name]
    if missing or (outcome and outcome.unexpected_keys):
        raise UserError(
            f"{key}: {file} does not fit model.lora.targets: {len(missing)} adapter weights are not in it and "
            f"{len(outcome.unexpected_keys)} of its weights have no adapter"
        )
    alpha, here = (metadata or {}).get(f"{part}.lora_alpha"), cast(Any, module).peft_config["default"].lora_alpha
    if alpha is not None and float(alpha) != float(here):
        raise UserError(f"{key}: {file} was made with alpha {alpha}, but model.lora.alpha is {here}")
