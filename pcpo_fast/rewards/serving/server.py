"""Running a reward server."""

import ipaddress
import os
import socket
from collections.abc import Callable

import uvicorn

from pcpo_fast.errors import UserError
from pcpo_fast.rewards.serving.app import RewardServer

_SHUTDOWN_SECONDS = 30  # for requests in progress when the server is stopped


def token_for(host: str, variable: str) -> str | None:
    """The token that clients need, from the environment.

    Raises:
        UserError: other machines can reach the host but there is no token, or the token is not valid in a header.
    """
    token = os.environ.get(variable, "").strip()
    try:
        only_here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        only_here = host == "localhost"
    if not token and not only_here:
        raise UserError(
            f"--host {host} can be reached from other machines, so the server needs a token: set the environment "
            f"variable {variable} here and for the runs (for example to the output of `openssl rand -hex 32`), or bind "
            "to 127.0.0.1"
        )
    if not token.isascii() or any(character.isspace() for character in token):
        raise UserError(f"the token in the environment variable {variable} must be plain characters without spaces")
    return token or None


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        UserError: the address is not available.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on --host {host} --port {port}: {reason}") from None
    return bound


def serve(server: RewardServer, bound: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; requests in progress are finished first.

    Args:
        server: the server.
        bound: from :func:`listen`.
        ready: called as soon as clients can connect.
    """
    settings = uvicorn.Config(
        server.app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        timeout_keep_alive=60,
        lifespan="off",
    )
    bound.listen(settings.backlog)  # clients that connect before the loop runs wait for it
    ready()
    uvicorn.Server(settings).run(sockets=[bound])
