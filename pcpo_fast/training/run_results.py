"""A run's results besides its metrics: credit table, exported weights, before/after image, report, summary."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pcpo_fast.distributed.collectives import barrier, rank
from pcpo_fast.engine.engine import Engine
from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.method.credit import CreditTable, credit_record
from pcpo_fast.method.transitions import Transitions
from pcpo_fast.policies import Policy
from pcpo_fast.reporting.grids import before_after
from pcpo_fast.reporting.records import RunRecorder
from pcpo_fast.reporting.report import write_report
from pcpo_fast.reporting.summary import write_summary
from pcpo_fast.runs.provenance import copy_provenance
from pcpo_fast.runs.run_directory import CREDIT_FILE, GAINS_FILE
from pcpo_fast.training.heldout import HeldOut


def write_credit(folder: Path, sampler: str, transitions: Transitions, table: CreditTable) -> None:
    """Write ``credit.json`` of a run."""
    write_atomically(folder / CREDIT_FILE, json.dumps(credit_record(sampler, transitions, table), indent=1))


def write_gains(folder: Path, correlations: Mapping[str, Any]) -> None:
    """Write ``gains.json`` of a run with per-step credit: how the gains of its steps go together."""
    write_atomically(folder / GAINS_FILE, json.dumps(correlations))


def write_captions(folder: Path, captions: list[str]) -> None:
    """Write ``images/captions.json``: the captions of the images in a grid, in order."""
    write_atomically(folder / "images" / "captions.json", json.dumps(captions, ensure_ascii=False))


def finish_run(
    folder: Path, policy: Policy, engine: Engine, heldout: HeldOut, recorder: RunRecorder, epoch: int
) -> dict[str, Any]:
    """Export the weights; write before/after image, summary and report; return the summary. All ranks must call it."""
    weights = engine.full_state()
    summary: dict[str, Any] = {}
    if rank() == 0:
        _replace_export(policy, folder / "export", weights)
        first = heldout.first()
        if first is not None and heldout.last is not None and len(first) == len(heldout.last):
            recorder.image("before_after", before_after(first, heldout.last, heldout.captions), epoch)
        summary = write_summary(folder)
        write_report(folder)
    barrier()
    return summary


def _replace_export(policy: Policy, target: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the export; an existing one is kept until the new one is complete."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    policy.save_weights(temporary, weights)
    copy_provenance(target.parent, temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
