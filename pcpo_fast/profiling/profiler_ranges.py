"""Named ranges of a run for the profiler; nearly free when no profile is being recorded."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, Protocol, TypeVar, get_args

Name = Literal[
    "epoch",
    "rollout",
    "candidates",
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
"""The names that :func:`named` accepts, from the outermost to the innermost."""

Item = TypeVar("Item")
NOTHING: AbstractContextManager[None] = nullcontext()


class Listener(Protocol):
    """Is notified when a range begins and ends."""

    def begin(self, name: Name) -> None: ...

    def end(self, name: Name) -> None: ...


_listener: Listener | None = None


def named(name: Name) -> AbstractContextManager[None]:
    """Mark the block as a range; without a listener this costs one function call."""
    return NOTHING if _listener is None else _told(_listener, name)


def each(name: Name, items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items; each iteration of the consuming loop is a range."""
    for item in items:
        with named(name):
            yield item


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Notify the listener of all ranges of this process within the block.

    Raises:
        RuntimeError: there already is a listener.
    """
    global _listener
    if _listener is not None:
        raise RuntimeError("ranges already have a listener")
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
