"""Small records of a comparison's finished runs, which can be committed and continued from elsewhere."""

import gzip
import shutil
from pathlib import Path

from pcpo_fast.comparison.comparison_file import FILE
from pcpo_fast.comparison.reading import read_run, what_is_read
from pcpo_fast.errors import UserError
from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.reporting.metrics_file import encode, find_metrics, read_metrics

_SUMMARY = "summary.json"
_COPIED = ("config.yaml", "inputs.json")


def write_small_records(folder: Path, target: Path) -> list[Path]:
    """Write ``comparison.yaml`` and every finished run's ``config.yaml``, ``inputs.json``, ``summary.json`` and
    ``metrics.jsonl.gz`` under `target`, in the same folders as under `folder`; returns the new records.

    The metrics keep what a comparison reads, to the last digit. The summary is written last, so that a record is whole
    or does not count.

    Raises:
        UserError: `target` lies in `folder`, or cannot be written.
    """
    if folder.resolve() in (target.resolve(), *target.resolve().parents):
        raise UserError(f"--records: {target} lies in the comparison's own folder {folder}; choose another one")
    new = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        if (folder / FILE).is_file():
            shutil.copyfile(folder / FILE, target / FILE)
        for summary in sorted(folder.rglob(f"seed_*/{_SUMMARY}")):
            run, record = summary.parent, target / summary.parent.relative_to(folder)
            said = summary.read_bytes()
            if (record / _SUMMARY).is_file() and (record / _SUMMARY).read_bytes() == said:
                continue
            metrics = find_metrics(run)
            if metrics is None or not read_run(run).finished:
                continue
            record.mkdir(parents=True, exist_ok=True)
            (record / _SUMMARY).unlink(missing_ok=True)
            lines = b"".join(encode(what_is_read(line)) for line in read_metrics(metrics))
            write_atomically(record / "metrics.jsonl.gz", gzip.compress(lines, mtime=0))
            for name in _COPIED:
                if (run / name).is_file():
                    shutil.copyfile(run / name, record / name)
            write_atomically(record / _SUMMARY, said)
            new.append(record)
    except OSError as error:
        raise UserError(f"--records: {target} cannot be written: {error.strerror}") from None
    return new
