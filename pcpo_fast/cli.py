"""The command line ``pcpo-fast COMMAND``: user errors end with one sentence and exit code 2, without a traceback."""

import argparse
import atexit
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NoReturn, TextIO

from pcpo_fast import __version__
from pcpo_fast.commands import (
    compare,
    configs,
    credit,
    evaluate,
    export,
    first_difference,
    plan,
    preflight,
    report,
    reproduce,
    sample,
    serve_reward,
    step_gradients,
    train,
    votes,
)
from pcpo_fast.distributed.launching import adopt_launch
from pcpo_fast.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError

COMMANDS = (
    train,
    configs,
    plan,
    preflight,
    reproduce,
    sample,
    evaluate,
    votes,
    compare,
    credit,
    step_gradients,
    first_difference,
    report,
    export,
    serve_reward,
)
NEEDED = ("deepspeed", "diffusers", "numpy", "peft", "pydantic", "rich", "safetensors", "torch", "transformers", "yaml")
"""Packages that the commands import; if one is missing, this is not the Python that the project was installed into."""


class Parser(argparse.ArgumentParser):
    """Reports errors like the rest of the program, and does not accept abbreviated options.

    Attributes:
        commands: parsers of its commands, by name.
    """

    commands: Mapping[str, argparse.ArgumentParser] = MappingProxyType({})

    def __init__(self, **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter  # keeps the lines of examples
        super().__init__(**{"allow_abbrev": False, "formatter_class": formatter, **options})
        for kind in (int, float):
            self.register("type", kind, _number(kind))

    def error(self, message: str) -> NoReturn:
        """Exit with one sentence, which suggests what a misspelt choice was meant to be."""
        choice = re.fullmatch(r"(.*invalid choice: '(.*)') (\(choose from (.*)\))", message, re.DOTALL)
        if choice is not None:
            from pcpo_fast.config.messages import did_you_mean

            said, word, allowed, names = choice.groups()
            hint = did_you_mean(word, re.findall(r"[\w.-]+", names))
            message = f"{said}{hint} {allowed}"
        self.exit(EXIT_USER_ERROR, f"error: {message} (see {self.prog} --help)\n")


def _number(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Parse numbers as in configurations, without Python's ``0_7`` (read as 7) and ``0123`` (read as 123)."""

    def read(text: str) -> float:
        if "_" in text or re.match(r"[-+]?0\d", text.strip()):
            raise ValueError(text)
        return kind(text)

    return read


def build_parser() -> Parser:
    """The parser with all commands."""
    parser = Parser(
        prog="pcpo-fast",
        description="Align text-to-image models with rewards: proportionate credit, fused kernels, DeepSpeed.",
        epilog="example:\n  pcpo-fast train            the demo: tiny FLUX on a CPU, in about two minutes",
    )
    parser.add_argument("--version", action="version", version=f"pcpo-fast {__version__}")
    # `deepspeed --module pcpo_fast COMMAND` puts this before the command; the actual rank is in the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    parser.commands = commands.choices
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; settings (``key=value``) may appear anywhere among the options."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    takes_settings = hasattr(arguments, "settings")
    if takes_settings:
        # argparse accepts only one contiguous group of settings, and returns those after the next option as unknown.
        arguments.settings += [text for text in rest if not text.startswith("-")]
        rest = [text for text in rest if text.startswith("-")]
    if rest:
        words = list(sys.argv[1:] if argv is None else argv)
        following = words[words.index(rest[0]) + 1 :][:1]
        command = parser.commands[next(word for word in words if word in parser.commands)]
        hint = _as_setting(rest[0], following) if takes_settings else ""
        command.error(f"unknown arguments: {' '.join(rest)}{hint or _as_option(rest[0], command)}")
    for name, value in vars(arguments).items():
        if isinstance(value, str) and value.startswith("~/"):  # as in --config=~/run.yaml, which shells do not expand
            setattr(arguments, name, os.path.expanduser(value))
    return arguments


def _as_option(option: str, command: argparse.ArgumentParser) -> str:
    """A hint for a misspelt option, or for a setting that is misspelt and written as one."""
    from pcpo_fast.config.messages import close_settings, did_you_mean

    name = option.partition("=")[0]
    hint = did_you_mean(name, re.findall(r"--[\w-]+", command.format_usage()))
    if not hint and "key.subkey=value" in command.format_usage():
        found = close_settings(name.lstrip("-").replace("-", "_"))
        hint = f"; a setting is written {found[0]}=VALUE" if found else ""
    return hint


def _as_setting(option: str, following: list[str]) -> str:
    """A hint for a setting that was written as an option, such as ``--deepspeed FILE`` in other trainers."""
    from pcpo_fast.config.messages import dotted_keys
    from pcpo_fast.config.schema import Config

    name, _, value = option.lstrip("-").partition("=")
    name = name.replace("-", "_").replace("deepspeed_config", "deepspeed")
    found = [key for key in dotted_keys(Config) if name in (key, key.rpartition(".")[2])]
    value = value or "".join(word for word in following if not word.startswith("-") and "=" not in word) or "VALUE"
    return f"; a setting is written {found[0]}={value}" if found else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = parse(argv)
    # transformers reports missing optional packages at import; they do not matter here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    ranks = 1
    try:
        with _short_messages():
            if getattr(arguments, "local_rank", None) is not None:  # commands that a launcher may start
                ranks = adopt_launch()
            code = int(arguments.run(arguments))
            sys.stdout.flush()
            return code
    except UserError as error:
        if ranks > 1:
            from pcpo_fast.distributed.rendezvous import heard

            with heard(error) as sentence:
                if sentence is not None:
                    print(f"error: {sentence}", file=sys.stderr, flush=True)
        else:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        print(
            f"error: {error.name} is not installed for {sys.executable}: activate the environment that pcpo_fast was "
            "installed into (source .venv/bin/activate), or install it there (make install)",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has closed it (``| head``); flushing at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A full disk or missing permission: a problem of the machine, not of the program.
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {where}{os.strerror(error.errno)}", file=sys.stderr)
        return EXIT_USER_ERROR


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code."""
    end = _End()
    # The first registered handler runs last, after those of the libraries.
    atexit.register(end.leave_threads)
    try:
        end.code = main(argv)
    except Exception as error:
        print(f"error: {_report_bug(error)}", file=sys.stderr)
    sys.exit(end.code)


def _report_bug(error: Exception) -> str:
    """Write the traceback of an unexpected error to a file; returns one sentence about it."""
    import tempfile
    import traceback

    summary = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if os.environ.get("WORLD_SIZE", "1") != "1":
        summary = f"rank {os.environ.get('RANK', '?')}: {summary}"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="pcpo-fast-", suffix=".txt", delete=False) as file:
            file.write(f"pcpo-fast {__version__}, Python {sys.version}\n{sys.argv}\n\n")
            traceback.print_exception(error, file=file)
    except OSError:
        traceback.print_exception(error)
        return summary
    return f"{summary} (a bug in pcpo-fast; please report it with the traceback in {file.name})"


class _End:
    """Ends the process if threads are left, such as a running reward or the watchdog after a run was stopped.

    A thread that returns from C++ while Python shuts down would abort the process and change its exit code.
    """

    code = 1

    def leave_threads(self) -> None:
        if threading.active_count() > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.code)


@contextmanager
def _short_messages() -> Iterator[None]:
    """Print warnings, and I/O errors of threads, on one line each; hide deprecation warnings of libraries."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, DeprecationWarning | PendingDeprecationWarning | FutureWarning):
            print("warning:", " ".join(str(message).split()), file=sys.stderr)

    def show_in_thread(thrown: threading.ExceptHookArgs) -> None:
        if isinstance(thrown.exc_value, OSError):  # for example TensorBoard's writer thread on a full disk
            print(f"warning: {thrown.exc_value}", file=sys.stderr)
        else:
            threading.__excepthook__(thrown)

    before = threading.excepthook
    threading.excepthook = show_in_thread
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        threading.excepthook = before


if __name__ == "__main__":
    program()
