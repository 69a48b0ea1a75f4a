"""A launcher for tests: forks the trainer from a process that has already loaded its libraries.

Loading them takes ten seconds of a run of the tiny pipeline, and training it for two epochs one. `serve` loads them
once and forks for every run; this file as a script (``python warm_trainer.py SOCKET train.py ARGUMENT ...``) asks for
one, gives it its own output, errors, environment and folder, passes on interrupts, and ends with its exit code. What
the environment's WARM_MODULES names is loaded first, and stays loaded.
"""

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import socket
import sys


def ask(path: str, arguments: list[str]) -> int:
    """Request a run from the server."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        signal.signal(signal.SIGINT, lambda *_: server.send(b"interrupt"))
        request = {"arguments": arguments[1:], "folder": os.getcwd(), "environment": dict(os.environ)}
        socket.send_fds(server, [json.dumps(request).encode()], [1, 2])
        return int(server.recv(100) or b"1")


def serve(path: str) -> None:
    """Load the libraries of a run, and fork a process for each request, until this process is killed."""
    import pcpo_fast.policies.flux
    import pcpo_fast.training.trainer  # noqa: F401
    from pcpo_fast.cli import main

    prctl = ctypes.CDLL(None).prctl
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen()
    os.rename(path + ".new", path)
    children: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener, *children.values()], [], [], 0.02)
        if listener in ready:
            asker, _ = listener.accept()
            data, descriptors, _, _ = socket.recv_fds(asker, 1 << 20, 2)
            request = json.loads(data)
            for module in request["environment"].get("WARM_MODULES", "").split():
                importlib.import_module(module)
            child = os.fork()
            if child == 0:
                prctl(1, signal.SIGKILL)  # ends with the server
                for other in (listener, asker, *children.values()):
                    other.close()
                os._exit(_work(main, request, descriptors))
            for descriptor in descriptors:
                os.close(descriptor)
            children[child] = asker
        for child, asker in list(children.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                with contextlib.suppress(OSError):
                    asker.send(str(os.waitstatus_to_exitcode(status) & 255).encode())
                children.pop(child).close()
            elif asker in ready:
                os.kill(child, signal.SIGINT if asker.recv(100) else signal.SIGKILL)  # nothing: the asker has gone


def _work(main, request: dict, outputs: list[int]) -> int:  # type: ignore[no-untyped-def]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(outputs[0], 1)
    os.dup2(outputs[1], 2)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path += os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = ["train.py", *request["arguments"]]
    code = main(["train", *request["arguments"]])
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    raise SystemExit(ask(sys.argv[1], sys.argv[2:]))
