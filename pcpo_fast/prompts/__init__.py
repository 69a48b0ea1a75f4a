"""Prompts: reading prompt files, and choosing the prompts of an epoch."""

from pcpo_fast.prompts.entries import Prompt, prompt_of
from pcpo_fast.prompts.epochs import epoch_prompts, trained_prompts
from pcpo_fast.prompts.files import load_prompts

__all__ = ["Prompt", "epoch_prompts", "load_prompts", "prompt_of", "trained_prompts"]
