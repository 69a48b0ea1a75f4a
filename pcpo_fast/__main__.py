"""``python -m pcpo_fast``."""

from pcpo_fast.cli import program

program()
