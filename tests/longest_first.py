"""Which test files take longest: they start first, so that none is left for one process when the others are through.

Seconds on one core, measured on one file at a time; a file that is not here takes less than the last. A file that has
become slow is moved up by hand: nothing but the time of the whole suite depends on it.
"""

import pytest

LONGEST = (
    "kernels/test_interpreter.py",  # 110
    "test_resuming.py",  # 55
    "test_compare_command.py",
    "test_planning.py",  # 50
    "test_two_ranks.py",  # 49
    "test_flux_step.py",
    "test_speed.py",
    "kernels/test_ahead_of_time.py",
    "test_tiny_pipelines.py",
    "test_packaging.py",
    "test_guided_policies.py",
    "test_waiting.py",
    "test_ds_configs.py",  # 35
    "test_preflight.py",
    "test_checkpoint.py",
    "test_evaluate_ranks.py",
    "test_profiling.py",  # 24
    "test_killing.py",
    "test_relayout.py",
    "test_reward_guidance.py",
    "test_flux_policy.py",
    "test_update.py",
    "test_engine.py",
    "test_guided_update.py",
    "test_guided_runs.py",
    "kernels/test_launched_variants.py",  # 17
)


def longest_first(items: list[pytest.Item]) -> None:
    """Sort the tests by their file's place in the list; each file's own order, and that of the rest, stays."""
    place = {name: number for number, name in enumerate(LONGEST)}

    def of(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((place[name] for name in place if path.endswith(f"/tests/{name}")), len(place))

    items.sort(key=of)
