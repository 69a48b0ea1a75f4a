"""CPU ranks on this machine, started by DeepSpeed's own launcher."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch_ranks(
    count: int, *arguments: Path | str, folder: Path, timeout: float, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run a script on ``count`` ranks in ``folder`` until it ends; ``arguments`` are the script and its own."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(count)]
    command += ["--master_port", str(free_port())]
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    inherited |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
