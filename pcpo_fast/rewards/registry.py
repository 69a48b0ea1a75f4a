"""From the name of a reward to the callable; a reward's file is imported when it is asked for, not before."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pcpo_fast.errors import UserError
from pcpo_fast.rewards.option_secrets import resolved, shown
from pcpo_fast.rewards.sources import note_options
from pcpo_fast.rewards.user import first_line, import_target

Reward = Callable[[Tensor, list[str], list[dict[str, Any]]], Tensor | np.ndarray | Sequence[float]]

# Name -> module:attribute, a function that is the reward or a class whose instances are.
_BUILT_IN = {
    "caption_match": "pcpo_fast.rewards.caption_match:caption_match",
    "jpeg_compressibility": "pcpo_fast.rewards.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "pcpo_fast.rewards.jpeg:jpeg_incompressibility",
}
# These need a model, or a library of the extra "rewards".
_LEARNED = {
    "hpsv2": "pcpo_fast.rewards.hpsv2:HPSv2",
    "pickscore": "pcpo_fast.rewards.pickscore:PickScore",
    "clip_score": "pcpo_fast.rewards.clip_score:ClipScore",
    "aesthetic": "pcpo_fast.rewards.aesthetic:Aesthetic",
    "image_reward": "pcpo_fast.rewards.image_reward:ImageReward",
    "caption_bertscore": "pcpo_fast.rewards.caption_bertscore:CaptionBertScore",
    "ocr_accuracy": "pcpo_fast.rewards.ocr_accuracy:OcrAccuracy",
}
# These ask another machine, and need its address.
_REMOTE = {
    "remote": "pcpo_fast.rewards.remote:Remote",
    "vision_judge": "pcpo_fast.rewards.vision_judge:VisionJudge",
}
_BUILT_IN |= _LEARNED | _REMOTE
# Those that cannot judge every prompt: what raises UserError for the others.
_PROMPT_CHECKS = {
    "caption_match": "pcpo_fast.rewards.caption_match:check_prompt",
    "ocr_accuracy": "pcpo_fast.rewards.ocr_accuracy:requested_text",
}

available_rewards: tuple[str, ...] = tuple(_BUILT_IN)
"""Names of the built-in rewards."""

learned_rewards: tuple[str, ...] = tuple(_LEARNED)
"""Those among them that need a model's files, or a library that is not always installed."""

remote_rewards: tuple[str, ...] = tuple(_REMOTE)
"""Those among them that are the client of something on the network."""


def load_reward(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """Find a built-in reward, or a user's as ``module:function`` or ``module:Class``.

    A function is the reward itself and gets ``options`` as keyword arguments with every call. A class is made once
    with ``options`` as keyword arguments, and its instance is the reward; here belongs what loads a model. An option
    ``{env: NAME}`` is the value of that environment variable.

    Raises:
        UserError: no such reward, module or attribute; it is not callable, does not take these options, is not to be
            called as a reward is, or could not be made; an option holds a secret itself.
    """
    options = dict(options or {})
    if name not in _BUILT_IN and ":" not in name:
        close = difflib.get_close_matches(name, available_rewards, n=1, cutoff=0.5)
        suggestion = f", did you mean {close[0]}?" if close else ""
        raise UserError(
            f"unknown reward {name!r}{suggestion}; built in are {', '.join(available_rewards)}, "
            "and module:function names one of your own"
        )
    target = import_target(_BUILT_IN.get(name, name))
    if name not in _BUILT_IN:
        note_options(options)
    if not isinstance(target, type):
        _check_call(name, target, options)
        return functools.partial(target, **resolved(name, options)) if options else target
    reward = _make(name, target, options)
    _check_call(name, reward, {})
    return reward


def prompt_check(name: str) -> Callable[[str, dict[str, Any]], object] | None:
    """What raises `UserError` for a prompt and its metadata that the reward cannot judge; None if it judges all."""
    return import_target(_PROMPT_CHECKS[name]) if name in _PROMPT_CHECKS else None


def _make(name: str, target: type, options: Mapping[str, Any]) -> Reward:
    signature = _signature(target)
    if signature is not None:
        try:
            signature.bind(**options)
        except TypeError as error:
            raise UserError(f"reward {name} cannot be made with the options {shown(options)}: {error}") from None
    values = resolved(name, options)
    try:
        made = target(**values)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"reward {name} cannot be made: {first_line(error)}") from error
    if not callable(made):
        raise UserError(f"reward {name} is a class whose instances are not callable; it needs a __call__ method")
    return made


def _check_call(name: str, reward: Callable[..., Any], options: Mapping[str, Any]) -> None:
    signature = _signature(reward)
    if signature is None:
        return
    try:
        (signature.bind_partial if options else signature.bind)(None, None, None)
    except TypeError as error:
        raise UserError(
            f"reward {name} cannot be called with (images, prompts, metadata): {error}; it is declared with {signature}"
        ) from None
    try:
        signature.bind(None, None, None, **options)
    except TypeError as error:
        raise UserError(
            f"reward {name} does not take the options {shown(options)}: {error}; it takes {signature}"
        ) from None


def _signature(target: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):  # some callables written in C do not tell
        return None
