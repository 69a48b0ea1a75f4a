"""Prompt tables separated by commas, semicolons or tabs, with or without quoting."""

import csv
import io
from pathlib import Path
from typing import Literal

from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.prompts.entries import Prompt, column_of, prompt_of, wanted_columns

SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""The column separator by file extension."""


def parse_table(text: str, separator: str, path: Path, column: str | None = None) -> list[Prompt]:
    """The prompts of a table with a header; the other columns become the metadata.

    Args:
        text: the content of the file.
        separator: the separator expected from the extension. If the header has no prompt column with it, the first of
            comma, semicolon (written by spreadsheets in much of Europe) and tab that gives one is used.
        path: path of the file, for error messages.
        column: the prompt's column; None: one of :data:`pcpo_fast.prompts.entries.COLUMNS`.

    Raises:
        UserError: the header has no prompt column or a duplicate column, or a row has too many cells.
    """
    rows = _rows_of(text, _separator(text, separator, path, column), path)
    if not rows:
        return []
    (where, header), *rows = rows
    header = [name.strip() for name in header]
    found = column_of(header, where, column)
    if found is None:
        raise UserError(f"{where}: the header needs a column {wanted_columns(column)}")
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f'{where}: duplicate column "{twice}" in the header')
    prompts = []
    for where, row in rows:
        if len(row) > len(header):
            raise UserError(f"{where}: {counted(len(row), 'cell')}, but the header has {len(header)}")
        cells = dict(zip(header, row, strict=False))
        metadata = {name: cell for name, cell in cells.items() if name != found and cell.strip()}
        prompts.append(prompt_of({found: cells.get(found), "metadata": metadata}, where, column))
    return prompts


def _separator(text: str, promised: str, path: Path, column: str | None) -> str:
    lines = enumerate(io.StringIO(text, newline=""), start=1)
    number, first = next(((number, line) for number, line in lines if line.strip()), (1, ""))
    for separator in (promised, ",", ";", "\t"):
        header = next(csv.reader([first], delimiter=separator), [])
        if column_of([name.strip() for name in header], f"{path} line {number}", column) is not None:
            return separator
    return promised


def _rows_of(text: str, separator: str, path: Path) -> list[tuple[str, list[str]]]:
    """(location, cells) of all rows that are not blank.

    Tab-separated files such as PartiPrompts are mostly written without quoting, so a quotation mark at the start of a
    cell belongs to the prompt. A file is read without quoting if it is not a valid quoted table, or if quoted cells
    would span tabs or lines although without quoting all rows have equally many cells.
    """
    if separator != "\t":
        return _read(text, separator, path, quoted=True)
    try:
        rows = _read(text, separator, path, quoted=True)
    except UserError:
        return _read(text, separator, path, quoted=False)
    if any(mark in cell for _, row in rows for cell in row for mark in "\t\r\n"):
        plain = _read(text, separator, path, quoted=False)
        if len({len(row) for _, row in plain}) == 1:
            return plain
    return rows


def _read(text: str, separator: str, path: Path, *, quoted: bool) -> list[tuple[str, list[str]]]:
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, quoting=quoting)
    try:
        return [(f"{path} line {rows.line_num}", row) for row in rows if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num}: not a valid table: {error}") from None
