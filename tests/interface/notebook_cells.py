"""Cells of a notebook, executed in a module as a kernel does it in ``__main__``."""

import ast
import linecache
from types import ModuleType
from typing import Any


def execute(source: str, name: str, module: ModuleType) -> Any:
    """Run a cell in a module; returns the value of its last expression, which a notebook shows."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None  # type: ignore[attr-defined]
    exec(compile(tree, name, "exec"), module.__dict__)
    return None if last is None else eval(compile(last, name, "eval"), module.__dict__)  # noqa: S307
