"""Text rendering: how much of the text asked for can be read in the image (Flow-GRPO, arXiv:2505.05470).

The text is what the prompt has in double quotes. 1 - min(d, n) / n, with n its length without spaces and d the edit
distance to what was read, lower case; d is 0 where the text appears within it. 0..1. Flow-GRPO takes the first
quotation only; here a prompt with several asks for all of them.
"""

import unicodedata
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pcpo_fast.errors import UserError
from pcpo_fast.rewards.preprocessing import rows_of_bytes
from pcpo_fast.rewards.quotations import quotations
from pcpo_fast.rewards.user import import_target

_LOOK_ALIKE = str.maketrans("‘’ʼ′“”„‐–—−", "'" * 4 + '"' * 3 + "-" * 4)

Recognizer = Callable[[np.ndarray], str]
"""uint8 RGB [H, W, 3] -> the text in it."""


class OcrAccuracy:
    """Share of the requested text that is legible.

    Args:
        recognizer: None for RapidOCR (the extra ``rewards``), a recogniser of your own as ``module:function``, or the
            function itself.

    Raises:
        UserError: RapidOCR is not installed, or the recogniser cannot be found.
    """

    name: ClassVar[str] = "ocr_accuracy"

    def __init__(self, recognizer: str | Recognizer | None = None) -> None:
        if recognizer is None:
            self._read = _rapid_ocr()
        elif isinstance(recognizer, str):
            self._read = import_target(recognizer)
        elif callable(recognizer):
            self._read = recognizer
        else:
            raise UserError(f"reward {self.name}: option recognizer must be module:function, got {recognizer!r}")

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Score float32 images [B, 3, H, W] in 0..1; returns float32 [B].

        The text may also be given as ``text`` in a prompt's metadata.

        Raises:
            UserError: a prompt asks for no text, or a recogniser of the user's returns none.
        """
        wanted = [requested_text(prompt, row) for prompt, row in zip(prompts, metadata, strict=True)]
        scores = []
        for pixels, text in zip(rows_of_bytes(images), wanted, strict=True):
            found = self._read(pixels)
            if not isinstance(found, str):
                raise UserError(
                    f"reward {self.name}: the recognizer returned a {type(found).__name__}, but must return a string"
                )
            scores.append(legible(found, text))
        return torch.tensor(scores)


def requested_text(prompt: str, metadata: dict[str, Any]) -> str:
    """The text that an image should show: ``text`` of the metadata, else what the prompt has in double quotes, with a
    line for each quotation.

    Raises:
        UserError: there is none.
    """
    text = metadata.get("text")
    if text is None:
        text = "\n".join(quotations(prompt))
    if not isinstance(text, str) or not _letters(text):
        raise UserError(
            f"the reward ocr_accuracy finds no text to draw in the prompt {prompt!r}: put it in "
            "double quotes in the prompt, or in the metadata as text"
        )
    return text


def legible(found: str, wanted: str) -> float:
    """1 where ``wanted`` was read, less by 1 / n for each of its n letters that is wrong. Upper case, spaces and other
    forms of the same letter in Unicode are overlooked, and so is what surrounds the text; the lines of ``wanted`` may
    be read in any order."""
    read, texts = _letters(found), [_letters(line) for line in wanted.splitlines()]
    whole = "".join(texts)
    apart = sum(_missing(read, text) for text in texts)
    return 1 - min(apart, _missing(read, whole)) / len(whole)


def _missing(read: str, wanted: str) -> int:
    return 0 if wanted in read else min(edit_distance(read, wanted), len(wanted))


def _letters(text: str) -> str:
    """What can be seen of a text, without spaces: letters that look alike are equal."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(_LOOK_ALIKE)
    return "".join(letter for letter in folded if not letter.isspace() and unicodedata.category(letter) != "Cf")


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and replacements of a letter that make a into b."""
    costs = list(range(len(b) + 1))
    for row, letter in enumerate(a, 1):
        diagonal, costs[0] = costs[0], row
        for column, other in enumerate(b, 1):
            cost = min(costs[column] + 1, costs[column - 1] + 1, diagonal + (letter != other))
            diagonal, costs[column] = costs[column], cost
    return costs[-1]


def _rapid_ocr() -> Recognizer:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError(
            f"reward ocr_accuracy: {error.name or 'rapidocr'} is not installed: run `pip install rapidocr "
            "onnxruntime`, or name a recogniser of your own with the option recognizer"
        ) from None
    engine = RapidOCR(params={"Global.log_level": "error"})

    def read(pixels: np.ndarray) -> str:
        # The library takes arrays to be BGR, as OpenCV's are. It reads line by line, from the top.
        return "".join(engine(np.ascontiguousarray(pixels[..., ::-1])).txts or ())

    return read
