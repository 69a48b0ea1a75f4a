"""pcpo_fast.reporting.pages: what every page has from its skeleton, and the tables and numbers on it."""

import base64
import hashlib
import re
from pathlib import Path

import jinja2
import pytest

from pcpo_fast.reporting.pages import render_page
from pcpo_fast.reporting.statistics import Estimate
from pcpo_fast.reporting.tables import Grid, estimate_text


@pytest.fixture
def template(tmp_path: Path) -> Path:
    file = tmp_path / "page_of_a_test.html"
    file.write_text(
        '{% extends "page.html" %}{% block script %}if (1 < 2 && "a") { run(); }{% endblock %}'
        "{% block sections %}<p>{{ words }}</p>{% endblock %}",
        encoding="utf-8",
    )
    return file


def test_values_are_escaped_and_only_the_page_s_own_script_is_allowed(template: Path) -> None:
    page = render_page(template, title="<b>", subtitle="'&'", footer='"', words="</p><script>alert(1)</script>")
    assert "<title>&lt;b&gt;</title>" in page and "<p>&#39;&amp;&#39;</p>" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    library, script = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert library == ""
    assert script == 'if (1 < 2 && "a") { run(); }'
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_a_value_that_the_template_lacks_is_an_error(template: Path) -> None:
    with pytest.raises(jinja2.UndefinedError, match="words"):
        render_page(template, title="", subtitle="", footer="")


def test_an_interval_is_written_like_its_value() -> None:
    assert estimate_text(Estimate(1.5, 1.0, 2.25, 3)) == "1.500 [1.000, 2.250]"
    assert estimate_text(Estimate(1.5, None, None, 1), lambda value: f"{value:+.1f}") == "+1.5"


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    assert Grid("", ("a|b", "c"), (("d", "1|2"),)).markdown() == "| a\\|b | c |\n| --- | ---: |\n| d | 1\\|2 |"
