"""Loads and validates a :class:`pcpo_fast.config.schema.Config` from YAML and the command line."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pcpo_fast.config.dotted_keys import flattened
from pcpo_fast.config.messages import did_you_mean, explain, place_of
from pcpo_fast.config.presets import PRESETS
from pcpo_fast.config.roles import sections_in
from pcpo_fast.config.sampler_registry import listed
from pcpo_fast.config.schema import Config
from pcpo_fast.config.shipped import configurations, find_configuration
from pcpo_fast.config.unused_settings import unused
from pcpo_fast.config.yaml_text import TextPath, dump_yaml, parse_value, read_yaml
from pcpo_fast.errors import UserError

_WRITTEN_OUT = {"deepspeed", "model.revision", "model.lora.targets", "model.lora.init", "credit.steps", "seed"}
"""A file that sets all of these was written by a run (of any version), not by hand."""


def load_config(
    source: str | Path | Config | None, overrides: Sequence[str] = (), where: str = "command line"
) -> Config:
    """Read a YAML file, apply ``key.subkey=value`` overrides, fill in the algorithm preset, and validate.

    A later override wins over an earlier one. A mapping given for a section is laid over what is there, key by key;
    a section without any key is left at its defaults; one value of a list is named by its position
    (``rewards.0.weight=2``).

    Args:
        source: the YAML file or the name of a shipped one, a configuration that is loaded already, or None for defaults
            alone.
        overrides: settings; values are YAML.
        where: what messages call the place that the overrides come from.

    Raises:
        UserError: one sentence for the first problem, naming file, line and key, with what is allowed.
    """
    values: dict[str, Any] = {}
    places: dict[TextPath, str] = {}
    if isinstance(source, Config):
        values = source.model_dump(mode="json")
    elif source is not None:
        values, places = read_yaml(find_configuration(source))
    given = {".".join(key) for key in places}
    if given >= _WRITTEN_OUT:
        given.clear()  # a run's own file: what it holds was checked when the run began, or is what it has trained with
    commands: list[tuple[str, Any]] = []
    for text in overrides:
        key, value = _parse_override(text, where)
        commands.append((".".join(key), value))
        _assign(values, key, value, f"{where} ({text})")
        places = {at: place for at, place in places.items() if at[: len(key)] != key}
        places[key] = f"{where} ({text})"
    values = _without_empty_sections(values, Config)
    fallback = "defaults" if source is None else "configuration" if isinstance(source, Config) else str(source)
    algorithm = values.get("algorithm", Config.model_fields["algorithm"].default)
    if not isinstance(algorithm, str) or algorithm not in PRESETS:
        raise UserError(
            f"{place_of(('algorithm',), places, fallback)}: algorithm: must be one of {', '.join(PRESETS)}, "
            f"got {algorithm!r}{did_you_mean(str(algorithm), PRESETS)}"
        )
    commanded = {name: None for key, value in commands for name, _ in flattened(value, key, lists=True)}
    try:
        config = Config.model_validate(merged(PRESETS[algorithm], values))
    except ValidationError as error:
        raise UserError(explain(error, places, fallback, commanded)) from None
    given |= commanded.keys()
    _refuse_unused(config, given, commanded, places, fallback)
    # What only the model can say of its settings (policies/) concerns those alone that the user has set.
    of_user = {key.split(".")[1] for key in given if key.startswith("model.")}
    if isinstance(source, Config):
        of_user |= source.model.model_fields_set
    config.model.model_fields_set.intersection_update(of_user)
    return config


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, every value written out; :func:`load_config` reads it back equal."""
    return dump_yaml(config.model_dump(mode="json"))


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over`` laid on top, mapping by mapping."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def _refuse_unused(
    config: Config, given: Collection[str], commanded: Collection[str], places: Mapping[TextPath, str], fallback: str
) -> None:
    """Fail if settings have no effect; the message lists all of them."""
    found = list(unused(config, Config.model_validate(PRESETS[config.algorithm]), given, commanded))
    if not found:
        return
    first = place_of(tuple(found[0][0][0].split(".")), places, fallback)
    clauses = []
    for keys, condition in found:
        named = []
        for key in keys:
            place = place_of(tuple(key.split(".")), places, fallback)
            said = place == first or key in commanded
            named.append(key if said else f"{key} ({place.removeprefix(fallback).strip()})")
        clauses.append(
            f"{listed(named, last='and')} {'only takes' if len(keys) == 1 else 'only take'} effect with {condition}"
        )
    them = "it" if sum(len(keys) for keys, _ in found) == 1 else "them"
    raise UserError(f"{first}: {'; '.join(clauses)}: remove {them}")


def _parse_override(text: str, where: str) -> tuple[TextPath, Any]:
    key, separator, value = text.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        file = not separator and (Path(text).suffix in (".yaml", ".yml") or text in configurations())
        hint = f"; a configuration is given as --config {text}" if file and where == "command line" else ""
        raise UserError(f"{where} ({text}): an override must have the form key.subkey=value{hint}")
    try:
        return tuple(key.split(".")), parse_value(value)
    except ValueError as error:
        raise UserError(f"{where} ({text}): {value!r} is not a valid YAML value ({error}); quote it") from None


def _assign(values: dict[str, Any], key: TextPath, value: Any, place: str) -> None:
    target: Any = values
    defaults: Any = Config().model_dump(mode="json")
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        if isinstance(target, list):
            if not (part.isdecimal() and int(part) < len(target)):
                name = ".".join(key[:depth])
                raise UserError(f"{place}: {name} is a list of {len(target)}; positions count from 0")
            position: Any = int(part)
        elif isinstance(target, dict):
            position = part
        else:
            raise UserError(f"{place}: {'.'.join(key[:depth])} is a value, not a section")
        defaults = defaults.get(part) if isinstance(defaults, dict) else None
        below = target.get(position) if isinstance(target, dict) else target[position]
        if last:
            target[position] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
        elif below is None:
            # Not in the file: positions of a list are those of its default.
            target[position] = below = defaults if isinstance(defaults, list) else {}
        target = below


def _without_empty_sections(values: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Drop sections that are null: in YAML, those whose keys are all commented out."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        field = model.model_fields.get(name) if isinstance(name, str) else None
        section = field.annotation if field is not None else None
        if section in sections_in(section):
            if value is None:
                continue
            if isinstance(value, Mapping):
                value = _without_empty_sections(value, section)
        kept[name] = value
    return kept
