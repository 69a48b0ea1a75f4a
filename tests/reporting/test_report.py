"""pcpo_fast.reporting.report: one whole, safe, self-contained page from whatever a run directory holds."""

import base64
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reporting_runs import CAPTIONS, make_run, scenes

from pcpo_fast.errors import UserError
from pcpo_fast.reporting.charts import chart_library
from pcpo_fast.reporting.grids import image_bytes, to_image
from pcpo_fast.reporting.metrics_file import read_metrics
from pcpo_fast.reporting.report import write_report
from pcpo_fast.reporting.run_files import read_run_files

VOID = {"meta", "img", "input", "br", "hr", "link"}
ATTACK = """</pre></script><script>alert(1)</script><img src=x onerror="alert(2)">'"&"""


class Page(HTMLParser):
    """Checks that tags are balanced, and collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with its report; not to be changed."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "demo", epochs=20)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def text(finished: Path) -> str:
    return (finished / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    check_self_contained(text)
    return Page(text)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the whole run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "demo"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A run of one epoch: all files are there, and its figures are quickly drawn."""
    folder = make_run(tmp_path / "small", epochs=1, every=1)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if '"kind": "evaluation"' in line))
    return folder


def report(folder: Path) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    check_self_contained(text)
    return Page(text)


def check_self_contained(text: str) -> None:
    """Nothing on the page could make a browser ask the network for anything."""
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "a"), tag
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "poster", "action", "data"):
                assert value is not None and value.startswith(("data:image/", "#")), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    markup = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert "@import" not in markup and not re.search(r"url\(\s*[^#\s]", markup)
    assert len([one for one in page.all("script") if "type" not in one]) == 2  # the library and the page's own


def test_all_numbers_are_there(finished: Path, page: Page) -> None:
    records = read_metrics(finished / "metrics.jsonl")
    held = [record["heldout/reward/mean"] for record in records if record["kind"] == "evaluation"]
    assert f"{held[0]:.3f} → {held[-1]:.3f} {held[-1] - held[0]:+.3f} held-out reward" in page.text
    assert "finished: 20 epochs, proportionate credit on the dance sampler" in page.text
    assert "1 min 24 s training time" in page.text  # 84.5 s, from summary.json
    assert re.search(r"10\d images/s", page.text)
    assert "ζ = 13.343" in page.text  # in the legend of the credit chart
    assert "the native credit varies by a factor of 3.39 here, the proportionate one by 7.67." in page.text
    assert "by a factor of 3.39" in page.text
    assert "Skipped updates: 1 of 40." in page.text
    assert "clip_range: 0.0001" in page.text
    assert "Left out" in page.text and "There is no" not in page.text


def test_images_and_charts_are_embedded(page: Page) -> None:
    images = page.all("img")
    assert len(images) == 2 * 12 + 3 * 12  # before/after, and the evaluations after 0, 10 and 20 epochs
    first = image_of(images[0])
    assert first.size == (32, 32)  # the sheet's enlarged pixels are pixels again
    before = np.asarray(to_image(scenes(0.25)[0])).astype(int)
    assert np.abs(np.asarray(first.convert("RGB")).astype(int) - before).max() == 0
    assert [box["data-label"] for box in page.all("div") if "data-label" in box] == [
        "before training",
        "after 10 epochs",
        "after 20 epochs",
    ]
    assert images[0]["alt"] == f"{CAPTIONS[0]}, before" and images[1]["alt"] == f"{CAPTIONS[0]}, after"
    assert page.text.count(f"{CAPTIONS[0]} · 0.60 → 0.80") == 1
    assert [box["aria-label"] for box in page.all("div") if box.get("class") == "charts"] == [
        "Reward over epochs",
        "Clip fraction per step and epoch",
        "Native and proportionate credit of every step",
        "Mismatch between rollout and update",
        "Gradient norm of every update",
        "Seconds per phase and images per second, over epochs",
    ]


def image_of(attributes: dict[str, str | None]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(str(attributes["src"]).split(",", 1)[1])))


def test_a_sheet_without_tiles_or_with_wrong_ones_is_shown_whole(run: Path) -> None:
    path = run / "images" / "before_after.png"
    for text in (None, "[]", '{"tiles": [{"boxes": [[0, 0, 99999, 99999]]}]}'):
        with Image.open(path) as image:
            image.load()
            image.info = {} if text is None else {"tiles": text}
            path.write_bytes(image_bytes(image))
        source = str(report(run).all("img")[0]["src"])
        assert source == "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def test_only_its_own_script_may_run(text: str, page: Page) -> None:
    (policy,) = [meta["content"] for meta in page.all("meta") if "content-security-policy" in str(meta).lower()]
    assert policy is not None and "default-src 'none'" in policy
    for script in re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy.split("script-src ")[1]
    assert len(chart_library().encode()) < 1_500_000


def test_light_and_dark(text: str) -> None:
    light, dark = text.split("prefers-color-scheme: dark", 1)
    assert "--plot-0072b2: #0072b2" in light and "--plot-0072b2: #58b1ee" in dark
    used = set(re.findall(r"var\((--(?!color)[\w-]+)\)", re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)))
    assert used and all(f"{name}:" in light and f"{name}:" in dark for name in used)


def test_everything_from_files_is_escaped(run: Path) -> None:
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + f"\n# {ATTACK}\n")
    (run / "images" / "captions.json").write_text(json.dumps([ATTACK] * 12))
    credit = json.loads((run / "credit.json").read_text())
    (run / "credit.json").write_text(json.dumps(credit | {"sampler": ATTACK, "rule": ATTACK}))
    with (run / "metrics.jsonl").open("a") as file:
        extra = {ATTACK: ATTACK, f"reward/{ATTACK}": 1.0, "reward/other": 2.0}
        file.write(json.dumps({"kind": "epoch", "epoch": 19, "time": 50.0, **extra}) + "\n")
    hostile = run.rename(run.parent / "a<b onclick=x>&amp;\"'")
    page = report(hostile)
    assert not page.all("b") or all("onclick" not in attributes for attributes in page.all("b"))
    assert page.text.count("<script>alert(1)</script>") >= 6  # it is there to be read
    assert page.text.startswith("a<b onclick=x>&amp;\"'")


def test_secrets_of_the_config_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "logging:\n  wandb:\n    api_key: hunter1\n    project: mine\n  hf_token: 'hunter2'\n  password: null\n"
        "rewards:\n  - options:\n      - secret: hunter3\nmodel:\n  max_token_length: 512\n  tokens: 7\n"
    )
    page = report(tmp_path)
    assert "hunter" not in (tmp_path / "report.html").read_text()
    assert page.text.count("(not shown)") == 3
    assert "max_token_length: 512" in page.text and "tokens: 7" in page.text and "password: null" in page.text


PIECES = ["metrics.jsonl", "config.yaml", "credit.json", "summary.json", "images", "images/captions.json"]


@pytest.mark.parametrize("piece", PIECES)
def test_a_missing_piece_is_no_obstacle(small: Path, piece: str) -> None:
    path = small / piece
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = report(small)
    titles = "Reward, Before and after, Samples over time, Clip fraction per step, Credit per step, Diversity"
    left_out = page.text.partition("nothing was recorded for it: ")[2].partition(".")[0].split(", ")
    assert (
        len(page.all("section")) + len(set(left_out) & {*titles.split(", "), "Health of the optimization", "Time"})
        == 10
    )
    if piece == "credit.json":
        assert "Credit per step" in left_out
    if piece == "images":
        assert page.all("img") == []
    if piece == "summary.json":
        assert "not finished: 0 of 1 epoch" in page.text


def test_a_run_that_has_just_started(run: Path) -> None:
    for path in run.iterdir():
        if path.name != "config.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = report(run)
    assert "not finished: 0 of 20 epochs" in page.text and "charts" not in [box.get("class") for box in page.all("div")]


def test_a_run_that_was_stopped_before_its_first_update(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "demo", epochs=0, finished=False))
    assert "0.625 → –" in page.text
    assert "before training, held-out reward 0.625" in page.text


def test_a_run_that_is_being_written(small: Path) -> None:
    path = small / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"kind": "update", "epoch": 1, "policy/lo')
    assert "Training run, " in report(small).text
    path.write_text(whole + '{"kind": "update", "epoch": 1, "policy/lo\n' + whole)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 3"):
        write_report(small)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"native": [1], "times": [1], "proportionate": [1], "zeta": 1}', '"x"', "{}\xff"]
)
def test_a_damaged_credit_file_is_left_out(small: Path, content: str) -> None:
    (small / "credit.json").write_bytes(content.encode("latin-1"))
    files = read_run_files(small)
    assert files.credit is None and ["credit.json" in note for note in files.notes] == [True]


def test_damaged_images_are_left_out_and_named(small: Path) -> None:
    path = small / "images" / "epoch_0001.png"
    path.write_bytes(path.read_bytes()[:2000])
    (small / "images" / "before_after.png").write_text("<svg onload=alert(1)>")
    page = report(small)
    assert len(page.all("img")) == 12
    assert "images/epoch_0001.png is not a valid PNG image" in page.text
    assert "images/before_after.png is not a valid PNG image" in page.text


def test_grids_of_a_future_that_was_given_up_are_left_out(run: Path) -> None:
    shutil.copy(run / "images" / "epoch_0010.png", run / "images" / "epoch_0300.png")
    assert [epoch for epoch, _ in read_run_files(run).grids()] == [0, 10, 20]


def test_long_runs_and_large_images_stay_small(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {epochs: 99}\n")
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (900, 1700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "images" / "before_after.png")
    for epoch in range(100):
        Image.new("RGB", (8, 8), (epoch, 0, 0)).save(tmp_path / "images" / f"epoch_{epoch:04d}.png")
    page = report(tmp_path)
    kind, data = str(page.all("img")[0]["src"]).split(",", 1)
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (1600, 847)
    labels = [figure["data-label"] for figure in page.all("div") if "data-label" in figure]
    assert len(labels) == 24 and labels[0] == "before training" and labels[-1] == "after 99 epochs"


def test_not_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder does not exist"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"neither metrics\.jsonl nor config\.yaml"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
