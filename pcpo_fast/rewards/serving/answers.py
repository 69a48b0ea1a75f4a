"""Answers by request identifier: a repeated request gets the same answer and is not scored again."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable


class IdentifierReused(Exception):
    """The identifier was used for another request."""


class Answers:
    """Remembers the latest answers and the requests in progress.

    Args:
        kept: number of finished answers to remember; each is a list of scores.
    """

    def __init__(self, kept: int = 4096) -> None:
        self._kept = kept
        self._known: OrderedDict[str, tuple[bytes, asyncio.Future[list[float]]]] = OrderedDict()

    async def of(self, name: str, body: bytes, score: "Callable[[], asyncio.Future[list[float]]]") -> list[float]:
        """The scores of a request: known or in progress for the same identifier, or newly computed.

        Args:
            name: the request's identifier.
            body: the request's body.
            score: starts scoring.

        Raises:
            IdentifierReused: the identifier was used with another body.
            Exception: the error of scoring; failures are not remembered, so a repeated request is tried again.
        """
        digest = (await asyncio.to_thread(hashlib.sha256, body)).digest()
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = (digest, score())
            known[1].add_done_callback(lambda done: self._finished(name, done))
        if known[0] != digest:
            raise IdentifierReused(f"the request identifier {name} was used for another request")
        # If a client disconnects, its cancellation must not reach the request that repeats the question.
        return await asyncio.shield(known[1])

    def _finished(self, name: str, done: "asyncio.Future[list[float]]") -> None:
        if done.cancelled() or done.exception() is not None:
            self._known.pop(name, None)
            return
        self._known.move_to_end(name)
        while len(self._known) > self._kept and next(iter(self._known.values()))[1].done():
            self._known.popitem(last=False)
