"""Adapting error messages and interruptions for calls from Python instead of the command line."""

import functools
import inspect
import os
import re
import signal
from collections.abc import Callable, Collection
from typing import ParamSpec, TypeVar

from pcpo_fast.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

_OPTION = re.compile(r"`[^`]*`|--([a-z][a-z-]+)(?: (?=[A-Z]{2,}|auto\b|never\b|accept-changes\b|base\b|runs/))?")


def for_python(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function for notebooks and scripts: errors mention arguments instead of command-line options, and a run
    that was stopped cleanly by a signal raises what Python raises for that signal.
    """

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        # transformers reports missing optional packages at import; they do not matter here.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        try:
            return function(*args, **kwargs)
        except UserError as error:
            error.args = (in_python(str(error), inspect.signature(function).parameters),)
            raise
        except BaseException as stopped:
            from pcpo_fast.comparison.scheduling import Interrupted
            from pcpo_fast.distributed.preemption import Stopped

            if isinstance(stopped, Stopped) and stopped.number == signal.SIGTERM:
                raise SystemExit(stopped.exit_code) from None
            if isinstance(stopped, Stopped | Interrupted):
                raise KeyboardInterrupt(f"{stopped}; the same call resumes") from None
            raise

    return called


def in_python(message: str, arguments: Collection[str]) -> str:
    """Rewrite ``--batch-size: ...`` as ``batch_size: ...``, and ``--resume auto`` as ``resume=auto``.

    Args:
        message: message of a command.
        arguments: names of the function's arguments; the argument of a repeatable option is its plural.
    """

    def argument(option: re.Match[str]) -> str:
        if option[1] is None:  # a command to be run in a shell
            return option[0]
        name = option[1].replace("-", "_").replace("guidance_scale_reward", "scale")
        name = f"{name}s" if f"{name}s" in arguments else name
        return f"{name}=" if option[0].endswith(" ") else name

    return _OPTION.sub(argument, message).replace("command line (", "setting (")
