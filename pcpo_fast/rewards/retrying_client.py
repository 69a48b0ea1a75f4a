"""An HTTP client that retries while a server restarts, and fails with one sentence if it stays unreachable."""

import asyncio
import os
import random
import threading
import time
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

from pydantic import NonNegativeInt, PositiveFloat
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt

from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.rewards.failures import RewardFailure
from pcpo_fast.rewards.options import checked_option

# Status codes worth a retry; those from 520 come from proxies in front of hosted services.
_BUSY = (408, 425, 429, 500, 502, 503, 504, *range(520, 530))
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 20.0  # seconds


class _UnavailableError(Exception):
    """The server is unreachable or busy, and wants to be left alone for `wanted` seconds."""

    def __init__(self, problem: str, wanted: float = 0.0) -> None:
        super().__init__(problem)
        self.wanted = wanted


class RetryingClient:
    """Requests to one server, retried with growing pauses while it is unreachable or busy. Thread-safe.

    The pauses double from 0.25 s to at most 20 s, each shortened randomly by up to a quarter so that many ranks do not
    retry simultaneously; 16 retries are about three and a half minutes. A server may request a longer pause
    (Retry-After).

    Args:
        name: name of the reward in error messages.
        url: http:// or https:// address; paths of requests are appended.
        key_variable: environment variable with the token, sent as ``Authorization: Bearer``; if unset, none is sent.
        timeout: time limit of each complete answer in seconds, including the connection.
        retries: further attempts after the first.

    Raises:
        UserError: the URL is invalid or contains a password.
    """

    def __init__(self, name: str, url: str, *, key_variable: str, timeout: float, retries: int) -> None:
        import httpx2

        self.name, self.url, self.key_variable, self.retries = name, url.rstrip("/"), key_variable, retries
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"reward {name}: url must be like http://host:8765, got {url!r}")
        if parts.username or parts.password:
            raise UserError(
                f"reward {name}: url must not hold a user name or password; put the token into the environment "
                f"variable {key_variable}"
            )
        checked_option(name, "timeout", timeout, PositiveFloat, "a number of seconds above 0")
        checked_option(name, "retries", retries, NonNegativeInt, "an integer of at least 0")
        key = os.environ.get(key_variable, "").strip()
        self._timeout = timeout
        self._client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0)),
            limits=httpx2.Limits(max_keepalive_connections=0),  # a restarted server would leave stale connections
            follow_redirects=False,  # the token and the images must only go to this address
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # Ignore proxy settings of the environment for this machine.
            trust_env=parts.hostname not in ("localhost", "127.0.0.1", "::1"),
        )
        # In a separate thread, because the caller's thread may already run a loop, as in a notebook.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="reward client").start()
        self._has_key = bool(key)
        # Not the global generator, which a reward may use.
        self._random = random.Random()

    def request(
        self, method: str, path: str, *, content: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Any:
        """Send a request and return the JSON of the answer.

        Raises:
            RewardFailure: the server remains unreachable or busy (with ``retry`` False, since a smaller batch does not
                help), or rejects this request (the message quotes it).
            UserError: the token is refused, or the address does not exist.
        """
        begin = time.monotonic()
        attempts = Retrying(
            retry=retry_if_exception_type(_UnavailableError),
            stop=stop_after_attempt(self.retries + 1),
            wait=self._pause,
            before_sleep=self._warn,
            reraise=True,
        )
        try:
            return self._read(attempts(self._attempt, method, path, content, headers))
        except _UnavailableError as problem:
            seconds = time.monotonic() - begin
            raise RewardFailure(
                f"reward {self.name}: {self.url} {problem}, in {counted(self.retries + 1, 'attempt')} over "
                f"{seconds:.0f} s; start the server again and resume the run, or raise the reward's option retries",
                retry=False,
            ) from None

    def _attempt(self, method: str, path: str, content: bytes | None, headers: Mapping[str, str] | None) -> Any:
        """The server's answer, or an :class:`_UnavailableError`."""
        import httpx2

        async def ask() -> Any:
            # httpx only limits single reads, so a server that sends one byte at a time would never time out.
            async with asyncio.timeout(self._timeout):
                return await self._client.request(method, self.url + path, content=content, headers=dict(headers or {}))

        try:
            answer = asyncio.run_coroutine_threadsafe(ask(), self._loop).result()
        except (TimeoutError, httpx2.TimeoutException):
            raise _UnavailableError(f"does not answer within {self._timeout:g} s") from None
        except httpx2.DecodingError as error:
            raise _UnavailableError(f"sends an answer that cannot be decoded ({reason_of(error)})") from None
        except (httpx2.TransportError, OSError) as error:
            raise _UnavailableError(f"cannot be reached ({reason_of(error)})") from None
        if answer.status_code in _BUSY:
            raise _UnavailableError(f"answers {answer.status_code} ({self._words(answer)})", _seconds(answer))
        return answer

    def _pause(self, state: RetryCallState) -> float:
        """Seconds before the next attempt."""
        problem = state.outcome and state.outcome.exception()
        wanted = problem.wanted if isinstance(problem, _UnavailableError) else 0.0
        return max(wanted, _growing(state.attempt_number - 1) * self._random.uniform(0.75, 1.0))

    def _warn(self, state: RetryCallState) -> None:
        if state.attempt_number == 2 and state.outcome is not None:
            patience = sum(map(_growing, range(self.retries)))
            warnings.warn(
                f"reward {self.name}: {self.url} {state.outcome.exception()}; trying again for about {patience:.0f} s",
                stacklevel=2,
            )

    def _read(self, answer: Any) -> Any:
        status = answer.status_code
        if status in (401, 403):
            which = "the token in" if self._has_key else "requests without a token; set"
            raise UserError(
                f"reward {self.name}: {self.url} refuses {which} the environment variable {self.key_variable}"
            )
        if 300 <= status < 400:
            raise UserError(
                f"reward {self.name}: {self.url} answers {status} with a redirect to {_target(answer)}, which is not "
                "followed; set url to the final address"
            )
        if status in (404, 405):
            raise UserError(f"reward {self.name}: {answer.url} answers {status} ({self._words(answer)}); check url")
        if status >= 400:
            raise RewardFailure(f"reward {self.name}: {self.url} answers {status}: {self._words(answer)}")
        try:
            return answer.json()
        except (ValueError, RecursionError):
            raise UserError(f"reward {self.name}: {answer.url} does not answer with JSON; check url") from None

    def _words(self, answer: Any) -> str:
        """The server's error message, as one short line."""
        try:
            found = answer.json()
            while isinstance(found, dict):
                found = found.get("error", found.get("message", found.get("detail", "")))
            text = str(found)
        except (ValueError, RecursionError):
            text = answer.text
        text = " ".join(text.split()) or answer.reason_phrase
        return text if len(text) <= 300 else text[:297] + "..."


def _growing(attempt: int) -> float:
    """Seconds to pause after an attempt, counted from 0."""
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0**attempt)


def _seconds(answer: Any) -> float:
    """The server's Retry-After (RFC 9110, 10.2.3: seconds or a date), at most a minute; 0 if there is none."""
    text = answer.headers.get("retry-after", "").strip()
    if text.isdecimal():
        return min(60.0, float(text))
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return min(60.0, max(0.0, (date - datetime.now(UTC)).total_seconds()))


def _target(answer: Any) -> str:
    """The target of a redirect, without parts that may be secret (user, password, query)."""
    to = urlsplit(urljoin(str(answer.url), answer.headers.get("location", "")))
    return f"{to.scheme}://{to.netloc.rpartition('@')[2]}{to.path}" if "location" in answer.headers else "no address"
