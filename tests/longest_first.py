"""Which test files take longest: they start first, so that none is left for one process when the others are through.

Seconds on one core, measured on one file at a time; a file that is not here takes less than the last. A file that has
become slow is moved up by hand: nothing but the time of the whole suite depends on it.
"""

import pytest

LONGEST = (
    "kernels/test_interpreter.py",  # 70
    "runs/test_resuming.py",  # 55
    "test_browser.py",
    "comparison/test_compare_command.py",
    "planning/test_planning.py",  # 50
    "training/test_two_ranks.py",  # 49
    "preflight/test_preflight.py",
    "training/test_update.py",
    "benchmarks/test_flux_step.py",
    "policies/test_speed.py",
    "kernels/test_ahead_of_time.py",
    "test_tiny_pipelines.py",
    "test_packaging.py",
    "policies/test_families.py",
    "training/test_waiting.py",
    "engine/test_ds_configs.py",  # 35
    "runs/test_checkpoint.py",
    "policies/test_compile_trial.py",
    "policies/test_four_bit.py",
    "kernels/test_host_path.py",
    "profiling/test_profiling.py",  # 24
    "interface/test_interface.py",
    "runs/test_killing.py",
    "engine/test_resharding.py",
    "guidance/test_reward_guidance.py",
    "policies/test_lora_files.py",
    "policies/test_model_folders.py",
    "policies/test_flux_policy.py",
    "engine/test_engine.py",
    "training/test_guided_update.py",
    "training/test_family_runs.py",
    "kernels/test_launched_variants.py",  # 17
)


def longest_first(items: list[pytest.Item]) -> None:
    """Sort the tests by their file's place in the list; each file's own order, and that of the rest, stays."""
    place = {name: number for number, name in enumerate(LONGEST)}

    def of(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((place[name] for name in place if path.endswith(f"/tests/{name}")), len(place))

    items.sort(key=of)
