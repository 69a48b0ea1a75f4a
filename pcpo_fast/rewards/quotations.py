"""The texts in double quotation marks of any kind in a prompt."""

import re

# Straight marks are paired in order, but one after a digit is an inch mark (a 5" screw) unless it closes a quotation.
# The curly closing mark is also the opening mark in Swedish and Finnish.
_QUOTATION = re.compile(
    r'(?<!\d)["”＂](?=[^"”＂\s])([^"”＂]*[^"”＂\s])["”＂]'
    r'|“([^“”]+)[“”]|“([^"“”]+)"|„([^"„“”]+)["“”]|«([^«»]+)»|»([^«»]+)«|「([^」]+)」|『([^』]+)』'
)
_WITH_SPACES = re.compile(r'(?<!\d)(?<!\d\s)["”＂]([^"”＂]*[^"”＂\s][^"”＂]*)["”＂]')


def quotations(prompt: str) -> list[str]:
    """The texts in ``"..."``, ``“...”``, ``„...“``, ``«...»``, ``»...«`` or ``「...」``, stripped.

    Single quotation marks are ignored, because they cannot be distinguished from apostrophes.
    """
    prompt = prompt.replace('\\"', '"')
    found = [next(filter(None, match.groups())) for match in _QUOTATION.finditer(prompt)]
    found = found or [match.group(1) for match in _WITH_SPACES.finditer(prompt)]
    return [text.strip() for text in found if text.strip()]
