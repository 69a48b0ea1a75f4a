"""Tables of numbers with intervals, as Markdown or for the terminal."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pcpo_fast.reporting.statistics import Estimate

if TYPE_CHECKING:
    from rich.table import Table

_STYLES = {"better": "green", "worse": "red"}


@dataclass(frozen=True)
class Grid:
    """A table of strings."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As Markdown; the first column is left-aligned, the others right-aligned."""
        lines = [self.header, ("---", *("---:" for _ in self.header[1:])), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    def section(self) -> str:
        """As Markdown with the title as a heading."""
        return f"## {self.title}\n\n{self.markdown()}"

    def rich(self) -> "Table":
        """For the terminal, with coloured verdicts."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title, title_justify="left", title_style="bold")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*(Text(cell, style=_STYLES.get(cell.removeprefix("probably "), "")) for cell in row))
        return table


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def number_text(value: float, *, signed: bool = False) -> str:
    """Format with about four significant digits; an exponent only below 1e-4 or from 1e6."""
    sign = "+" if signed else ""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e6:
        size = abs(value)
        digits = 1 if size >= 100 else 2 if size >= 10 else 3 if size >= 1 else 4 if size >= 1e-3 else 6
        return f"{value:{sign}.{digits}f}"
    return f"{value:{sign}.2e}"


def fixed_text(value: float, digits: int = 3, *, signed: bool = False) -> str:
    """Format with a fixed number of decimals; with an exponent from 1e6."""
    return f"{value:{'+' if signed else ''}{f'.{digits}f' if abs(value) < 1e6 else '.2e'}}"


def estimate_text(estimate: Estimate, text: Callable[[float], str] = number_text) -> str:
    """A value and its interval, each formatted by `text`."""
    if estimate.low is None or estimate.high is None:
        return text(estimate.value)
    return f"{text(estimate.value)} [{text(estimate.low)}, {text(estimate.high)}]"
