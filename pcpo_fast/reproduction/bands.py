"""Acceptance bands: JSON files with the results that runs of a configuration should reach, and their sources."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from pcpo_fast.errors import UserError

Number = Annotated[float, Field(allow_inf_nan=False)]


class Part(BaseModel):
    """Base of all parts of a band file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Within(Part):
    """After ``epochs`` epochs the metric lies between ``low`` and ``high``."""

    kind: Literal["within"]
    metric: str = Field(min_length=1)
    epochs: int = Field(ge=0)
    low: Number
    high: Number

    @model_validator(mode="after")
    def check_order(self) -> "Within":
        """``low`` must be below ``high``."""
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        return self


class Reaches(Part):
    """The mean of the metric over ``average`` epochs reaches ``value`` by epoch ``by_epochs``."""

    kind: Literal["reaches"]
    metric: str = Field(min_length=1)
    value: Number
    by_epochs: int = Field(ge=1)
    average: int = Field(1, ge=1)


class Band(Part):
    """What a run should reach.

    Attributes:
        name: shown to the user.
        source: where the numbers come from, and how the limits were derived.
        verified: whether a run of this project has ever been inside the band.
        settings: the configuration values, by ``section.key``, for which the band applies.
        points: the conditions to check.
    """

    name: str = Field(min_length=1)
    source: str = Field(min_length=1)
    verified: bool
    settings: dict[str, JsonValue]
    points: tuple[Annotated[Within | Reaches, Field(discriminator="kind")], ...] = Field(min_length=1)

    def unmet_settings(self, config: dict[str, Any]) -> list[str]:
        """One sentence for each setting in which a run's configuration differs from the band's."""
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
        UserError: it is missing, malformed, or not a band file.
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
    """The bands of a folder of recipes (``*/band.json``) by path."""
    return {path: read_band(path) for path in sorted(folder.glob("*/band.json"))}
