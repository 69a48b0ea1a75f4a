"""``docs/configuration.md``, made from the configuration's own fields: ``python -m pcpo_fast.config.docs``.

It also fills the table of samplers in ``docs/algorithms.md``. Run it from the project's folder after changing
:mod:`pcpo_fast.config.schema` or :mod:`pcpo_fast.config.sampler_registry`; a test compares them.
"""

import re
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pcpo_fast.config.presets import PRESETS
from pcpo_fast.config.roles import Role, roles, sections_in
from pcpo_fast.config.sampler_registry import SAMPLERS
from pcpo_fast.config.schema import LARGEST, Config, NameIn
from pcpo_fast.config.unused_settings import REWARD_RULES, RULES
from pcpo_fast.config.yaml_text import dump_yaml, value_text

COMMAND = "python -m pcpo_fast.config.docs"
DOCUMENT = Path("docs/configuration.md")
ALGORITHMS = Path("docs/algorithms.md")

_HEAD = f"""<!-- Made by `{COMMAND}` from pcpo_fast/config/schema.py; change the descriptions there. -->
# Configuration

A run is described by a YAML file and by settings on the command line:

    pcpo-fast train --config tiny_flux train.epochs=20 optimizer.lr=3e-4

A value comes from the first of these that has one: the command line (`key.subkey=value` in YAML; the last one wins),
the YAML file, the preset named by `algorithm`, the default below. Lists are given whole
(`credit.steps=[0,1,2]`) or by position (`rewards.0.weight=2`). An unknown key, a wrong type or a value out of range
stops the program before anything is loaded. The run directory's `config.yaml` records every value that was used.

Paths are relative to the current directory; `~` is the home folder. A path below `configs/`, `ds_configs/`,
`examples/` or `assets/` that is not there is the one that comes with pcpo_fast, in a wheel as in a checkout; `--config`
also takes the name of a configuration that `pcpo-fast configs` lists. Numbers are written in plain digits: `0123`,
`1:30` and `0_7`, which YAML 1.1 reads as 83, 90 and 7, are refused. On the command line a string that
contains `#` or a colon needs no quotes. Counts are below 2^31.
"""

_RULES_HEAD = """
## Settings that need others

A setting that the file or the command line changes from its default, and that would have no effect, is refused, so
that nobody waits for something that was never switched on. One that does nothing only because the run is too short or
too small for it (`scoring.overlap` with one batch, or `checkpoint.keep_best` with evaluations that never meet a
checkpoint) is named at the start of the run instead, and by `pcpo-fast preflight`. A run's own `config.yaml` always
loads. Turning a feature off on the command line (`prompts.heldout=null`, `window.size=0`, `credit.kl_coefficient=0`,
`model.gradient_checkpointing=false`) also turns off the file's other settings for it.

| setting | only takes effect with |
|---|---|
| `model.guidance` | a model with an embedded guidance scale (FLUX.1-dev, FLUX.2-dev) |
| `model.max_sequence_length` | a model that reads prompts with a text encoder other than CLIP |
"""

_ROLES_HEAD = """
## When a setting may differ

Most settings determine what is learnt: a resumed run must keep the value that it began with ([resuming](resuming.md)),
a different value makes a different variant ([comparing](comparing.md)), and all hosts of a run share it. Exceptions:

| the setting | |
|---|---|
"""

_ROLES: tuple[tuple[str, Callable[[Role], bool]], ...] = (
    ("may change on resume", lambda role: role.on_resume == "free"),
    (
        "may change on resume if the run's `inputs.json` records the content that it names",
        lambda role: role.on_resume == "by_content",
    ),
    ("does not make a different variant in a comparison", lambda role: role.in_comparison == "incidental"),
    ("differs between the runs of one variant", lambda role: role.in_comparison == "own"),
    (
        "is part of the base model, the same in all runs that are composed (`--run` given twice)",
        lambda role: role.base_model,
    ),
    ("may differ between the hosts of a run", lambda role: role.per_host),
)

_NAMES: dict[Any, str] = {int: "integer", float: "number", bool: "true or false", str: "string", NoneType: "null"}


def render() -> str:
    """The document as Markdown."""
    parts = [_HEAD, "\n## Top level\n\n", _table(Config, "")]
    for name, section, text in _sections(Config):
        parts.append(f"\n## {escape(name)}\n\n{text}\n\n{_table(section, name)}")
    parts.append(_RULES_HEAD)
    for rule in RULES:
        parts.append(f"| {', '.join(f'`{key}`' for key in rule.keys)} | {rule.condition} |\n")
    for name, condition, _ in REWARD_RULES:
        parts.append(f"| `rewards.<position>.{name}` | {condition} |\n")
    parts.append(_ROLES_HEAD)
    for text, holds in _ROLES:
        parts.append(f"| {text} | {', '.join(f'`{key}`' for key in _settings_where(holds))} |\n")
    parts.append("\n## Presets\n\nWhat `algorithm` fills in where nothing else is given.\n")
    for preset, values in PRESETS.items():
        parts.append(f"\n### {preset}\n\n```yaml\n{dump_yaml(values)}```\n")
    return "".join(parts)


def with_samplers(text: str) -> str:
    """``docs/algorithms.md`` with the rows of the samplers as they are registered."""
    rows = "".join(f"| `{name}` | {' | '.join(sampler.row)} |\n" for name, sampler in SAMPLERS.items())
    return re.sub(r"(\| `sampler\.name` \|.*\n\|[-|]+\n)(?:\|.*\n)+", lambda found: found[1] + rows, text)


def _sections(model: type[BaseModel], above: str = "") -> Iterator[tuple[str, type[BaseModel], str]]:
    for name, field in model.model_fields.items():
        for section in sections_in(field.annotation):
            position = ".<position>" if section is not field.annotation else ""
            yield above + name + position, section, (section.__doc__ or "").strip()
            yield from _sections(section, f"{above}{name}.")


def _settings_where(holds: Callable[[Role], bool]) -> Iterator[str]:
    """Their dotted keys; ``section.*`` for all of a section."""
    sections: dict[str, list[tuple[str, bool]]] = {}
    for key, role in roles(Config):
        sections.setdefault(key.rpartition(".")[0], []).append((key, role is not None and holds(role)))
    for section, keys in sections.items():
        whole = section and all(held for _, held in keys)
        yield from [f"{section}.*"] if whole else [key for key, held in keys if held]


def _table(model: type[BaseModel], section: str) -> str:
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if field.annotation in sections_in(field.annotation):
            continue
        cells = (f"`{section}{'.' if section else ''}{name}`", _kind(field), _default(field), field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _kind(field: FieldInfo) -> str:
    limits = _limits(field.metadata)
    for item in field.metadata:
        if isinstance(item, NameIn):
            return ", ".join(f"`{name}`" for name in item.registry)
    return _type_name(field.annotation) + (f", {limits}" if limits else "")


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = _limits(item for extra in arguments[1:] for item in getattr(extra, "metadata", [extra]))
        return _type_name(arguments[0]) + (f", {limits}" if limits else "")
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is tuple:
        distinct = dict.fromkeys(_type_name(argument) for argument in arguments if argument is not Ellipsis)
        count = "" if Ellipsis in arguments else f"{len(arguments)} x "
        return f"list of {count}({', '.join(distinct)})"
    if origin is dict:
        return "mapping"
    if sections_in(annotation):
        return "section"
    return _NAMES[annotation]


def _limits(metadata: Any) -> str:
    words = []
    for item in metadata:
        for name, text in (("ge", "at least {}"), ("gt", "above {}"), ("le", "at most {}"), ("lt", "below {}")):
            if getattr(item, name, None) is not None:
                if (name, getattr(item, name)) == ("le", LARGEST):
                    continue  # said once, in the head
                words.append(text.format("2^63" if (value := getattr(item, name)) == 2**63 else value))
        if getattr(item, "min_length", None):
            words.append("not empty")
    return ", ".join(words)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, tuple):
        if any(isinstance(item, BaseModel) for item in value):
            return ", ".join(f"`{{name: {item.name}}}`" for item in value)
        return ", ".join(f"`{item}`" for item in value)
    return f"`{value_text(value)}`"


def main() -> None:
    """Write the document and the table."""
    algorithms = with_samplers(ALGORITHMS.read_text(encoding="utf-8"))
    for path, text in ((DOCUMENT, render()), (ALGORITHMS, algorithms)):
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
