"""comparison.yaml: the definition of a comparison, written by the user and saved to every comparison's folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from pcpo_fast.comparison.analysis import ComparisonSettings
from pcpo_fast.comparison.measures import Costs, Metric, Primary
from pcpo_fast.comparison.variants import ComparisonPlan, Tuning, Variant, settings_from, settings_mapping
from pcpo_fast.config.dotted_keys import flattened
from pcpo_fast.config.messages import did_you_mean, place_of
from pcpo_fast.config.schema import HomePath
from pcpo_fast.config.shipped import find
from pcpo_fast.config.yaml_text import dump_yaml, read_yaml
from pcpo_fast.errors import UserError
from pcpo_fast.files.atomic import write_atomically

FILE = "comparison.yaml"


REPORTED = ("baseline", "metric", "target", "at_epoch", "smoothing", "primary")
"""Fields that the file and :class:`ComparisonSettings` share."""


class ComparisonFile(BaseModel):
    """The schema of the file; command-line options take precedence over it.

    Field descriptions complete the error message "must be ...".
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    output: HomePath | None = None
    config: HomePath | None = None
    seeds: int | list[int] = Field(3, description="a number of seeds, or a list of them")
    settings: dict[str, Any] = Field({}, description="a mapping of settings")
    variants: dict[str, dict[str, Any] | None] = Field({}, description="a mapping of names to settings (or to nothing)")
    baseline: str | None = None
    metric: Metric = Field("training", description="training or heldout")
    target: float | None = Field(None, description="a number")
    at_epoch: int | None = Field(None, description="an integer")
    smoothing: int = Field(5, description="an integer")
    primary: Primary | None = Field(None, description=f"one of {', '.join(get_args(Primary))}")
    costs: Costs = Field(Costs(), description="a mapping of decode and reward to numbers")
    tuning: Tuning | None = Field(None, description="a mapping of lr, seeds and max_trials")


def read_plan_file(path: Path) -> ComparisonFile:
    """Read and validate a file.

    Raises:
        UserError: it cannot be read, or a key or value is invalid; the message gives the line.
    """
    values, places = read_yaml(find(path))
    try:
        return ComparisonFile.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        at = tuple(map(str, problem["loc"]))
        at = max((key for key in places if at[: len(key)] == key), key=len, default=at[:1])
        raise UserError(f"{place_of(at, places, str(path))}: {_sentence(problem)}") from None


def _sentence(problem: ErrorDetails) -> str:
    first, *below = (part for part in map(str, problem["loc"]) if part != "int" and not part.startswith("list["))
    sections: dict[str, type[BaseModel]] = {"tuning": Tuning, "costs": Costs}
    fields = sections[first].model_fields if below and first in sections else ComparisonFile.model_fields
    last = below[-1] if below else first
    if problem["type"] == "extra_forbidden":
        hint = did_you_mean(last, list(fields)) or f"; {first if below else 'a comparison'} has {', '.join(fields)}"
        return f"unknown key {'.'.join([first, *below])}{hint}"
    if problem["type"] == "missing":
        return f"{'.'.join([first, *below])} is missing"
    key = f"{first}.{below[0]}" if below and first in sections else first
    return f"{key}: must be {fields[key.rpartition('.')[2]].description or 'a string'}, got {problem['input']!r}"


def variants_of(file: ComparisonFile) -> tuple[Variant, ...]:
    """The variants of a file; the key ``config`` of a variant names its own configuration."""
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
    """The seeds of a file; an integer n means 0 to n - 1."""
    seeds = tuple(range(file.seeds)) if isinstance(file.seeds, int) else tuple(file.seeds)
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds: must be a number of at least 1, or distinct numbers from 0, got {file.seeds}")
    return seeds


def tuning_of(file: ComparisonFile, seeds: Sequence[int]) -> Tuning | None:
    """The validated tuning section of a file; `seeds` are those of the comparison.

    Raises:
        UserError: the rates or the seeds are invalid, or a variant has ``search`` and there is no ``tuning``.
    """
    given = file.tuning
    if given is None:
        searching = [name for name, values in file.variants.items() if "search" in (values or {})]
        if searching:
            raise UserError(f"variants.{searching[0]}.search: needs a section tuning with lr and seeds")
        return None
    rates = sorted(set(given.lr))
    if len(rates) < 2 or len(rates) < len(given.lr) or not (rates[0] > 0 and rates[-1] < float("inf")):
        raise UserError(f"tuning.lr: must be two or more distinct numbers above 0, got {list(given.lr)}")
    if not given.seeds or min(given.seeds) < 0 or len(set(given.seeds)) < len(given.seeds):
        raise UserError(f"tuning.seeds: must be distinct numbers from 0, got {list(given.seeds)}")
    both = sorted(set(given.seeds) & set(seeds))
    if both:
        raise UserError(
            f"tuning.seeds: {', '.join(map(str, both))} is also a seed of the comparison (seeds), which must not be "
            "used for tuning"
        )
    return given.model_copy(update={"lr": tuple(rates)})


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
        **{name: getattr(settings, name) for name in REPORTED},
        "costs": None if settings.costs == Costs() else settings.costs.model_dump(),
        "tuning": plan.tuning and plan.tuning.model_dump(mode="json", exclude_none=True),
    }
    path = plan.output / FILE
    write_atomically(path, dump_yaml({key: value for key, value in values.items() if value not in (None, {})}))
    return path
