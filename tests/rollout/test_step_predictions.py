"""What steps predict: decoded in the rollout, scored, turned into advantages of steps; and the audit by branches."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pcpo_kernels import philox_normal
from tiny_pipeline import PROMPTS, tiny_config
from torch import Tensor

import pcpo_fast.rollout.branches
from pcpo_fast.config.schema import Config
from pcpo_fast.errors import UserError
from pcpo_fast.method.advantages import RunningAdvantages
from pcpo_fast.method.step_advantages import StepAdvantages
from pcpo_fast.method.step_tables import EpochTables, RunTables
from pcpo_fast.policies import Conditioning, Policy
from pcpo_fast.policies.families import load_policy
from pcpo_fast.prompts import Prompt
from pcpo_fast.rewards import RewardSet
from pcpo_fast.rollout.branches import audited_images, audited_step, branch
from pcpo_fast.rollout.epoch_plan import plan_epoch
from pcpo_fast.rollout.epoch_scoring import RolloutScoring, ScoredEpoch
from pcpo_fast.rollout.rollout import Rollout, collect_rollout

CPU = torch.device("cpu")
seen: list[dict[str, Any]] = []
"""Metadata of every image that was scored."""


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    seen.extend(metadata)
    return images.mean(dim=(1, 2, 3))


def declining(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images.mean(dim=(1, 2, 3))


declining.scores_predictions = False  # type: ignore[attr-defined]


def blind_late(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """No score of what the second step of one prompt predicts."""
    scores = images.mean(dim=(1, 2, 3))
    rows = zip(prompts, metadata, strict=True)
    lost = [prompt == prompts[0] and 0.5 < data.get("predicted_at", 0) < 1 for prompt, data in rows]
    return torch.where(torch.tensor(lost), torch.nan, scores)


def blind_once_in_audits(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """No score of the first image of a batch that has both images and predictions."""
    scores = images.mean(dim=(1, 2, 3))
    scores[0] = scores[0] if len({"predicted_at" in data for data in metadata}) == 1 else torch.nan
    return scores


@pytest.fixture(scope="module")
def policy(pipeline_folder: Path) -> Policy:
    return load_policy(tiny_config(pipeline_folder), CPU)


@pytest.fixture
def config_of(pipeline_folder: Path) -> Callable[..., Config]:
    seen.clear()
    return lambda *overrides, reward="brightness": tiny_config(
        pipeline_folder,
        f"rewards=[{{name: '{__name__}:{reward}'}}]",
        "advantage.steps=gain",
        "advantage.calibrated=false",
        "sampler.steps=5",
        "rollout.prompts_per_epoch=2",
        *overrides,
    )


def epoch_of(policy: Policy, config: Config, epoch: int = 3) -> tuple[ScoredEpoch, Rollout, EpochTables]:
    tables = RunTables(config, policy.schedule(config.sampler.steps), CPU)
    at = tables.at(epoch)
    plan = plan_epoch(config, len(PROMPTS), at.steps, epoch, 0, 1)
    stepwise = StepAdvantages(config.advantage, config.sampler.steps)
    prompts, rewards = [Prompt(text) for text in PROMPTS], RewardSet(config.rewards, config.scoring)
    scoring = RolloutScoring(config, rewards, prompts, RunningAdvantages(), stepwise, at, plan, CPU)

    def encode(indices: list[int]) -> Conditioning:
        return policy.encode([PROMPTS[index] for index in indices])

    settings = config.rollout
    rollout = collect_rollout(policy, encode, plan, settings, at.sampler, config.seed, scoring.add, scoring.predicted)
    if config.advantage.audit_every:
        step = audited_step(scoring.predicted.steps, at.steps, epoch, config.seed)  # type: ignore[union-attr]
        assert step is not None
        scored = scoring.predicted.steps  # type: ignore[union-attr]
        scoring.add_branches(branch(policy, rollout, at.sampler, scored, step, range(4), config.seed, 8))
    return scoring.finish(rollout.images), rollout, at


def units(rollout: Rollout, rewards: Tensor, finals: Tensor) -> Tensor:
    """Centred within groups of 4 and divided by the spread of the final rewards."""
    result = torch.zeros(len(rewards), dtype=torch.float64)
    for group in rollout.groups.unique():
        members = rollout.groups == group
        centred = rewards[members].double() - rewards[members].double().mean()
        result[members] = centred / finals[members].double().std(correction=0)
    return result


@pytest.mark.parametrize("overrides", [(), ("scoring.overlap=true",), ("rollout.batch_size=3",)], ids=str)
def test_a_step_is_credited_with_the_change_of_the_predicted_reward(
    policy: Policy, config_of: Callable[..., Config], overrides: tuple[str, ...]
) -> None:
    scored, rollout, at = epoch_of(policy, config_of(*overrides))
    finals = rollout.images.mean(dim=(1, 2, 3))
    times, columns, order = at.sampler.times, [], rollout.groups.argsort(stable=True)
    for step in range(4):  # the last step is decoded without its noise
        x, f = rollout.trajectories.latents[:, step], rollout.trajectories.outputs[:, step]
        rewards = policy.decode(x - times[step] * f).mean(dim=(1, 2, 3))
        columns.append(units(rollout, rewards, finals))
        ahead = (rewards - finals).double()[order].reshape(2, 4).mean(dim=1)
        expected = float(ahead.mean()), float((ahead[0] - ahead[1]).abs()) / 2
        assert scored.leads[f"step_{step}"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    gains = torch.stack([*columns, units(rollout, finals, finals)], dim=1).diff(dim=1).clamp(-5, 5)
    assert scored.advantages.shape == (8, 5)
    torch.testing.assert_close(scored.advantages[:, :4], gains, rtol=1e-3, atol=1e-3)
    assert bool((scored.advantages[:, 4] == 0).all())
    marks = sorted({data["predicted_at"] for data in seen if "predicted_at" in data}, reverse=True)
    assert marks == pytest.approx(times[:4].tolist())
    assert len(seen) == 8 * 5


def test_permuted_predictions_are_those_of_another_image_of_the_group(
    policy: Policy, config_of: Callable[..., Config]
) -> None:
    own, rollout, _ = epoch_of(policy, config_of())
    permuted = [epoch_of(policy, config_of("advantage.control=permuted"))[0].advantages for _ in range(2)]
    assert torch.equal(*permuted)  # the key of the epoch, whenever it is asked
    finals = rollout.images.mean(dim=(1, 2, 3))
    final = units(rollout, finals, finals)
    early = own.advantages[:, :3]  # gains from prediction to prediction; the fourth ends in the final reward
    same = (permuted[0][:, None, :3] == early[None]).all(dim=2)
    order = same.long().argmax(dim=1)
    assert bool((same.sum(dim=1) == 1).all()) and order.sort().values.tolist() == list(range(8))
    assert torch.equal(rollout.groups[order], rollout.groups) and order.tolist() != list(range(8))
    last = final - (final - own.advantages[:, 3])[order]
    torch.testing.assert_close(permuted[0][:, 3], last.clamp(-5, 5), rtol=1e-3, atol=1e-3)


def test_only_needed_predictions_are_scored(policy: Policy, config_of: Callable[..., Config]) -> None:
    scored, _, _ = epoch_of(policy, config_of("credit.steps=[2]", "advantage.gain_lambda=0"))
    times = [data["predicted_at"] for data in seen if "predicted_at" in data]
    assert len(times) == 16 and len(set(times)) == 2  # at the step itself and after it
    assert bool((scored.advantages[:, 0] == 0).all()) and bool((scored.advantages[:, 2] != 0).all())


def test_images_of_all_prompts_are_scored_at_a_step_if_they_are_compared(
    policy: Policy, config_of: Callable[..., Config]
) -> None:
    """A mean over those prompts alone of which an image trains the step would be another one at the next step."""
    settings = "rollout.images_per_prompt=1", "rollout.prompts_per_epoch=8", "credit.fraction=0.25"
    scored, rollout, at = epoch_of(
        policy, config_of("advantage.normalization=global", "rollout.same_initial_noise=false", *settings)
    )
    finals, columns = rollout.images.mean(dim=(1, 2, 3)), []
    for step in range(4):
        x, f = rollout.trajectories.latents[:, step], rollout.trajectories.outputs[:, step]
        columns.append(policy.decode(x - at.sampler.times[step] * f).mean(dim=(1, 2, 3)).double())
    rewards = torch.stack([*columns, finals.double()], dim=1)
    gains = ((rewards - rewards.mean(dim=0)) / finals.double().std(correction=0)).diff(dim=1).clamp(-5, 5)
    trained = rollout.plan.steps.flatten(0, 1)
    assert trained.shape == (8, 1) and len(trained.unique()) > 1
    torch.testing.assert_close(scored.advantages.gather(1, trained), gains.gather(1, trained), rtol=1e-3, atol=1e-3)


def test_windows_and_segments(policy: Policy, config_of: Callable[..., Config]) -> None:
    """Only the window's steps have noise: after the last of them the image is decided."""
    scored, rollout, at = epoch_of(policy, config_of("window.size=2", "window.start=1", "window.schedule=fixed"))
    assert at.steps == [1, 2]
    finals = rollout.images.mean(dim=(1, 2, 3))
    x, f = rollout.trajectories.latents[:, 2], rollout.trajectories.outputs[:, 2]
    before = units(rollout, policy.decode(x - at.sampler.times[2] * f).mean(dim=(1, 2, 3)), finals)
    expected = (units(rollout, finals, finals) - before).clamp(-5, 5)
    torch.testing.assert_close(scored.advantages[:, 2], expected, rtol=1e-3, atol=1e-3)
    whole = epoch_of(policy, config_of("advantage.scored_steps=2"))[0].advantages
    assert torch.equal(whole[:, 0], whole[:, 1]) and torch.equal(whole[:, 2], whole[:, 3])


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [(("rollout.batch_size=3",), [0, 1, 2, 3]), (("credit.steps=[1]",), [1, 2])],
    ids=["batches", "few_steps"],
)
def test_strips_show_what_was_predicted_of_the_first_images(
    policy: Policy, config_of: Callable[..., Config], overrides: tuple[str, ...], steps: list[int]
) -> None:
    config = config_of(*overrides)
    at = RunTables(config, policy.schedule(5), CPU).at(0)
    plan = plan_epoch(config, len(PROMPTS), at.steps, 0, 0, 1)
    prompts, rewards = [Prompt(text) for text in PROMPTS], RewardSet(config.rewards, config.scoring)
    scoring = RolloutScoring(
        config, rewards, prompts, RunningAdvantages(), StepAdvantages(config.advantage, 5), at, plan, CPU
    )
    scoring.keep_strips()
    rollout = collect_rollout(
        policy,
        lambda indices: policy.encode([PROMPTS[index] for index in indices]),
        plan,
        config.rollout,
        at.sampler,
        config.seed,
        scoring.add,
        scoring.predicted,
    )
    rows, captions = scoring.strips_of(rollout.images)  # type: ignore[misc]
    assert captions == [*(f"step {step}" for step in steps), "image"]
    for column, step in enumerate(steps):
        x, f = rollout.trajectories.latents[:4, step], rollout.trajectories.outputs[:4, step]
        torch.testing.assert_close(rows[:, column], policy.decode(x - at.sampler.times[step] * f), rtol=0, atol=1e-4)
    assert torch.equal(rows[:, -1], rollout.images[:4])


def test_a_group_whose_prediction_cannot_be_scored_is_left_out(
    policy: Policy, config_of: Callable[..., Config]
) -> None:
    config = config_of("scoring.on_failure=drop_group", reward="blind_late")
    scored, _, _ = epoch_of(policy, config)
    lost = (scored.advantages == 0).all(dim=1)
    assert 0 < int(lost.sum()) < 8 and scored.metrics["scoring/dropped_groups"] == 1
    assert "groups dropped" in scored.warning
    with pytest.raises(UserError, match="blind_late"):
        epoch_of(policy, config_of(reward="blind_late"))


def test_a_reward_may_decline(config_of: Callable[..., Config]) -> None:
    config = config_of(reward="declining")
    with pytest.raises(UserError, match="does not score the blurred images") as error:
        RewardSet(config.rewards).check_predictions()
    assert "declining" in str(error.value)
    RewardSet(config_of().rewards).check_predictions()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("advantage.normalization=running", "advantage.steps: gain compares images of one epoch"),
        ("advantage.calibrated=branches", "branches needs audits"),
        (
            "advantage.control=permuted;advantage.normalization=global;rollout.images_per_prompt=1",
            "permuted permutes predictions among the images of a prompt, so rollout.images_per_prompt must be at least",
        ),
        ("window.size=1", "steps: gain would be final: .* that of step 0, is the same for all images of a prompt"),
        ("advantage.scored_steps=4", r"allowed here: a scored_steps below the number of steps with noise \(4;"),
        ("sampler.steps=2", r"with advantage.scored_steps=1 the only prediction .* \(1; sampler.steps"),
        (
            "advantage.audit_every=1;advantage.scored_steps=4;rollout.same_initial_noise=false",
            "there is nothing to audit",
        ),
        ("advantage.audit_every=1;credit.steps=[1,2];advantage.scored_steps=3", "there is nothing to audit"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(
    policy: Policy, config_of: Callable[..., Config], override: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        config = config_of(*override.split(";"))
        RunTables(config, policy.schedule(config.sampler.steps), CPU)


def test_a_single_prediction_tells_images_of_different_initial_noise_apart(
    policy: Policy, config_of: Callable[..., Config]
) -> None:
    config = config_of("advantage.scored_steps=4", "rollout.same_initial_noise=false")
    scored, rollout, _ = epoch_of(policy, config)
    finals = rollout.images.mean(dim=(1, 2, 3))
    assert float((scored.advantages[:, 0] - units(rollout, finals, finals)).abs().max()) > 0.01


# Branches


def test_a_branch_with_the_rollouts_own_noise_is_the_rollout(
    policy: Policy, config_of: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    _, rollout, at = epoch_of(policy, config)
    count = rollout.trajectories.latents[0, 0].numel()

    def own(keys: Tensor, offsets: Tensor, size: int) -> Tensor:
        return philox_normal(rollout.seeds[:3].repeat(2), offsets + 2 * count, size)

    monkeypatch.setattr(pcpo_fast.rollout.branches, "philox_normal", own)
    found = branch(policy, rollout, at.sampler, (0, 1, 2, 3), 2, range(3), config.seed, 6)
    torch.testing.assert_close(found.images[:3], rollout.images[:3], rtol=1e-4, atol=1e-4)
    x, f = rollout.trajectories.latents[:3, 3], rollout.trajectories.outputs[:3, 3]
    torch.testing.assert_close(found.predictions[:3], policy.decode(x - at.sampler.times[3] * f), rtol=1e-4, atol=1e-4)
    assert float((found.images[3:] - found.images[:3]).abs().amax()) > 1e-3
    assert found.time == float(at.sampler.times[3]) and found.rows == [0, 1, 2]


def test_an_audit_regresses_what_the_noise_changed_on_what_it_changed_in_the_prediction(
    policy: Policy, config_of: Callable[..., Config]
) -> None:
    config = config_of("advantage.audit_every=1", "advantage.audit_images=4")
    scored, rollout, at = epoch_of(policy, config)
    step = audited_step((0, 1, 2, 3), at.steps, 3, config.seed)
    assert step is not None
    found = branch(policy, rollout, at.sampler, (0, 1, 2, 3), step, range(4), config.seed, 8)
    final, predicted = (images.mean(dim=(1, 2, 3)).double() for images in (found.images, found.predictions))
    d, e = final[:4] - final[4:], predicted[:4] - predicted[4:]
    slope = float((d * e).sum() / (e * e).sum())
    assert scored.metrics[f"stepwise/branch_slope_step_{step}"] == pytest.approx(max(slope, 0), rel=1e-4)


def test_branches_are_sampled_in_the_rollouts_batches(
    policy: Policy, config_of: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many at once as rollout.batch_size allows, which limits memory; the images are the same."""
    config, sizes = config_of(), []
    _, rollout, at = epoch_of(policy, config)
    whole = branch(policy, rollout, at.sampler, (0, 1, 2, 3), 1, range(4), config.seed, 100)
    predict = policy.predict
    monkeypatch.setattr(policy, "predict", lambda x, *rest: sizes.append(len(x)) or predict(x, *rest))
    parts = branch(policy, rollout, at.sampler, (0, 1, 2, 3), 1, range(4), config.seed, 3)
    assert sizes == [3] * 3 + [3] * 3 + [2] * 3
    torch.testing.assert_close(parts.images, whole.images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.predictions, whole.predictions, rtol=1e-4, atol=1e-4)


busy: list[int] = []
"""Calls of :func:`slow` that are running."""


def slow(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    assert not busy, "a reward runs concurrently with itself"
    busy.append(1)
    time.sleep(0.01)
    busy.pop()
    return images.mean(dim=(1, 2, 3))


def test_an_audit_waits_for_rewards_that_are_still_at_work(policy: Policy, config_of: Callable[..., Config]) -> None:
    settings = "advantage.audit_every=1", "advantage.audit_images=4"
    overlapped, _, _ = epoch_of(policy, config_of("scoring.overlap=true", *settings, reward="slow"))
    plain, _, _ = epoch_of(policy, config_of(*settings, reward="slow"))
    slopes = [{n: v for n, v in one.metrics.items() if "branch" in n} for one in (overlapped, plain)]
    assert slopes[0] and slopes[0] == pytest.approx(slopes[1], rel=1e-4)


def test_an_audit_sees_what_the_limits_of_a_reward_leave(policy: Policy, config_of: Callable[..., Config]) -> None:
    rewards = f"rewards=[{{name: '{__name__}:brightness', clip: [5, 6]}}]"
    config = config_of(rewards, "scoring.normalize=each", "advantage.audit_every=1", "advantage.audit_images=4")
    effects = [value for name, value in epoch_of(policy, config)[0].metrics.items() if "branch_effect" in name]
    assert effects == [0.0]


def test_an_audit_leaves_out_and_counts_images_whose_branches_cannot_be_scored(
    policy: Policy, config_of: Callable[..., Config]
) -> None:
    settings = "scoring.on_failure=drop_group", "advantage.audit_every=1", "advantage.audit_images=4"
    metrics = epoch_of(policy, config_of(*settings, reward="blind_once_in_audits"))[0].metrics
    assert (metrics["scoring/failed_audits"], metrics["scoring/failed_images"]) == (1, 0)
    assert all(math.isfinite(value) for name, value in metrics.items() if "branch" in name)


@pytest.mark.parametrize(("images", "wanted"), [(48, 8), (24, 24), (12, 4)])
def test_the_audited_images_are_the_same_for_every_number_of_ranks(images: int, wanted: int) -> None:
    for ranks in (1, 2, 4):
        share = images // ranks
        found = [rank * share + place for rank in range(ranks) for place in audited_images(share, wanted, ranks)]
        assert found == audited_images(images, wanted, 1) and len(found) == wanted
    assert audited_images(2, 100, 3) == [0, 1]


def test_the_audited_step_is_drawn_among_trained_ones_before_the_last() -> None:
    drawn = {audited_step((0, 2, 4, 6), (2, 3, 4, 6), epoch, 5) for epoch in range(40)}
    assert drawn == {2, 4}
    assert audited_step((6,), (6,), 0, 5) is None
