"""Reading prompt files and choosing an epoch's prompts."""

import json
import re
import subprocess
import sys
from pathlib import Path

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


def test_utf16_is_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 1 is not UTF-8 text \(byte 0 of the file\)"):
        load_prompts(write(tmp_path, "p.txt", "a cat".encode("utf-16")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a cat"', "not valid JSON: .* (column 19)"),
        ("a cat", "not valid JSON: .* (column 1)"),
        ('["a cat"]', 'must be a JSON object with the key "prompt", got a list'),
        ('"a cat"', 'must be a JSON object with the key "prompt", got a text'),
        ("{}", 'the key "prompt" is missing'),
        ('{"metadata": {}}', 'the key "prompt" is missing'),
        ('{"prompt": ""}', '"prompt" must be a text that is not empty, got an empty text'),
        ('{"prompt": "  "}', '"prompt" must be a text that is not empty, got an empty text'),
        ('{"prompt": null}', '"prompt" must be a text that is not empty, got null'),
        ('{"prompt": 3}', '"prompt" must be a text that is not empty, got a number'),
        ('{"prompt": ["a"]}', '"prompt" must be a text that is not empty, got a list'),
        ('{"prompt": "a cat", "metadata": "x"}', '"metadata" must be a JSON object, got a text'),
        ('{"prompt": "a cat", "metadata": [1]}', '"metadata" must be a JSON object, got a list'),
        ('{"prompt": "a cat", "metadata": false}', '"metadata" must be a JSON object, got true or false'),
        ('{"prompt": "a cat", "meta": {}}', 'unknown key "meta"; allowed: "prompt" and "metadata", .*'),
        ('{"prompt": "a \\ud83d cat"}', '"prompt" holds half a character (a lone surrogate escape)'),
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


def test_jsonl_under_the_name_of_a_text_file(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", '{"prompt": "a cat"}\n')
    with pytest.raises(UserError, match=r"p\.txt line 1: a JSON object .*\.jsonl$"):
        load_prompts(path)


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
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_lists_are_read_as_they_are(name: str, tmp_path: Path) -> None:
    text, expected = PUBLISHED[name]
    assert load_prompts(write(tmp_path, name, "\ufeff" + text)) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "a,b\n1,2\n", "line 1: the header needs a column prompt, prompts, caption or text$"),
        ("a.tsv", "prompt\tb\nx\ty\tz\n", "line 2: 3 cells, but the header has 2$"),
        ("a.csv", 'prompt\n"abc\n', "line 2: not a valid table: unexpected end of data$"),
        ("a.csv", "prompt,b\n,2\n", 'line 2: "prompt" must be a text that is not empty, got an empty text$'),
        ("a.csv", "prompt\n", "is empty; it needs at least one prompt$"),
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
