"""Reading a run directory that may be unfinished or damaged; what cannot be read is noted."""

import io
import json
import math
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator

from pcpo_fast.errors import UserError
from pcpo_fast.reporting.grids import TILES, image_bytes
from pcpo_fast.reporting.metrics_file import Record, read_metrics
from pcpo_fast.reporting.pages import data_url, embedded
from pcpo_fast.runs.hidden_secrets import without_secrets

_GRID_NAME = re.compile(r"epoch_(\d+)\.png")
_EMBED_LIMIT = 400_000  # larger PNG files (in bytes) are embedded as JPEG
_EMBED_WIDTH = 1600


class Credit(BaseModel):
    """The validated content of credit.json: N steps, N+1 times."""

    sampler: str = ""
    rule: str = ""
    times: list[FiniteFloat]
    native: list[FiniteFloat] = Field(min_length=1)
    proportionate: list[FiniteFloat]
    used: list[FiniteFloat] | None = None
    zeta: FiniteFloat
    trained_steps: list[int] | None = None

    @model_validator(mode="after")
    def _columns_fit(self) -> "Credit":
        columns = (self.times[1:], self.proportionate, self.native if self.used is None else self.used)
        if not self.times or {len(column) for column in columns} != {len(self.native)}:
            raise ValueError("the columns differ in length")
        return self


class Gains(BaseModel):
    """gains.json after validation: S steps, and the correlation of every two steps' gains (None: not known)."""

    steps: list[int] = Field(min_length=1)
    correlations: list[list[FiniteFloat | None]]

    @model_validator(mode="after")
    def _square(self) -> "Gains":
        if {len(self.steps)} != {len(self.correlations), *map(len, self.correlations)}:
            raise ValueError("the matrix does not fit the steps")
        return self


@dataclass
class RunFiles:
    """The content of a run directory; `notes` has one sentence for everything that could not be read."""

    folder: Path
    records: list[Record] = field(default_factory=list)
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    credit: Credit | None = None
    gains: Gains | None = None
    captions: list[str] = field(default_factory=list)
    finished: bool = False
    summary: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def grids(self) -> list[tuple[int, Path]]:
        """The sample grids by number of epochs trained, without those later than the last record: they are left over
        from before the run was resumed at an earlier epoch."""
        found = [
            (int(match[1]), path)
            for path in (self.folder / "images").glob("epoch_*.png")
            if (match := _GRID_NAME.fullmatch(path.name))
        ]
        epochs = [record["epoch"] for record in self.records if isinstance(record.get("epoch"), int)]
        return sorted((epoch, path) for epoch, path in found if not epochs or epoch <= max(epochs) + 1)


def read_run_files(folder: Path) -> RunFiles:
    """Read a run directory.

    Raises:
        UserError: ``folder`` is not a folder or has neither metrics.jsonl nor config.yaml, or a line of metrics.jsonl
            other than the last is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a run directory: the folder does not exist")
    run = RunFiles(folder)
    metrics, config = folder / "metrics.jsonl", folder / "config.yaml"
    if not metrics.exists() and not config.exists():
        raise UserError(f"{folder} is not a run directory: it contains neither metrics.jsonl nor config.yaml")
    if metrics.exists():
        run.records = read_metrics(metrics)
    else:
        run.notes.append("There is no metrics.jsonl: nothing has been recorded yet.")
    if config.exists():
        raw = config.read_text(encoding="utf-8", errors="replace")
        run.config_text = without_secrets(raw)
        try:
            loaded = yaml.safe_load(raw)
            run.config = loaded if isinstance(loaded, dict) else {}
        except yaml.YAMLError:
            run.notes.append("config.yaml is not valid YAML; it is shown unchanged.")
    else:
        run.notes.append("There is no config.yaml.")
    credit = _read_json(run, "credit.json")
    if credit is not None:
        try:
            run.credit = Credit.model_validate(credit)
        except ValidationError:
            run.notes.append("credit.json is incomplete or its columns differ in length; the credit figure is omitted.")
    gains = _read_json(run, "gains.json")
    if gains is not None:
        try:
            run.gains = Gains.model_validate(gains)
        except ValidationError:
            run.notes.append("gains.json is incomplete or its matrix is not square; its figure is omitted.")
    captions = _read_json(run, "images/captions.json")
    if isinstance(captions, list):
        run.captions = [str(caption) for caption in captions]
    summary = _read_json(run, "summary.json")
    if isinstance(summary, dict):
        run.summary, run.finished = summary, True
    return run


def _read_json(run: RunFiles, name: str) -> Any:
    path = run.folder / name
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        run.notes.append(f"{name} could not be read.")
        return None


class _Tile(BaseModel):
    boxes: list[tuple[int, int, int, int]]
    caption: str = ""
    scores: list[FiniteFloat] = []


class _Tiles(BaseModel):
    """What a sheet knows about itself (`pcpo_fast.reporting.grids.TILES`)."""

    tiles: list[_Tile]
    scale: int = Field(1, ge=1)
    headings: list[str] = []


@dataclass(frozen=True)
class Sheet:
    """An image sheet for a page: its tiles, or the whole sheet where it was written without them.

    Attributes:
        source: the sheet as a data URL (as JPEG above 400 kB); None with tiles.
        tiles: of each the ``images`` (see `pcpo_fast.reporting.pages.embedded`), ``caption`` and ``scores``.
        headings: of the images of a tile; empty if a tile is one image.
    """

    source: str | None
    tiles: list[dict[str, Any]] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)


def embedded_sheet(run: RunFiles, path: Path) -> Sheet | None:
    """A PNG file for a page; None if it is missing, or with a note if it is damaged."""
    if not path.exists():
        return None
    try:
        data = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=("PNG",))
            image.load()
    except Exception:  # PIL raises many kinds of errors for damaged files
        run.notes.append(f"{path.relative_to(run.folder)} is not a valid PNG image; it is omitted.")
        return None
    try:
        known = _Tiles.model_validate_json(image.info.get(TILES, ""))
        if not all(_inside(box, image.size) for tile in known.tiles for box in tile.boxes):
            raise ValueError("a tile is outside the sheet")
        tiles = [
            {
                "images": [embedded(_shrunk(image.crop(box), known.scale)) for box in tile.boxes],
                "caption": tile.caption,
                "scores": tile.scores,
            }
            for tile in known.tiles
        ]
        return Sheet(None, tiles, known.headings)
    except (ValidationError, ValueError):
        pass  # written before sheets had tiles, or by something else
    if len(data) <= _EMBED_LIMIT:
        return Sheet(data_url(data, "png"))
    image = image.convert("RGB")
    if image.width > _EMBED_WIDTH:
        height = max(1, round(image.height * _EMBED_WIDTH / image.width))
        image = image.resize((_EMBED_WIDTH, height), Image.Resampling.LANCZOS)
    return Sheet(data_url(image_bytes(image, "jpeg", quality=88, optimize=True), "jpeg"))


def _inside(box: tuple[int, int, int, int], size: tuple[int, int]) -> bool:
    left, upper, right, lower = box
    return 0 <= left < right <= size[0] and 0 <= upper < lower <= size[1]


def _shrunk(image: Image.Image, scale: int) -> Image.Image:
    """An image whose pixels were repeated `scale` times, as it was."""
    size = (max(1, image.width // scale), max(1, image.height // scale))
    return image.resize(size, Image.Resampling.NEAREST)


def is_number(value: Any) -> bool:
    """Whether the value is a finite number and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number_at(config: Any, *keys: str) -> float | None:
    """The number at these nested keys of a config; None if there is none."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return float(config) if is_number(config) else None
