"""Scoring in the background: a batch of images is judged while the next one is sampled.

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

Job = tuple[Tensor, list[str], list[dict[str, Any]], "torch.cuda.Event | None"]


class BackgroundScoring:
    """Scores batches in a thread of its own, one after the other; on a GPU, on a stream of its own.

    Attributes:
        seconds: how long the rewards have been at work.
    """

    def __init__(self, rewards: RewardSet) -> None:
        self.seconds = 0.0
        self._rewards = rewards
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._scores: list[Scores] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="rewards")
        self._thread.start()

    def add(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> None:
        """Score a batch; its arguments are those of :meth:`RewardSet.score`. Does not wait."""
        event = None
        if images.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(images.device))
        self._jobs.put((images, prompts, metadata, event))

    def results(self) -> Scores:
        """Wait for all batches, and return their scores in the order in which they were added.

        Raises:
            UserError: what a reward raised; batches after that one are not scored.
        """
        self.close()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return Scores.joined(self._scores)

    def close(self) -> None:
        """No batch comes any more."""
        self._jobs.put(None)

    def _run(self) -> None:
        stream = None
        while (job := self._jobs.get()) is not None:
            if self._error is not None:
                continue
            images, prompts, metadata, event = job
            if event is not None and stream is None:
                stream = torch.cuda.Stream(images.device)
            begin = time.perf_counter()
            try:
                with _beside(images, stream, event):
                    self._scores.append(self._rewards.score(images, prompts, metadata, evaluation=False))
            except BaseException as error:
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
