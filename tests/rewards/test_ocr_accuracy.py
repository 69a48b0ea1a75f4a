"""How much of a text can be read in an image: Flow-GRPO's arithmetic, and what a recogniser is shown."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from pcpo_fast.config.schema import RewardConfig, ScoringConfig
from pcpo_fast.errors import UserError
from pcpo_fast.prompts import Prompt
from pcpo_fast.rewards import RewardSet, load_reward
from pcpo_fast.rewards.ocr_accuracy import edit_distance, legible
from pcpo_fast.rewards.quotations import quotations

LETTERS = st.text(alphabet="abc", max_size=6)


@given(LETTERS, LETTERS)
def test_edit_distance_is_the_recursive_definition(a: str, b: str) -> None:
    @functools.cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        same = distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(same, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    assert edit_distance(a, b) == distance(len(a), len(b))


@pytest.mark.parametrize(
    ("found", "wanted", "score"),
    [
        ("Hello World", "hello world", 1.0),  # upper case and spaces are overlooked
        ("... HELLOWORLD!!", "Hello World", 1.0),  # and so is what surrounds the text
        ("Hallo World", "Hello World", 0.9),
        ("", "Hello World", 0.0),
        ("kitten", "sitting", 1 - 3 / 7),
        ("something long and altogether different", "cat", 0.0),  # never below 0
        ("ct", "cat", 1 - 1 / 3),
    ],
)
def test_score_of_a_reading(found: str, wanted: str, score: float) -> None:
    assert legible(found, wanted) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a sign reading "OPEN"', ["OPEN"]),
        ('A 5" tall sign reading "OPEN"', ["OPEN"]),
        ('a 12"x16" poster that says "HI"', ["HI"]),
        ('a 5 " tall sign reading "OPEN"', ["OPEN"]),
        ('two 5" screws and a 7 " nail', []),
        ('a sign "ROUTE 66" at 5" from "B"', ["ROUTE 66", "B"]),
        ("A 5” tall sign reading “OPEN”", ["OPEN"]),
        ("a sign “OPEN” beside ”STÄNGT” and „ZU“ and „ZU”", ["OPEN", "STÄNGT", "ZU", "ZU"]),
        ('“OPEN" beside "SHUT"', ["OPEN", "SHUT"]),
        ("une affiche «\u00a0OUVERT\u202f» et »ZU«", ["OUVERT", "ZU"]),
        ("「開店」と『閉店』", ["開店", "閉店"]),
        ('写着"你好"的牌子', ["你好"]),
        ("a board ＂OPEN＂", ["OPEN"]),
        ('He said "" then "HI"', ["HI"]),
        ('a sign " OPEN "', ["OPEN"]),
        (r"a sign reading \"OPEN\"", ["OPEN"]),
        ('a ""quoted"" word', ["quoted"]),
        ("\"DON'T PANIC\" on the dog's bowl", ["DON'T PANIC"]),
        ("the dogs' bowls say 'HI'", []),
        ('an unclosed "quote', []),
    ],
)
def test_quotations_of_every_kind(prompt: str, texts: list[str]) -> None:
    assert quotations(prompt) == texts


@pytest.mark.parametrize(
    ("found", "wanted", "score"),
    [
        ("CAFE\u0301", "CAF\u00c9", 1.0),  # the accent as a letter of its own
        ("GRAND\u00a0OPENING", "GRAND\u2009OPENING", 1.0),
        ("STRASSE", "Stra\u00dfe", 1.0),
        ("ＯＰＥＮ ２４", "Open 24", 1.0),
        ("ﬁre", "FIRE", 1.0),
        ("DON'T", "don’t", 1.0),
        ("9-5", "9–5", 1.0),
        ("OP\u200bEN", "OPEN\ufeff", 1.0),
        ("CAFE", "CAFÉ", 0.75),
        # Several texts: all count, in any order, and what is nearly read counts as for one.
        ("pen ink", "pen\nink", 1.0),
        ("inkpen", "pen\nink", 1.0),
        ("pen", "pen\nink", 0.5),
        ("pin ink", "pen\nink", 1 - 1 / 6),
        ("", "pen\nink", 0.0),
    ],
)
def test_letters_that_look_alike_and_several_texts(found: str, wanted: str, score: float) -> None:
    assert legible(found, wanted) == pytest.approx(score, abs=1e-12)


def test_prompts_that_cannot_be_judged_are_found_before_the_first_image() -> None:
    prompts = [Prompt('a "cat"'), Prompt("a red circle on a blue background", {"text": "x"}), Prompt('a 5" dog')]
    options = {"recognizer": "builtins:len"}
    ocr = RewardConfig(name="ocr_accuracy", options=options)
    with pytest.raises(
        UserError, match=r"^p\.txt: prompt 3 of 3 cannot be scored: the reward ocr_accuracy finds no text"
    ):
        RewardSet([ocr]).check_prompts(prompts, "p.txt")
    RewardSet([ocr]).check_prompts(prompts[:2], "p.txt")
    with pytest.raises(UserError, match=r"prompt 1 of 3 cannot be scored: the reward caption_match cannot judge"):
        RewardSet([RewardConfig(name="caption_match")]).check_prompts(prompts, "p.txt")
    shown = RewardSet([RewardConfig(name="ocr_accuracy", options=options, evaluation_only=True)])
    shown.check_prompts(prompts, "p.txt", evaluation=False)
    dropping = ScoringConfig(on_failure="drop_group")  # type: ignore[call-arg]
    RewardSet([ocr], dropping).check_prompts(prompts, "p.txt")


def test_the_recogniser_sees_bytes_and_the_prompt_or_metadata_say_the_text() -> None:
    shown: list[np.ndarray] = []

    def read(pixels: np.ndarray) -> str:
        shown.append(pixels)
        return "open"

    batch = torch.rand(3, 3, 4, 6)
    batch[0, 0, 0, 0], batch[0, 0, 0, 1] = 1.2, -0.2
    reward = load_reward("ocr_accuracy", {"recognizer": read})
    scores = reward(batch, ['a door with "OPEN" on it', 'a "pen" and "ink"', "a sign"], [{}, {}, {"text": "opera"}])
    torch.testing.assert_close(torch.as_tensor(scores), torch.tensor([1.0, 0.5, 1 - 2 / 5]))
    assert [(pixels.shape, pixels.dtype) for pixels in shown] == [((4, 6, 3), np.uint8)] * 3
    assert shown[0][0, 0, 0] == 255 and shown[0][0, 1, 0] == 0
    assert shown[1][2, 3, 1] == round(float(batch[1, 1, 2, 3]) * 255)


@pytest.mark.parametrize(
    ("prompt", "metadata"), [("a cat", {}), ('an unclosed "quote', {}), ('""', {}), ("a", {"text": 3})]
)
def test_a_prompt_without_text(prompt: str, metadata: dict[str, Any]) -> None:
    reward = load_reward("ocr_accuracy", {"recognizer": lambda pixels: ""})
    with pytest.raises(UserError, match="ocr_accuracy finds no text to draw in the prompt"):
        reward(torch.rand(1, 3, 4, 4), [prompt], [metadata])


def test_recognisers_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny_reader.py").write_text("def read(pixels): return 'cat'\ndef wrong(pixels): return ['cat']\n")
    monkeypatch.chdir(tmp_path)
    scores = load_reward("ocr_accuracy", {"recognizer": "tiny_reader:read"})(torch.rand(1, 3, 4, 4), ['"cat"'], [{}])
    assert torch.as_tensor(scores).tolist() == [1.0]
    with pytest.raises(UserError, match="the recognizer returned a list, but must return a string"):
        load_reward("ocr_accuracy", {"recognizer": "tiny_reader:wrong"})(torch.rand(1, 3, 4, 4), ['"cat"'], [{}])
    with pytest.raises(UserError, match=r"tiny_reader.* has no raed, did you mean read"):
        load_reward("ocr_accuracy", {"recognizer": "tiny_reader:raed"})
    with pytest.raises(UserError, match="option recognizer must be module:function, got 3"):
        load_reward("ocr_accuracy", {"recognizer": 3})


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rapidocr", None)
    with pytest.raises(UserError, match=r"rapidocr is not installed: run `pip install rapidocr onnxruntime`"):
        load_reward("ocr_accuracy")


def test_rapid_ocr_reads_what_is_drawn() -> None:
    pytest.importorskip("rapidocr", reason="RapidOCR is not installed: pip install rapidocr onnxruntime")
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install rapidocr onnxruntime")
    image = Image.new("RGB", (384, 128), (200, 220, 255))
    ImageDraw.Draw(image).text((20, 30), "Hello World", fill=(200, 0, 0), font=ImageFont.load_default(56))
    batch = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
    reward = load_reward("ocr_accuracy")
    assert torch.as_tensor(reward(batch, ['"Hello World"'], [{}])).tolist() == [1.0]
    assert torch.as_tensor(reward(torch.ones(1, 3, 64, 64), ['"cat"'], [{}])).tolist() == [0.0]
