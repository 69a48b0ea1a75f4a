"""``load_config``: a validated configuration from a file, mapping or configuration, with rewards written in Python."""

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
"""A YAML file, its content as a mapping, or a loaded configuration."""
Settings = Mapping[str, Any] | Sequence[str]
"""``{"train.epochs": 3}``, ``{"train": {"epochs": 3}}``, or ``["train.epochs=3"]`` as on the command line."""
Reward = str | Callable[..., Any] | Mapping[str, Any]
"""A name, a function or a class, or an entry of the configuration's ``rewards`` whose ``name`` is one of these."""


def load_config(
    config: Source | None = None, settings: Settings = (), *, rewards: Reward | Sequence[Reward] | None = None
) -> Config:
    """Load and validate a configuration.

    Args:
        config: YAML file or the name of a shipped one, mapping, or a loaded configuration; None: the demo's.
        settings: settings that take precedence over ``config``.
        rewards: rewards that replace the configuration's own; see :data:`Reward`.

    Raises:
        UserError: the configuration is invalid; the message gives the first problem, its location and what is allowed.
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
            "algorithm: a loaded configuration already contains its preset's values; pass the file or "
            "mapping that it was loaded from instead"
        )
    if rewards is not None:
        texts += settings_texts({"rewards": rewards})
    return load_file(config if config is None or isinstance(config, Config) else os.fspath(config), texts, where)


def settings_texts(settings: Settings) -> list[str]:
    """Settings in the form ``key=value`` of the command line.

    Raises:
        UserError: they are neither a mapping nor a list of strings, or a value cannot be represented in YAML.
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
    """Convert rewards to configuration entries; a name or label in ``known`` selects that entry.

    Raises:
        UserError: a function or class cannot be imported by its name, or an entry is invalid.
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
    """An entry of ``rewards``; a function is referred to as module:function and labelled with its own name."""
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
