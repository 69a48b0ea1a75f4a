"""The reward server's HTTP application: authorization, limits and responses."""

import asyncio
import hmac
import re
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.rewards.serving.answers import Answers, IdentifierReused
from pcpo_fast.rewards.serving.batching import BatchQueue
from pcpo_fast.rewards.serving.wire import CONTENT_TYPE, PROTOCOL, unpack


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        most_images: maximum number of images per request.
        most_bytes: maximum size of a request's body.
        most_waiting_bytes: maximum size of all bodies that are being received, waiting or being scored; beyond it
            requests are answered with 503.
        body_seconds: time limit for receiving a body.
    """

    most_images: int = 64
    most_bytes: int = 256 * 2**20
    most_waiting_bytes: int = 2**30
    body_seconds: float = 60.0


class RewardServer:
    """The routes and their state.

    Args:
        name: name of the reward.
        work: the queue that scores batches.
        limits: limits of requests.
        token: the required bearer token; None: no authorization.
    """

    def __init__(self, name: str, work: BatchQueue, limits: Limits, token: str | None) -> None:
        self.name, self.work, self.limits = name, work, limits
        self.answers = Answers()
        self.waiting_bytes = 0
        self._expected = None if token is None else f"Bearer {token}".encode()
        self.app = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/reward", self.information),
                Route("/v1/score", self.score, methods=["POST"]),
            ],
            exception_handlers={HTTPException: _refusal},
        )

    async def health(self, request: Request) -> Response:
        """Health check; needs no token."""
        return JSONResponse({"status": "ok"})

    async def information(self, request: Request) -> Response:
        """The served reward, its limits, and counters."""
        self._check_token(request)
        return JSONResponse(
            {
                "protocol": PROTOCOL,
                "reward": self.name,
                "scores_predictions": self.work.scores_predictions,
                "most_images": self.limits.most_images,
                "most_bytes": self.limits.most_bytes,
                "images_scored": self.work.images_scored,
                "calls": self.work.calls,
            }
        )

    async def score(self, request: Request) -> Response:
        """Scores of the images in the body, in order."""
        self._check_token(request)
        if request.headers.get("content-type") != CONTENT_TYPE:
            raise HTTPException(415, f"the content type must be {CONTENT_TYPE}")
        name = request.headers.get("x-request-id", "")
        if not re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII):
            raise HTTPException(400, "X-Request-Id must be 1 to 64 letters, digits, '.', '_' or '-'")
        length = self._length(request)
        self.waiting_bytes += length
        try:
            body = await self._body(request, length)
            scores = await self.answers.of(name, body, lambda: self._begin(body))
        except IdentifierReused as error:
            raise HTTPException(409, str(error)) from None
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        except UserError as error:
            raise HTTPException(422, str(error)) from None
        finally:
            self.waiting_bytes -= length
        return JSONResponse({"request": name, "scores": scores})

    def _begin(self, body: bytes) -> "asyncio.Future[list[float]]":
        return asyncio.wrap_future(self.work.submit(unpack(body, self.limits.most_images)))

    def _check_token(self, request: Request) -> None:
        if self._expected is not None:
            given = request.headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, self._expected):
                raise HTTPException(401, "the token is wrong or missing", {"WWW-Authenticate": "Bearer"})

    def _length(self, request: Request) -> int:
        text = request.headers.get("content-length", "")
        if not text.isdecimal():
            raise HTTPException(411, "the request must have a Content-Length")
        if int(text) > self.limits.most_bytes:
            raise HTTPException(
                413, f"a body of {counted(int(text), 'byte')}, but at most {self.limits.most_bytes} are allowed"
            )
        if self.waiting_bytes + int(text) > self.limits.most_waiting_bytes and self.waiting_bytes:
            raise HTTPException(503, "too many requests are waiting", {"Retry-After": "1"})
        return int(text)

    async def _body(self, request: Request, length: int) -> bytes:
        parts = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    parts += part
                    if len(parts) > length:
                        raise HTTPException(400, "the body is longer than its Content-Length")
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {self.limits.body_seconds:g} s") from None
        except ClientDisconnect:
            raise HTTPException(400, "the client has disconnected") from None
        return bytes(parts)


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    # Close the connection: the unread rest of the body would be taken for the next request.
    headers = {**(error.headers or {}), "Connection": "close"}
    return JSONResponse({"error": error.detail}, error.status_code, headers)
