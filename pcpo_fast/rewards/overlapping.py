"""Scoring batch by batch: in the background while the next batch is sampled, or immediately.

The policy does not change between the batches of an epoch's rollout, and the update waits for all scores, so the result
is the same as when scoring afterwards.
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
    """Scores batches one after the other; errors are raised by :meth:`results`.

    Args:
        rewards: the rewards.
        overlap: score in a separate thread, and on a GPU on a separate stream; otherwise inside :meth:`add`.

    Attributes:
        seconds: total running time of the rewards.
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
        """Score a batch, or submit it to the thread without waiting; for the arguments see :meth:`RewardSet.score`."""
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
            UserError: the error of a reward; later batches are not scored.
        """
        self.close()
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._scores

    def close(self) -> None:
        """Tell the thread that no more batches follow."""
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
            with _on_stream(images, stream, event):
                scores = self._rewards.score(images, prompts, metadata, evaluation=False, predictions=predictions)
            self._scores.append(scores)
        except BaseException as error:
            if self._thread is None and not isinstance(error, Exception):
                raise  # KeyboardInterrupt
            self._error = error
        self.seconds += time.perf_counter() - begin


@contextmanager
def _on_stream(images: Tensor, stream: "torch.cuda.Stream | None", event: "torch.cuda.Event | None") -> Iterator[None]:
    """Run the block on ``stream`` once the images are ready, and synchronize at the end."""
    if stream is None or event is None:
        yield
        return
    with torch.cuda.device(images.device), torch.cuda.stream(stream):
        stream.wait_event(event)
        images.record_stream(stream)
        yield
        stream.synchronize()
