"""Users' own rewards, given as ``module:attribute``."""

import asyncio
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pcpo_fast.errors import UserError
from pcpo_fast.rewards.sources import note_source, note_text

USERS_ERRORS = (Exception, SystemExit, asyncio.CancelledError)
"""What users' code raises when it fails. The last two would otherwise end the run without a word; an interrupt is none
of them."""


def import_target(target: str) -> Callable[..., Any]:
    """Import ``module:attribute``, for example ``my_rewards:redness`` or ``package.module:Class``.

    The working directory is searched after the installed packages, so a file in it is enough.

    Raises:
        UserError: the name is malformed, the module is missing or fails to import, or the attribute is missing or
            not callable.
    """
    module_name, _, path = target.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise UserError(
            f"reward {target!r} is not of the form module:function, for example my_rewards:redness{_of_file(target)}"
        )
    found: Any = _import(module_name, target)
    file, module = getattr(found, "__file__", None), found
    if file is not None and not module_name.startswith("pcpo_fast."):
        note_source(f"module {module_name}", Path(file))
    where = f"module {module_name} ({getattr(found, '__file__', None) or 'a folder without __init__.py'})"
    for part in path.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, [name for name in dir(found) if name[0] != "_"], n=1, cutoff=0.5)
            suggestion = f", did you mean {close[0]}?" if close else ""
            raise UserError(f"reward {target}: {where} has no {part}{suggestion}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"reward {target}: {path} in {where} is not callable but of type {type(found).__name__}")
    if file is None and isinstance(module, ModuleType):
        note_text(f"module {module_name}", path, _code_of(found))
    return found  # type: ignore[no-any-return]


def name_of(reward: Callable[..., Any]) -> str:
    """The ``module:attribute`` of a function or class, for use in a configuration.

    Raises:
        UserError: it cannot be imported by that name: it is a lambda, an instance, or defined inside a function.
    """
    module, path = getattr(reward, "__module__", ""), getattr(reward, "__qualname__", "")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if found is not reward:
        raise UserError(
            f"reward {path or repr(reward)}: must be a function or a class at the top level of a module, script or "
            "notebook, where the configuration can name it"
        )
    return f"{module}:{path}"


def first_line(error: BaseException) -> str:
    """An exception as one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _code_of(target: Any) -> str:
    """The source code of a function, or of a class's functions, in a module without a file: that of a notebook."""
    parts = [one for one in vars(target).values() if inspect.isfunction(one)] if isinstance(target, type) else [target]
    try:
        return "\n".join(map(inspect.getsource, parts))
    except (OSError, TypeError):
        return ""


def _of_file(target: str) -> str:
    """A suggestion for a reward that is given as a file (``folder/my_rewards.py:redness``); empty for others."""
    file, _, path = target.partition(":")
    parts = file.removesuffix(".py").removeprefix("./").split("/")
    good = file.endswith(".py") and all(part.isidentifier() for part in (*parts, *path.split(".")))
    return f", did you mean {'.'.join(parts)}:{path}?" if good else ""


def _import(module_name: str, target: str) -> Any:
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
    try:
        # Otherwise a module file written recently might not be found.
        importlib.invalidate_caches()
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise UserError(
                f"reward {target}: there is no module {missing} in {folder} or among the installed packages"
                f"{_of_file(target)}"
            ) from None
        reason = f"needs {missing}, which is not installed" if missing else f"cannot be imported: {first_line(error)}"
        raise UserError(f"reward {target}: module {module_name} {reason}") from error
    except UserError:
        raise
    except USERS_ERRORS as error:
        raise UserError(f"reward {target}: module {module_name} cannot be imported: {first_line(error)}") from error
