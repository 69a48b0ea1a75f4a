"""Named stretches of a run, for a profile: nothing where none is being made."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, Protocol, TypeVar, get_args

Name = Literal[
    "epoch",
    "rollout",
    "batch",
    "sampler step",
    "decode",
    "reward",
    "update",
    "micro-step",
    "forward",
    "loss",
    "backward",
    "optimizer",
    "evaluation",
    "checkpoint",
]
NAMES: tuple[str, ...] = get_args(Name)
"""What :func:`named` takes, from the outside in."""

Item = TypeVar("Item")
NOTHING: AbstractContextManager[None] = nullcontext()


class Listener(Protocol):
    """What is told where ranges begin and end."""

    def begin(self, name: Name) -> None: ...

    def end(self, name: Name) -> None: ...


_listener: Listener | None = None


def named(name: Name) -> AbstractContextManager[None]:
    """The block is a range of this name; where nobody listens it costs a function call."""
    return NOTHING if _listener is None else _told(_listener, name)


def each(name: Name, items: Iterable[Item]) -> Iterator[Item]:
    """The items; what the loop does with one of them is a range of this name."""
    for item in items:
        with named(name):
            yield item


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block the listener is told of every range of this process.

    Raises:
        RuntimeError: somebody listens already.
    """
    global _listener
    if _listener is not None:
        raise RuntimeError("ranges have a listener already")
    _listener = listener
    try:
        yield
    finally:
        _listener = None


@contextmanager
def _told(listener: Listener, name: Name) -> Iterator[None]:
    listener.begin(name)
    try:
        yield
    finally:
        listener.end(name)
