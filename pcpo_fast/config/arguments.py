"""Checks of arguments, which error messages call by their option on the command line."""

from collections.abc import Mapping, Sequence

from pcpo_fast.config.messages import did_you_mean
from pcpo_fast.errors import UserError


def check_least(least: int, **numbers: int | None) -> None:
    """Check that arguments are at least ``least``; None means not given.

    Raises:
        UserError: one is smaller.
    """
    for name, number in numbers.items():
        if number is not None and number < least:
            raise UserError(f"--{name.replace('_', '-')}: must be at least {least}, got {number}")


def check_choice(allowed: Sequence[str], **words: str | None) -> None:
    """Check that arguments are among ``allowed``; None means not given.

    Raises:
        UserError: one is not.
    """
    for name, word in words.items():
        if word is not None and word not in allowed:
            hint = did_you_mean(word, allowed)
            raise UserError(f"--{name}: must be one of {', '.join(allowed)}, got {word!r}{hint}")


def check_idle(reason: str, idle: Mapping[str, object]) -> None:
    """Check that no argument is given that would have no effect; empty values are not given.

    Raises:
        UserError: one is.
    """
    for name, value in idle.items():
        if value:
            option = name if "=" in name else f"--{name}"
            raise UserError(f"{reason}, so it cannot be combined with {option}")


def check_seed(seed: int) -> None:
    """Check that a seed is in the range of the random generators.

    Raises:
        UserError: it is not.
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed: must be between 0 and 2^63 - 1, got {seed}")
