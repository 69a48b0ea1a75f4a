"""The built site, checked: every link and anchor leads somewhere, and no page loads anything from elsewhere."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_STYLE_ADDRESS = re.compile(r"""(?:url\(\s*|@import\s+)["']?([^"')\s;]+)""")
_LINKS_THAT_LOAD = {
    "stylesheet",
    "icon",
    "preload",
    "prefetch",
    "preconnect",
    "dns-prefetch",
    "modulepreload",
    "manifest",
}


class _Page(HTMLParser):
    """What a page links to and loads, and the anchors in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attributes if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "link":
            if set(values.get("rel", "").split()) & _LINKS_THAT_LOAD and "href" in values:
                self.loads.append(values["href"])
        elif "href" in values:
            self.links.append(values["href"])
        self.loads += [values[name] for name in ("src", "data", "poster") if name in values and tag != "base"]
        self.loads += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]
        self.loads += _STYLE_ADDRESS.findall(values.get("style", ""))


def problems_of(site: Path) -> list[str]:
    """One line for each broken link and each thing that is loaded from elsewhere."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    problems = []
    for path, page in pages.items():
        name = path.relative_to(site)
        problems += [f"{name} loads {address}" for address in page.loads if _is_foreign(address)]
        for address in [*page.links, *(address for address in page.loads if not _is_foreign(address))]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            # The page for what is not found may be shown at any depth, so its addresses start at the site's root.
            start = site if parts.path.startswith("/") else path.parent
            target = (start / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                problems.append(f"{name} links to {address}, which is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                problems.append(f"{name} links to {address}, but there is no such heading")
    for path in sorted(site.rglob("*.css")):
        addresses = _STYLE_ADDRESS.findall(path.read_text(encoding="utf-8"))
        problems += [f"{path.relative_to(site)} loads {address}" for address in addresses if _is_foreign(address)]
    return problems


def _is_foreign(address: str) -> bool:
    parts = urlsplit(address)
    return parts.scheme not in ("", "data") or bool(parts.netloc)
