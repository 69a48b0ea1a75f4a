"""Scoring on a stream of its own, in order: no kernel of a reward may run before the images are there, or outlive the
scores. There is no GPU here: PyTorch's streams are replaced by ones that write down what is asked of them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from pcpo_fast.rewards import Scores
from pcpo_fast.rewards.overlapping import BatchScoring

Log = list[tuple[str, Any]]
GPU = torch.device("cuda", 0)


class Images(Tensor):
    """Images that say that they are on a GPU."""

    log: ClassVar[Log] = []
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    device = property(lambda self: GPU)  # type: ignore[assignment]

    def record_stream(self, stream: Any) -> None:
        self.log.append(("kept for", stream.name))


class Stream:
    def __init__(self, device: torch.device | None, log: Log) -> None:
        self.name, self.log = f"side of {device}", log

    def wait_event(self, event: Any) -> None:
        self.log.append(("waits for", event.recorded))

    def synchronize(self) -> None:
        self.log.append(("done on", self.name))


class Event:
    recorded: Any = None

    def record(self, stream: Any) -> None:
        self.recorded = stream


class Rewards:
    def __init__(self, log: Log, local: threading.local) -> None:
        self.log, self.local = log, local

    def score(
        self, images: Tensor, prompts: list[str], metadata: Any, *, evaluation: bool, predictions: bool
    ) -> Scores:
        assert not evaluation and not predictions
        if "bad" in prompts:
            raise KeyError("bad")
        self.log.append(("scores on", getattr(self.local, "stream", "main")))
        return Scores(torch.ones(len(prompts)), {"r": torch.ones(len(prompts))})


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    made: Log = []
    Images.log = made
    return made


def scoring(log: Log, monkeypatch: pytest.MonkeyPatch) -> BatchScoring:
    local = threading.local()

    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        local.stream = stream.name
        try:
            yield
        finally:
            del local.stream

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"main of {device}")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(device, log))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return BatchScoring(Rewards(log, local), overlap=True)  # type: ignore[arg-type]


def images() -> Tensor:
    return torch.rand(2, 3, 4, 4).as_subclass(Images)


def test_each_batch_waits_for_its_images_and_is_done_before_its_scores_are_taken(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    background = scoring(log, monkeypatch)
    for _ in range(2):
        background.add(images(), ["a", "b"], [{}, {}])
    assert [scores.total.tolist() for scores in background.results()] == [[1.0] * 2] * 2
    side = "side of cuda:0"
    batch = [("waits for", "main of cuda:0"), ("kept for", side), ("scores on", side), ("done on", side)]
    assert log == batch * 2


def test_a_failure_on_the_stream_is_raised_and_nothing_is_scored_after_it(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    background = scoring(log, monkeypatch)
    for prompts in (["bad", "b"], ["a", "b"]):
        background.add(images(), prompts, [{}, {}])
    with pytest.raises(KeyError, match="bad"):
        background.results()
    assert ("scores on", "side of cuda:0") not in log


def test_images_of_a_cpu_need_no_stream(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    background = scoring(log, monkeypatch)
    background.add(torch.rand(2, 3, 4, 4), ["a", "b"], [{}, {}])
    background.results()
    assert log == [("scores on", "main")]
