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

import pcpo_kernels
import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import pcpo_fast

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ("constraints.txt", "constraints-torch-2.11.txt")
BUILT = shutil.ignore_patterns(".*_cache", ".git", ".venv", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist")


def not_source(folder: str, names: list[str]) -> set[str]:
    """What a copy of the sources leaves out; some at the root only: pcpo_fast/runs is a part of the package."""
    return BUILT(folder, names) | ({"runs", "tests", "benchmarks"} if Path(folder) == ROOT else set())


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


SHIPPED = ("configs", "ds_configs", "examples", "assets/prompts", "assets/tiny-*")


def shipped_files() -> set[str]:
    """What a wheel carries besides modules, by its path in the checkout."""
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", *SHIPPED]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return {name for name in listing.stdout.splitlines() if (ROOT / name).is_file()}


# Wheel and sdist.


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that nothing is left in the working tree."""
    folder = tmp_path_factory.mktemp("source") / "pcpo_fast"
    shutil.copytree(ROOT, folder, ignore=not_source)
    return folder


@pytest.fixture(scope="module")
def distributions(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel built from that sdist)."""
    out = tmp_path_factory.mktemp("dist")
    # Without isolation: the build backend is one of the development dependencies, and nothing is downloaded.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_names_and_version(distributions: tuple[Path, Path]) -> None:
    sdist, wheel = distributions
    assert sdist.name == f"pcpo_fast-{pcpo_fast.__version__}.tar.gz"
    assert wheel.name == f"pcpo_fast-{pcpo_fast.__version__}-py3-none-any.whl"


def test_wheel_holds_both_packages_and_what_a_run_needs(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = set(archive.namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    expected = python_files(ROOT / "pcpo_fast") | python_files(ROOT / "kernels" / "pcpo_kernels")
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pcpo_fast").glob("*/templates/*")}
    assert templates >= {"pcpo_fast/reporting/templates/page.html", "pcpo_fast/evaluation/templates/evaluation.html"}
    typed = {"pcpo_fast/py.typed", "pcpo_fast/__init__.pyi", "pcpo_kernels/py.typed"}
    shipped = {f"pcpo_fast/shipped/{name}" for name in shipped_files()}
    tables = {"pcpo_fast/planning/published.json", "pcpo_kernels/tuned.json"}
    assert inside == expected | templates | typed | shipped | tables
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert distributions[1].stat().st_size < 40_000_000


def test_sdist_holds_what_the_wheel_is_built_from(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"pyproject.toml", "setup.py", "README.md", "LICENSE", *CONSTRAINTS, "train.py"}
    assert names >= python_files(ROOT / "pcpo_fast") | shipped_files()
    assert not {name for name in names if name.startswith(("tests/", "benchmarks/"))}
    assert distributions[0].stat().st_size < 40_000_000


def test_metadata(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(archive.read(name))
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        scripts = archive.read(name).decode()
    assert fields["Name"] == "pcpo-fast"
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.11"
    extras = {"8bit", "cuda", "nf4", "flash-attn", "xformers", "rewards", "eval", "server", "docs", "dev"}
    extras |= {"wandb", "trackio"}
    assert set(fields.get_all("Provides-Extra", [])) == extras
    assert "pcpo-fast = pcpo_fast.cli:program" in scripts
    assert len(str(fields.get_payload())) > 1000, "the README is missing"


# Installed in an environment of its own.


def environment_with(folder: Path, *what: str | Path) -> Path:
    """The bin folder of an empty environment with what pip installs into it; the rest is the environment under test's.

    A path in a .pth file is searched after the environment's own packages, and .pth files in there are not read, so
    an editable install of this project in the environment under test does not come along.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip())
    other = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path[1:]])
    (own / "dependencies.pth").write_text("\n".join(path for path in other if path.endswith("-packages")) + "\n")
    run(*pip, "install", "--no-deps", "--no-index", "--no-compile", "--quiet", *what, cwd=folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def installed(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel."""
    return environment_with(tmp_path_factory.mktemp("environment") / "venv", distributions[1])


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


def test_the_wheel_trains_the_demo_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """Configuration, model and prompts are the wheel's; the run's own record names them as any checkout does."""
    small = ["train.epochs=1", "evaluation.prompts=1", "evaluation.images_per_prompt=1", "logging.tensorboard=false"]
    run(installed / "pcpo-fast", "train", *small, cwd=tmp_path, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    assert json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())["epochs"] == 1
    assert "path: assets/tiny-flux\n" in (tmp_path / "runs" / "demo" / "config.yaml").read_text()


def test_an_editable_install_finds_what_the_checkout_has(source: Path, tmp_path: Path) -> None:
    installed = environment_with(tmp_path / "venv", "--no-build-isolation", "--editable", source)
    assert not (source / "pcpo_fast" / "shipped").exists()
    code = (
        "from pcpo_fast.config.shipped import find\n"
        "from pcpo_fast.config.loading import load_config\n"
        "print(load_config('1x24gb_flux_lora').deepspeed, find('ds_configs/zero3_offload.json'), sep='\\n')"
    )
    name, found = run(installed / "python", "-c", code, cwd=tmp_path).stdout.splitlines()
    assert (name, Path(found)) == ("ds_configs/zero3_offload.json", source / "ds_configs" / "zero3_offload.json")


# The kernels by themselves.


def test_both_packages_have_the_same_version() -> None:
    assert pcpo_kernels.__version__ == pcpo_fast.__version__


def test_kernels_ask_for_what_the_root_asks_for() -> None:
    """The same ranges of PyTorch and Triton, whichever of the two is installed."""
    own, whole = (
        tomllib.loads((ROOT / file).read_text(encoding="utf-8"))["project"]
        for file in ("kernels/pyproject.toml", "pyproject.toml")
    )
    assert set(own["dependencies"]) <= {*whole["dependencies"], *whole["optional-dependencies"]["cuda"]}
    assert own["requires-python"] == whole["requires-python"] and own["license"] == whole["license"]


@pytest.mark.parametrize("files", [{"version.py": "__version__ = '0.0.7'"}, {}])
def test_kernels_of_another_version_are_one_clear_error(tmp_path: Path, files: dict[str, str]) -> None:
    (tmp_path / "pcpo_kernels").mkdir()
    for name, text in ({"__init__.py": ""} | files).items():
        (tmp_path / "pcpo_kernels" / name).write_text(text)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    code = "import pcpo_fast"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    last = answer.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: pcpo_fast {pcpo_fast.__version__} needs pcpo_kernels {pcpo_fast.__version__}")
    assert (tmp_path / "pcpo_kernels").as_posix() in last and ("0.0.7" if files else "unknown version") in last


def with_dependencies(*names: str) -> set[str]:
    """These distributions of the environment under test, and whatever they need of it."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            needs = map(Requirement, metadata.requires(name) or ())
            left += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


@pytest.mark.slow
def test_kernels_work_with_pytorch_and_triton_alone(tmp_path: Path) -> None:
    """In an environment that holds the wheel, what it asks for, and what that asks for: nothing else."""
    source = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", source, ignore=BUILT)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", source, cwd=tmp_path)
    (wheel,), (sdist,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    version = pcpo_kernels.__version__
    assert (wheel.name, sdist.name) == (f"pcpo_kernels-{version}-py3-none-any.whl", f"pcpo_kernels-{version}.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == python_files(ROOT / "kernels" / "pcpo_kernels") | {
        "pcpo_kernels/py.typed",
        "pcpo_kernels/tuned.json",
    }
    assert any(name.endswith("/licenses/LICENSE") for name in names)

    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=tmp_path)
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).stdout.strip())

    def add(*names: str) -> None:
        for name in names:
            for file in metadata.files(name) or ():
                top = Path(file).parts[0]
                if top not in ("..", "__pycache__") and not (own / top).exists():
                    (own / top).symlink_to(Path(str(metadata.distribution(name).locate_file(top))))

    add(*with_dependencies("torch", "triton"))
    run(*pip, "check", cwd=tmp_path)  # what the wheel declares is there

    code = (
        "import importlib.util as u, json, os, sys, torch\n"
        "from pcpo_kernels import NoiseKey, sample_step\n"
        "x, f = torch.linspace(-1, 1, 12).reshape(2, 6), torch.linspace(2, -2, 12).reshape(2, 6)\n"
        "a, b, std = torch.tensor([1.0, 0.9]), torch.tensor([-0.1, -0.2]), torch.tensor([0.3, 0.5])\n"
        "key = NoiseKey(torch.tensor([3, 5]), torch.tensor([0, 7]))\n"
        "step = sample_step(x, f, a, b, std, key)\n"
        "absent = [n for n in ('deepspeed', 'diffusers', 'pydantic', 'pcpo_fast', 'rich') if not u.find_spec(n)]\n"
        "print(json.dumps([step[0].tolist(), 'triton' in sys.modules, absent]))"
    )
    reference, *_ = json.loads(run(python, "-c", code, cwd=tmp_path, PCPO_KERNELS="reference").stdout)
    add("numpy")  # of Triton's interpreter; a GPU needs none
    choice = {"PCPO_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    kernel, triton, absent = json.loads(run(python, "-c", code, cwd=tmp_path, **choice).stdout)
    assert triton and absent == ["deepspeed", "diffusers", "pydantic", "pcpo_fast", "rich"]
    assert torch.tensor(kernel).sub(torch.tensor(reference)).abs().max() < 2e-6


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


@pytest.mark.slow
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


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    entries = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", entry) for entry in entries), "exact versions only"
    return {canonicalize_name(name): version for name, _, version in (entry.partition("==") for entry in entries)}


@pytest.mark.parametrize("file", CONSTRAINTS)
def test_constraints_are_exact_and_hold_every_dependency_within_its_range(file: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    kernels = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = pins(file)
    for entry in project["dependencies"] + project["optional-dependencies"]["dev"] + kernels["dependencies"]:
        requirement = Requirement(entry)
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, entry


def test_the_two_sets_differ_only_where_pytorch_2_11_and_triton_3_6_ask_for_it() -> None:
    current, older = map(pins, CONSTRAINTS)
    different = {name: older[name] for name in current if older[name] != current[name]}
    assert current.keys() == older.keys()
    assert different.keys() == {"numpy", "setuptools", "torch", "triton"}
    assert (different["torch"], different["triton"]) == ("2.11.0", "3.6.0")
    assert different["numpy"] in SpecifierSet("<2.4")  # see pcpo_kernels.dispatch.interpreter_lacks
    assert different["setuptools"] in SpecifierSet("<82")


def test_the_environment_under_test_is_within_the_declared_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for entry in project["dependencies"]:
        requirement = Requirement(entry)
        installed_version = metadata.version(requirement.name)
        assert requirement.specifier.contains(installed_version, prereleases=True), f"{entry}: {installed_version}"
