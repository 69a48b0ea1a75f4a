"""Calling a blocking function for several items in parallel threads."""

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> list[Result]:
    """Results of ``function`` for all items, in order; after an exception no new call is started, and it is raised.

    The threads are daemons, so an interrupted run does not wait for them.
    """
    if workers <= 1 or len(items) <= 1:
        return [function(item) for item in items]
    results: dict[int, Result] = {}
    errors: list[BaseException] = []
    waiting, lock = iter(range(len(items))), threading.Lock()

    def work() -> None:
        with torch.no_grad():
            while not errors:
                with lock:
                    index = next(waiting, None)
                if index is None:
                    return
                try:
                    results[index] = function(items[index])
                except BaseException as error:
                    errors.append(error)

    threads = [threading.Thread(target=work, daemon=True, name="reward") for _ in range(min(workers, len(items)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(items))]
