"""Keys and passwords in a reward's options: read from environment variables, so that they are never stored.

Options are written into the run directory's ``config.yaml`` and from there into reports; on a command line, other users
of the machine can see them. An option that needs a secret is therefore written ``{env: NAME}`` and gets the variable's
value when the reward is created.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

from pcpo_fast.errors import UserError

_SECRET = re.compile(
    r"(.*[_-])?(api[_-]?key|(access|secret|private)[_-]key|secret|password|passwd|passphrase|authorization|credentials?)"
    r"|((auth|access|api|bearer|hf|session)[_-])?token",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"://[^/\s@]*:[^/\s@]+@")
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def resolved(reward: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with environment variables replaced by their values.

    Args:
        reward: name of the reward, for error messages.
        options: the options in the configuration.

    Raises:
        UserError: a variable is not set, or an option itself looks like a secret.
    """
    return {name: _value(reward, (name,), value) for name, value in options.items()}


def shown(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options for an error message, with possible secrets hidden."""
    hidden = ("key", "token", "secret", "pass", "credential")
    return {
        name: "***" if isinstance(value, str) and any(word in str(name).lower() for word in hidden) else value
        for name, value in options.items()
    }


def _value(reward: str, path: tuple[str, ...], value: Any) -> Any:
    name = ".".join(path)
    if isinstance(value, Mapping):
        if set(value) == {"env"} and isinstance(value["env"], str) and _VARIABLE.fullmatch(value["env"]):
            found = os.environ.get(value["env"], "")
            if not found:
                raise UserError(
                    f"reward {reward}: option {name} comes from the environment variable {value['env']}, which "
                    "is not set"
                )
            return found
        return {key: _value(reward, (*path, str(key)), inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_value(reward, path, inner) for inner in value]
    if isinstance(value, str) and value:
        what = "looks like a secret" if _SECRET.fullmatch(path[-1]) else ""
        if ":" in reward and _IN_URL.search(value):  # the built-in clients have their own check
            what = "has a password in its address"
        if what:
            raise UserError(
                f"reward {reward}: option {name} {what}, and options are written into the run directory; put it into "
                f"an environment variable and name that: {path[-1]}: {{env: NAME}}"
            )
    return value
