"""pcpo_fast.reporting.loggers: TensorBoard for real, Weights & Biases through a stand-in for its module."""

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pcpo_fast.errors import UserError
from pcpo_fast.reporting.metrics_file import read_metrics
from pcpo_fast.reporting.records import RunRecorder


class FakeWandb:
    """The part of the wandb module that is used; `fail` names calls that raise."""

    class Settings:
        model_fields = dict.fromkeys(("console", "save_code", "disable_git", "init_timeout", "x_disable_meta"))

        def __init__(self, **values: Any) -> None:
            unknown = set(values) - set(self.model_fields)
            assert not unknown, f"wandb would refuse {unknown}"
            self.values = values

    def __init__(self, fail: tuple[str, ...] = ()) -> None:
        self.fail = fail
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.axes: dict[str, str] = {}
        self.finished = 0

    def init(self, **arguments: Any) -> "FakeWandb":
        self.inits.append(arguments)
        if "init" in self.fail and arguments.get("mode") != "offline":
            raise ConnectionError("no route to host")
        return self

    def log(self, values: dict[str, Any]) -> None:
        if "log" in self.fail:
            raise ConnectionError("gone")
        self.logged.append(values)

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def finish(self) -> None:
        self.finished += 1

    def Image(self, image: Any) -> Any:
        return SimpleNamespace(size=image.size)


class FakeTrackio:
    """The part of the trackio module that is used."""

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> "FakeTrackio":
        print("* Trackio explains itself")
        self.inits.append(arguments)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1

    def Image(self, image: Any) -> Any:
        return SimpleNamespace(size=image.size)


def test_trackio_gets_the_metrics_under_the_runs_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)  # type: ignore[arg-type]
    options = {"project": "mine", "group": None}
    with RunRecorder(tmp_path / "red", tensorboard=False, wandb=None, trackio=options, about={"seed": 3}) as records:
        train(records, range(2), 0.5)
    name = f"red-{(tmp_path / 'red' / 'trackio' / 'run_id.txt').read_text()[:4]}"
    [init] = fake.inits
    assert init == {"project": "mine", "name": name, "config": {"seed": 3}, "resume": "allow", "embed": False}
    assert (0, {"heldout/reward/mean": 0.5, "epoch": 0}) in fake.logged
    assert (3, {"update/policy/loss": 0.5, "epoch": 1}) in fake.logged
    assert fake.finished == 1 and capsys.readouterr().out == ""


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    return fake


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0})
    accumulator.Reload()
    scalars = {
        tag: [(event.step, round(event.value, 4)) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }
    images = {tag: [(i.step, 0.0) for i in accumulator.Images(tag)] for tag in accumulator.Tags()["images"]}
    return scalars | images


def train(records: RunRecorder, epochs: range, value: float) -> None:
    for epoch in epochs:
        records.log("evaluation", {"heldout/reward/mean": value}, epoch=epoch)
        for update in range(2):
            records.log("update", {"policy/loss": value}, epoch=epoch, update=update)
        records.log("epoch", {"reward/mean": value}, epoch=epoch)
        records.image(f"epoch_{epoch:04d}", torch.zeros(3, 8, 8), epoch)


def test_tensorboard_shows_what_was_logged_and_forgets_what_is_run_again(tmp_path: Path) -> None:
    with RunRecorder(tmp_path, tensorboard=True, wandb=None, about={"seed": 2}) as records:
        train(records, range(4), 1.0)
    with RunRecorder(tmp_path, tensorboard=True, wandb=None, about={"seed": 3, "command": "a | b"}) as records:
        records.truncate_after(2, keep_evaluation=True)
        records.log("epoch", {"reward/mean": 2.0}, epoch=2)
        records.log("update", {"policy/loss": 2.0}, epoch=2, update=0)
    epochs = events(tmp_path / "tensorboard" / "epochs")
    assert epochs["reward/mean"] == [(0, 1.0), (1, 1.0), (2, 2.0)]
    assert epochs["heldout/reward/mean"] == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert [step for step, _ in epochs["images/epoch"]] == [0, 1]
    updates = events(tmp_path / "tensorboard" / "updates")
    assert updates == {"update/policy/loss": [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(tmp_path / "tensorboard" / "epochs"))
    accumulator.Reload()
    texts = {text.step: text.tensor_proto.string_val[0].decode() for text in accumulator.Tensors("run/text_summary")}
    assert texts == {  # of each start
        0: "| setting | value |\n|---|---|\n| seed | 2 |",
        2: "| setting | value |\n|---|---|\n| seed | 3 |\n| command | a &#124; b |",
    }


def test_loggers_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="tensorboard is not installed"):
        RunRecorder(tmp_path, tensorboard=True, wandb=None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed"):
        RunRecorder(tmp_path, tensorboard=False, wandb={})


def test_wandb_gets_metrics_and_images_and_nothing_else(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k3y-very-secret")
    with RunRecorder(tmp_path, tensorboard=False, wandb={"project": "p", "tags": ["a"], "name": None}) as records:
        train(records, range(1), 0.5)
    (arguments,) = wandb.inits
    assert set(arguments) == {"project", "tags", "id", "resume", "config", "dir", "settings"}
    assert arguments["config"] == {}
    assert arguments["settings"].values == {
        "console": "off",
        "save_code": False,
        "disable_git": True,
        "init_timeout": 30.0,
        "x_disable_meta": True,
    }
    assert "secret" not in repr((arguments, wandb.logged))
    assert wandb.logged[0] == {"heldout/reward/mean": 0.5, "epoch": 0}
    assert wandb.logged[2] == {"update/policy/loss": 0.5, "epoch": 0, "update_step": 1}
    assert wandb.logged[-1]["images/epoch"].size == (8, 8)
    assert wandb.axes["update/policy/loss"] == "update_step" and wandb.axes["reward/mean"] == "epoch"
    assert wandb.finished == 1


def test_wandb_continues_its_run(tmp_path: Path, wandb: FakeWandb) -> None:
    for _ in range(2):
        RunRecorder(tmp_path, tensorboard=False, wandb={}).close()
    first, second = wandb.inits
    assert first["id"] == second["id"] and len(first["id"]) == 12
    assert second["resume"] == "allow"


@pytest.mark.parametrize("options", [{"api_key": "x"}, {"mode": "quick"}, {"config": {}}])
def test_wandb_options_are_checked(tmp_path: Path, wandb: FakeWandb, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"wandb: .*allowed: "):
        RunRecorder(tmp_path, tensorboard=False, wandb=options)
    assert wandb.inits == []


def test_wandb_without_a_network_is_recorded_offline(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.fail = ("init",)
    with RunRecorder(tmp_path, tensorboard=False, wandb={}) as records:
        train(records, range(1), 0.5)
    assert [arguments.get("mode") for arguments in wandb.inits] == [None, "offline"]
    assert wandb.inits[0]["id"] != wandb.inits[1]["id"]
    assert len(wandb.logged) == 5
    assert "no route to host" in caplog.text and "wandb sync" in caplog.text


def test_a_logger_that_fails_warns_once_and_training_goes_on(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.fail = ("log",)
    with RunRecorder(tmp_path, tensorboard=False, wandb={}) as records:
        train(records, range(3), 0.5)
        records.truncate_after(2)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "Weights & Biases failed (ConnectionError: gone)" in warnings[0].getMessage()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 8


def test_tensorboard_that_cannot_write_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with RunRecorder(tmp_path, tensorboard=True, wandb=None) as records:
        train(records, range(2), 0.5)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 8
    assert caplog.text.count("TensorBoard failed") == 1
