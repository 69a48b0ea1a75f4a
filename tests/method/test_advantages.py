"""Advantages against plain statistics, published trainers' conventions, and their invariances."""

import json
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pcpo_fast.method.advantages import RunningAdvantages, compute_advantages

REWARDS = [0.1, 0.7, 0.4, 2.0, -1.0, 0.5, 3.0]
GROUPS = [5, 5, 5, 2, 2, 9, 9]
MEMBERS = {5: [0, 1, 2], 2: [3, 4], 9: [5, 6]}


def advantages(normalization, clip=None, **options):
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    return compute_advantages(rewards, torch.tensor(GROUPS), normalization, clip, **options).tolist()


def test_group_advantages():
    expected = [0.0] * 7
    for members in MEMBERS.values():
        rewards = [REWARDS[i] for i in members]
        for i in members:
            expected[i] = (REWARDS[i] - statistics.mean(rewards)) / (statistics.pstdev(rewards) + 1e-8)
    assert advantages("group") == pytest.approx(expected, rel=1e-12)


def test_group_advantages_with_the_sample_deviation():
    """torch.std's default, as DanceGRPO computes it."""
    expected = torch.zeros(7, dtype=torch.float64)
    for members in MEMBERS.values():
        rewards = torch.tensor([REWARDS[i] for i in members], dtype=torch.float64)
        expected[members] = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    assert advantages("group", unbiased=True) == pytest.approx(expected.tolist(), rel=1e-12)


def test_flow_grpo_advantages():
    """Mean per prompt, deviation of all rewards (numpy's, plus 1e-4 in the public code)."""
    rewards = np.array(REWARDS)
    expected = np.zeros(7)
    for members in MEMBERS.values():
        expected[members] = (rewards[members] - rewards[members].mean()) / (np.std(rewards) + 1e-4)
    assert advantages("flow_grpo", epsilon=1e-4) == pytest.approx(expected.tolist(), rel=1e-12)


def test_global_advantages():
    rewards = np.array(REWARDS)
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    assert advantages("global") == pytest.approx(expected.tolist(), rel=1e-12)
    ungrouped = compute_advantages(torch.tensor(REWARDS, dtype=torch.float64), None, "global", None)
    assert ungrouped.tolist() == advantages("global")


def test_defaults_are_group_advantages_clipped_at_5():
    rewards = torch.zeros(60, dtype=torch.float64)
    rewards[0] = 1
    result = compute_advantages(rewards, torch.zeros(60, dtype=torch.long))
    assert float(result[0]) == 5, "unclipped it is sqrt(59)"
    assert float(result[1]) == pytest.approx(-1 / math.sqrt(59), rel=1e-6)
    assert compute_advantages(-rewards, torch.zeros(60, dtype=torch.long), clip=2.0).tolist()[0] == -2
    unclipped = compute_advantages(rewards, torch.zeros(60, dtype=torch.long), clip=None)
    assert float(unclipped[0]) == pytest.approx(math.sqrt(59), rel=1e-6)


@pytest.mark.parametrize("normalization", ["group", "flow_grpo", "global"])
@pytest.mark.parametrize("value", [0.1, 0.0, -3.3, 1e30, 1e-300])
@pytest.mark.parametrize("unbiased", [False, True])
def test_equal_rewards_have_advantage_exactly_zero(normalization, value, unbiased):
    rewards = torch.full((21,), value, dtype=torch.float64)
    groups = torch.arange(21) // 7
    assert compute_advantages(rewards, groups, normalization, unbiased=unbiased).tolist() == [0.0] * 21


@pytest.mark.parametrize("normalization", ["group", "flow_grpo"])
def test_one_constant_group_among_others_is_exactly_zero(normalization):
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.2, 0.9, 0.4], dtype=torch.float64)
    result = compute_advantages(rewards, torch.tensor([0, 0, 0, 1, 1, 1]), normalization)
    assert result[:3].tolist() == [0, 0, 0] and bool((result[3:] != 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_result_is_float64_for_any_dtype(dtype):
    result = compute_advantages(torch.tensor([1, 2, 4, 8], dtype=dtype), torch.tensor([0, 0, 1, 1]))
    assert result.dtype == torch.float64
    assert result.tolist() == pytest.approx([-1, 1, -1, 1], rel=1e-6)


rewards_strategy = st.lists(st.floats(-1e6, 1e6), min_size=6, max_size=40)
normalizations = st.sampled_from(["group", "flow_grpo", "global"])


def grouped(rewards):
    values = torch.tensor(rewards[: len(rewards) // 2 * 2], dtype=torch.float64)
    return values, torch.arange(len(values)) // 2 % 3


@settings(deadline=None, max_examples=100)
@given(rewards_strategy, normalizations, st.floats(-1e3, 1e3), st.floats(0.1, 10))
def test_advantages_ignore_the_scale_and_origin_of_the_rewards(rewards, normalization, shift, scale):
    values, groups = grouped(rewards)
    for group in groups.unique():
        assume(float(values[groups == group].std()) > 1e-2)
    first = compute_advantages(values, groups, normalization, clip=None)
    second = compute_advantages(values * scale + shift, groups, normalization, clip=None)
    assert torch.allclose(first, second, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=100)
@given(rewards_strategy, normalizations)
def test_advantages_are_finite_centred_and_ordered(rewards, normalization):
    values, groups = grouped(rewards)
    result = compute_advantages(values, groups, normalization, clip=None)
    assert bool(result.isfinite().all())
    parts = [groups == group for group in groups.unique()] if normalization != "global" else [groups >= 0]
    for part in parts:
        order = values[part].argsort()
        assert bool((result[part][order].diff() >= 0).all())
        if float(values[part].std()) > 1e-2:
            assert float(result[part].mean()) == pytest.approx(0, abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(rewards_strategy, normalizations, st.randoms(use_true_random=False))
def test_order_of_the_images_does_not_matter(rewards, normalization, random):
    values, groups = grouped(rewards)
    order = list(range(len(values)))
    random.shuffle(order)
    straight = compute_advantages(values, groups, normalization)
    shuffled = compute_advantages(values[order], groups[order], normalization)
    assert torch.allclose(straight[order], shuffled, rtol=1e-6, atol=1e-6)


# Running statistics


class PublicTracker:
    """DDPO's per-prompt statistics as its authors describe them, in plain Python."""

    def __init__(self, size, least):
        self.size, self.least, self.seen = size, least, {}

    def __call__(self, prompts, rewards):
        result = []
        for prompt, reward in zip(prompts, rewards, strict=True):
            self.seen.setdefault(prompt, []).append(reward)
        for prompt, reward in zip(prompts, rewards, strict=True):
            latest = self.seen[prompt][-self.size :]
            data = latest if len(latest) >= self.least else rewards
            result.append((reward - statistics.fmean(data)) / (statistics.pstdev(data) + 1e-6))
        return result


def test_running_advantages_follow_ddpo_over_epochs():
    generator = torch.Generator().manual_seed(0)
    ours, public = RunningAdvantages(buffer_size=8, min_count=5), PublicTracker(8, 5)
    own_statistics = 0
    for _ in range(12):
        prompts = ["abc"[i] for i in torch.randint(3, (7,), generator=generator)]
        rewards = torch.randn(7, generator=generator, dtype=torch.float64)
        result = ours.compute(rewards, prompts, clip=None)
        assert result.tolist() == pytest.approx(public(prompts, rewards.tolist()), rel=1e-9, abs=1e-9)
        own_statistics += sum(len(public.seen[prompt]) >= 5 for prompt in prompts)
    assert 0 < own_statistics < 84, "both branches must have been taken"


def test_running_advantages_of_a_single_image_per_prompt():
    """What group advantages refuse is the ordinary case here."""
    running = RunningAdvantages(buffer_size=4, min_count=2)
    first = running.compute(torch.tensor([1.0, 3.0]), ["a", "b"])
    assert first.tolist() == pytest.approx([-1, 1], rel=1e-5)
    second = running.compute(torch.tensor([3.0, 3.0]), ["a", "b"])
    assert second.tolist() == pytest.approx([1, 0], abs=1e-5)


def test_running_advantages_clip_and_stay_exact():
    running = RunningAdvantages(buffer_size=100, min_count=2)
    rewards = torch.full((3,), 0.1, dtype=torch.float64)
    assert float(rewards.mean()) != 0.1, "the mean must be inexact for this to test anything"
    assert running.compute(rewards, ["a"] * 3).tolist() == [0.0] * 3
    assert running.compute(torch.cat([torch.full((60,), 0.1), torch.ones(1)]), ["a"] * 61).tolist()[-1] == 5.0


def test_running_state_survives_json():
    generator = torch.Generator().manual_seed(3)
    straight, interrupted = RunningAdvantages(6, 3), RunningAdvantages(6, 3)
    prompts = ["a", "b", "a", "b", "c"]
    for _ in range(3):
        rewards = torch.rand(5, generator=generator)
        assert straight.compute(rewards, prompts).tolist() == interrupted.compute(rewards, prompts).tolist()
        resumed = RunningAdvantages(6, 3)
        resumed.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
        assert resumed.state_dict() == interrupted.state_dict()
        interrupted = resumed
    assert len(straight.state_dict()["rewards"]["a"]) == 6


def test_running_state_keeps_the_latest_rewards_in_a_smaller_buffer():
    running = RunningAdvantages(2, 2)
    running.load_state_dict({"rewards": {"a": [1.0, 2.0, 3.0]}})
    assert running.state_dict() == {"rewards": {"a": [2.0, 3.0]}}


# Refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
def test_bad_rewards_are_refused_by_index(bad):
    rewards = torch.tensor([0.0, 1.0, bad, 2.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"rewards must be finite.*at index 2"):
        compute_advantages(rewards, torch.tensor([0, 0, 1, 1]))
    running = RunningAdvantages()
    with pytest.raises(ValueError, match=r"rewards must be finite.*at index 2"):
        running.compute(rewards, ["a"] * 4)
    assert running.state_dict() == {"rewards": {}}


@pytest.mark.parametrize("normalization", ["group", "flow_grpo"])
def test_a_group_of_one_is_refused(normalization):
    with pytest.raises(ValueError, match=f"{normalization} advantages compare .* group 7 has a single image"):
        compute_advantages(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4, 4, 7]), normalization)


def test_a_batch_of_one_is_refused():
    with pytest.raises(ValueError, match="single reward"):
        compute_advantages(torch.tensor([1.0]), None, "global")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": None}, "group advantages need the group of every image"),
        ({"groups": torch.tensor([0, 0])}, "groups must be 3 integers"),
        ({"groups": torch.tensor([0.0, 0.0, 0.0])}, "groups must be 3 integers"),
        ({"normalization": "prompt"}, r"normalization must be one of group, flow_grpo, global .*, got 'prompt'"),
        ({"clip": 0.0}, "clip must be a positive number"),
        ({"clip": math.nan}, "clip must be a positive number"),
        ({"epsilon": 0.0}, "epsilon must be a positive number"),
        ({"epsilon": math.inf}, "epsilon must be a positive number"),
        ({"rewards": torch.zeros(3, 1)}, r"rewards must be a vector .* got the shape \[3, 1\]"),
        ({"rewards": torch.zeros(0)}, r"rewards must be a vector .* got the shape \[0\]"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    defaults = {"rewards": torch.tensor([1.0, 2.0, 3.0]), "groups": torch.tensor([0, 0, 0]), "normalization": "group"}
    with pytest.raises(ValueError, match=message):
        compute_advantages(**(defaults | arguments))


@pytest.mark.parametrize(
    ("size", "least", "message"),
    [
        (0, 1, "buffer_size must be a positive integer"),
        (4, 0, "min_count must be a positive integer"),
        (4, 5, "min_count 5 is never reached by buffers of 4"),
        (2.5, 1, "buffer_size must be a positive integer"),
    ],
)
def test_bad_buffers_are_refused(size, least, message):
    with pytest.raises(ValueError, match=message):
        RunningAdvantages(size, least)


def test_running_refuses_other_lengths_and_foreign_states():
    running = RunningAdvantages()
    with pytest.raises(ValueError, match="got 2 rewards for 1 prompt"):
        running.compute(torch.tensor([1.0, 2.0]), ["a"])
    for state in ({}, {"rewards": [1.0]}, {"rewards": {"a": [math.nan]}}, {"rewards": {"a": ["1"]}}):
        with pytest.raises(ValueError):
            running.load_state_dict(state)
