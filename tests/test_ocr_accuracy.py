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

from pcpo_fast.errors import UserError
from pcpo_fast.rewards import load_reward
from pcpo_fast.rewards.ocr_accuracy import edit_distance, legible

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


def test_the_recogniser_sees_bytes_and_the_prompt_or_metadata_say_the_text() -> None:
    shown: list[np.ndarray] = []

    def read(pixels: np.ndarray) -> str:
        shown.append(pixels)
        return "open"

    batch = torch.rand(3, 3, 4, 6)
    batch[0, 0, 0, 0], batch[0, 0, 0, 1] = 1.2, -0.2
    reward = load_reward("ocr_accuracy", {"recognizer": read})
    scores = reward(batch, ['a door with "OPEN" on it', 'a "pen" and "ink"', "a sign"], [{}, {}, {"text": "opera"}])
    torch.testing.assert_close(torch.as_tensor(scores), torch.tensor([1.0, 1.0, 1 - 2 / 5]))
    assert [(pixels.shape, pixels.dtype) for pixels in shown] == [((4, 6, 3), np.uint8)] * 3
    assert shown[0][0, 0, 0] == 255 and shown[0][0, 1, 0] == 0
    assert shown[1][2, 3, 1] == round(float(batch[1, 1, 2, 3]) * 255)


@pytest.mark.parametrize(
    ("prompt", "metadata"), [("a cat", {}), ('an unclosed "quote', {}), ('""', {}), ("a", {"text": 3})]
)
def test_a_prompt_without_text(prompt: str, metadata: dict[str, Any]) -> None:
    reward = load_reward("ocr_accuracy", {"recognizer": lambda pixels: ""})
    with pytest.raises(UserError, match="ocr_accuracy finds no text in the prompt"):
        reward(torch.rand(1, 3, 4, 4), [prompt], [metadata])


def test_recognisers_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny_reader.py").write_text("def read(pixels): return 'cat'\ndef wrong(pixels): return ['cat']\n")
    monkeypatch.chdir(tmp_path)
    scores = load_reward("ocr_accuracy", {"recognizer": "tiny_reader:read"})(torch.rand(1, 3, 4, 4), ['"cat"'], [{}])
    assert torch.as_tensor(scores).tolist() == [1.0]
    with pytest.raises(UserError, match="the recognizer returned a list, it must be a string"):
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
