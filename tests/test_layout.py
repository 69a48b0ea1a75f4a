"""The house as the sources draw it: which file may import which, and what must not stand in any of them.

docs/architecture.md says why; the list below is what holds.
"""

import ast
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pcpo_fast.config.wording import counted

ROOT = Path(__file__).resolve().parents[1]

# The rooms from the ground up: a file imports only from its own room and from those above it in this list. So there is
# no circle between rooms. A room is a folder, or a file at the root of pcpo_fast that belongs to none.
ROOMS = (
    "pcpo_kernels",
    "pcpo_fast",  # the version
    "errors",
    "config",
    "distributed",
    "files",
    "profiling",
    "method",
    "prompts",
    "policies",
    "rewards",
    "engine",
    "runs",
    "reporting",
    "rollout",
    "planning",
    "training",
    "guidance",
    "preflight",
    "comparison",
    "evaluation",
    "reproduction",
    "interface",
    "commands",
    "cli",
    "__main__",
)
TESTS_OF_NO_ROOM = {"kernels", "benchmarks", "support", "golden"}


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


def room(module: str) -> str:
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "pcpo_fast" and rest else package


def importers_of(pattern: str) -> set[str]:
    """Modules that import a name which matches."""
    return {
        module
        for module, path in MODULES.items()
        for _, name in imports(path.read_text(encoding="utf-8"), module)
        if re.fullmatch(pattern, name)
    }


def test_the_rooms_are_those_of_the_list() -> None:
    assert {room(module) for module in MODULES} == set(ROOMS)
    assert len(set(ROOMS)) == len(ROOMS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_come_from_the_same_room_or_one_below(module: str) -> None:
    for line, name in imports(MODULES[module].read_text(encoding="utf-8"), module):
        target = owner(name)
        assert target is None or ROOMS.index(room(target)) <= ROOMS.index(room(module)), (
            f"{module} line {line} imports {target}, and the room {room(target)} is above {room(module)}"
        )


def test_the_tests_follow_the_rooms() -> None:
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").glob("*/**/*.py")}
    assert folders - TESTS_OF_NO_ROOM - set(ROOMS) == set()


def test_the_document_shows_the_rooms_in_order() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `([\w/.]+)` \|", text, re.MULTILINE)
    shown = [row.removeprefix("kernels/").removesuffix("/").removesuffix(".py") for row in table]
    assert tuple(reversed(shown)) == tuple(name for name in ROOMS if name not in ("pcpo_fast", "__main__"))


def test_import_finder_sees_every_form() -> None:
    source = "import a.b\nfrom c import d as e, f\ndef g():\n    from h.i import j\nif True:\n    import k\n"
    assert {name for _, name in imports(source)} == {"a.b", "c.d", "c.f", "h.i.j", "k"}
    assert owner("pcpo_fast.config.schema.Config") == "pcpo_fast.config.schema"
    assert owner("pcpo_fast.__version__") == "pcpo_fast"
    assert owner("torch.nn") is None
    found = [room(module) for module in ("pcpo_fast", "pcpo_fast.cli", "pcpo_fast.rewards.serving.app")]
    assert found == ["pcpo_fast", "cli", "rewards"]


def test_kernels_know_tensors_only() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "numpy", "pcpo_kernels"}
    for module, path in MODULES.items():
        if room(module) == "pcpo_kernels":
            imported = {name.split(".")[0] for _, name in imports(path.read_text(encoding="utf-8"), module)}
            assert imported <= allowed, f"{module} imports {imported - allowed}"


def test_deepspeed_is_the_engines_business() -> None:
    users = importers_of(r"deepspeed(\..*)?")
    assert users, "the pattern matches nothing: the test has lost its object"
    assert {module for module in users if not module.startswith("pcpo_fast.engine.")} == set()


def test_pipelines_are_the_policies_business() -> None:
    users = importers_of(r"diffusers(\.pipelines)?(\..*)?Pipeline\w*|diffusers\.pipelines(\..*)?")
    assert users, "the pattern matches nothing: the test has lost its object"
    assert {module for module in users if not module.startswith("pcpo_fast.policies.")} == set()


def test_torchvision_is_not_needed() -> None:
    assert importers_of(r"torchvision(\..*)?") == set()


def test_light_commands_do_not_load_the_heavy_libraries(tmp_path: Path) -> None:
    """``--help``, ``credit``, ``report`` and ``votes`` answer at once, and sizes that do not divide are
    refused at once: run for real, and their modules looked at.
    """
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
        ["configs"],
        ["train", "train.micro_batch_size=7"],
        ["credit", "--steps", "4"],
        ["report", str(tmp_path)],
        ["votes", str(tmp_path / "votes.json")],
    ]
    answer = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(answer.stdout) == {" ".join(command): [] for command in commands}, answer.stderr


# What must not stand in a message.

COUNTED = (
    "attempt|byte|call|caption|cell|checkpoint|column|difference|dimension|epoch|error|evaluation|event|failure|figure|"
    "file|frame|GPU|group|image|integer|layer|machine|node|number|operation|pair|process|prompt|rank|reward|rollout|"
    "row|run|sample|scale|score|seed|setting|step|task|thread|tie|token|trial|update|value|vote|warning"
)
# A verb may stand between a name and a plural: {folder} holds images.
PLURAL = re.compile(rf" (?:(?!compares|holds|needs|has|for|ends|produces|with|or)[a-z-]+ )?(?:{COUNTED})(?:s|es)\b")


def test_a_number_before_a_word_is_written_by_the_function_that_knows_one_run_from_two_runs() -> None:
    found = []
    for module, path in MODULES.items():
        nodes = [] if room(module) == "pcpo_kernels" else list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        for text in (node for node in nodes if isinstance(node, ast.JoinedStr)):
            for value, after in itertools.pairwise(text.values):
                plain = isinstance(value, ast.FormattedValue) and value.conversion == -1 and value.format_spec is None
                if plain and isinstance(after, ast.Constant) and PLURAL.match(str(after.value)):
                    found.append(f"{module} line {text.lineno}: {ast.unparse(text)}")
    assert found == [], "write {counted(count, 'run')} (pcpo_fast.config.wording)"
    assert [counted(count, "more pass") for count in (0, 1, 2)] == ["0 more passes", "1 more pass", "2 more passes"]
    assert [counted(2, what) for what in ("epoch", "batch", "box")] == ["2 epochs", "2 batches", "2 boxes"]


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
