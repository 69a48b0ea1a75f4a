"""Prompts from Parquet files, and from folders saved by the library ``datasets``."""

import json
import tempfile
from pathlib import Path
from typing import Any

from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.prompts.entries import Prompt, column_of, prompt_of, wanted_columns


def read_dataset(path: Path, column: str | None = None) -> list[Prompt]:
    """The prompts of a Parquet file or of a folder written by ``Dataset.save_to_disk``, in order.

    The other columns become metadata, except values that JSON cannot represent (images, dates). ``column`` names the
    prompt's; None: one of :data:`pcpo_fast.prompts.entries.COLUMNS`.

    Raises:
        UserError: the file does not exist, the folder is not such a dataset or has several splits, ``datasets`` is not
            installed, or there is no prompt column.
    """
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        splits = sorted(folder.name for folder in path.iterdir() if (folder / "state.json").is_file())
        raise UserError(f"prompt file {path} is a dataset with splits; give the folder of one: {', '.join(splits)}")
    if path.is_dir() and not (path / "state.json").is_file():
        raise UserError(
            f"prompt file {path} is a folder; give a text, JSONL, CSV or Parquet file in it (only folders written by "
            "datasets' save_to_disk are supported)"
        )
    if not path.exists():
        raise UserError(f"prompt file {path} does not exist")
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"prompt file {path} needs {error.name or 'datasets'}, which is not installed: run `pip install datasets`, "
            "or save the prompts as JSONL"
        ) from None
    shown, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as cache:
            if path.is_dir():
                table = datasets.load_from_disk(str(path), keep_in_memory=True)
            else:
                table = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
            # Leave out columns that would be decoded (images, audio) and values that JSON cannot represent.
            kept = [name for name, feature in table.features.items() if not hasattr(feature, "decode")]
            rows = [{name: cell for name, cell in row.items() if _is_json(cell)} for row in table.select_columns(kept)]
    except Exception as error:  # Arrow and datasets raise many kinds of errors for damaged files
        raise UserError(f"prompt file {path} cannot be read by datasets: {reason_of(error)}") from None
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()
    if column_of(table.column_names, str(path), column) is None:
        raise UserError(f"{path}: the table needs a column {wanted_columns(column)}")
    return [prompt_of(row, f"{path} row {number}", column) for number, row in enumerate(rows, start=1)]


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
