"""What an evaluation compares: the base model, runs at reward guidance scales, exports, pipelines, finished images."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pcpo_fast.config.loading import load_config
from pcpo_fast.config.presets import DEFAULT_CONFIG
from pcpo_fast.config.schema import Config
from pcpo_fast.errors import UserError
from pcpo_fast.evaluation.image_sets import MANIFEST_FILE
from pcpo_fast.files.content import index_of
from pcpo_fast.files.image_files import is_image
from pcpo_fast.guidance.guided_runs import base_difference, read_fine_tune
from pcpo_fast.guidance.scale_sweep import sweep_scales
from pcpo_fast.policies.fine_tunes import FineTune
from pcpo_fast.runs.checkpoint import STATE_FILE, WEIGHTS
from pcpo_fast.runs.run_directory import CONFIG_FILE

Kind = Literal["base", "run", "pipeline", "images"]
BASE = "base"
_LORA_FILE = "pytorch_lora_weights.safetensors"
WHOLE = {"finetune": "full", "base_weights": "full"}
"""Model settings of a network that has no adapters: it is what its files say."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,59}")


@dataclass(frozen=True)
class Candidate:
    """One entry of ``--checkpoint`` at one scale: a row of the result.

    Attributes:
        name: shown in tables, used in file names.
        family: the name without a scale; the scales of one run form a curve.
        kind: where the images come from.
        path: of the run, pipeline or images; "" for the base model.
        scale: reward guidance scale of a run; 1 otherwise.
        config: model and sampler; None for finished images.
        weights: folder of a run's weights; None otherwise.
    """

    name: str
    family: str
    kind: Kind
    path: str
    scale: float
    config: Config | None
    weights: Path | None

    @property
    def fine_tune(self) -> FineTune | None:
        """The run's configuration and weights; None for other kinds."""
        return None if self.weights is None or self.config is None else FineTune(self.config, self.weights)


def read_candidates(texts: Sequence[str], config: str | None, overrides: Sequence[str]) -> list[Candidate]:
    """Parse ``[NAME=]WHAT[@SCALES]`` arguments into candidates, in their order.

    All use the sampler and image size of ``config`` (default: the first run's configuration), so that they differ only
    in their weights.

    Args:
        texts: WHAT is ``base``, a run directory, a checkpoint or export of one, a pipeline (folder or hub id) or a
            folder of finished images; SCALES are reward guidance scales, such as ``0.5,1`` or ``0,0.25,...,1.5``.
        config: configuration file.
        overrides: ``key=value`` settings that take precedence over all configurations.

    Raises:
        UserError: a path does not exist, a name is used twice, or a run has another base model.
    """
    parsed = [_parse(text) for text in texts]
    shared = load_config(shared_config_file(texts) if config is None else config, overrides)
    found = []
    for (name, what, scales), text in zip(parsed, texts, strict=True):
        one = _candidate(name, what, shared, overrides, text)
        if scales is not None and one.kind != "run":
            raise UserError(f"--checkpoint {text!r}: a scale (@) needs a run, and {what} is not one")
        for scale in scales or [1.0]:
            label = one.family if scales is None else f"{one.family}@{scale:g}"
            found.append(replace(one, name=label, scale=scale))
    names = [one.name for one in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--checkpoint: the name {twice} is used twice; choose names, for example NAME={texts[-1]}")
    return found


def _parse(text: str) -> tuple[str | None, str, list[float] | None]:
    name, separator, what = text.partition("=")
    if not separator or "/" in name:
        name, what = "", text
    elif not _NAME.fullmatch(name):
        raise UserError(
            f"--checkpoint {text!r}: a name consists of at most 60 letters, digits, dots, dashes and underscores, and "
            f"starts with a letter or digit; got {name!r}"
        )
    scales = None
    before, at, behind = what.rpartition("@")
    if at and not Path(what).exists():
        what = before
        try:
            scales = sweep_scales(behind)
        except UserError as error:
            raise UserError(str(error).replace("--sweep:", f"--checkpoint {text!r}:", 1)) from None
    if not what:
        raise UserError(f"--checkpoint {text!r}: expected [NAME=]WHAT[@SCALES], for example pcpo=runs/pcpo@0.5,1")
    return name or None, what, scales


def shared_config_file(texts: Sequence[str]) -> str:
    """The configuration file of the first run among the arguments, or the project's default."""
    for text in texts:
        _, what, _ = _parse(text)
        folder = _run_of(Path(what).expanduser())
        if what != BASE and folder is not None:
            return str(folder / CONFIG_FILE)
    return DEFAULT_CONFIG


def _run_of(path: Path) -> Path | None:
    """The run directory that ``path`` is, or whose checkpoint or export it is; None if neither."""
    if (path / CONFIG_FILE).is_file():
        return path
    checkpoint = (path / STATE_FILE).is_file()
    run = path.absolute().parent.parent if checkpoint else path.absolute().parent
    if not path.is_dir() or not (run / CONFIG_FILE).is_file() or index_of(path).is_file():
        return None
    return run if _finetune_kind(path / WEIGHTS if checkpoint else path) is not None else None


def _finetune_kind(weights: Path) -> Literal["full", "lora"] | None:
    if (weights / _LORA_FILE).is_file():
        return "lora"
    parts = (weights / part for part in ("transformer", "unet"))
    return "full" if any(any(part.glob("*.safetensors")) for part in parts) else None


def _candidate(name: str | None, what: str, shared: Config, overrides: Sequence[str], text: str) -> Candidate:
    path = Path(what).expanduser()
    label = name or (what if what == BASE else re.sub(r"[^\w.-]+", "_", path.absolute().name).lstrip("._-") or BASE)
    if what == BASE:
        return Candidate(label, label, "base", "", 1.0, shared, None)
    run = _run_of(path)
    if run is not None:
        weights = None if run == path else path / WEIGHTS if (path / STATE_FILE).is_file() else path
        tune = read_fine_tune(run, overrides, weights=weights, option=f"--checkpoint {text!r}")
        return Candidate(label, label, "run", what, 1.0, _same_base(tune.config, shared, text), tune.weights)
    if index_of(path).is_file() or (not path.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", what)):
        model = shared.model.model_copy(update={"path": what, "revision": None} | WHOLE)
        return Candidate(label, label, "pipeline", what, 1.0, shared.model_copy(update={"model": model}), None)
    kind = _finetune_kind(path)
    if kind is not None:
        lora = shared.model.lora.model_copy(update={"init": None})
        model = shared.model.model_copy(update={"finetune": kind, "lora": lora} | (WHOLE if kind == "full" else {}))
        return Candidate(label, label, "run", what, 1.0, shared.model_copy(update={"model": model}), path)
    if path.is_dir() and ((path / MANIFEST_FILE).is_file() or any(map(is_image, path.iterdir()))):
        return Candidate(label, label, "images", what, 1.0, None, None)
    raise UserError(
        f"--checkpoint {text!r}: {what} is not 'base', a run directory, a checkpoint or export of one, a pipeline, or "
        "a folder of images"
    )


def _same_base(own: Config, shared: Config, text: str) -> Config:
    """A run's configuration with the shared sampler; its base model must be the shared one."""
    different = base_difference(shared, own)
    if different is not None:
        key, first, other = different
        raise UserError(
            f"--checkpoint {text!r}: all checkpoints must share one base model, but model.{key} is {other!r} here and "
            f"{first!r} in the configuration (model.{key}=... on the command line sets it for all)"
        )
    return own.model_copy(update={"sampler": shared.sampler})
