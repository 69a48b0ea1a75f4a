"""Options of rewards, checked before a model is loaded."""

from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from pcpo_fast.errors import UserError


def checked_option(reward: str, option: str, value: object, kind: Any, allowed: str) -> Any:
    """An option's value.

    Args:
        reward, option, value: what was given.
        kind: a type that pydantic knows, such as ``PositiveInt``; only integers are converted, to floats.
        allowed: what the option may be, for the message: "a finite number".

    Raises:
        UserError: the value is not of that kind.
    """
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        raise UserError(f"reward {reward}: option {option} must be {allowed}, got {value!r}") from None


def checked_device(where: str, name: str) -> torch.device:
    """The device of that name, a GPU with its number.

    Raises:
        UserError: there is none on this machine; ``where`` begins the message.
    """
    try:
        found = torch.device(name)
        if found.type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError):
        have = f"cpu, cuda:0 to cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "cpu"
        raise UserError(f"{where}: there is no device {name!r} here; allowed are {have}") from None
    return torch.device("cuda", torch.cuda.current_device()) if str(found) == "cuda" else found
