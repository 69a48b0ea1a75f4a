"""The documentation's site: its translation of pages, what its check finds, and its navigation."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")


def test_pages_are_translated() -> None:
    from site_pages import translated

    page = (
        "A step $`x' = a x`$ and `$`, `[no](link.md)`; see docs/metrics.md and [`code`](method.md#notation).\n\n"
        "```math\nx = y\n```\n\n```mermaid\nflowchart TD\n```\n\n```python\nf[0](x)\n```\n\n"
        "[rules](../CONTRIBUTING.md#habits), [a file](../configs/tiny_sd.yaml), [a folder](../configs), "
        "[far](https://a.org/b.md), ![a figure](figures/credit.png), [here](#below)\n"
    )
    text, diagrams, files = translated(page, ROOT / "docs", "page.md")
    assert text == (
        "A step \\(x' = a x\\) and `$`, `[no](link.md)`; see [docs/metrics.md](metrics.md) "
        "and [`code`](method.md#notation).\n\n"
        "\\[\nx = y\n\\]\n\n![Diagram](page-diagram-0.svg)\n\n```python\nf[0](x)\n```\n\n"
        "[rules](contributing.md#habits), [a file](files/configs/tiny_sd.yaml), a folder, "
        "[far](https://a.org/b.md), ![a figure](figures/credit.png), [here](#below)\n"
    )
    assert diagrams == ["flowchart TD\n"]
    assert files == [ROOT / "configs" / "tiny_sd.yaml"]


def test_a_linked_page_outside_docs_has_to_be_listed() -> None:
    from site_pages import translated

    with pytest.raises(ValueError, match=r"x\.md links to kernels/README\.md, which is not among PAGES"):
        translated("[x](../kernels/README.md)", ROOT / "docs", "x.md")


def test_the_check_finds_broken_links_and_what_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    from site_check import problems_of

    page = '<h1 id="top"></h1><a href="https://a.org">fine</a><link rel="canonical" href="https://a.org">'
    (tmp_path / "deep").mkdir()
    (tmp_path / "index.html").write_text(page + '<a href="deep/a.html#top"></a><img src="data:image/png;base64,AA">')
    (tmp_path / "deep" / "a.html").write_text(page + '<a href="../index.html#top"></a><a href="#top"></a>')
    (tmp_path / "style.css").write_text("a { background: url(img.png); } svg { fill: url('data:image/svg+xml,x') }")
    assert problems_of(tmp_path) == []

    (tmp_path / "deep" / "b.html").write_text(
        '<a href="c.html"></a><a href="a.html#none"></a><img src="gone.png"><script src="https://cdn.org/x.js"></script>'
        '<link rel="stylesheet" href="//fonts.org/a.css"><p style="background: url(https://b.org/i.png)"></p>'
    )
    (tmp_path / "style.css").write_text(
        "@import 'https://fonts.org/b.css'; @font-face { src: url(https://fonts.org/c.woff2) }"
    )
    assert problems_of(tmp_path) == [
        "deep/b.html loads https://cdn.org/x.js",
        "deep/b.html loads //fonts.org/a.css",
        "deep/b.html loads https://b.org/i.png",
        "deep/b.html links to c.html, which is not there",
        "deep/b.html links to a.html#none, but there is no such heading",
        "deep/b.html links to gone.png, which is not there",
        "style.css loads https://fonts.org/b.css",
        "style.css loads https://fonts.org/c.woff2",
    ]


def test_the_navigation_lists_every_page_once() -> None:
    from site_pages import API, PAGES, listed

    nav = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    documents = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert sorted(listed(nav)) == sorted(documents | set(PAGES.values()) | {f"api/{name}.md" for name in API})
