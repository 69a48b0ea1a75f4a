"""Warns about prompts that a text encoder truncates."""

import warnings
from collections.abc import Sequence
from typing import Any


def warn_of_long_prompts(prompts: Sequence[str], tokenizer: Any, limit: int, reader: str) -> int:
    """Warn once about prompts longer than ``limit`` tokens, quoting what is cut from the first.

    Args:
        prompts: any number, repeated ones count once.
        tokenizer: of transformers; its special tokens count, and stay when a prompt is cut.
        limit: tokens that are read.
        reader: completes "... tokens that ...".

    Returns:
        How many prompts are cut.
    """
    distinct = list(dict.fromkeys(prompts))
    tokens = tokenizer(distinct, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
    long = [(prompt, ids) for prompt, ids in zip(distinct, tokens, strict=True) if len(ids) > limit]
    if long:
        prompt, ids = long[0]
        lost = tokenizer.decode(ids[limit - 1 :], skip_special_tokens=True)
        warnings.warn(
            f"{len(long)} of {len(distinct)} prompts are longer than the {limit} tokens that {reader}; "
            f'of "{prompt[:60]}..." this is cut: "{lost[:120]}"',
            stacklevel=2,
        )
    return len(long)
