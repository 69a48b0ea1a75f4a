"""Checks of reward options, before a model is loaded."""

from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from pcpo_fast.errors import UserError


def checked_option(reward: str, option: str, value: object, kind: Any, allowed: str) -> Any:
    """Check an option's value and return it.

    Args:
        reward, option, value: the reward, the option and its value.
        kind: a pydantic type such as ``PositiveInt``; only integers are converted, to floats.
        allowed: description of valid values for the message, such as "a finite number".

    Raises:
        UserError: the value is not of that kind.
    """
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        raise UserError(f"reward {reward}: option {option} must be {allowed}, got {value!r}") from None


def checked_device(where: str, name: str) -> torch.device:
    """The device with this name; a GPU always with its index.

    Raises:
        UserError: this machine does not have it; ``where`` is the prefix of the message.
    """
    try:
        found = torch.device(name)
        if found.type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError):
        have = f"cpu, cuda:0 to cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "cpu"
        raise UserError(f"{where}: there is no device {name!r} here; available: {have}") from None
    return torch.device("cuda", torch.cuda.current_device()) if str(found) == "cuda" else found
