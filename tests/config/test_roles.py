"""Every setting declares what it is, once, and all who ask get the same answer."""

from typing import Annotated

import pytest
from pydantic import BaseModel

from pcpo_fast.comparison.differences import decisive, differences
from pcpo_fast.config.loading import load_config
from pcpo_fast.config.roles import EXECUTION, RESULT, role_of, roles
from pcpo_fast.config.schema import Config, Section
from pcpo_fast.guidance.guided_runs import SHARED


class Below(Section):
    kept: int = 0
    own: Annotated[int | None, EXECUTION] = None


class Whole(Section):
    role = RESULT
    usual: int = 0
    below: Below = Below()
    several: tuple[Below, ...] = ()


def test_every_setting_has_a_role() -> None:
    assert [key for key, role in roles(Config) if role is None] == []


def test_a_setting_without_a_role_is_found() -> None:
    """Neither its own nor its section's: that of the section above does not count."""
    assert [key for key, role in roles(Whole) if role is None] == ["below.kept", "several.kept"]
    assert dict(roles(Whole))["usual"] is RESULT
    with pytest.raises(KeyError, match=r"below.kept"):
        role_of(Whole, "below.kept")


def test_every_value_of_a_configuration_is_a_setting_with_a_role() -> None:
    """Keys as the configuration has them in a file, lists and mappings included."""

    def leaves(section: BaseModel, above: str = "") -> list[str]:
        found = []
        for name in type(section).model_fields:
            value = getattr(section, name)
            found += leaves(value, f"{above}{name}.") if isinstance(value, BaseModel) else [above + name]
        return found

    keys = leaves(Config())
    assert len(keys) > 80 and {"seed", "model.lora.rank", "logging.wandb", "rewards"} <= set(keys)
    for key in keys:
        role_of(Config, key)
    assert role_of(Config, "logging.wandb.project") == role_of(Config, "logging.wandb") == EXECUTION
    assert role_of(Config, "rewards.0.options.size") == role_of(Config, "rewards") == RESULT
    assert role_of(Whole, "several.3.own") is EXECUTION
    with pytest.raises(KeyError):
        role_of(Config, "model.atention")


@pytest.mark.parametrize(
    ("setting", "on_resume", "another_variant"),
    [
        ("optimizer.lr=0.5", "fixed", True),
        ("evaluation.seed=3", "fixed", True),
        ("rollout.merge_lora=true", "fixed", True),  # in bf16 not the same policy
        ("scoring.on_failure=drop_group", "fixed", True),
        ("model.attention=flash", "free", False),
        ("model.compile=true", "free", False),
        ("rollout.attention=sage", "free", True),  # it quantises
        ("scoring.timeout=60", "free", False),
        ("scoring.overlap=true", "free", False),
        ("distributed.timeout=60", "free", False),
        ("logging.wandb={project: a}", "free", False),
        ("evaluation.every=3", "free", False),
        ("train.max_rollout_age=64", "free", False),
        ("train.max_skipped_updates=9", "free", True),
        ("train.epochs=9", "free", True),
        ("seed=1", "fixed", False),
        ("output_dir=elsewhere", "free", False),
    ],
)
def test_resuming_and_comparing_judge_by_one_role(setting: str, on_resume: str, another_variant: bool) -> None:
    lora = ("model.finetune=lora",)
    found = differences({"a": load_config(None, lora), "b": load_config(None, (*lora, setting))})
    assert bool(decisive(found)) is another_variant
    assert role_of(Config, setting.partition("=")[0]).on_resume == on_resume


def test_the_base_model_is_what_its_output_depends_on() -> None:
    model = Config().model
    assert set(SHARED) < set(type(model).model_fields)
    adapters_and_speed = {"finetune", "lora", "gradient_checkpointing", "checkpointed_share", "compile"}
    adapters_and_speed |= {"block_kernels", "attention", "embedding_cache", "encode_on"}
    assert set(type(model).model_fields) - set(SHARED) == adapters_and_speed
    hosts_own = {key for key, role in roles(Config) if role is not None and role.per_host}
    assert hosts_own == {"model.path", "model.transformer", "model.unet", "model.embedding_cache"}
