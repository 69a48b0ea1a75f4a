"""YAML parsing in which ``1e-4`` is a number, duplicate keys are errors, and every value has a line number."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pcpo_fast.errors import UserError

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"

TextPath = tuple[str, ...]
"""Keys from the top, positions in lists as decimal numbers."""


class _Loader(yaml.SafeLoader):
    """Safe YAML with the numbers that people write: ``1e-4`` is one, which YAML 1.1 takes for a string; ``0123``,
    ``1:30`` and ``0_7``, which are 83, 90 and 7 there, are strings, and no setting takes them for a number.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - the base class declares it
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Writes what :class:`_Loader` reads back: a string that looks like ``1e-4`` is quoted."""


_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(?:0|[1-9][0-9]*|0x[0-9a-fA-F]+)$"), list("-+0123456789"))
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        _FLOAT,
        re.compile(
            r"""^(?:[-+]?[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?
            |[-+]?[0-9]+(?:[eE][-+]?[0-9]+)
            |[-+]?\.[0-9]+(?:[eE][-+]?[0-9]+)?
            |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
            re.VERBOSE,
        ),
        list("-+0123456789."),
    )


class _FastLoader(getattr(yaml, "CSafeLoader", _Loader)):  # type: ignore[misc]  # absent where PyYAML has no libyaml
    """The same through libyaml, ten times as fast; if it fails, :class:`_Loader` parses again for its error message."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def dump_yaml(value: Any) -> str:
    """Block YAML in the order of the keys; reading it again gives the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def value_text(value: Any) -> str:
    """A value on one line, as it may be given on the command line."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=math.inf, sort_keys=False, allow_unicode=True
    )
    return str(text).strip().removesuffix("...").strip()


def parse_value(text: str) -> Any:
    """A value from the command line: one in brackets or quotes is YAML, and so is a word; a sentence is a string.

    In ``bad hands #ugly`` nothing is a comment, and ``low quality: bad`` is no mapping.

    Raises:
        ValueError: the text is not valid YAML; the message is the reason.
    """
    try:
        text = text.strip()
        node = yaml.compose(text, _Loader)
        if node is None or (isinstance(node, yaml.CollectionNode) and not node.flow_style):
            return text or None
        if isinstance(node, yaml.ScalarNode) and node.style is None and node.value != text:
            return text
        if rest := text[node.end_mark.index :].strip():
            raise ValueError(f"unexpected text after it: {rest!r}")
        list(_lines(node, (), "", set()))
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        raise ValueError(error.problem or "not valid YAML") from None
    except (yaml.YAMLError, ValueError, RecursionError, UserError) as error:
        raise ValueError(str(error).splitlines()[0]) from None


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[TextPath, str]]:
    """A YAML file that holds a mapping, and the place ("FILE line N") of each of its values.

    Raises:
        UserError: the file cannot be read, is not UTF-8 or not YAML, holds no mapping, or gives a key twice.
    """
    text = _read_text(path)
    try:
        try:
            values, places = _parse(text, str(path), _FastLoader)
        except (yaml.YAMLError, ValueError):
            values, places = _parse(text, str(path), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(f"{path} line {line}: not valid YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: brackets nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        raise UserError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if values is None:
        return {}, places
    if not isinstance(values, dict):
        raise UserError(f"{path} line 1: a configuration must be a mapping of keys, got a {type(values).__name__}")
    return values, places


def _parse(text: str, file: str, kind: type[Any]) -> tuple[Any, dict[TextPath, str]]:
    """The values of a document, and the place of each; an empty one is None."""
    loader = kind(text)
    try:
        node = loader.get_single_node()
        places = dict(_lines(node, (), file, set()))  # first: constructing resolves merge keys in the nodes
        return None if node is None else loader.construct_document(node), places
    finally:
        loader.dispose()


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"config file {path} is a folder; name a YAML file in it") from None
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"config file {path} line {line} is not UTF-8 text; save it as UTF-8") from None


def _lines(node: yaml.Node | None, key: TextPath, file: str, seen: set[int]) -> Iterator[tuple[TextPath, str]]:
    """Yield the place of every value; refuse a key given twice, where YAML would silently use the last."""
    if node is None or id(node) in seen:  # an alias: its lines are those of its anchor
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for name, value in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode):
                continue  # a key that is no text: the configuration refuses it
            if name.value in first:
                raise UserError(f"{file} line {line}: {name.value} is given twice (first on line {first[name.value]})")
            first[name.value] = line
            yield (*key, name.value), f"{file} line {line}"
            yield from _lines(value, (*key, name.value), file, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*key, str(index)), f"{file} line {value.start_mark.line + 1}"
            yield from _lines(value, (*key, str(index)), file, seen)
