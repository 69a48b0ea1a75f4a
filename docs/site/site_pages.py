"""The pages of docs/ as the site generator wants them.

GitHub and the site show the same Markdown. What GitHub wants otherwise is translated in a copy: mathematics, diagrams,
and links to files outside docs/, which the site carries along.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = "files"  # where the site keeps files from outside docs/
PAGES = {"CONTRIBUTING.md": "contributing.md", "examples/launching/README.md": "launching.md"}  # from outside docs/

API = {
    "python": ("From Python", ["pcpo_fast"]),
    "method": (
        "The method",
        [f"pcpo_fast.method.{name}" for name in ("transitions", "credit", "advantages", "step_advantages")],
    ),
    "rewards": ("Rewards", ["pcpo_fast.rewards.learned", "pcpo_fast.rewards.remote"]),
    "policies": ("Model families", ["pcpo_fast.policies.pipeline_policy"]),
    "kernels": ("The kernels", ["pcpo_kernels", "pcpo_kernels.accelerate.accelerate"]),
}
"""Pages of the API reference: title, and the modules whose docstrings they show."""

_FENCE = re.compile(r"^(`{3,})(\w*)[^\n]*\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
_PROSE = re.compile(
    r"\$`(?P<math>.+?)`\$"
    r"|(?P<image>!?)\[(?P<label>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<address>[^)\s]+)\)"
    r"|(?P<code>(?<!`)(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))"
    r"|(?<![\w/.])docs/(?P<mention>\w+\.md)",
    re.DOTALL,
)


def write_pages(target: Path, draw: Callable[[str], str]) -> None:
    """Write all pages and figures to an empty folder; ``draw`` makes an SVG of a Mermaid diagram."""
    shutil.rmtree(target, ignore_errors=True)
    for source in sorted((ROOT / "docs").rglob("*")):
        name = source.relative_to(ROOT / "docs")
        if source.is_file() and name.parts[0] != "site":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".md":
                write_page(source, name.as_posix(), target, draw)
            else:
                shutil.copyfile(source, target / name)
    for outside, name in PAGES.items():
        write_page(ROOT / outside, name, target, draw)
    (target / "api").mkdir()
    for name, (title, modules) in API.items():
        text = f"# {title}\n\n" + "\n".join(f"::: {module}\n" for module in modules)
        (target / "api" / f"{name}.md").write_text(text, encoding="utf-8")


def write_page(source: Path, name: str, target: Path, draw: Callable[[str], str]) -> None:
    """Write one page, and what it links to outside docs/."""
    text, diagrams, files = translated(source.read_text(encoding="utf-8"), source.parent, name)
    for number, diagram in enumerate(diagrams):
        (target / diagram_name(name, number)).write_text(draw(diagram), encoding="utf-8")
    for file in files:
        copy = target / FILES / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    (target / name).write_text(text, encoding="utf-8")


def diagram_name(page: str, number: int) -> str:
    return f"{page.removesuffix('.md')}-diagram-{number}.svg"


def translated(text: str, folder: Path, name: str) -> tuple[str, list[str], list[Path]]:
    """A page's Markdown for the site, its diagrams, and the files outside docs/ to which it links.

    Args:
        folder: the page's folder in the repository, from which its links lead.
        name: the page's path in the site.
    """
    diagrams: list[str] = []
    files: list[Path] = []

    def link(image: str, label: str, address: str) -> str:
        path, mark, anchor = address.partition("#")
        if not path or "://" in path:
            return f"{image}[{label}]({address})"
        linked = (folder / path).resolve()
        outside = linked.relative_to(ROOT).as_posix()
        if outside.startswith("docs/"):
            inside = outside.removeprefix("docs/")
        elif outside in PAGES:
            inside = PAGES[outside]
        elif linked.is_dir():
            return label  # the site shows no folders
        elif linked.suffix == ".md":
            raise ValueError(f"{name} links to {outside}, which is not among PAGES in docs/site/site_pages.py")
        else:
            files.append(linked)
            inside = f"{FILES}/{outside}"
        return f"{image}[{label}]({'../' * name.count('/')}{inside}{mark}{anchor})"

    def prose(match: re.Match[str]) -> str:
        if match["math"]:
            return f"\\({match['math']}\\)"
        if match["address"]:
            return link(match["image"], match["label"], match["address"])
        return f"[docs/{match['mention']}]({match['mention']})" if match["mention"] else match[0]

    def fence(match: re.Match[str]) -> str:
        if match[2] == "math":
            return f"\\[\n{match[3].strip()}\n\\]"
        if match[2] == "mermaid":
            diagrams.append(match[3])
            return f"![Diagram]({Path(diagram_name(name, len(diagrams) - 1)).name})"
        return match[0]

    parts, end = [], 0
    for match in _FENCE.finditer(text):
        parts += [_PROSE.sub(prose, text[end : match.start()]), fence(match)]
        end = match.end()
    return "".join([*parts, _PROSE.sub(prose, text[end:])]), diagrams, files


def listed(entry: object) -> list[str]:
    """The pages in a part of the navigation."""
    match entry:
        case str():
            return [entry]
        case dict():
            return [page for part in entry.values() for page in listed(part)]
        case list():
            return [page for part in entry for page in listed(part)]
    raise TypeError(f"not a part of a navigation: {entry!r}")
