"""Build the documentation's site into build/site and check it: python docs/site/build_site.py (make docs)."""

import hashlib
import shutil
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import mermaidx
from site_check import problems_of
from site_pages import ROOT, listed, write_pages

CONFIG = ROOT / "zensical.toml"


def main() -> None:
    project = tomllib.loads(CONFIG.read_text(encoding="utf-8"))["project"]
    pages, site = ROOT / project["docs_dir"], ROOT / project["site_dir"]
    write_pages(pages, draw)
    copy_assets(pages / "assets")
    written = {path.relative_to(pages).as_posix() for path in pages.rglob("*.md")}
    if absent := sorted(written - set(listed(project["nav"]))):
        sys.exit(f"error: nav in {CONFIG.name} does not list {', '.join(absent)}")
    shutil.rmtree(site, ignore_errors=True)
    built = subprocess.run([sys.executable, "-m", "zensical", "build", "--clean", "--strict", "-f", CONFIG], cwd=ROOT)
    if built.returncode:
        sys.exit(built.returncode)
    if problems := problems_of(site):
        sys.exit("\n".join(["error: the site has problems:", *problems]))
    print(f"{site.relative_to(ROOT)}/index.html; to search in it, python -m http.server -d {site.relative_to(ROOT)}")


def draw(diagram: str) -> str:
    """The diagram as an SVG, which takes many seconds; it is kept under build/."""
    # Labels as SVG text: in an image, HTML inside SVG is not shown by every browser.
    diagram = '%%{init: {"flowchart": {"htmlLabels": false}}}%%\n' + diagram
    kept = ROOT / "build" / "diagrams" / f"{hashlib.sha256(diagram.encode()).hexdigest()}.svg"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(mermaidx.render(diagram).svg(), encoding="utf-8")
    return kept.read_text(encoding="utf-8")


def copy_assets(target: Path) -> None:
    """Style, script, and MathJax with its fonts, from the installed package."""
    target.mkdir()
    for name in ("style.css", "math.js"):
        shutil.copyfile(Path(__file__).with_name(name), target / name)
    mathjax = Path(str(files("mathjax"))) / "static" / "mathjax" / "es5"
    fonts = Path("output", "chtml", "fonts", "woff-v2")
    shutil.copytree(mathjax / fonts, target / "mathjax" / fonts)
    shutil.copyfile(mathjax / "tex-chtml.js", target / "mathjax" / "tex-chtml.js")


if __name__ == "__main__":
    main()
