"""What a prompt has in double quotation marks of any kind."""

import re

# Straight marks pair in their order, but one behind a digit is an inch mark (a 5" screw) unless it closes a quotation.
# The curly closing mark is also the opening one in Swedish and Finnish.
_QUOTATION = re.compile(
    r'(?<!\d)["”＂](?=[^"”＂\s])([^"”＂]*[^"”＂\s])["”＂]'
    r'|“([^“”]+)[“”]|“([^"“”]+)"|„([^"„“”]+)["“”]|«([^«»]+)»|»([^«»]+)«|「([^」]+)」|『([^』]+)』'
)
_WITH_SPACES = re.compile(r'(?<!\d)(?<!\d\s)["”＂]([^"”＂]*[^"”＂\s][^"”＂]*)["”＂]')


def quotations(prompt: str) -> list[str]:
    """The texts in ``"..."``, ``“...”``, ``„...“``, ``«...»``, ``»...«`` or ``「...」``, without blanks around them.

    Single quotation marks are none of these: they cannot be told from apostrophes.
    """
    prompt = prompt.replace('\\"', '"')
    found = [next(filter(None, match.groups())) for match in _QUOTATION.finditer(prompt)]
    found = found or [match.group(1) for match in _WITH_SPACES.finditer(prompt)]
    return [text.strip() for text in found if text.strip()]
