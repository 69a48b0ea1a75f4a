"""comparison.yaml: a comparison as a file, written by people and into every comparison's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pcpo_fast.comparison.analysis import ComparisonSettings
from pcpo_fast.comparison.measures import Metric
from pcpo_fast.comparison.variants import ComparisonPlan, Variant, settings_from, settings_mapping
from pcpo_fast.config.messages import did_you_mean, place_of
from pcpo_fast.config.schema import HomePath
from pcpo_fast.config.yaml_text import dump_yaml, read_yaml
from pcpo_fast.errors import UserError
from pcpo_fast.files.atomic import write_atomically

FILE = "comparison.yaml"


class ComparisonFile(BaseModel):
    """What a file may hold; everything may also be given on the command line, which wins."""

    model_config = ConfigDict(extra="forbid", strict=True)

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
        key = tuple(str(part) for part in problem["loc"] if part in ComparisonFile.model_fields or str(part) in values)
        place = place_of(key[:1] or tuple(map(str, problem["loc"][:1])), places, str(path))
        raise UserError(f"{place}: {_sentence(problem['type'], problem)}") from None


def _sentence(kind: str, problem: Mapping[str, Any]) -> str:
    name, allowed = str(problem["loc"][0]), list(ComparisonFile.model_fields)
    if kind == "extra_forbidden":
        hint = did_you_mean(name, allowed) or f"; a comparison takes {', '.join(allowed)}"
        return f"unknown key {name}{hint}"
    expected = {
        "seeds": "a number of seeds, or a list of them",
        "variants": "a mapping of names to settings (or to nothing)",
        "settings": "a mapping of settings",
        "metric": "training or heldout",
        "target": "a number",
        "at_epoch": "a whole number",
        "smoothing": "a whole number",
    }.get(name, "a text")
    return f"{name}: must be {expected}, got {problem['input']!r}"


def variants_of(file: ComparisonFile) -> tuple[Variant, ...]:
    """The variants of a file; ``config`` among a variant's settings is its own file."""
    found = []
    for name, values in file.variants.items():
        own = dict(values or {})
        config = own.pop("config", None)
        if config is not None and not isinstance(config, str):
            raise UserError(f"variants.{name}.config: must be the name of a YAML file, got {config!r}")
        found.append(Variant(name, config, settings_from(own)))
    return tuple(found)


def seeds_of(file: ComparisonFile) -> tuple[int, ...]:
    """The seeds of a file: a number counts from 0."""
    seeds = tuple(range(file.seeds)) if isinstance(file.seeds, int) else tuple(file.seeds)
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds: must be a number of at least 1, or distinct numbers from 0, got {file.seeds}")
    return seeds


def write_plan_file(plan: ComparisonPlan, settings: ComparisonSettings) -> Path:
    """Write ``OUTPUT/comparison.yaml``, from which ``pcpo-fast compare --output OUTPUT`` goes on; returns its path."""
    variants = {
        variant.name: ({"config": variant.config} if variant.config else {}) | settings_mapping(variant.settings)
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
    }
    path = plan.output / FILE
    write_atomically(path, dump_yaml({key: value for key, value in values.items() if value not in (None, {})}))
    return path
