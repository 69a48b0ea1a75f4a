"""Never two runs in one folder, whoever has died before."""

import errno
import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_runs import call, write_config

import pcpo_fast.training.trainer
from pcpo_fast.config.loading import load_config
from pcpo_fast.errors import UserError
from pcpo_fast.files.locks import LOCK_FILE, lock_folder
from pcpo_fast.runs import run_lock
from pcpo_fast.runs.run_directory import claim
from pcpo_fast.runs.run_lock import only_run


@contextmanager
def held_elsewhere(folder: Path, with_child: bool = False) -> Iterator[int]:
    """Another process, whose number is given, holds the lock; it may have a child that outlives it."""
    reader, writer = os.pipe()
    ours, theirs = os.pipe()  # closed where the test is over
    process = os.fork()
    if process == 0:
        try:
            os.close(theirs)
            with only_run(folder):
                if with_child and os.fork() == 0:
                    os.read(ours, 1)
                    os._exit(0)
                os.write(writer, b"x")
                os.read(ours, 1)
        finally:
            os._exit(0)
    try:
        assert os.read(reader, 1) == b"x"
        yield process
    finally:
        for descriptor in (reader, writer, ours, theirs):
            os.close(descriptor)


@pytest.mark.parametrize("with_child", [False, True])
def test_the_lock_dies_with_its_process(tmp_path: Path, with_child: bool) -> None:
    folder = tmp_path / "new" / "run"
    with held_elsewhere(folder, with_child) as process:
        words = rf"another run is using {folder} \(process {process} on {socket.gethostname()} since 20.*\); wait for"
        with pytest.raises(UserError, match=words), only_run(folder):
            pass
        assert (folder / LOCK_FILE).exists()
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        with only_run(folder):
            assert f"process {os.getpid()} on" in (folder / LOCK_FILE).read_text()


def test_a_second_run_is_refused_before_anything_is_loaded_and_readers_are_not(
    tmp_path: Path, pipeline_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pcpo_fast.training.trainer.RunInputs, "load", None)
    config = write_config(tmp_path, pipeline_folder)
    with held_elsewhere(tmp_path / "run") as process:
        answer = call(capsys, "train", "--config", config)
        assert (answer.code, answer.err.count("\n")) == (2, 1)
        assert answer.err.startswith(f"error: output_dir: another run is using {tmp_path / 'run'} (process {process}")
        assert claim(load_config(config), "auto").fresh
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_a_folder_that_stays_empty_is_taken_away(tmp_path: Path) -> None:
    with only_run(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
    with only_run(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
    assert (tmp_path / "run" / LOCK_FILE).read_bytes() == b""
    with only_run(tmp_path / "run"):
        with pytest.raises(UserError, match="is already in use by a run of this process"), only_run(tmp_path / "run"):
            pass
        with pytest.raises(UserError, match="another run is using"), in_another_process(tmp_path / "run"):
            pass


@contextmanager
def in_another_process(folder: Path) -> Iterator[None]:
    """What another process meets when it takes the lock."""
    process = os.fork()
    if process == 0:
        run_lock._held.clear()
        try:
            with only_run(folder):
                os._exit(0)
        except UserError as error:
            os._exit(1 if "another run is using" in str(error) else 2)
    if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 1:
        raise UserError("another run is using")
    yield


def test_a_lock_file_that_is_taken_away_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, lockf = [], fcntl.lockf

    def lock(descriptor: int, how: int) -> None:
        calls.append(descriptor)
        lockf(descriptor, how)
        if len(calls) == 1:  # the run before has just ended, and its folder was empty
            (tmp_path / "run" / LOCK_FILE).unlink()
            (tmp_path / "run").rmdir()

    monkeypatch.setattr(fcntl, "lockf", lock)
    attempt = lock_folder(tmp_path / "run", inherited=False)
    assert attempt is not None and attempt.holder is None and len(calls) == 2
    assert os.path.samestat(os.fstat(attempt.descriptor), os.stat(tmp_path / "run" / LOCK_FILE))
    os.close(attempt.descriptor)


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with (
        pytest.warns(UserWarning, match=r"the file system of .* does not support locks \(No locks available\)"),
        only_run(tmp_path),
    ):
        pass
