"""All preflight checks, from cheap to expensive."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from pcpo_fast.config.arguments import check_least
from pcpo_fast.config.schema import Config
from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.planning.advice import GB
from pcpo_fast.planning.recomputing import device_memory
from pcpo_fast.planning.run_plan import make_plan
from pcpo_fast.preflight.checks import (
    Check,
    attempt,
    check_disk,
    check_gpus,
    check_host,
    check_inputs,
    check_memory,
    check_model,
    check_output,
    check_versions,
)
from pcpo_fast.preflight.dry_run import dry_run, with_planned_sizes


def run_checks(
    config: Config, gpus: int, ranks_here: int, memory_gb: float | None = None, dry: bool = True, timeout: float = 1800
) -> Iterator[Check]:
    """Yield the result of each check; the dry run is skipped if an earlier check failed.

    Args:
        config: the run.
        gpus: GPUs of the whole run.
        ranks_here: GPUs of this machine.
        memory_gb: memory of one GPU in 1e9 bytes; None: query the GPU, or assume 80 without one.
        dry: whether to train two steps at the end.
        timeout: time limit of the dry run in seconds.
    """
    failed = False

    @cache
    def planned() -> dict[str, Any]:
        here = device_memory(torch.device("cuda", 0), 1) / GB if torch.cuda.is_available() else 80.0
        return make_plan(config, gpus, memory_gb or here, nodes=gpus // ranks_here)

    for name, check in (
        ("versions", check_versions),
        ("GPUs", lambda: check_gpus(ranks_here)),
        ("output_dir", lambda: check_output(config)),
        ("prompts and rewards", lambda: check_inputs(config, gpus)),
        ("model", lambda: check_model(config)),
        ("memory plan", lambda: check_memory(planned())),
        ("host memory", lambda: check_host(planned())),
        ("disk", lambda: check_disk(config, planned())),
    ):
        result = attempt(name, check)
        failed = failed or result.status == "failed"
        yield result
    if not dry:
        yield Check("dry run", "skipped", "turned off (--no-dry-run)")
    elif failed:
        yield Check("dry run", "skipped", "an earlier check failed")
    else:
        tried = with_planned_sizes(config, planned()) if torch.cuda.is_available() else config
        yield attempt("dry run", lambda: dry_run(tried, ranks_here, timeout))


def check_arguments(gpus: int, nodes: int, timeout: float) -> int:
    """Check the numeric options and return the number of GPUs per machine.

    Raises:
        UserError: a number is out of range, or the GPUs do not divide evenly over the machines.
    """
    check_least(1, gpus=gpus, nodes=nodes)
    if gpus % nodes:
        raise UserError(
            f"--gpus: {counted(gpus, 'GPU')} cannot be divided evenly over {counted(nodes, 'machine')} (--nodes)"
        )
    if not timeout > 0:
        raise UserError(f"--timeout: must be above 0 seconds, got {timeout:g}")
    return gpus // nodes
