"""Acceptance bands: JSON files that say what a run of a configuration should reach, and where the numbers come from."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from pcpo_fast.errors import UserError

Number = Annotated[float, Field(allow_inf_nan=False)]


class Part(BaseModel):
    """A part of a band file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Within(Part):
    """A metric lies between two numbers after a number of epochs."""

    kind: Literal["within"]
    metric: str = Field(min_length=1)
    epochs: int = Field(ge=0)
    low: Number
    high: Number

    @model_validator(mode="after")
    def check_order(self) -> "Within":
        """A band has an inside."""
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        return self


class Reaches(Part):
    """The mean of a metric over some epochs reaches a number no later than after some epochs."""

    kind: Literal["reaches"]
    metric: str = Field(min_length=1)
    value: Number
    by_epochs: int = Field(ge=1)
    average: int = Field(1, ge=1)


class Band(Part):
    """What a run should reach.

    Attributes:
        name: for the reader.
        source: where the numbers come from, and how the limits were made from them.
        verified: whether a run of this project has ever lain in the band.
        settings: values that a run's configuration has where the band applies, by ``section.key``.
        points: what is checked.
    """

    name: str = Field(min_length=1)
    source: str = Field(min_length=1)
    verified: bool
    settings: dict[str, JsonValue]
    points: tuple[Annotated[Within | Reaches, Field(discriminator="kind")], ...] = Field(min_length=1)

    def unmet_settings(self, config: dict[str, Any]) -> list[str]:
        """One sentence for each setting in which a run differs from what the band is about."""
        differences = []
        for key, wanted in self.settings.items():
            found: Any = config
            for part in key.split("."):
                found = found.get(part) if isinstance(found, dict) else None
            if found != wanted:
                differences.append(f"{key} is {json.dumps(found)}, not {json.dumps(wanted)}")
        return differences


def read_band(path: Path) -> Band:
    """Read a band file.

    Raises:
        UserError: it is missing, malformed, or not a band.
    """
    try:
        return Band.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "file"
        raise UserError(f"{path}: {place}: {first['msg']}") from None


def shipped_bands(folder: Path) -> dict[Path, Band]:
    """The bands below a folder of recipes (``*/band.json``), by their path."""
    return {path: read_band(path) for path in sorted(folder.glob("*/band.json"))}
