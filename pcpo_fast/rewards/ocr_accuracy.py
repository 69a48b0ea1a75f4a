"""Text rendering: how much of the requested text can be read in the image, 0..1 (Flow-GRPO, arXiv:2505.05470).

The requested text is in double quotes in the prompt. The score is 1 - min(d, n) / n, where n is its length without
spaces and d its edit distance to the recognized text, ignoring case; d is 0 if the recognized text contains it.
Flow-GRPO uses only the first quotation; here all quotations of a prompt are requested.
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
        recognizer: None: RapidOCR (the extra ``rewards``); or your own recognizer as ``module:function`` or as the
            function itself.

    Raises:
        UserError: RapidOCR is not installed, or the recognizer cannot be found.
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
            UserError: a prompt requests no text, or the recognizer does not return a string.
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
    """The text that an image should show: ``text`` of the metadata, otherwise the text in double quotes in the prompt,
    with one line per quotation.

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
    """1 if ``wanted`` was recognized, minus 1 / n for each wrong letter of its n. Case, spaces, Unicode variants of the
    same letter and surrounding text are ignored; the lines of ``wanted`` may be found in any order."""
    read, texts = _letters(found), [_letters(line) for line in wanted.splitlines()]
    whole = "".join(texts)
    apart = sum(_missing(read, text) for text in texts)
    return 1 - min(apart, _missing(read, whole)) / len(whole)


def _missing(read: str, wanted: str) -> int:
    return 0 if wanted in read else min(edit_distance(read, wanted), len(wanted))


def _letters(text: str) -> str:
    """The visible letters of a text without spaces, normalized so that letters that look alike are equal."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(_LOOK_ALIKE)
    return "".join(letter for letter in folded if not letter.isspace() and unicodedata.category(letter) != "Cf")


def edit_distance(a: str, b: str) -> int:
    """The Levenshtein distance: the minimum number of insertions, deletions and replacements that turn a into b."""
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
            "onnxruntime`, or give your own with the option recognizer"
        ) from None
    engine = RapidOCR(params={"Global.log_level": "error"})

    def read(pixels: np.ndarray) -> str:
        # The library expects BGR arrays, like OpenCV's. It returns lines from top to bottom.
        return "".join(engine(np.ascontiguousarray(pixels[..., ::-1])).txts or ())

    return read
