"""Combining requests into batches, for rewards that are faster on many images at once."""

import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from pcpo_fast.errors import UserError
from pcpo_fast.rewards.calling import call_reward
from pcpo_fast.rewards.failures import RewardFailure
from pcpo_fast.rewards.registry import Reward, scores_predictions
from pcpo_fast.rewards.serving.wire import Batch
from pcpo_fast.rewards.time_limit import TimeLimit


@dataclass
class _Job:
    batch: Batch
    scores: "Future[list[float]]" = field(default_factory=Future)


class BatchQueue:
    """Calls the reward in one thread; waiting requests with the same image size are scored together.

    Args:
        name: name of the reward in error messages.
        reward: the callable; never called concurrently.
        device: device of the images.
        most_images: maximum images per call of the reward; a larger request is scored alone.
        linger: seconds to wait for more requests if there are fewer images.

    Attributes:
        images_scored: number of images scored, each request counted once.
        calls: number of calls of the reward.
        scores_predictions: whether the reward accepts the blurred images that steps predict.
    """

    def __init__(
        self, name: str, reward: Reward, *, device: torch.device, most_images: int, linger: float = 0.005
    ) -> None:
        self.images_scored = self.calls = 0
        self.scores_predictions = scores_predictions(reward)
        self._name, self._reward, self._device = name, reward, device
        self._most, self._linger = most_images, linger
        self._limit = TimeLimit(None)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._kept: _Job | None = None  # the request that did not fit into the latest batch
        self._thread = threading.Thread(target=self._run, daemon=True, name="reward")
        self._thread.start()

    def submit(self, batch: Batch) -> "Future[list[float]]":
        """Score a request; the future gets the scores, or the RewardFailure."""
        job = _Job(batch)
        self._jobs.put(job)
        return job.scores

    def close(self) -> None:
        """Finish all submitted requests and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (jobs := self._next()) is not None:
            try:
                results: list[list[float] | BaseException] = list(self._score(jobs))
            except RewardFailure as failure:
                # A request must not fail because of another one's images.
                results = [failure] if len(jobs) == 1 else [self._alone(job) for job in jobs]
            except BaseException as error:  # the thread must survive
                results = [error] * len(jobs)
            for job, result in zip(jobs, results, strict=True):
                if isinstance(result, BaseException):
                    job.scores.set_exception(result)
                else:
                    self.images_scored += len(result)
                    job.scores.set_result(result)

    def _next(self) -> list[_Job] | None:
        first = self._jobs.get() if self._kept is None else self._kept
        self._kept = None
        if first is None:
            return None
        jobs, count, end = [first], len(first.batch.prompts), time.monotonic() + self._linger
        while count < self._most:
            try:
                job = self._jobs.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                self._jobs.put(None)
                break
            count += len(job.batch.prompts)
            if count > self._most or job.batch.images.shape[1:] != first.batch.images.shape[1:]:
                self._kept = job
                break
            jobs.append(job)
        return jobs

    def _score(self, jobs: list[_Job]) -> list[list[float]]:
        images = torch.cat([job.batch.images for job in jobs]).to(self._device)
        prompts = [prompt for job in jobs for prompt in job.batch.prompts]
        metadata = [row for job in jobs for row in job.batch.metadata]
        self.calls += 1
        with torch.no_grad():
            # The requests of a combined batch are scored one by one after a failure; search for the image only then.
            scores = call_reward(
                self._name, self._reward, images, prompts, metadata, limit=self._limit, search=len(jobs) == 1
            )
        return [part.tolist() for part in scores.cpu().split([len(job.batch.prompts) for job in jobs])]

    def _alone(self, job: _Job) -> list[float] | BaseException:
        try:
            return self._score([job])[0]
        except UserError as error:
            return error
