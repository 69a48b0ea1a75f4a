"""Error messages for invalid configurations."""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pcpo_fast.config.roles import sections_in
from pcpo_fast.config.schema import Config
from pcpo_fast.config.yaml_text import TextPath

_ALLOWED = {
    "int_type": "must be an integer",
    "int_parsing": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "tuple_type": "must be a list",
    "model_type": "must be a section (keys with values)",
    "dict_type": "must be a mapping (keys with values)",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "too_short": "must have at least {min_length} values",
    "too_long": "must have at most {max_length} values",
    "invalid_key": "a key must be a string",
    "invalid-json-value": "must be made of strings, numbers, true, false, null, lists and mappings",
}


def explain(
    error: ValidationError, places: Mapping[TextPath, str], fallback: str, commanded: Collection[str] = ()
) -> str:
    """The first problem as "PLACE: KEY: what is allowed, got what".

    The place of a conflict is that of the first setting in its message that the command line gives, or else of the
    first.

    Args:
        error: of :class:`pcpo_fast.config.schema.Config`.
        places: where each value was set.
        fallback: the place of everything else.
        commanded: dotted keys that the command line gives.
    """
    problems = _joined(error.errors())
    first = problems[0]
    inner = [tuple(problem["loc"]) for problem in problems]
    # pydantic also reports a list with an invalid value as too short, which is not a second problem.
    distinct = [
        key for key in dict.fromkeys(inner) if not any(len(o) > len(key) and o[: len(key)] == key for o in inner)
    ]
    more = f" ({len(distinct) - 1} more after this one)" if len(distinct) > 1 else ""
    key = tuple(str(part) for part in first["loc"])
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        first_key, *others = re.findall(r"^\w+(?:\.\w+)*|\b[a-z]\w*(?:\.\w+)+", message)
        given = (one for key in (first_key, *others) for one in commanded if one == key or one.startswith(f"{key}."))
        key = tuple(next(given, first_key).split("."))
    else:
        message = _message(first, ".".join(key))
    return f"{place_of(key, places, fallback)}: {message}{more}"


def _joined(problems: list[ErrorDetails]) -> list[ErrorDetails]:
    """One problem where pydantic has two for a value that is neither a truth value nor one of some words."""
    joined: list[ErrorDetails] = []
    for problem in problems:
        if joined and joined[-1]["loc"] == (*problem["loc"][:-1], "bool") and problem["type"] == "literal_error":
            allowed = {"expected": f"true, false, {problem['ctx']['expected']}"}
            joined[-1] = problem | {"loc": problem["loc"][:-1], "ctx": allowed}  # type: ignore[assignment]
        else:
            joined.append(problem)
    return joined


def place_of(key: TextPath, places: Mapping[TextPath, str], fallback: str) -> str:
    """Where a key was set, or something below it, or the innermost section around it that was given at all."""
    below = [place for at, place in places.items() if at[: len(key)] == key]
    around = [places[key[:length]] for length in range(len(key), 0, -1) if key[:length] in places]
    return next(iter([*(below if key not in places else []), *around]), fallback)


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """ ", did you mean X?" for a word close to an allowed one, or nothing."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""


def dotted_keys(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """The keys of all settings and sections, from the outside in."""
    for name, field in model.model_fields.items():
        yield above + name
        if field.annotation in sections_in(field.annotation):
            yield from dotted_keys(field.annotation, f"{above}{name}.")


def _message(problem: ErrorDetails, dotted: str) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(problem["loc"])
    if kind == "missing":
        return f"{dotted} is missing"
    got = f"got {_shown(problem['input'])}"
    if kind == "string_type":
        scalar = isinstance(problem["input"], int | float)
        return f"{dotted}: must be a string, {got}" + ("; put it in quotes" if scalar else "")
    if kind == "literal_error":
        allowed = [part.strip("'") for part in context["expected"].replace(" or ", ", ").split(", ")]
        hint = did_you_mean(str(problem["input"]), allowed)
        return f"{dotted}: must be one of {', '.join(allowed)}, {got}{hint}"
    if kind in ("int_type", "float_type") and re.fullmatch(r"[-+]?[\d_:.]*\d[\d_:.]*", str(problem["input"])):
        got += "; digits alone, without a leading zero, colons or underscores"
    if re.fullmatch(r"rewards(\.\d+)?", dotted):
        got += "; a reward is written {name: NAME}, several [{name: NAME}, {name: NAME}]"
    return f"{dotted}: {requirement(problem)}, {got}"


def requirement(problem: ErrorDetails) -> str:
    """What a value must be, for the middle of a sentence."""
    if problem["type"] in _ALLOWED:
        return _ALLOWED[problem["type"]].format(**problem.get("ctx", {}))
    reason = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{reason[0].lower()}{reason[1:]}"


def _unknown_key(key: Sequence[str | int]) -> str:
    model: type[BaseModel] = Config
    for part in key[:-1]:
        if not isinstance(part, int):
            model = sections_in(model.model_fields[part].annotation)[0]
    allowed, word = list(model.model_fields), str(key[-1])
    section = ".".join(map(str, key[:-1]))
    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.6)
    found = [f"{section}.{close[0]}" if section else close[0]] if close else close_settings(word)
    hint = f", did you mean {found[0]}?" if found else f"; {section or 'the top level'} takes {', '.join(allowed)}"
    return f"unknown key {'.'.join(map(str, key))}{hint}"


def close_settings(word: str) -> list[str]:
    """Settings anywhere whose own name is this word, or else the one whose name is close to it, as dotted keys."""
    named: dict[str, list[str]] = {}
    for key in dotted_keys(Config):
        named.setdefault(key.rpartition(".")[2], []).append(key)
    return (
        named[word]
        if word in named
        else [named[name][0] for name in difflib.get_close_matches(word, named, n=1, cutoff=0.75)]
    )


def _shown(value: Any) -> str:
    """A value as the user may have written it, cut to a readable length."""
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
