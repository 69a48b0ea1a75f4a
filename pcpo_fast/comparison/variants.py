"""A comparison's variants and seeds, and the validated configuration of each of its runs."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict

from pcpo_fast.comparison.differences import decisive, differences
from pcpo_fast.config.dotted_keys import flattened
from pcpo_fast.config.loading import load_config
from pcpo_fast.config.schema import Config
from pcpo_fast.config.yaml_text import parse_value
from pcpo_fast.errors import UserError

EMBEDDINGS = "embeddings"
"""Folder of encoded prompts that all runs of a comparison share."""

TUNING = "tuning"
"""Folder of the runs by which variants are tuned."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = (EMBEDDINGS, TUNING, "figures")
_OWNED = {"seed": "use --seeds", "output_dir": "use --output"}


@dataclass(frozen=True)
class Variant:
    """One of the configurations to compare.

    Attributes:
        name: its name, and its folder's.
        config: its own YAML file; None for the comparison's.
        settings: ``key.subkey=value``, which override the file and the settings common to all variants.
        search: candidate values to tune over, by dotted key.
    """

    name: str
    config: str | None = None
    settings: tuple[str, ...] = ()
    search: Mapping[str, Sequence[object]] = field(default_factory=dict, hash=False)


class Tuning(BaseModel):
    """How every variant is tuned before the comparison.

    Attributes:
        lr: learning rates that every variant starts with, ascending, at least two.
        seeds: seeds of the tuning runs; none of them may be a seed of the comparison.
        max_trials: maximum number of trials per variant; None means twice the size of the largest grid.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    lr: Annotated[tuple[float, ...], Strict(False)] = Field(description="a list of numbers")
    seeds: Annotated[tuple[int, ...], Strict(False)] = Field(description="a list of integers")
    max_trials: int | None = Field(None, description="an integer")


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison to run.

    Attributes:
        output: its folder.
        config: the YAML file for variants without their own; None for the defaults.
        settings: ``key.subkey=value`` common to all variants.
        variants: at least one, with distinct names.
        seeds: seeds that every variant is run with.
        tuning: how variants are tuned first; None compares them as they are.
    """

    output: Path
    config: str | None
    settings: tuple[str, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    tuning: Tuning | None = None


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    Attributes:
        variant, seed: the variant's name and the seed.
        folder: its run directory.
        log: file for its output.
        config_file, overrides: the trainer's arguments.
        config: the configuration they resolve to.
    """

    variant: str
    seed: int
    folder: Path
    log: Path
    config_file: str | None
    overrides: tuple[str, ...]
    config: Config

    @property
    def name(self) -> str:
        """How messages name the run."""
        return f"{self.variant}, seed {self.seed}"


def parse_variant(text: str) -> Variant:
    """``NAME: [FILE.yaml] key=value ...`` from the command line; quotes as in a shell.

    Raises:
        UserError: the text is not in this form.
    """
    name, colon, rest = text.partition(":")
    where = f"--variant {text!r}"
    if not colon or "=" in name:
        raise UserError(
            f"{where}: must have the form 'NAME: key=value key=value', for example 'native: credit.rule=native'"
        )
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise UserError(f"{where}: {error}; close the quotes") from None
    config = words.pop(0) if words and "=" not in words[0] else None
    stray = [word for word in words if "=" not in word]
    if stray:
        raise UserError(
            f"{where}: {stray[0]} is not a setting; a setting has the form key.subkey=value, without spaces"
        )
    return Variant(name.strip(), config, tuple(words))


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from the command line: ``5`` means 0 to 4, ``3,7,11`` exactly these, ``3,`` only 3.

    Raises:
        UserError: the text is in neither form, or names a seed twice.
    """
    parts = [part.strip() for part in text.split(",")]
    listed = parts[:-1] if len(parts) > 1 and not parts[-1] else parts
    if not all(part.isdecimal() for part in listed) or (len(parts) == 1 and int(text) == 0):
        raise UserError(f"--seeds: must be a number of seeds (5), or a list of them (3,7,11), got {text!r}")
    seeds = tuple(map(int, listed)) if len(parts) > 1 else tuple(range(int(text)))
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds: each seed may be given only once, got {text}")
    return seeds


def settings_from(values: Mapping[str, object]) -> tuple[str, ...]:
    """Convert nested or dotted settings of a YAML file to ``key.subkey=value``."""
    return tuple(f"{key}={json.dumps(value)}" for key, value in flattened(values) if key)


def settings_mapping(settings: Sequence[str]) -> dict[str, object]:
    """The inverse of :func:`settings_from`: dotted keys and their values; the last value of a key wins."""
    found: dict[str, object] = {}
    for text in settings:
        key, _, value = text.partition("=")
        for below, leaf in flattened(parse_value(value), key):
            found[below] = leaf
    return found


def check_name(name: str) -> None:
    """Check that a variant's name can name its folder.

    Raises:
        UserError: it cannot.
    """
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise UserError(
            f"variant {name!r}: a name is also the name of a folder: it must consist of letters, digits, '.', '_' "
            f"and '-', and must not be {', '.join(_RESERVED[:-1])} or {_RESERVED[-1]}"
        )


def planned_runs(plan: ComparisonPlan, *, twins: bool = False) -> list[PlannedRun]:
    """Every run with its validated configuration, ordered by seed so that all variants progress evenly.

    Args:
        plan: the comparison.
        twins: allow identical variants, which tuning may produce.

    Raises:
        UserError: a name, setting or configuration is invalid, or two variants are identical; names the variant.
    """
    names = [variant.name for variant in plan.variants]
    for name in names:
        check_name(name)
        if names.count(name) > 1:
            raise UserError(f"variant {name}: duplicate name")
    runs = [
        planned_run(plan, variant, seed, plan.output / variant.name) for seed in plan.seeds for variant in plan.variants
    ]
    if not twins:
        _refuse_twins(runs[: len(names)])
    return runs


def planned_run(plan: ComparisonPlan, variant: Variant, seed: int, above: Path) -> PlannedRun:
    """The run in ``ABOVE/seed_S`` with its validated configuration.

    Raises:
        UserError: a setting is invalid; names the variant.
    """
    settings = (*plan.settings, *variant.settings)
    for text in settings:
        key = text.partition("=")[0]
        if key in _OWNED:
            raise UserError(f"variant {variant.name}: {key} cannot be set here ({text}): {_OWNED[key]}")
    folder = above / f"seed_{seed}"
    overrides = (*settings, f"seed={seed}", f"output_dir={json.dumps(str(folder))}")
    file = variant.config or plan.config
    try:
        config = load_config(file, overrides, "setting")  # it may come from a file of the comparison
    except UserError as error:
        raise UserError(f"variant {variant.name}: {error}") from None
    if config.model.embedding_cache is None:
        shared = str((plan.output / EMBEDDINGS).expanduser())
        overrides += (f"model.embedding_cache={json.dumps(shared)}",)
        model = config.model.model_copy(update={"embedding_cache": shared})
        config = config.model_copy(update={"model": model})
    return PlannedRun(variant.name, seed, folder, folder.with_suffix(".log"), file, overrides, config)


def _refuse_twins(runs: Sequence[PlannedRun]) -> None:
    """Refuse variants that train the same thing under two names.

    This happens when a setting in the file overrides what a variant's preset would fill in.
    """
    for index, run in enumerate(runs):
        for other in runs[:index]:
            found = differences({"one": run.config, "other": other.config})
            if not decisive(found):
                only = f" (they differ in {', '.join(found)} alone)" if found else ""
                hint = (
                    "; the file sets what the preset of an algorithm would fill in: name the settings themselves, for "
                    "example credit.rule=native"
                    if "algorithm" in found
                    else ""
                )
                raise UserError(f"variants {other.variant} and {run.variant} train the same thing{only}{hint}")
