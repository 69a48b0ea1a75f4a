"""comparison.yaml: a comparison as a file, written by people and into every comparison's folder."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from pcpo_fast.comparison.analysis import ComparisonSettings
from pcpo_fast.comparison.measures import Costs, Metric, Primary
from pcpo_fast.comparison.variants import ComparisonPlan, Tuning, Variant, settings_from, settings_mapping
from pcpo_fast.config.dotted_keys import flattened
from pcpo_fast.config.messages import did_you_mean, place_of
from pcpo_fast.config.schema import HomePath
from pcpo_fast.config.yaml_text import dump_yaml, read_yaml
from pcpo_fast.errors import UserError
from pcpo_fast.files.atomic import write_atomically

FILE = "comparison.yaml"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TuningSection(_Section):
    """How variants are tuned: see :class:`pcpo_fast.comparison.variants.Tuning`."""

    lr: list[float]
    seeds: list[int]
    max_trials: int | None = None


class CostsSection(_Section):
    """What decodes and reward calls count: see :class:`pcpo_fast.comparison.measures.Costs`."""

    decode: float = 1.0
    reward: float = 1.0


class ComparisonFile(_Section):
    """What a file may hold; what has an option on the command line may also be given there, and that wins."""

    output: HomePath | None = None
    config: HomePath | None = None
    seeds: int | list[int] = 3
    settings: dict[str, Any] = {}
    variants: dict[str, dict[str, Any] | None] = {}
    baseline: str | None = None
    metric: Metric = "training"
    target: float | None = None
    at_epoch: int | None = None
    smoothing: int = 5
    primary: Primary | None = None
    costs: CostsSection = CostsSection()
    tuning: TuningSection | None = None


_EXPECTED = {
    "seeds": "a number of seeds, or a list of them",
    "variants": "a mapping of names to settings (or to nothing)",
    "settings": "a mapping of settings",
    "metric": "training or heldout",
    "target": "a number",
    "at_epoch": "an integer",
    "smoothing": "an integer",
    "primary": f"one of {', '.join(get_args(Primary))}",
    "costs": "a mapping of decode and reward to numbers",
    "costs.decode": "a number",
    "costs.reward": "a number",
    "tuning": "a mapping of lr, seeds and max_trials",
    "tuning.lr": "a list of numbers",
    "tuning.seeds": "a list of integers",
    "tuning.max_trials": "an integer",
}


def read_plan_file(path: Path) -> ComparisonFile:
    """Read and check a file.

    Raises:
        UserError: it cannot be read, or a key or value is wrong; one sentence with the line.
    """
    values, places = read_yaml(path)
    try:
        return ComparisonFile.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        at = tuple(map(str, problem["loc"]))
        at = max((key for key in places if at[: len(key)] == key), key=len, default=at[:1])
        raise UserError(f"{place_of(at, places, str(path))}: {_sentence(problem)}") from None


def _sentence(problem: ErrorDetails) -> str:
    *above, last = (part for part in map(str, problem["loc"]) if part != "int" and not part.startswith("list["))
    if problem["type"] == "extra_forbidden":
        sections: dict[str, type[BaseModel]] = {"tuning": TuningSection, "costs": CostsSection}
        section = sections.get(above[0] if above else "", ComparisonFile)
        allowed = list(section.model_fields)
        hint = did_you_mean(last, allowed) or f"; {above[0] if above else 'a comparison'} takes {', '.join(allowed)}"
        return f"unknown key {'.'.join([*above, last])}{hint}"
    if problem["type"] == "missing":
        return f"{'.'.join([*above, last])} is missing"
    keys = [".".join([*above, last][:length]) for length in (2, 1)]
    key = next((key for key in keys if key in _EXPECTED), keys[-1])
    return f"{key}: must be {_EXPECTED.get(key, 'a text')}, got {problem['input']!r}"


def variants_of(file: ComparisonFile) -> tuple[Variant, ...]:
    """The variants of a file; ``config`` among a variant's settings is its own file."""
    found = []
    for name, values in file.variants.items():
        own = dict(values or {})
        config = own.pop("config", None)
        if config is not None and not isinstance(config, str):
            raise UserError(f"variants.{name}.config: must be the name of a YAML file, got {config!r}")
        search = dict(flattened(own.pop("search"))) if own.get("search") else {}
        for key, choices in search.items():
            if not key or not isinstance(choices, list) or not choices:
                where = f"variants.{name}.search{key and '.'}{key}"
                raise UserError(f"{where}: must be a list of values to choose from, got {choices!r}")
        found.append(Variant(name, config, settings_from(own), search))
    return tuple(found)


def seeds_of(file: ComparisonFile) -> tuple[int, ...]:
    """The seeds of a file: a number counts from 0."""
    seeds = tuple(range(file.seeds)) if isinstance(file.seeds, int) else tuple(file.seeds)
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds: must be a number of at least 1, or distinct numbers from 0, got {file.seeds}")
    return seeds


def tuning_of(file: ComparisonFile, seeds: Sequence[int]) -> Tuning | None:
    """How a file says that variants are tuned, and `seeds` are those of the comparison.

    Raises:
        UserError: the rates or the seeds are not sound, or a variant searches and there is no ``tuning``.
    """
    given = file.tuning
    if given is None:
        searching = [name for name, values in file.variants.items() if "search" in (values or {})]
        if searching:
            raise UserError(f"variants.{searching[0]}.search: needs the key tuning, whose lr and seeds say how")
        return None
    rates = sorted(set(given.lr))
    if len(rates) < 2 or len(rates) < len(given.lr) or not (rates[0] > 0 and rates[-1] < float("inf")):
        raise UserError(f"tuning.lr: must be two or more distinct numbers above 0, got {given.lr}")
    if not given.seeds or min(given.seeds) < 0 or len(set(given.seeds)) < len(given.seeds):
        raise UserError(f"tuning.seeds: must be distinct numbers from 0, got {given.seeds}")
    both = sorted(set(given.seeds) & set(seeds))
    if both:
        raise UserError(
            f"tuning.seeds: {', '.join(map(str, both))} also decides the comparison (seeds), which needs seeds that "
            "nothing was chosen on"
        )
    return Tuning(tuple(rates), tuple(given.seeds), given.max_trials)


def write_plan_file(plan: ComparisonPlan, settings: ComparisonSettings) -> Path:
    """Write ``OUTPUT/comparison.yaml``, from which ``compare --output OUTPUT`` continues; returns its path."""
    variants = {
        variant.name: ({"config": variant.config} if variant.config else {})
        | settings_mapping(variant.settings)
        | ({"search": dict(variant.search)} if variant.search else {})
        for variant in plan.variants
    }
    seeds = list(plan.seeds)
    values: dict[str, Any] = {
        "output": str(plan.output),
        "config": plan.config,
        "seeds": len(seeds) if seeds == list(range(len(seeds))) else seeds,
        "settings": settings_mapping(plan.settings),
        "variants": variants,
        "baseline": settings.baseline,
        "metric": settings.metric,
        "target": settings.target,
        "at_epoch": settings.at_epoch,
        "smoothing": settings.smoothing,
        "primary": settings.primary,
        "costs": None if settings.costs == Costs() else asdict(settings.costs),
        "tuning": None if plan.tuning is None else _without_none(asdict(plan.tuning)),
    }
    path = plan.output / FILE
    write_atomically(path, dump_yaml({key: value for key, value in values.items() if value not in (None, {})}))
    return path


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if value is not None
    }
