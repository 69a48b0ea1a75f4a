"""The command line: ``pcpo-fast COMMAND``; a user's mistake is one sentence and exit code 2, never a traceback."""

import argparse
import atexit
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from pcpo_fast import __version__
from pcpo_fast.commands import (
    compare,
    configs,
    credit,
    evaluate,
    export,
    plan,
    preflight,
    report,
    reproduce,
    sample,
    serve_reward,
    train,
    votes,
)
from pcpo_fast.distributed.launching import adopt_launch
from pcpo_fast.errors import UserError

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
    report,
    export,
    serve_reward,
)
NEEDED = ("deepspeed", "diffusers", "numpy", "peft", "pydantic", "rich", "safetensors", "torch", "transformers", "yaml")
"""What commands import: without one of them, Python is another than the project was installed for."""
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Says what is wrong in the same way as the rest of the program, and takes options by their whole name only."""

    def __init__(self, **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter  # keeps the lines of examples
        super().__init__(**{"allow_abbrev": False, "formatter_class": formatter, **options})
        for kind in (int, float):
            self.register("type", kind, _number(kind))

    def error(self, message: str) -> NoReturn:
        """Leave with one sentence."""
        self.exit(EXIT_USER_ERROR, f"error: {message} ({self.prog} --help shows what it takes)\n")


def _number(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Numbers as configurations take them: Python would read ``0_7`` as 7, and ``0123`` as 123."""

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
    # `deepspeed --module pcpo_fast COMMAND` puts it before the command; the rank that counts is in the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; settings (``key=value``) may stand anywhere among the options."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    takes_settings = hasattr(arguments, "settings")
    if takes_settings:
        # argparse takes one run of settings only, and returns those behind the next option as unknown.
        arguments.settings += [text for text in rest if not text.startswith("-")]
        rest = [text for text in rest if text.startswith("-")]
    if rest:
        words = list(sys.argv[1:] if argv is None else argv)
        following = words[words.index(rest[0]) + 1 :][:1]
        hint = _as_setting(rest[0], following) if takes_settings else ""
        parser.error(f"unknown arguments: {' '.join(rest)}{hint}")
    for name, value in vars(arguments).items():
        if isinstance(value, str) and value.startswith("~/"):  # as in --config=~/run.yaml, which shells leave alone
            setattr(arguments, name, os.path.expanduser(value))
    return arguments


def _as_setting(option: str, following: list[str]) -> str:
    """A hint for a setting that is written as an option; other trainers take ``--deepspeed FILE``."""
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
    # transformers reports at import what it does without; none of it concerns this program.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    ranks = 1
    try:
        with _short_messages():
            if getattr(arguments, "local_rank", None) is not None:  # of a command that a launcher may start
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
        # The reader of our output has gone (``| head``): no more to say, and nothing to flush into.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A full disk, a folder without permission: the machine's state, not a fault of the program.
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {where}{os.strerror(error.errno)}", file=sys.stderr)
        return EXIT_USER_ERROR


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command, and end the process with its exit code."""
    end = _End()
    # What is registered first runs last: after what libraries have to finish.
    atexit.register(end.leave_threads)
    try:
        end.code = main(argv)
    except Exception as error:
        print(f"error: {_last_resort(error)}", file=sys.stderr)
    sys.exit(end.code)


def _last_resort(error: Exception) -> str:
    """One sentence on a fault of the program's own, whose traceback goes into a file."""
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
    return f"{summary} (a fault of pcpo-fast, not of yours: the traceback is in {file.name}; please report it)"


class _End:
    """The end of the process. A run that is stopped leaves threads behind: a reward at work, the ranks' watchdog.

    One that comes back from C++ while Python is being taken down would abort the process, whatever its exit code was.
    """

    code = 1

    def leave_threads(self) -> None:
        if threading.active_count() > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.code)


@contextmanager
def _short_messages() -> Iterator[None]:
    """Warnings, and threads that cannot write, in one line each; libraries' notes to developers not at all."""

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
        if isinstance(thrown.exc_value, OSError):  # TensorBoard writes from a thread of its own, and the disk is full
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
