"""From what a caller has (a file, a mapping, a configuration; rewards written in Python) to a checked configuration."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from pcpo_fast.config.dotted_keys import flattened
from pcpo_fast.config.loading import load_config as load_file
from pcpo_fast.config.presets import DEFAULT_CONFIG
from pcpo_fast.config.schema import Config, RewardConfig
from pcpo_fast.errors import UserError

File = str | os.PathLike[str]
Source = File | Mapping[str, Any] | Config
"""A YAML file, its content as a mapping, or a configuration that is loaded already."""
Settings = Mapping[str, Any] | Sequence[str]
"""``{"train.epochs": 3}``, ``{"train": {"epochs": 3}}`` or ``["train.epochs=3"]``, as the command line takes them."""
Reward = str | Callable[..., Any] | Mapping[str, Any]
"""A name, a function or a class, or a mapping of ``rewards`` in the configuration whose ``name`` is one of these."""


def load_config(
    config: Source | None = None, settings: Settings = (), *, rewards: Reward | Sequence[Reward] | None = None
) -> Config:
    """Read and check a configuration.

    Args:
        config: YAML file or the name of a shipped one, mapping, or a loaded configuration; None: the demo's.
        settings: they win over ``config``.
        rewards: instead of the configuration's own; see :data:`Reward`.

    Raises:
        UserError: one sentence for the first problem, with its place and what is allowed.
    """
    if config is None:
        config = DEFAULT_CONFIG
    where, texts = "command line", []
    if isinstance(config, Mapping):
        where, texts, config = "setting", settings_texts(config), None
    if isinstance(settings, Mapping) or rewards is not None:
        where = "setting"
    texts += settings_texts(settings)
    if isinstance(config, Config) and any(text.startswith("algorithm=") for text in texts):
        raise UserError(
            "algorithm: a loaded configuration already holds its preset's values; pass the file or "
            "mapping that it was loaded from instead"
        )
    if rewards is not None:
        texts += settings_texts({"rewards": rewards})
    return load_file(config if config is None or isinstance(config, Config) else os.fspath(config), texts, where)


def check_least(least: int, **numbers: int | None) -> None:
    """Refuse arguments below `least`; None is one that was not given.

    Raises:
        UserError: one of them is.
    """
    for name, number in numbers.items():
        if number is not None and number < least:
            raise UserError(f"--{name.replace('_', '-')}: must be at least {least}, got {number}")


def check_choice(allowed: Sequence[str], **words: str | None) -> None:
    """Refuse arguments that are not among `allowed`; None is one that was not given.

    Raises:
        UserError: one of them is not.
    """
    for name, word in words.items():
        if word is not None and word not in allowed:
            raise UserError(f"--{name}: must be one of {', '.join(allowed)}, got {word!r}")


def check_seed(seed: int) -> None:
    """Refuse a seed that random generators do not take.

    Raises:
        UserError: it is one.
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed: must lie in 0..2^63 - 1, got {seed}")


def settings_texts(settings: Settings) -> list[str]:
    """Settings as the command line writes them.

    Raises:
        UserError: they are neither a mapping nor a list of strings, or a value is not one that YAML has.
    """
    if isinstance(settings, str) or not isinstance(settings, Mapping | Sequence):
        raise UserError(
            f'settings: must be a mapping such as {{"train.epochs": 3}} or a list such as ["train.epochs=3"], '
            f"got {settings!r}"
        )
    if not isinstance(settings, Mapping):
        return list(settings)
    if "rewards" in settings:
        settings = {**settings, "rewards": [_reward_entry(reward) for reward in _listed(settings["rewards"])]}
    return [f"{key}={_json(key, value)}" for key, value in flattened(settings) if key]


def reward_configs(rewards: Reward | Sequence[Reward], known: Sequence[RewardConfig] = ()) -> list[RewardConfig]:
    """Rewards as the configuration has them; a name, or a label, that is among ``known`` stands for that one.

    Raises:
        UserError: a function or class cannot be found by its name, or an entry is wrong.
    """
    chosen: dict[str, RewardConfig] = {}
    for reward in _listed(rewards):
        entry = _reward_entry(reward)
        found = [one for one in known if entry.keys() == {"name"} and entry["name"] in (one.name, one.label)]
        try:
            chosen |= {one.column: one for one in found or [RewardConfig.model_validate(entry)]}
        except ValidationError as error:
            problem = error.errors()[0]
            raise UserError(f"rewards: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    return list(chosen.values())


def _listed(rewards: Reward | Sequence[Reward]) -> Sequence[Reward]:
    return rewards if isinstance(rewards, Sequence) and not isinstance(rewards, str) else [rewards]  # type: ignore[list-item]


def _reward_entry(reward: Reward) -> dict[str, Any]:
    """An entry of ``rewards``: a function is named by its module, and labelled with its own name."""
    entry = dict(reward) if isinstance(reward, Mapping) else {"name": reward}
    given = entry.get("name")
    if callable(given):
        from pcpo_fast.rewards.user import name_of

        entry = {"label": getattr(given, "__qualname__", None)} | entry | {"name": name_of(given)}
    return entry


def _json(key: str, value: Any) -> str:
    def path(other: Any) -> str:
        if isinstance(other, os.PathLike):
            return os.fspath(other)
        raise UserError(f"setting {key}: {other!r} of type {type(other).__name__} is not a configuration value")

    return json.dumps(value, default=path, ensure_ascii=False)
