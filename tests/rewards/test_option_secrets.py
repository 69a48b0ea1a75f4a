"""Secrets among a reward's options: named by the environment, refused in the clear, hidden in messages."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pcpo_fast.errors import UserError
from pcpo_fast.rewards import load_reward
from pcpo_fast.rewards.option_secrets import resolved, shown

SECRET = "sk-1234567890"
SOURCE = """
class Judge:
    def __init__(self, **options):
        self.options = options
    def __call__(self, images, prompts, metadata):
        return [0.0] * len(prompts)
def level(images, prompts, metadata, *, api_key, factor=1.0):
    return [factor * (api_key == "sk-1234567890")] * len(prompts)
"""


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"secret_judge_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_JUDGE_KEY", SECRET)
    return f"{name}:Judge"


def test_an_option_takes_the_value_of_an_environment_variable(judge: str) -> None:
    options: dict[str, Any] = {
        "api_key": {"env": "MY_JUDGE_KEY"},
        "client": {"headers": [{"authorization": {"env": "MY_JUDGE_KEY"}}], "retries": 3},
        "env": "staging",
    }
    made: Any = load_reward(judge, options)
    assert made.options["api_key"] == SECRET and made.options["env"] == "staging"
    assert made.options["client"] == {"headers": [{"authorization": SECRET}], "retries": 3}
    assert SECRET not in repr(options)  # the configuration itself, which is written down
    level: Any = load_reward(judge.replace("Judge", "level"), {"api_key": {"env": "MY_JUDGE_KEY"}, "factor": 2.0})
    assert level(torch.zeros(1, 3, 4, 4), ["a"], [{}]) == [2.0]


@pytest.mark.parametrize("name", ["api_key", "API-KEY", "openai_api_key", "secret", "db_password", "token", "hf_token"])
def test_a_secret_in_the_clear_is_refused_and_not_repeated(judge: str, name: str) -> None:
    for options in ({name: SECRET}, {"client": {name: SECRET}}, {"clients": [{name: SECRET}]}):
        with pytest.raises(
            UserError, match=rf"looks like a secret, and options are written .*{name}: {{env: NAME}}$"
        ) as e:
            load_reward(judge, options)
        assert SECRET not in str(e.value)


def test_a_password_in_an_address_is_refused(judge: str) -> None:
    with pytest.raises(UserError, match="option url has a password in its address"):
        load_reward(judge, {"url": "https://me:hidden@host/v1"})
    assert load_reward(judge, {"url": "https://host:80/a@b:c"})


def test_what_only_sounds_like_one_is_an_option_as_any_other(judge: str) -> None:
    options = {"tokenizer": "a/b", "max_tokens": 3, "json_key": "score", "image_token": "<image>", "token_env": "X"}
    options |= {"token": 3, "api_key": None, "secret": ""}
    assert resolved(judge, options) == options
    assert load_reward(judge, options)


def test_a_variable_that_is_not_set(judge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_JUDGE_KEY")
    with pytest.raises(UserError, match=r"option client\.api_key comes from the environment variable MY_JUDGE_KEY,"):
        load_reward(judge, {"client": {"api_key": {"env": "MY_JUDGE_KEY"}}})


def test_messages_about_options_hide_what_may_be_a_secret() -> None:
    with pytest.raises(UserError, match=r"cannot be created with the options .*'key': '\*\*\*'") as caught:
        load_reward("vision_judge", {"url": "http://host/v1", "model": "m", "key": SECRET})
    assert SECRET not in str(caught.value)
    with pytest.raises(UserError, match=r"does not take the options {'token': '\*\*\*', 'quality': 5}"):
        load_reward("jpeg_compressibility", {"token": SECRET, "quality": 5})
    assert shown({"tokens": 5}) == {"tokens": 5}
