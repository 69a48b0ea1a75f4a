"""The order in which test files start."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from longest_first import LONGEST, longest_first

TESTS = Path(__file__).parent


def test_the_files_are_there_and_named_once() -> None:
    assert [name for name in LONGEST if not (TESTS / name).is_file()] == []
    assert len(set(LONGEST)) == len(LONGEST)


def test_long_files_come_first_and_files_stay_in_one_piece() -> None:
    names = ["test_a.py", LONGEST[1], "kernels/test_b.py", LONGEST[1], LONGEST[0]]
    items: list[Any] = [SimpleNamespace(path=TESTS / name, number=number) for number, name in enumerate(names)]
    longest_first(items)
    assert [item.number for item in items] == [4, 1, 3, 0, 2]
