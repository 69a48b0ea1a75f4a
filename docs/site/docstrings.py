"""Docstrings as Markdown: their cross-references, their mentions of pages, their ``::`` before an example."""

import re
from typing import Any

from griffe import Extension, Module, Object

_ROLE = re.compile(r":(?:func|class|mod|meth|data|attr):`~?([^`]+)`")
_PAGE = re.compile(r"(?<![\w/`\[])docs/(\w+)\.md")


class MarkdownDocstrings(Extension):
    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            text = _PAGE.sub(r"[docs/\1.md](../\1.md)", text)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        self.on_object(obj=pkg)  # on_object is called for what a package holds, not for itself
