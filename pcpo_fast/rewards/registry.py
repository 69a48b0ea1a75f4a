"""Finding rewards by name; a reward's module is only imported when it is used."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pcpo_fast.errors import UserError
from pcpo_fast.rewards.learned import LearnedReward
from pcpo_fast.rewards.option_secrets import resolved, shown
from pcpo_fast.rewards.sources import note_options
from pcpo_fast.rewards.user import USERS_ERRORS, first_line, import_target

Reward = Callable[[Tensor, list[str], list[dict[str, Any]]], Tensor | np.ndarray | Sequence[float]]

# Name -> module:attribute of a function that is the reward, or of a class whose instances are.
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
_ONE_SIZE = ("hpsv2", "image_reward")  # whatever file is given
# These call another machine, and need its address.
_REMOTE = {
    "remote": "pcpo_fast.rewards.remote:Remote",
    "vision_judge": "pcpo_fast.rewards.vision_judge:VisionJudge",
}
_BUILT_IN |= _LEARNED | _REMOTE
# Rewards that cannot score every prompt, and functions that raise UserError for those prompts.
_PROMPT_CHECKS = {
    "caption_match": "pcpo_fast.rewards.caption_match:check_prompt",
    "ocr_accuracy": "pcpo_fast.rewards.ocr_accuracy:requested_text",
}

available_rewards: tuple[str, ...] = tuple(_BUILT_IN)
"""Names of the built-in rewards."""

learned_rewards: tuple[str, ...] = tuple(_LEARNED)
"""Built-in rewards that need model files or an optional library."""

remote_rewards: tuple[str, ...] = tuple(_REMOTE)
"""Built-in rewards that call a server on the network."""


def model_bytes(name: str, options: Mapping[str, Any]) -> float | None:
    """Bytes of a reward's model on a GPU by the published size of its default model; None if it is not known.

    Rewards without a model of their own, behind an address, on a CPU or on another GPU need none.
    """
    if name not in _LEARNED:
        return 0.0 if name in _BUILT_IN else None
    kind = import_target(_LEARNED[name])
    assert isinstance(kind, type)
    if not issubclass(kind, LearnedReward):
        return 0.0
    defaults = {key: value.default for key, value in inspect.signature(kind).parameters.items()}
    given = defaults | dict(options)
    if given["device"] not in (None, "cuda"):
        return 0.0
    if given["model"] != defaults["model"] and name not in _ONE_SIZE:
        return None
    counted, single = kind.size
    return counted * (4 if given["dtype"] == "float32" else 2) + 4.0 * single


def load_reward(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """Load a built-in reward by name, or a user's as ``module:function`` or ``module:Class``.

    A function is the reward itself and gets ``options`` as keyword arguments in every call. A class is instantiated
    once with ``options`` as keyword arguments, and the instance is the reward; use a class to load a model. An option
    ``{env: NAME}`` is replaced by the value of that environment variable.

    Raises:
        UserError: the reward, module or attribute does not exist, is not callable, does not accept these options or the
            arguments of a reward, or cannot be created; or an option itself looks like a secret.
    """
    options = dict(options or {})
    if name not in _BUILT_IN and ":" not in name:
        close = difflib.get_close_matches(name, available_rewards, n=1, cutoff=0.5)
        suggestion = f", did you mean {close[0]}?" if close else ""
        raise UserError(
            f"unknown reward {name!r}{suggestion}; built in: {', '.join(available_rewards)}; your own: module:function"
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
    """A function that raises `UserError` for prompts that the reward cannot score; None if it scores all."""
    return import_target(_PROMPT_CHECKS[name]) if name in _PROMPT_CHECKS else None


def scores_predictions(reward: Reward) -> bool:
    """Whether a reward accepts the blurred images that steps predict: unless its attribute of this name is false."""
    return bool(getattr(getattr(reward, "func", reward), "scores_predictions", True))


def _make(name: str, target: type, options: Mapping[str, Any]) -> Reward:
    signature = _signature(target)
    if signature is not None:
        try:
            signature.bind(**options)
        except TypeError as error:
            raise UserError(f"reward {name} cannot be created with the options {shown(options)}: {error}") from None
    values = resolved(name, options)
    try:
        made = target(**values)
    except UserError:
        raise
    except USERS_ERRORS as error:
        raise UserError(f"reward {name} cannot be created: {first_line(error)}") from error
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
    except (TypeError, ValueError):  # some callables written in C have no signature
        return None
