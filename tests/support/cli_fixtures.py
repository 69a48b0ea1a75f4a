"""Runs shared by several test files, made once per session."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runs import ROOT, WAITING_REWARD, Run, finished_run, wait_for, write_config

SUPPORT = Path(__file__).parent


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A command that takes the place of ``python``, for runs in processes of their own: see warm_trainer.py."""
    socket = tmp_path_factory.mktemp("warm") / "socket"
    code = f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); import warm_trainer; warm_trainer.serve({str(socket)!r})"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    server = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    try:
        wait_for(socket.exists, server)
        yield f"{sys.executable} -S {SUPPORT / 'warm_trainer.py'} {socket}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path) -> Run:
    """A full fine-tune with everything switched on."""
    folder = tmp_path_factory.mktemp("full")
    rewards = [
        {"name": "tiny_pipeline:redness"},
        {"name": "jpeg_compressibility", "weight": 0.01},
        {"name": "jpeg_incompressibility", "evaluation_only": True},
    ]
    return finished_run(folder, pipeline_folder, rewards=rewards, logging__tensorboard=True)


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path) -> Run:
    """A LoRA run whose alpha is not its rank, with a KL to its start."""
    changes = {
        "credit__kl_coefficient": 0.01,
        "evaluation__kl": True,
        "model__finetune": "lora",
        "model__lora": {"rank": 2, "alpha": 6.0},
        "optimizer__lr": 3e-2,
    }
    return finished_run(tmp_path_factory.mktemp("lora"), pipeline_folder, **changes)


@pytest.fixture
def copy_of_full(full: Run, tmp_path: Path) -> Iterator[Run]:
    """A copy of the finished run, to be continued."""
    shutil.copytree(full.folder, tmp_path / "run")
    config = tmp_path / "run.yaml"
    config.write_text(full.config.read_text().replace(str(full.folder), str(tmp_path / "run")))
    yield Run(config, tmp_path / "run", None, full.images)


@pytest.fixture
def waiting(tmp_path: Path, pipeline_folder: Path) -> Path:
    """A folder with the configuration of a run of three epochs whose reward is a file next to it."""
    (tmp_path / "waiting_rewards.py").write_text(WAITING_REWARD)
    rewards = [{"name": "waiting_rewards:redness"}]
    write_config(tmp_path, pipeline_folder, rewards=rewards, train__epochs=3, checkpoint__keep=5)
    return tmp_path
