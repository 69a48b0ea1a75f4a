"""Warns about prompts that a text encoder truncates."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError

EMPTY = ({"role": "user", "content": ""},)
"""A conversation of one empty prompt."""


def template_tokens(
    tokenizer: Any,
    folder: Path | None,
    messages: Sequence[Any] = EMPTY,
    *,
    add_generation_prompt: bool = True,
    **options: Any,
) -> int:
    """How many tokens the chat template around a prompt has, less those that the tokenizer adds to any text.

    Args:
        tokenizer: of transformers.
        folder: of the pipeline, for the message.
        messages: the conversation, with an empty prompt.
        add_generation_prompt: whether the template begins an answer.
        options: of the template.

    Raises:
        UserError: there is no template.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"model.path: the tokenizer of {folder} has no chat template (chat_template.jinja), in which the text "
            "encoder reads prompts"
        )
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **options
    )
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) - len(tokenizer("")["input_ids"])


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
            f"prompts longer than the {counted(limit, 'token')} that {reader}: {len(long)} of {len(distinct)}; "
            f'of "{prompt[:60]}..." this is cut: "{lost[:120]}"',
            stacklevel=2,
        )
    return len(long)
