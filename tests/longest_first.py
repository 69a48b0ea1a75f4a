"""Which test files take longest: they start first, so that none is left for one process when the others are through.

Seconds on one core, measured on one file at a time; a file that is not here takes less than the last. A file that has
become slow is moved up by hand: nothing but the time of the whole suite depends on it.
"""

import pytest

LONGEST = (
    "kernels/test_interpreter.py",
    "test_rank_equality.py",
    "test_two_ranks.py",
    "test_resuming.py",
    "test_killing.py",
    "test_relayout.py",
    "test_compare_command.py",
    "test_preflight.py",
)


def longest_first(items: list[pytest.Item]) -> None:
    """Sort the tests by their file's place in the list; each file's own order, and that of the rest, stays."""
    place = {name: number for number, name in enumerate(LONGEST)}

    def of(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((place[name] for name in place if path.endswith(f"/tests/{name}")), len(place))

    items.sort(key=of)
