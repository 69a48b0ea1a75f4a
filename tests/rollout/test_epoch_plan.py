"""Who samples and trains what: a partition of the epoch, the same whatever the number of ranks."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pipeline import tiny_config

from pcpo_fast.config.schema import Config
from pcpo_fast.errors import UserError
from pcpo_fast.rollout.epoch_plan import EpochPlan, accumulation_steps, plan_epoch, steps_per_image

NOWHERE = Path("unused")


def config_of(*overrides: str) -> Config:
    return tiny_config(NOWHERE, *overrides)


def steps_of(plan: EpochPlan) -> dict[int, list[int]]:
    return dict(zip(plan.images.flatten().tolist(), plan.steps.flatten(0, 1).tolist(), strict=True))


@given(
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10**6),
    updates=st.sampled_from([1, 2, 3]),
    world_size=st.sampled_from([1, 2, 4]),
    fraction=st.floats(0.01, 1),
)
def test_ranks_share_the_images_of_each_update(
    seed: int, epoch: int, updates: int, world_size: int, fraction: float
) -> None:
    config = config_of(
        f"seed={seed}",
        f"credit.fraction={fraction}",
        f"train.updates_per_epoch={updates}",
        "rollout.prompts_per_epoch=4",
        "rollout.images_per_prompt=6",
    )
    trainable = [0, 1, 3, 4, 7]
    alone = plan_epoch(config, 10, trainable, epoch, 0, 1)
    plans = [plan_epoch(config, 10, trainable, epoch, rank, world_size) for rank in range(world_size)]
    assert sorted(alone.images.flatten().tolist()) == list(range(24))
    assert alone.prompts.shape == (4,) and alone.epoch == epoch
    for update in range(updates):
        together = [image for plan in plans for image in plan.images[update].tolist()]
        assert together == alone.images[update].tolist()
    for plan in plans:
        assert plan.images.shape == (updates, 24 // updates // world_size)
        assert torch.equal(plan.prompts, alone.prompts)
        assert steps_of(plan).items() <= steps_of(alone).items()
    count = steps_per_image(config, len(trainable))
    for steps in steps_of(alone).values():
        assert len(steps) == count and steps == sorted(set(steps)) and set(steps) <= set(trainable)


@given(
    seed=st.integers(0, 2**63 - 1),
    first=st.integers(0, 1000),
    prompts=st.integers(1, 9),
    per_epoch=st.integers(1, 6),
    group=st.integers(2, 9),
    world_size=st.integers(1, 12),
)
@settings(max_examples=40)
def test_no_prompt_is_skipped_or_repeated_at_any_number_of_ranks(
    seed: int, first: int, prompts: int, per_epoch: int, group: int, world_size: int
) -> None:
    """Over whole passes of the list every prompt has the same number of images, however groups are cut over ranks."""
    config = config_of(
        f"seed={seed}",
        f"rollout.prompts_per_epoch={per_epoch}",
        f"rollout.images_per_prompt={group}",
        "train.updates_per_epoch=1",
        "train.micro_batch_size=1",
    )
    if per_epoch * group % world_size:
        with pytest.raises(UserError, match=rf"cannot be divided equally over {world_size} ranks"):
            accumulation_steps(config, 3, world_size)
        return
    # Epochs from the beginning of a pass over the list to the end of one.
    start, count = first * prompts, prompts
    made: dict[int, int] = {}
    for epoch in range(start, start + count):
        plans = [plan_epoch(config, prompts, [0, 1, 2], epoch, rank, world_size) for rank in range(world_size)]
        images = [image for plan in plans for image in plan.images.flatten().tolist()]
        assert sorted(images) == list(range(per_epoch * group)), "every image of the epoch, each once"
        assert len({len(plan.images.flatten()) for plan in plans}) == 1
        for image in images:
            prompt = int(plans[0].prompts[image // group])
            made[prompt] = made.get(prompt, 0) + 1
    assert set(made) == set(range(prompts)) and set(made.values()) == {per_epoch * group}


def test_epochs_and_seeds_differ() -> None:
    config = config_of("rollout.images_per_prompt=24", "credit.fraction=0.5")
    plans = [plan_epoch(config, 10, [0, 1, 2, 3], epoch, 0, 1) for epoch in (0, 1)]
    plans.append(plan_epoch(config_of("rollout.images_per_prompt=24", "seed=1"), 10, [0, 1, 2, 3], 0, 0, 1))
    assert len({tuple(plan.images.flatten().tolist()) for plan in plans}) == 3
    assert steps_of(plans[0]) != steps_of(plans[1])


def test_every_step_is_trained_equally_often() -> None:
    config = config_of("rollout.images_per_prompt=300", "credit.fraction=0.6", "train.updates_per_epoch=1")
    steps = plan_epoch(config, 10, list(range(15)), 0, 0, 1).steps
    assert steps.shape == (1, 600, 9)
    counts = steps.flatten().bincount(minlength=15).double()
    # Each step is drawn with probability 0.6: a spread of sqrt(600 * 0.6 * 0.4) = 12 images.
    assert (counts - 360).abs().max() < 5 * 12


@pytest.mark.parametrize(
    ("fraction", "trainable", "count"), [(0.6, 15, 9), (1.0, 15, 15), (0.01, 15, 1), (0.5, 5, 2), (0.7, 10, 7)]
)
def test_steps_per_image(fraction: float, trainable: int, count: int) -> None:
    assert steps_per_image(config_of(f"credit.fraction={fraction}"), trainable) == count


def test_accumulation_steps() -> None:
    config = config_of("train.micro_batch_size=6")  # 8 images, 2 updates, 3 steps each: 12 pairs in an update
    assert accumulation_steps(config, 3, 1) == 2
    assert accumulation_steps(config, 3, 2) == 1


def test_images_that_do_not_divide_over_the_ranks_are_refused() -> None:
    with pytest.raises(UserError, match=r"an update has 4 images \(2 prompts x 4 images / 2 updates\).* over 3 ranks"):
        accumulation_steps(config_of(), 3, 3)


def test_a_micro_batch_that_does_not_divide_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(
        UserError, match=r"^train\.micro_batch_size: 5 does not divide the 12 .* allowed: auto, 1, 2, 3, 4, 6, 12$"
    ):
        accumulation_steps(config_of("train.micro_batch_size=5"), 3, 1)
