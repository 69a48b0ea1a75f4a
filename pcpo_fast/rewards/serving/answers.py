"""Answers by the identifier of their request: a request that is repeated is answered again, not scored again."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable


class IdentifierReused(Exception):
    """The identifier belongs to another request."""


class Answers:
    """Remembers the latest answers, and the requests that are being worked on.

    Args:
        kept: finished answers remembered; a list of scores each.
    """

    def __init__(self, kept: int = 4096) -> None:
        self._kept = kept
        self._known: OrderedDict[str, tuple[bytes, asyncio.Future[list[float]]]] = OrderedDict()

    async def of(self, name: str, body: bytes, score: "Callable[[], asyncio.Future[list[float]]]") -> list[float]:
        """The scores of a request: those under way or given for the same identifier, or new ones.

        Args:
            name: the request's identifier.
            body: what it holds.
            score: begins the work.

        Raises:
            IdentifierReused: the identifier was used for another body.
            Exception: what the work raises; a failure is not remembered, so a repeated request is tried again.
        """
        digest = (await asyncio.to_thread(hashlib.sha256, body)).digest()
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = (digest, score())
            known[1].add_done_callback(lambda done: self._finished(name, done))
        if known[0] != digest:
            raise IdentifierReused(f"the request identifier {name} was used for another request")
        # A client that hangs up must not take the answer from the one that asks again.
        return await asyncio.shield(known[1])

    def _finished(self, name: str, done: "asyncio.Future[list[float]]") -> None:
        if done.cancelled() or done.exception() is not None:
            self._known.pop(name, None)
            return
        self._known.move_to_end(name)
        while len(self._known) > self._kept and next(iter(self._known.values()))[1].done():
            self._known.popitem(last=False)
