"""The wheel and the sdist: what is in them, and that they work in an environment of their own."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import pcpo_fast

ROOT = Path(__file__).resolve().parents[1]
BUILT = shutil.ignore_patterns(
    ".*_cache", ".git", ".venv", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist", "tiny-*"
)


def not_source(folder: str, names: list[str]) -> set[str]:
    """What a copy of the sources leaves out; runs/ at the root only: pcpo_fast/runs is a part of the package."""
    return BUILT(folder, names) | ({"runs"} if Path(folder) == ROOT else set())


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run without a PYTHONPATH from outside; a failure shows what the command printed."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert result.returncode == 0, f"{command} exited with {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def python_files(folder: Path) -> set[str]:
    return {path.relative_to(folder.parent).as_posix() for path in folder.rglob("*.py")}


# Wheel and sdist.


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel built from that sdist), made from a copy, so that nothing is left in the working tree."""
    source = tmp_path_factory.mktemp("source") / "pcpo_fast"
    shutil.copytree(ROOT, source, ignore=not_source)
    out = tmp_path_factory.mktemp("dist")
    # Without isolation: the build backend is one of the development dependencies, and nothing is downloaded.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_names_and_version(distributions: tuple[Path, Path]) -> None:
    sdist, wheel = distributions
    assert sdist.name == f"pcpo_fast-{pcpo_fast.__version__}.tar.gz"
    assert wheel.name == f"pcpo_fast-{pcpo_fast.__version__}-py3-none-any.whl"


def test_wheel_holds_both_packages_and_nothing_else(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = set(archive.namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    expected = python_files(ROOT / "pcpo_fast") | python_files(ROOT / "kernels" / "pcpo_kernels")
    assert inside == expected | {"pcpo_fast/py.typed", "pcpo_kernels/py.typed"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert distributions[1].stat().st_size < 1_000_000


def test_sdist_builds_without_tests_and_weights(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", "train.py"}
    assert names >= python_files(ROOT / "pcpo_fast")
    assert not {name for name in names if name.startswith(("tests/", "assets/")) or name.endswith(".safetensors")}
    assert distributions[0].stat().st_size < 2_000_000


def test_metadata(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(archive.read(name))
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        scripts = archive.read(name).decode()
    assert fields["Name"] == "pcpo-fast"
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.11"
    extras = {"8bit", "cuda", "flash-attn", "xformers", "rewards", "eval", "server", "wandb", "dev"}
    assert set(fields.get_all("Provides-Extra", [])) == extras
    assert "pcpo-fast = pcpo_fast.cli:program" in scripts
    assert len(str(fields.get_payload())) > 1000, "the README is missing"


def test_wheel_from_the_tree_is_the_wheel_from_the_sdist(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=not_source)
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, source, cwd=tmp_path)
    (direct,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(direct) as one, zipfile.ZipFile(distributions[1]) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


# Installed in an environment of its own.


@pytest.fixture(scope="module")
def installed(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an empty environment with the wheel; other packages are those of the environment under test.

    A path in a .pth file is searched after the environment's own packages, and .pth files in there are not read, so
    an editable install of this project in the environment under test does not come along.
    """
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", "--quiet", distributions[1], cwd=folder)
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip())
    other = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path[1:]])
    (own / "dependencies.pth").write_text("\n".join(path for path in other if path.endswith("-packages")) + "\n")
    return folder / "bin"


def test_both_packages_are_imported_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "import json, pcpo_fast, pcpo_kernels, pcpo_fast.config.schema, importlib.metadata as m;"
        "print(json.dumps([pcpo_fast.__file__, pcpo_kernels.__file__, m.version('pcpo-fast')]))"
    )
    one, other, version = json.loads(run(installed / "python", "-c", code, cwd=tmp_path).stdout)
    for file in (one, other):
        assert Path(file).is_relative_to(installed.parent)
    assert version == pcpo_fast.__version__


@pytest.mark.parametrize("command", [["pcpo-fast"], ["python", "-m", "pcpo_fast"]])
def test_command_line_starts(installed: Path, tmp_path: Path, command: list[str]) -> None:
    program = [installed / command[0], *command[1:]]
    assert "train" in run(*program, "--help", cwd=tmp_path).stdout
    assert pcpo_fast.__version__ in run(*program, "--version", cwd=tmp_path).stdout


def test_credit_command_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    arguments = ["--sampler", "dance", "--steps", "16", "--noise", "0.3", "--shift", "3", "--json"]
    table = json.loads(run(installed / "pcpo-fast", "credit", *arguments, cwd=tmp_path).stdout)
    assert table["zeta"] == pytest.approx(13.343190914766362, rel=1e-12)
    assert [len(table[key]) for key in ("times", "native", "proportionate")] == [17, 16, 16]


# The folder kernels/ and the library of that name.


def fake_kernels(folder: Path, version: str = "0.12.1") -> Path:
    """A folder to put on PYTHONPATH, with something installed in it that looks like Hugging Face's `kernels`."""
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text("MARK = 'the library'\n")
    information = folder / f"kernels-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (information / "RECORD").write_text("kernels/__init__.py,,\n")
    return folder


IMPORT_KERNELS = "import kernels; print(getattr(kernels, 'MARK', 'a folder'))"


def test_kernels_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "pcpo_kernels" / "__init__.py").is_file()


def test_an_installed_kernels_library_wins_over_the_folder(tmp_path: Path) -> None:
    library = fake_kernels(tmp_path)
    found = run(sys.executable, "-c", IMPORT_KERNELS, cwd=ROOT, PYTHONPATH=str(library)).stdout.strip()
    assert found == "the library"


def test_a_package_named_kernels_would_have_hidden_it(tmp_path: Path) -> None:
    """The test above can fail: with an __init__.py in the working directory's folder it would."""
    library = fake_kernels(tmp_path / "library")
    (tmp_path / "project" / "kernels").mkdir(parents=True)
    (tmp_path / "project" / "kernels" / "__init__.py").touch()
    found = run(sys.executable, "-c", IMPORT_KERNELS, cwd=tmp_path / "project", PYTHONPATH=str(library)).stdout.strip()
    assert found == "a folder"


KERNELS_AVAILABLE = (
    "from diffusers.utils.import_utils import is_kernels_available as one;"
    "from transformers.utils.import_utils import KERNELS_MIN_VERSION, is_kernels_available as other;"
    "import json; print(json.dumps([one(), other(), KERNELS_MIN_VERSION]))"
)


def test_libraries_see_the_same_kernels_inside_and_outside_the_project(tmp_path: Path) -> None:
    """diffusers and transformers ask whether `kernels` is there; standing in our root must not change the answer."""
    (tmp_path / "elsewhere").mkdir()

    def available(folder: Path, **environment: str) -> list[object]:
        return json.loads(run(sys.executable, "-c", KERNELS_AVAILABLE, cwd=folder, **environment).stdout)  # type: ignore[no-any-return]

    *outside, version = available(tmp_path / "elsewhere")
    assert available(ROOT)[:2] == outside
    library = str(fake_kernels(tmp_path / "library", str(version)))
    assert available(ROOT, PYTHONPATH=library)[:2] == [True, True]


# Dependencies.


def test_constraints_are_exact_and_cover_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins), "exact public versions only"
    pinned = {re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower() for pin in pins}
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    direct = {re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", entry)[0]).lower() for entry in wanted}
    assert direct - pinned == set()


def test_the_environment_under_test_is_within_the_declared_ranges() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for entry in project["dependencies"]:
        requirement = Requirement(entry)
        installed_version = metadata.version(requirement.name)
        assert requirement.specifier.contains(installed_version, prereleases=True), f"{entry}: {installed_version}"
