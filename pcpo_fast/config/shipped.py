"""What comes with pcpo_fast: configurations, DeepSpeed files, recipes, prompts and the tiny pipelines.

In a wheel they are in ``pcpo_fast/shipped``, where the project's ``setup.py`` puts them; in a checkout at its root.
"""

import os
from pathlib import Path

from pcpo_fast.config.messages import did_you_mean
from pcpo_fast.errors import UserError

FOLDERS = ("configs", "ds_configs", "examples", "assets")
_PACKAGE = Path(__file__).resolve().parents[1]


def root() -> Path:
    """The folder that holds :data:`FOLDERS`: the package's own, or the checkout."""
    shipped = _PACKAGE / "shipped"
    return shipped if shipped.is_dir() else _PACKAGE.parent


def find(path: str | Path) -> Path:
    """The given path if it exists; otherwise the file or folder of that name that comes with pcpo_fast, if any.

    So ``assets/tiny-flux`` is the same model in any working directory. Configurations keep the path as it was
    written: a run does not depend on where pcpo_fast is installed.
    """
    own = Path(os.path.expanduser(path))
    if own.parts[:1] and own.parts[0] in FOLDERS and not own.exists():
        shipped = root() / own
        return shipped if shipped.exists() else own
    return own


def find_configuration(name: str | Path) -> Path:
    """The file of a configuration: a path (:func:`find`), or the name of one that comes with pcpo_fast.

    Raises:
        UserError: it is a name, and there is none.
    """
    path = find(name)
    if path.is_file() or path.suffix or str(name) != path.name:
        return path
    known = configurations()
    if path.name in known:
        return known[path.name]
    if path.exists():
        return path
    raise UserError(
        f"config file {name} does not exist, and no configuration of this name comes with pcpo-fast"
        f"{did_you_mean(path.name, known)} (pcpo-fast configs lists them)"
    )


def configurations() -> dict[str, Path]:
    """The configurations that come with pcpo_fast, by name: those of ``configs/``, then the recipes."""
    named = {path.stem: path for path in sorted(root().glob("configs/*.yaml"))}
    return named | {path.parent.name: path for path in sorted(root().glob("examples/*/config.yaml"))}


def summary(path: Path) -> str:
    """A configuration's description: its first line."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()
