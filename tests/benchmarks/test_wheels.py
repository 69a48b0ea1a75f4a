"""What is carried to a GPU machine, and what is there, are all that the training step's benchmark asks for."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
THERE = {"python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}
KNOWN_TO_DIFFER = {
    "bokeh": "imported by pages with charts alone",
    "httpx2": "imported by the client of a reward server alone",
    "tenacity": "imported by the client of a reward server alone",
    "transformers": "required for the learned rewards; the benchmark builds FLUX without a text encoder",
}
"""Of the project's own requirements."""
OLD_ENOUGH = {"packaging>=20.0", "matplotlib<4,>=3.9", "peft<0.23,>=0.20", "pyyaml<7,>=6", "scipy<2,>=1.15"}
OLD_ENOUGH |= {"jinja2<4,>=3.1", "pillow>=11.3", "rich>=13.9", "tensorboard<3,>=2.19", "regex!=2019.12.17"}
"""Requirements of packages there whose version is not known."""


def names(file: str) -> list[Requirement]:
    lines = (ROOT / file).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


CARRIED = {canonicalize_name(one.name): metadata.version(one.name) for one in names("benchmarks/wheels.txt")}
MACHINE = {
    canonicalize_name(one.name): next((part.version for part in one.specifier), None)
    for one in names("benchmarks/machine.txt")
}
VERSIONS: dict[str, str | None] = {**MACHINE, **CARRIED}


def unmet(requirements: list[str]) -> list[str]:
    """Those of the requirements that neither a wheel nor the machine meets."""
    found = []
    for text in requirements:
        one = Requirement(text)
        name = canonicalize_name(one.name)
        if one.marker is not None and not one.marker.evaluate(THERE):
            continue
        version = VERSIONS.get(name)
        if name not in VERSIONS or (version is not None and not one.specifier.contains(version)):
            found.append(text)
        elif version is None and one.specifier and f"{one.name.lower()}{one.specifier}" not in OLD_ENOUGH:
            found.append(f"{text} (its version there is not known)")
    return found


def test_the_versions_are_the_tested_ones() -> None:
    """The wheels are of constraints.txt, whose versions are installed here: their requirements are read from there."""
    pinned = {canonicalize_name(one.name): str(one.specifier) for one in names("constraints.txt")}
    assert {name: f"=={version}" for name, version in CARRIED.items()} == {name: pinned[name] for name in CARRIED}
    assert not set(CARRIED) & set(MACHINE)


@pytest.mark.parametrize("name", sorted(CARRIED))
def test_a_wheels_requirements_are_met(name: str) -> None:
    assert unmet(metadata.requires(name) or []) == []


def test_what_the_project_requires_is_there_but_for_what_the_benchmark_does_not_use() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {Requirement(text).name for text in unmet(project["dependencies"])} == set(KNOWN_TO_DIFFER)


def test_unmet_requirements_are_noticed() -> None:
    asked = [
        "nothing-there",
        "numpy<2.5",
        "numpy>=2",
        "tqdm>=4",
        "hjson; extra == 'x'",
        "absent; python_version < '3.12'",
    ]
    assert unmet(asked) == ["nothing-there", "numpy<2.5", "tqdm>=4 (its version there is not known)"]
