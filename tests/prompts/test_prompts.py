"""Reading prompt files and choosing an epoch's prompts."""

import codecs
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcpo_fast.errors import UserError
from pcpo_fast.prompts import Prompt, epoch_prompts, load_prompts


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Files that are right.


def test_text_file_one_prompt_per_line(tmp_path: Path) -> None:
    path = write(tmp_path, "prompts.txt", "a red circle\n\n  a blue square \r\n\t\nein grüner Kreis – 緑の円")
    assert load_prompts(path) == [Prompt("a red circle"), Prompt("a blue square"), Prompt("ein grüner Kreis – 緑の円")]


def test_jsonl_with_and_without_metadata(tmp_path: Path) -> None:
    lines = ['{"prompt": "a cat", "metadata": {"count": 2, "tags": ["x"]}}', "", '{"prompt": " a dog "}', ""]
    path = write(tmp_path, "prompts.jsonl", "\n".join(lines))
    assert load_prompts(str(path)) == [Prompt("a cat", {"count": 2, "tags": ["x"]}), Prompt("a dog", {})]


@pytest.mark.parametrize(("name", "line"), [("p.txt", "a cat"), ("p.jsonl", '{"prompt": "a cat"}')])
def test_byte_order_mark_is_ignored(tmp_path: Path, name: str, line: str) -> None:
    assert load_prompts(write(tmp_path, name, b"\xef\xbb\xbf" + line.encode())) == [Prompt("a cat")]


def test_null_metadata_is_no_metadata(tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path, "p.jsonl", '{"prompt": "a cat", "metadata": null}')) == [Prompt("a cat")]


def test_unicode_line_separators_do_not_break_a_line(tmp_path: Path) -> None:
    prompt = "one\u2028two\x0bthree\x85four"
    assert load_prompts(write(tmp_path, "p.txt", prompt)) == [Prompt(prompt)]
    line = json.dumps({"prompt": "one\u2028two"}, ensure_ascii=False)
    assert load_prompts(write(tmp_path, "p.jsonl", line)) == [Prompt("one\u2028two")]


def test_braces_are_allowed_in_plain_prompts(tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path, "p.txt", "{a red circle}")) == [Prompt("{a red circle}")]


def test_repeated_prompts_are_kept(tmp_path: Path) -> None:
    assert len(load_prompts(write(tmp_path, "p.txt", "a cat\na cat\n"))) == 2


def test_prompts_can_be_keys() -> None:
    assert len({Prompt("a", {"x": [1]}), Prompt("a", {"x": [1]}), Prompt("b")}) == 2


# Files that are wrong: one sentence that says what and where.


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompt file .*nowhere\.txt does not exist$"):
        load_prompts(tmp_path / "nowhere.txt")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        load_prompts(tmp_path)


@pytest.mark.parametrize("content", ["", "\n \n\t\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_empty_file(tmp_path: Path, name: str, content: str | bytes) -> None:
    with pytest.raises(UserError, match=rf"prompt file .*{name} is empty; it needs at least one prompt"):
        load_prompts(write(tmp_path, name, content))


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_not_utf8_names_line_and_byte(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, b"a cat\na caf\xe9 at night\n")
    with pytest.raises(UserError, match=rf"{name} line 2 is not UTF-8 text \(byte 11 of the file\)"):
        load_prompts(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize(
    ("name", "text"), [("p.txt", "a cat\r\nein Käfer 🐞\r\n"), ("p.csv", "text\na cat\nein Käfer 🐞")]
)
def test_a_byte_order_mark_names_the_encoding(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    path = write(tmp_path, name, mark + text.encode(encoding))
    assert load_prompts(path) == [Prompt("a cat"), Prompt("ein Käfer 🐞")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a cat\n".encode("utf-16-le"), "line 1 contains a NUL character, as UTF-16 without a byte order mark does"),
        ("a cat\n".encode("utf-16-be"), "line 1 contains a NUL character"),
        (b"a cat\na \0 dog\n", "line 2 contains a NUL character"),
        ("a cat\n".encode("utf-16") + b"x", "is not valid UTF-16 despite its byte order mark"),
    ],
)
def test_what_only_looks_like_text(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_prompts(write(tmp_path, "p.txt", content))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a cat\ra dog\r"),
        ("p.jsonl", '{"prompt": "a cat"}\r{"prompt": "a dog"}\r'),
        ("p.csv", "text\ra cat\ra dog"),
    ],
)
def test_carriage_returns_end_lines(tmp_path: Path, name: str, text: str) -> None:
    assert load_prompts(write(tmp_path, name, text)) == [Prompt("a cat"), Prompt("a dog")]


@pytest.mark.parametrize("name", ["p.yaml", "p.xlsx", "p.jsonl.gz", "p.md"])
def test_an_unknown_ending_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        UserError, match=r"files ending in \.\w+ are not supported; allowed are \.txt, \.jsonl, .*\.parquet$"
    ):
        load_prompts(write(tmp_path, name, "a cat"))
    assert load_prompts(write(tmp_path, "prompts", "a cat")) == [Prompt("a cat")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a cat"', "not valid JSON: .* (column 19)"),
        ("a cat", "not valid JSON: .* (column 1)"),
        ('["a cat"]', 'must be a JSON object with the key "prompt", got a list'),
        ('"a cat"', 'must be a JSON object with the key "prompt", got a string'),
        ("{}", 'the key "prompt" (or "text", or "caption") is missing; the keys are none'),
        ('{"metadata": {}}', 'the key "prompt" (or "text", or "caption") is missing; the keys are "metadata"'),
        ('{"prompt": ""}', '"prompt" must be a non-empty string, got an empty string'),
        ('{"prompt": "  "}', '"prompt" must be a non-empty string, got an empty string'),
        ('{"prompt": null}', '"prompt" must be a non-empty string, got null'),
        ('{"prompt": 3}', '"prompt" must be a non-empty string, got a number'),
        ('{"prompt": ["a"]}', '"prompt" must be a non-empty string, got a list'),
        ('{"prompt": "a cat", "metadata": "x"}', '"metadata" must be a JSON object, got a string'),
        ('{"prompt": "a cat", "metadata": [1]}', '"metadata" must be a JSON object, got a list'),
        ('{"prompt": "a cat", "metadata": false}', '"metadata" must be a JSON object, got true or false'),
        ('{"prompt": "a cat", "meta": {}}', 'unknown key "meta"; allowed: "prompt" and "metadata", .*'),
        ('{"prompt": "a \\ud83d cat"}', '"prompt" contains a lone surrogate (half a character)'),
        ('{"prompt": "a cat", "x": ["\\udc00"]}', '"x" contains a lone surrogate (half a character)'),
        ('{"prompt": "a \\u0000 cat"}', '"prompt" contains a NUL character'),
        ('{"prompt": "a cat", "Prompt": "a dog"}', 'both "prompt" and "Prompt" could be the prompt; keep one of them'),
        ('{"prompt": "a cat", "prompt": "a dog"}', 'not valid JSON: the key "prompt" is given twice'),
        ('{"prompt": "a cat", "metadata": {"n": ' + "9" * 5000 + "}}", "not valid JSON: .*"),
        ('{"prompt": ' + "[" * 200_000 + "]" * 200_000 + "}", "not valid JSON: .*"),
    ],
)
def test_malformed_jsonl_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, "p.jsonl", '{"prompt": "fine"}\n\n' + line + '\n{"prompt": "fine"}')
    expected = message.replace("(", r"\(").replace(")", r"\)").replace("[", r"\[")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))} line 3: {expected}$") as caught:
        load_prompts(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a cat"}\n', r"a JSON object .*\.jsonl$"),
        ('{"caption": "a cat"}\n', r"a JSON object .*\.jsonl$"),
        ('["a cat",\n "a dog"]\n', r"a JSON list .*\.json$"),
        ("Prompt\tCategory\na cat\tAnimals\n", r"a table .*\.tsv$"),
    ],
)
def test_other_forms_under_the_name_of_a_text_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"p\.txt line 1: {message}"):
        load_prompts(write(tmp_path, "p.txt", text))


# The prompts of an epoch.

counts = st.integers(1, 40)


@given(counts, counts, st.integers(0, 2**63 - 1))
def test_every_prompt_is_used_once_before_any_repeats(count: int, per_epoch: int, seed: int) -> None:
    epochs = 3 * count // per_epoch + 2
    sequence = [index for epoch in range(epochs) for index in epoch_prompts(count, per_epoch, epoch, seed)]
    assert len(sequence) == epochs * per_epoch
    for start in range(0, len(sequence) - count + 1, count):
        assert sorted(sequence[start : start + count]) == list(range(count))


@given(counts, counts, st.integers(0, 10**6))
def test_an_epoch_follows_from_its_number_alone(count: int, per_epoch: int, epoch: int) -> None:
    alone = epoch_prompts(count, per_epoch, epoch, seed=7)
    for other in (0, epoch + 1, epoch // 2):
        epoch_prompts(count, per_epoch, other, seed=7)
    assert epoch_prompts(count, per_epoch, epoch, seed=7) == alone
    # The same sequence, read in pieces of one.
    assert alone == [epoch_prompts(count, 1, epoch * per_epoch + i, seed=7)[0] for i in range(per_epoch)]


def test_seed_and_pass_change_the_order() -> None:
    first, second = epoch_prompts(50, 50, 0, seed=0), epoch_prompts(50, 50, 1, seed=0)
    assert first != second
    assert first != epoch_prompts(50, 50, 0, seed=1)
    assert first != list(range(50))


def test_order_does_not_depend_on_global_random_state() -> None:
    code = (
        "import random, numpy, torch; random.seed(5); numpy.random.seed(5); torch.manual_seed(5);"
        "from pcpo_fast.prompts import epoch_prompts; print(epoch_prompts(30, 12, 4, 3))"
    )
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(elsewhere.stdout) == epoch_prompts(30, 12, 4, 3)


@pytest.mark.parametrize("arguments", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, -1, 0), (1, 1, 0, -1)])
def test_out_of_range_arguments(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        epoch_prompts(*arguments)


# Lists as benchmarks are published.

PUBLISHED = {
    "PartiPrompts.tsv": (
        'Prompt\tCategory\tChallenge\tNote\na sign that says "Hi"\tArts\tBasic\t\n\nbond\tAbstract\tBasic\tx\n',
        [
            Prompt('a sign that says "Hi"', {"Category": "Arts", "Challenge": "Basic"}),
            Prompt("bond", {"Category": "Abstract", "Challenge": "Basic", "Note": "x"}),
        ],
    ),
    "DrawBench.csv": (
        'Prompts,Category\r\nA red car,Colors\r\n"one, two",Counting\r\n"""Hi"" on a wall",Text\r\n',
        [
            Prompt("A red car", {"Category": "Colors"}),
            Prompt("one, two", {"Category": "Counting"}),
            Prompt('"Hi" on a wall', {"Category": "Text"}),
        ],
    ),
    "anime.json": ('["a cat",\n "a dog"]', [Prompt("a cat"), Prompt("a dog")]),
    "evaluation_metadata.jsonl": (
        '{"tag": "counting", "include": [{"class": "bench", "count": 2}], "prompt": "two benches"}\n',
        [Prompt("two benches", {"tag": "counting", "include": [{"class": "bench", "count": 2}]})],
    ),
    "captions_val2014.json": (
        '{"info": {}, "annotations": [{"image_id": 7, "id": 1, "caption": "A dog. "},'
        ' {"image_id": 7, "id": 2, "caption": "No."}, {"image_id": 4, "id": 3, "caption": "A cat."}]}',
        [Prompt("A dog.", {"image_id": 7}), Prompt("A cat.", {"image_id": 4})],
    ),
    "objects.json": ('[{"prompt": "a", "metadata": {"n": 1}}]', [Prompt("a", {"n": 1})]),
    "lines.json": ('{"prompt": "a"}\n{"prompt": "b"}\n', [Prompt("a"), Prompt("b")]),
    "one.json": ('{"prompt": "a"}', [Prompt("a")]),
    "indented.json": ('{\n "prompt": "a",\n "n": 1\n}\n', [Prompt("a", {"n": 1})]),
    "list.jsonl": ('[{"prompt": "a"},\n {"Caption": "b"}]\n', [Prompt("a"), Prompt("b")]),
    "semicolons.csv": ('Prompt;Category\n"one; two, three";x\n', [Prompt("one; two, three", {"Category": "x"})]),
    "tabs.csv": ("prompt\tn\na, b\t1\n", [Prompt("a, b", {"n": "1"})]),
    "commas.tsv": ('prompt,n\n"a, b",1\n', [Prompt("a, b", {"n": "1"})]),
    "index.csv": (",prompt\n0,a\n1,b\n", [Prompt("a", {"": "0"}), Prompt("b", {"": "1"})]),
    # Quotation marks of a list without quoting; all that begin a cell and end one may lie lines apart.
    "unquoted.tsv": (
        'Prompt\tCategory\n"G O" on a wall\tText\na 5" screw\tThings\n',
        [Prompt('"G O" on a wall', {"Category": "Text"}), Prompt('a 5" screw', {"Category": "Things"})],
    ),
    "far_apart.tsv": (
        'Prompt\tCategory\n"A is a letter\tText\na sign: "B"\tText\nthe end"\tText\n',
        [Prompt(text, {"Category": "Text"}) for text in ('"A is a letter', 'a sign: "B"', 'the end"')],
    ),
    "quoted.tsv": (
        'prompt\tn\n"a ""b"" c"\t1\n"two\nlines"\t2\n',
        [Prompt('a "b" c', {"n": "1"}), Prompt("two\nlines", {"n": "2"})],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_lists_are_read_as_they_are(name: str, tmp_path: Path) -> None:
    text, expected = PUBLISHED[name]
    assert load_prompts(write(tmp_path, name, "\ufeff" + text)) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "a,b\n1,2\n", "line 1: the header needs a column prompt, prompts, text or caption$"),
        ("a.tsv", "prompt\tb\nx\ty\tz\n", "line 2: 3 cells, but the header has 2$"),
        ("a.csv", 'prompt\n"abc\n', "line 2: not a valid table: unexpected end of data$"),
        ("a.csv", "prompt,b\n,2\n", 'line 2: "prompt" must be a non-empty string, got an empty string$'),
        ("a.csv", "prompt\n", "is empty; it needs at least one prompt$"),
        ("a.csv", "\nprompt,b,b\nx,1,2\n", 'line 2: duplicate column "b" in the header$'),
        ("a.csv", "prompt,Prompt\nx,y\n", 'line 1: both "prompt" and "Prompt" could be the prompt'),
        ("a.tsv", "caption\tb\n \tx\n", 'line 2: "caption" must be a non-empty string, got an empty string$'),
        ("a.jsonl", '["x",\n "y"\n "z"]', "a.jsonl line 3: not valid JSON: .* \\(column 2\\)$"),
        ("a.json", "[]", "is empty; it needs at least one prompt$"),
        ("a.json", '["x", 1]', 'entry 2: must be a JSON object with the key "prompt", got a number$'),
        ("a.json", '{"annotations": [{"caption": "x"}]}', r'annotations\[0\]: must be an object with "caption"'),
        ("a.jsonl", '{"prompt": "x", "metdata": {}}', 'line 1: unknown key "metdata"; allowed'),
        ("a.jsonl", '{"prompt": "x", "metadata": {}, "tag": 1}', 'line 1: unknown key "tag"; allowed'),
    ],
)
def test_malformed_lists_name_the_place(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_prompts(write(tmp_path, name, text))


@pytest.mark.parametrize(
    ("keys", "chosen"),
    [
        (["caption", "TEXT"], "TEXT"),
        (["text", "Prompt", "caption"], "Prompt"),
        (["Caption", "id"], "Caption"),
        (["text", "Prompts"], "Prompts"),
    ],
)
def test_every_kind_of_file_has_the_same_names_for_the_prompt(keys: list[str], chosen: str, tmp_path: Path) -> None:
    row = {key: f"the {key}" for key in keys}
    rest = {key: value for key, value in row.items() if key != chosen}
    forms = {"p.json": json.dumps([row]), "p.jsonl": json.dumps(row)}
    forms |= {name: f"{s.join(row)}\n{s.join(row.values())}\n" for name, s in (("p.csv", ","), ("p.tsv", "\t"))}
    for name, text in forms.items():
        assert load_prompts(write(tmp_path, name, text)) == [Prompt(f"the {chosen}", rest)], name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", "prompt,Wish\nno,a cat\n"),
        ("p.tsv", "Wish\tprompt\na cat\tno\n"),
        ("p.jsonl", '{"prompt": "no", "Wish": "a cat"}'),
        ("p.json", '[{"prompt": "no", "Wish": "a cat"}]'),
    ],
)
def test_a_column_of_another_name(name: str, text: str, tmp_path: Path) -> None:
    file = write(tmp_path, name, text)
    assert load_prompts(file, "Wish") == [Prompt("a cat", {"prompt": "no"})]
    with pytest.raises(UserError, match=r'"wish" \(prompts\.column\)'):
        load_prompts(file, "wish")
    assert load_prompts(write(tmp_path, "list.json", '["a cat"]'), "Wish") == [Prompt("a cat")]


# In a dataset on the hub.


def test_a_file_of_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, file: str, **rest: Any) -> str:
        asked.append((name, file, rest))
        return str(write(tmp_path, "p.csv", "Prompt\na cat\n"))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load_prompts("hf://datasets/me/prompts/sub/p.csv") == [Prompt("a cat")]
    assert load_prompts("hf://datasets/me/prompts@v2/p.csv") == [Prompt("a cat")]
    assert asked == [
        ("me/prompts", "sub/p.csv", {"repo_type": "dataset", "revision": None}),
        ("me/prompts", "p.csv", {"repo_type": "dataset", "revision": "v2"}),
    ]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: ["README.md", "a.csv", "b.txt"])
    with pytest.raises(UserError, match=r"hf://datasets/me/prompts: name one of the dataset's files: a\.csv, b\.txt$"):
        load_prompts("hf://datasets/me/prompts")
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: ["README.md", "data/a.csv"])
    assert load_prompts("hf://datasets/me/prompts") == [Prompt("a cat")] and asked[-1][:2] == (
        "me/prompts",
        "data/a.csv",
    )
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: ["README.md"])
    with pytest.raises(UserError, match=r"hf://datasets/me/prompts: the dataset has no file of prompts$"):
        load_prompts("hf://datasets/me/prompts")
    with pytest.raises(UserError, match=r"me/prompts does not exist \(a dataset .* is hf://datasets/me/prompts\)$"):
        load_prompts("me/prompts")
    with pytest.raises(UserError, match="an address is hf://datasets/OWNER/NAME/FILE"):
        load_prompts("hf://datasets/me")


def test_a_hub_dataset_offline_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="the hub dataset me/prompts is neither in the local cache nor") as caught:
        load_prompts("hf://datasets/me/prompts/p.csv")
    assert "\n" not in str(caught.value)


# Through the library datasets.


def test_without_datasets_parquet_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"p\.parquet needs datasets, which is not installed: run `pip install datasets`"
    ):
        load_prompts(write(tmp_path, "p.parquet", b"PAR1"))
    with pytest.raises(UserError, match=r"p2\.parquet does not exist$"):
        load_prompts(tmp_path / "p2.parquet")
    write(tmp_path, "dataset_dict.json", '{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write(tmp_path / split, "state.json", "{}")
    with pytest.raises(UserError, match=r"is a dataset with splits; give the folder of one: test, train$"):
        load_prompts(tmp_path)


def test_parquet_files_and_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"Caption": ["a cat", "a dog"], "n": [1, 2], "raw": [b"x", b"y"]})
    parquet.write_table(table, tmp_path / "p.parquet")
    parquet.write_table(table.select(["n"]), tmp_path / "numbers.parquet")
    datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint="0").save_to_disk(str(tmp_path / "saved"))
    for path in (tmp_path / "p.parquet", tmp_path / "saved"):
        assert load_prompts(path) == [Prompt("a cat", {"n": 1}), Prompt("a dog", {"n": 2})]
    with pytest.raises(UserError, match=r"damaged\.parquet cannot be read by datasets: "):
        load_prompts(write(tmp_path, "damaged.parquet", b"PAR1abc"))
    with pytest.raises(UserError, match=r"the table needs a column prompt, prompts, text or caption$"):
        load_prompts(tmp_path / "numbers.parquet")
