"""The house as the sources draw it: which file may import which, and what must not stand in any of them.

docs/architecture.md says why; the table below is what holds.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A file imports only from its own floor or from those below. A name ending in ".*" stands for a package.
FLOORS: dict[int, tuple[str, ...]] = {
    0: ("pcpo_kernels.*",),
    1: (
        "pcpo_fast",
        "pcpo_fast.transitions",
        "pcpo_fast.credit",
        "pcpo_fast.advantages",
        "pcpo_fast.config",
        "pcpo_fast.config_docs",
        "pcpo_fast.config_errors",
        "pcpo_fast.config_loading",
        "pcpo_fast.presets",
        "pcpo_fast.schedules",
        "pcpo_fast.windows",
        "pcpo_fast.collapse",
        "pcpo_fast.deepspeed_file",
        "pcpo_fast.dotted_keys",
        "pcpo_fast.fingerprints",
        "pcpo_fast.image_files",
        "pcpo_fast.content",
        "pcpo_fast.yaml_text",
        "pcpo_fast.noise_keys",
        "pcpo_fast.distributed",
        "pcpo_fast.launching",
        "pcpo_fast.rendezvous",
        "pcpo_fast.rank_agreement",
        "pcpo_fast.watch",
        "pcpo_fast.scenes",
        "pcpo_fast.statistics",
        "pcpo_fast.unused_settings",
        "pcpo_fast.atomic",
        "pcpo_fast.errors",
        "pcpo_fast.preemption",
        "pcpo_fast.ranges",
    ),
    2: ("pcpo_fast.policies.*", "pcpo_fast.rewards.*", "pcpo_fast.prompts.*", "pcpo_fast.samplers"),
    3: (
        "pcpo_fast.epoch_plan",
        "pcpo_fast.step_tables",
        "pcpo_fast.rollout",
        "pcpo_fast.rollout_scoring",
        "pcpo_fast.update",
        "pcpo_fast.step_statistics",
        "pcpo_fast.sampling",
        "pcpo_fast.reward_guidance",
        "pcpo_fast.engine",
        "pcpo_fast.optimizers",
        "pcpo_fast.eight_bit_adamw",
        "pcpo_fast.ema",
        "pcpo_fast.parking",
        "pcpo_fast.checkpoint",
        "pcpo_fast.manifest",
        "pcpo_fast.relayout",
        "pcpo_fast.retention",
    ),
    4: (
        "pcpo_fast.trainer",
        "pcpo_fast.heldout",
        "pcpo_fast.run_directory",
        "pcpo_fast.run_inputs",
        "pcpo_fast.input_record",
        "pcpo_fast.run_lock",
        "pcpo_fast.run_results",
        "pcpo_fast.showing",
        "pcpo_fast.sweeping",
        "pcpo_fast.guided_runs",
        "pcpo_fast.exporting",
        "pcpo_fast.reporting.*",
        "pcpo_fast.comparison.*",
        "pcpo_fast.planning.*",
        "pcpo_fast.preflight.*",
        "pcpo_fast.profiling.*",
        "pcpo_fast.reproduction.*",
        "pcpo_fast.evaluation.*",
    ),
    5: ("pcpo_fast.cli", "pcpo_fast.commands.*", "pcpo_fast.__main__"),
}


def sources() -> dict[str, Path]:
    """Every module of both packages, by its import name."""
    found = {}
    for package, folder in (("pcpo_fast", ROOT), ("pcpo_kernels", ROOT / "kernels")):
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = sources()


def imports(source: str, module: str = "") -> Iterator[tuple[int, str]]:
    """(line, name) of everything imported anywhere in a source; ``from x import y`` gives ``x.y``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} line {node.lineno}: a relative import; write the whole name"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def owner(name: str) -> str | None:
    """The module of ours that an imported name belongs to: itself, or the one that defines it."""
    while name:
        if name in MODULES:
            return name
        name = name.rpartition(".")[0]
    return None


def floor(module: str) -> int | None:
    for number, entries in FLOORS.items():
        for entry in entries:
            package = entry.removesuffix(".*")
            if module == package or (entry != package and module.startswith(f"{package}.")):
                return number
    return None


def importers_of(pattern: str) -> set[str]:
    """Modules that import a name which matches."""
    return {
        module
        for module, path in MODULES.items()
        for _, name in imports(path.read_text(encoding="utf-8"), module)
        if re.fullmatch(pattern, name)
    }


def test_every_module_has_a_floor() -> None:
    assert {module for module in MODULES if floor(module) is None} == set(), "add these to FLOORS"


def test_every_floor_entry_exists() -> None:
    entries = {entry.removesuffix(".*") for names in FLOORS.values() for entry in names}
    assert {entry for entry in entries if entry not in MODULES} == set(), "remove these from FLOORS"


@pytest.mark.parametrize("module", MODULES)
def test_imports_come_from_the_same_floor_or_below(module: str) -> None:
    own = floor(module)
    assert own is not None, f"{module} is missing from FLOORS"
    for line, name in imports(MODULES[module].read_text(encoding="utf-8"), module):
        target = owner(name)
        other = None if target is None else floor(target)
        assert other is None or other <= own, f"{module} (floor {own}) line {line} imports {target} (floor {other})"


def test_import_finder_sees_every_form() -> None:
    source = "import a.b\nfrom c import d as e, f\ndef g():\n    from h.i import j\nif True:\n    import k\n"
    assert {name for _, name in imports(source)} == {"a.b", "c.d", "c.f", "h.i.j", "k"}
    assert owner("pcpo_fast.config.Config") == "pcpo_fast.config"
    assert owner("pcpo_fast.__version__") == "pcpo_fast"
    assert owner("torch.nn") is None


def test_kernels_know_tensors_only() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "numpy", "pcpo_kernels"}
    for module, path in MODULES.items():
        if floor(module) == 0 and module.startswith("pcpo_kernels"):
            imported = {name.split(".")[0] for _, name in imports(path.read_text(encoding="utf-8"), module)}
            assert imported <= allowed, f"{module} imports {imported - allowed}"


def test_deepspeed_lives_in_one_place() -> None:
    assert importers_of(r"deepspeed(\..*)?") <= {"pcpo_fast.engine", "pcpo_fast.checkpoint"}


def test_pipelines_are_the_policies_business() -> None:
    users = importers_of(r"diffusers(\.pipelines)?(\..*)?Pipeline\w*|diffusers\.pipelines(\..*)?")
    assert users, "the pattern matches nothing: the test has lost its object"
    assert {module for module in users if not module.startswith("pcpo_fast.policies.")} == set()


def test_torchvision_is_not_needed() -> None:
    assert importers_of(r"torchvision(\..*)?") == set()


def test_light_commands_do_not_load_the_heavy_libraries(tmp_path: Path) -> None:
    """``--help``, ``credit``, ``report`` and ``votes`` answer at once: run for real, and their modules looked at."""
    (tmp_path / "votes.json").write_text("{}")
    code = (
        "import contextlib, json, sys\n"
        "from pcpo_fast.cli import main\n"
        "loaded = {}\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):\n"
        "        main(command)\n"
        "    heavy = {'bitsandbytes', 'deepspeed', 'diffusers', 'peft', 'transformers'}\n"
        "    loaded[' '.join(command)] = sorted(heavy & set(sys.modules))\n"
        "print(json.dumps(loaded))"
    )
    commands = [
        ["--help"],
        ["credit", "--steps", "4"],
        ["report", str(tmp_path)],
        ["votes", str(tmp_path / "votes.json")],
    ]
    answer = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(answer.stdout) == {" ".join(command): [] for command in commands}, answer.stderr


# What must not stand in any tracked file.

FORBIDDEN = {
    "a path of somebody's machine": re.compile(r"(?<![\w.\-:/])/(?:root|home|Users|work|workspace)/\w|[A-Z]:\\Users\\"),
    "a package index": re.compile(
        r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org|-{2}(?:(?:extra-)?index-url|find-links)",
        re.IGNORECASE,
    ),
}


def forbidden_in(text: str) -> list[str]:
    return [f"{what}: {match.group()}" for what, pattern in FORBIDDEN.items() for match in pattern.finditer(text)]


def test_forbidden_words_are_found() -> None:
    slash = "/"
    assert forbidden_in(f"see {slash}home{slash}me/x")
    assert forbidden_in(f'"{slash}root{slash}x"')
    assert forbidden_in("C:" + "\\Users\\me")
    assert forbidden_in("https://" + "pypi" + ".org/simple")
    assert forbidden_in("pip install -" + "-index-url x")
    assert not forbidden_in("https://example.org/home/page, a/root/of, frame work/shop, ~/models")


def tracked_files() -> list[str]:
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listing.stdout.split("\0") if name]


def test_no_tracked_file_names_a_machine_or_a_package_index() -> None:
    problems = []
    for name in tracked_files():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue  # not a text file, or one that is being removed
        problems += [f"{name}: {problem}" for problem in forbidden_in(text)]
    assert problems == []


def test_no_module_hides_the_library_kernels() -> None:
    """A script's own folder stands first on its path, and pytest puts the folders of test files there."""
    assert [name for name in tracked_files() if Path(name).parts[-2:] == ("kernels", "__init__.py")] == []
    assert [name for name in tracked_files() if Path(name).name == "kernels.py"] == []


def test_links_between_documents_lead_somewhere() -> None:
    documents = [name for name in tracked_files() if name.endswith(".md") and (ROOT / name).exists()]
    assert "README.md" in documents
    broken = []
    for name in documents:
        for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            file = target.partition("#")[0]
            if file and "://" not in file and not (ROOT / name).parent.joinpath(file).exists():
                broken.append(f"{name}: {target}")
    assert broken == []
