"""From YAML and command line to a checked :class:`pcpo_fast.config.Config`, with errors that say where."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pcpo_fast.config import Config
from pcpo_fast.errors import UserError
from pcpo_fast.presets import PRESETS

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads ``1e-4`` as a number, which YAML 1.1 takes for a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
        |\.[0-9_]+(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key.subkey=value`` overrides, fill in the algorithm preset, and validate.

    Args:
        path: the YAML file, or None for defaults alone.
        overrides: settings from the command line; values are YAML.

    Raises:
        UserError: one sentence for the first problem, naming file, line and key, with what is allowed.
    """
    values, where = ({}, {}) if path is None else _read_yaml(Path(path))
    for text in overrides:
        key, value = _parse_override(text)
        _assign(values, key, value, text)
        where[tuple(key)] = f"command line ({text})"
    algorithm = values.get("algorithm", Config.model_fields["algorithm"].default)
    if algorithm not in PRESETS:
        raise UserError(
            f"{_place(('algorithm',), where, path)}: unknown algorithm {algorithm!r}"
            f"{_suggestion(str(algorithm), PRESETS)}; allowed: {', '.join(PRESETS)}"
        )
    try:
        return Config.model_validate(merged(PRESETS[algorithm], values))
    except ValidationError as error:
        raise UserError(_explain(error, where, path)) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, every value written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over`` laid on top, mapping by mapping."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"config file {path} is a folder; name a YAML file in it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from None
    try:
        node = yaml.compose(text, _Loader)
        where = dict(_locate(node, (), str(path))) if node is not None else {}
        values = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path} line {line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if values is None:
        return {}, where
    if not isinstance(values, dict):
        raise UserError(f"{path} line 1: a config is a mapping of sections, got a {type(values).__name__}")
    return values, where


def _locate(node: yaml.Node, key: KeyPath, file: str) -> Iterator[tuple[KeyPath, str]]:
    """Yield (key path, "file line n") for every node; refuse a key given twice, which YAML would silently merge."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for name, value in node.value:
            line = name.start_mark.line + 1
            if name.value in seen:
                raise UserError(f"{file} line {line}: {name.value} is given twice (first on line {seen[name.value]})")
            seen[name.value] = line
            yield (*key, name.value), f"{file} line {line}"
            yield from _locate(value, (*key, name.value), file)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*key, index), f"{file} line {value.start_mark.line + 1}"
            yield from _locate(value, (*key, index), file)


def _parse_override(text: str) -> tuple[list[str], Any]:
    key, separator, value = text.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z_][\w]*(\.[\w]+)*", key):
        raise UserError(f"command line ({text}): an override is written key.subkey=value")
    try:
        return key.split("."), yaml.load(value, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        raise UserError(f"command line ({text}): {value!r} is not a valid YAML value; quote it") from None


def _assign(values: dict[str, Any], key: Sequence[str], value: Any, text: str) -> None:
    target: Any = values
    for part in key[:-1]:
        if isinstance(target, list) and part.isdigit() and int(part) < len(target):
            target = target[int(part)]
        elif isinstance(target, dict):
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
        else:
            raise UserError(f"command line ({text}): {part} is not a section")
    if isinstance(target, list) and key[-1].isdigit() and int(key[-1]) < len(target):
        target[int(key[-1])] = value
    elif isinstance(target, dict):
        target[key[-1]] = value
    else:
        raise UserError(f"command line ({text}): {'.'.join(key[:-1])} is not a section")


def _place(key: KeyPath, where: Mapping[KeyPath, str], path: str | Path | None) -> str:
    for length in range(len(key), 0, -1):
        if key[:length] in where:
            return where[key[:length]]
        as_text = tuple(str(part) for part in key[:length])
        if as_text in where:
            return where[as_text]
    return str(path) if path is not None else "defaults"


def _explain(error: ValidationError, where: Mapping[KeyPath, str], path: str | Path | None) -> str:
    first = error.errors()[0]
    key: KeyPath = first["loc"]
    dotted = ".".join(str(part) for part in key)
    more = f" ({error.error_count() - 1} more after this one)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        allowed = _keys_at(Config, key[:-1])
        section = ".".join(str(part) for part in key[:-1]) or "the top level"
        message = f"unknown key {dotted}{_suggestion(str(key[-1]), allowed)}; {section} takes {', '.join(allowed)}"
    elif first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        named = message.partition(":")[0]
        key = tuple(named.split(".")) if named else key
    elif first["type"] == "missing":
        message = f"{dotted} is missing"
    else:
        message = f"{dotted}: {_readable(first['msg'])}, got {first['input']!r}"
    return f"{_place(key, where, path)}: {message}{more}"


def _readable(message: str) -> str:
    return message.replace("Input should be", "must be").replace("Input", "it")


def _keys_at(model: type[BaseModel], key: KeyPath) -> list[str]:
    for part in key:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[str(part)].annotation
        options = [annotation, *get_args(annotation)]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)


def _suggestion(word: str, allowed: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""
