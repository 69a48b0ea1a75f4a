"""Scoring batch by batch: in the background, so that a batch is judged while the next one is sampled, or at once.

The policy does not change between the batches of an epoch's rollout, and the update waits for every score, so this is
the same computation as scoring afterwards, only earlier.
"""

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.rewards.scoring import RewardSet, Scores

Job = tuple[Tensor, list[str], list[dict[str, Any]], bool, "torch.cuda.Event | None"]


class BatchScoring:
    """Scores batches one after the other and keeps errors to itself until the results are asked for.

    Args:
        rewards: what scores.
        overlap: in a thread of its own, and on a GPU on a stream of its own; else within :meth:`add`.

    Attributes:
        seconds: how long the rewards have been running.
    """

    def __init__(self, rewards: RewardSet, overlap: bool) -> None:
        self.seconds = 0.0
        self._rewards = rewards
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._scores: list[Scores] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="rewards") if overlap else None
        if self._thread is not None:
            self._thread.start()

    def add(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]], *, predictions: bool = False
    ) -> None:
        """Score a batch; its arguments are those of :meth:`RewardSet.score`. Does not wait for the thread."""
        event = None
        if self._thread is None:
            self._score((images, prompts, metadata, predictions, None), None)
            return
        if images.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(images.device))
        self._jobs.put((images, prompts, metadata, predictions, event))

    def results(self) -> list[Scores]:
        """Wait for all batches, and return their scores in the order in which they were added.

        Raises:
            UserError: what a reward raised; batches after that one are not scored.
        """
        self.close()
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._scores

    def close(self) -> None:
        """No batch comes any more."""
        self._jobs.put(None)

    def _run(self) -> None:
        stream = None
        while (job := self._jobs.get()) is not None:
            images, event = job[0], job[-1]
            if event is not None and stream is None:
                stream = torch.cuda.Stream(images.device)
            self._score(job, stream)

    def _score(self, job: Job, stream: "torch.cuda.Stream | None") -> None:
        if self._error is not None:
            return
        images, prompts, metadata, predictions, event = job
        begin = time.perf_counter()
        try:
            with _beside(images, stream, event):
                scores = self._rewards.score(images, prompts, metadata, evaluation=False, predictions=predictions)
            self._scores.append(scores)
        except BaseException as error:
            if self._thread is None and not isinstance(error, Exception):
                raise  # somebody interrupts the run
            self._error = error
        self.seconds += time.perf_counter() - begin


@contextmanager
def _beside(images: Tensor, stream: "torch.cuda.Stream | None", event: "torch.cuda.Event | None") -> Iterator[None]:
    """Work on ``stream`` as soon as the images are there, and wait for what was begun."""
    if stream is None or event is None:
        yield
        return
    with torch.cuda.device(images.device), torch.cuda.stream(stream):
        stream.wait_event(event)
        images.record_stream(stream)
        yield
        stream.synchronize()
