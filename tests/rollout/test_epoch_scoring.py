"""From images to advantages: composition of rewards, overlap with the sampling, groups that are left out."""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipeline import tiny_config
from torch import Tensor

import pcpo_fast.rollout.epoch_scoring
from pcpo_fast.config.loading import load_config
from pcpo_fast.config.schema import AdvantageConfig, Config, RewardConfig
from pcpo_fast.errors import UserError
from pcpo_fast.method.advantages import RunningAdvantages, compute_advantages
from pcpo_fast.method.step_advantages import StepAdvantages
from pcpo_fast.method.step_tables import RunTables
from pcpo_fast.prompts import Prompt
from pcpo_fast.rewards import RewardSet
from pcpo_fast.rewards.composition import compose_advantages
from pcpo_fast.rollout.epoch_plan import plan_epoch
from pcpo_fast.rollout.epoch_scoring import RolloutScoring, ScoredEpoch

CPU = torch.device("cpu")
PROMPTS = [Prompt(text, {"n": n}) for n, text in enumerate(("a red circle", "a green square", "a blue circle", "red"))]
HERE = __name__
calls: list[list[str]] = []
"""The prompts of every call."""
SPOILT: set[str] = set()


def level(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """The first pixel: an image's own number."""
    calls.append(prompts)
    return images[:, 0, 0, 0].clone()


def second(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return 100 * images[:, 1, 0, 0]


def slow(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    time.sleep(0.02)
    calls.append(prompts)
    return images[:, 0, 0, 0].clone()


scored = threading.Semaphore(0)


def announced(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    calls.append(prompts)
    scored.release()
    return images[:, 0, 0, 0].clone()


def picky(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    if any(prompt in SPOILT for prompt in prompts):
        raise KeyError("no such thing")
    return images[:, 0, 0, 0].clone()


def sometimes_nan(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    scores = images[:, 0, 0, 0].clone()
    scores[[prompt in SPOILT for prompt in prompts]] = torch.nan
    return scores


@pytest.fixture(autouse=True)
def fresh() -> None:
    calls.clear()
    SPOILT.clear()


def config_of(*overrides: str, rewards: str = f"[{{name: '{HERE}:level'}}]") -> Config:
    return tiny_config(Path("unused"), f"rewards={rewards}", "rollout.prompts_per_epoch=3", *overrides)


def images_of(config: Config) -> Tensor:
    """The images of an epoch by their number: 3 groups of 4."""
    return torch.rand(config.images_per_epoch, 3, 4, 6, generator=torch.Generator().manual_seed(5))


def scoring_of(config: Config, rank: int = 0, world_size: int = 1, running: RunningAdvantages | None = None) -> Any:
    plan = plan_epoch(config, len(PROMPTS), [0, 1, 2], 7, rank, world_size)
    rewards, tables = RewardSet(config.rewards, config.scoring), RunTables(config, None, CPU)
    stepwise = StepAdvantages(config.advantage, tables.transitions.steps)
    running = running or RunningAdvantages(16, 2)
    return RolloutScoring(config, rewards, PROMPTS, running, stepwise, tables.at(7), plan, CPU)


def scored_epoch(config: Config, running: RunningAdvantages | None = None) -> tuple[ScoredEpoch, Tensor]:
    """The scored epoch, and its advantages by image number."""
    scoring = scoring_of(config, running=running)
    images = images_of(config)[scoring.numbers]
    for rows in torch.arange(len(images)).split(5):
        scoring.add(rows.tolist(), images[rows])
    epoch = scoring.finish(images)
    return epoch, epoch.advantages[scoring.numbers.argsort()]


GROUPS = torch.arange(3).repeat_interleave(4)


# Composition


def test_a_sum_is_weighted_and_each_score_kept_within_its_limits() -> None:
    rewards = f"[{{name: '{HERE}:level', weight: 2, clip: [0.3, 0.6]}}, {{name: '{HERE}:second', weight: -0.5}}]"
    config = config_of(rewards=rewards)
    epoch, advantages = scored_epoch(config)
    images = images_of(config)
    one, two = images[:, 0, 0, 0], 100 * images[:, 1, 0, 0]
    limited = one.clamp(0.3, 0.6)
    total = 2 * limited - 0.5 * two
    torch.testing.assert_close(advantages, compute_advantages(total, GROUPS), rtol=1e-5, atol=1e-5)
    metrics = epoch.metrics
    assert metrics["reward/mean"] == pytest.approx(float(total.double().mean()), rel=1e-6)
    assert metrics[f"reward/{HERE}:level"] == pytest.approx(float(one.double().mean()), rel=1e-6)
    outside = ((one < 0.3) | (one > 0.6)).double().mean()
    assert metrics[f"reward_clipped/{HERE}:level"] == float(outside) > 0
    spread = two.double().reshape(3, 4).std(dim=1, unbiased=False).mean()
    assert metrics[f"reward_spread/{HERE}:second"] == pytest.approx(0.5 * float(spread), rel=1e-6)


def nearly(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Scores that differ by rounding alone."""
    return 5 + 1e-15 * images[:, 0, 0, 0].double()


def of_the_prompt(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return torch.tensor([float(len(prompt)) for prompt in prompts])


def test_a_reward_that_tells_no_images_apart_is_found() -> None:
    names = ", ".join(f"{{name: '{HERE}:{name}'}}" for name in ("level", "nearly", "of_the_prompt"))
    clipped = f"{{name: '{HERE}:second', clip: [1000, 2000]}}"
    config = config_of(rewards=f"[{names}, {clipped}]")
    assert scored_epoch(config)[0].equal == (f"{HERE}:nearly", f"{HERE}:of_the_prompt", f"{HERE}:second")
    config = config_of("advantage.normalization=global", rewards=f"[{names}]")  # compares the prompts, too
    assert scored_epoch(config)[0].equal == (f"{HERE}:nearly",)


def finely(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [1e8 + value for value in images[:, 0, 0, 0].tolist()]


def test_differences_that_float32_does_not_hold_count() -> None:
    expected = compute_advantages(images_of(config_of())[:, 0, 0, 0].double(), GROUPS)
    for setting in ("scoring.overlap=false", "scoring.overlap=true"):
        epoch, advantages = scored_epoch(config_of(setting, rewards=f"[{{name: '{HERE}:finely'}}]"))
        torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-5)
        assert epoch.equal == ()


@pytest.mark.parametrize("normalization", ["group", "flow_grpo", "global", "running"])
def test_default_settings_are_the_plain_computation_bit_for_bit(normalization: str) -> None:
    """A run that was begun before there was a choice goes on with the same numbers."""
    rewards = f"[{{name: '{HERE}:level', weight: 0.3}}, {{name: '{HERE}:second', weight: -0.7}}]"
    config = config_of(f"advantage.normalization={normalization}", rewards=rewards)
    epoch, advantages = scored_epoch(config)
    images = images_of(config)
    total = 0.3 * images[:, 0, 0, 0].double() - 0.7 * (100 * images[:, 1, 0, 0]).double()
    if normalization == "running":
        texts = [group_of(config, group) for group in GROUPS.tolist()]
        expected = RunningAdvantages(16, 2).compute(total, texts, 5.0)
    else:
        expected = compute_advantages(total, GROUPS, normalization, 5.0)  # type: ignore[arg-type]
    assert torch.equal(advantages, expected)
    assert epoch.metrics["reward/mean"] == float(total.mean())
    assert epoch.metrics["reward/std"] == float(total.std(unbiased=False))


def test_each_reward_normalised_by_itself_counts_by_its_weight_alone() -> None:
    """GDPO written out; the second reward's scores are a hundred times larger."""
    rewards = f"[{{name: '{HERE}:level', weight: 2}}, {{name: '{HERE}:second'}}]"
    _, advantages = scored_epoch(config_of("scoring.normalize=each", "advantage.clip=1.2", rewards=rewards))
    images = images_of(config_of())
    summed = torch.zeros(12, dtype=torch.float64)
    for weight, scores in ((2, images[:, 0, 0, 0]), (1, 100 * images[:, 1, 0, 0])):
        group = scores.double().reshape(3, 4)
        summed += (
            weight * ((group - group.mean(1, True)) / (group.std(1, unbiased=False, keepdim=True) + 1e-8)).flatten()
        )
    expected = ((summed - summed.mean()) / (summed.std(unbiased=False) + 1e-8)).clamp(-1.2, 1.2)
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-6)
    _, of_the_sum = scored_epoch(config_of("advantage.clip=1.2", rewards=rewards))
    assert (advantages - of_the_sum).abs().max() > 0.3


def test_a_group_of_equal_rewards_has_exactly_no_advantage_when_each_is_normalised() -> None:
    """Its pairs are then not run through the network."""
    specs = (RewardConfig(name="a", weight=0.7), RewardConfig(name="b", weight=-1.0))
    components = torch.randn(24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    components[:6] = torch.tensor([0.3, 0.7])
    groups = torch.arange(4).repeat_interleave(6)
    found = compose_advantages(components.sum(dim=1), components, specs, groups, AdvantageConfig(), "each")
    assert bool((found[:6] == 0).all()) and bool((found[6:] != 0).all())


def test_rewards_whose_sum_is_equal_are_told_apart_when_each_is_normalised() -> None:
    """The case that GDPO was made for: a sum that says nothing of its parts' different spreads."""
    one = torch.tensor([0.0, 1.0, 0.0, 1.0])
    two = torch.tensor([1.0, 0.0, 2.0, 0.0])
    config = config_of(rewards="[{name: a}, {name: b}]")
    parts = torch.stack([one, two], dim=1).double()
    both = [
        compose_advantages(parts.sum(1), parts, config.rewards, torch.zeros(4).long(), config.advantage, normalize)
        for normalize in ("sum", "each")
    ]
    assert both[0][0] == both[0][1] == both[0][3] and both[1][0] != both[1][1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["scoring.normalize=each", "advantage.normalization=running"],
            "scoring.normalize: each normalises every reward",
        ),
        (["rewards=[{name: a, clip: [1, 0]}]"], r"rewards: clip of a must be \[lowest, highest\], got \[1.0, 0.0\]"),
        (["rewards=[{name: a, label: group_std}]"], "rewards: group_std is reserved for a metric of the weighted sum"),
        (["rewards=[{name: a}, {name: b, label: a}]"], "rewards: a is listed twice.* label"),
        (["scoring.on_failure=skip"], "scoring.on_failure: must be one of stop, drop_group, got 'skip'"),
        (["scoring.timeout=0"], "scoring.timeout: must be above 0"),
    ],
)
def test_settings_that_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, overrides)


def test_a_reward_may_be_listed_twice_under_labels() -> None:
    rewards = f"[{{name: '{HERE}:level', label: one}}, {{name: '{HERE}:level', label: two, clip: [0, 0.5]}}]"
    metrics = scored_epoch(config_of(rewards=rewards))[0].metrics
    assert metrics["reward/one"] == metrics["reward/two"] and metrics["reward_clipped/two"] > 0


# Overlap


def test_overlapped_scores_are_those_of_scoring_afterwards() -> None:
    afterwards, expected = scored_epoch(config_of())
    assert len(calls) == 1
    overlapped, advantages = scored_epoch(config_of("scoring.overlap=true"))
    assert len(calls) == 1 + 3
    assert torch.equal(advantages, expected)
    assert overlapped.metrics.pop("time/reward_overlapped") > 0
    assert overlapped.metrics == afterwards.metrics


def test_a_batch_is_scored_while_the_next_is_sampled() -> None:
    config = config_of("scoring.overlap=true", rewards=f"[{{name: '{HERE}:announced'}}]")
    scoring = scoring_of(config)
    images = images_of(config)[scoring.numbers]
    for rows in torch.arange(12).split(6):
        scoring.add(rows.tolist(), images[rows])
        # The next batch is sampled for as long as the scoring of this one takes; without overlap that would not begin.
        assert scored.acquire(timeout=60)
    assert calls == [
        [scoring.group_prompts[n // 4].text for n in rows] for rows in scoring.numbers.reshape(2, 6).tolist()
    ]
    scoring.finish(images)
    assert len(calls) == 2


def test_the_update_waits_for_scores_that_take_longer_than_the_sampling() -> None:
    config = config_of("scoring.overlap=true", rewards=f"[{{name: '{HERE}:slow'}}]")
    scoring = scoring_of(config)
    images = images_of(config)[scoring.numbers]
    for rows in torch.arange(12).split(3):
        scoring.add(rows.tolist(), images[rows])
    advantages = scoring.finish(images).advantages
    assert len(calls) == 4
    expected = compute_advantages(images_of(config)[:, 0, 0, 0], GROUPS)[scoring.numbers]
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-5)


def test_a_failure_in_the_background_is_the_same_sentence() -> None:
    SPOILT.add("a green square")
    plan = plan_epoch(config_of(), len(PROMPTS), [0, 1, 2], 7, 0, 1)
    SPOILT.add(PROMPTS[int(plan.prompts[0])].text)
    rewards = f"[{{name: '{HERE}:picky'}}]"
    for overlap in ("false", "true"):
        with pytest.raises(UserError, match=rf"^reward {HERE}:picky failed on the prompt .*KeyError: 'no such thing'"):
            scored_epoch(config_of(f"scoring.overlap={overlap}", rewards=rewards))


# Failures


def group_of(config: Config, group: int) -> str:
    """The prompt of a group of the epoch."""
    return scoring_of(config).group_prompts[group].text


@pytest.mark.parametrize("reward", ["picky", "sometimes_nan"])
@pytest.mark.parametrize("overlap", ["false", "true"])
@pytest.mark.parametrize("normalize", ["sum", "each"])
def test_the_group_of_a_failure_is_left_out_and_the_others_are_as_if_alone(
    reward: str, overlap: str, normalize: str
) -> None:
    settings = [f"scoring.overlap={overlap}", "scoring.on_failure=drop_group", f"scoring.normalize={normalize}"]
    config = config_of(*settings, rewards=f"[{{name: '{HERE}:{reward}'}}, {{name: '{HERE}:second'}}]")
    SPOILT.add(group_of(config, 1))
    epoch, advantages = scored_epoch(config)
    rows = GROUPS != 1
    images = images_of(config)[rows]
    total = images[:, 0, 0, 0] + 100 * images[:, 1, 0, 0]
    assert (advantages[~rows] == 0).all()
    if normalize == "sum":
        expected = compute_advantages(total, GROUPS[rows])
        torch.testing.assert_close(advantages[rows], expected, rtol=1e-4, atol=1e-4)
    assert (advantages[rows] != 0).all()
    metrics = epoch.metrics
    assert (metrics["scoring/dropped_groups"], metrics["scoring/failed_images"]) == (1, 4)
    assert metrics["reward/mean"] == pytest.approx(float(total.double().mean()), rel=1e-6)
    message = rf"epoch 7: 1 of 3 groups dropped: reward {HERE}:{reward} .*{group_of(config, 1)}"
    assert re.match(message, epoch.warning), epoch.warning


def test_nothing_is_said_and_counted_zero_where_nothing_fails() -> None:
    plain, expected = scored_epoch(config_of())
    epoch, advantages = scored_epoch(config_of("scoring.on_failure=drop_group"))
    assert torch.equal(advantages, expected) and epoch.warning == ""
    counts = {"scoring/dropped_groups": 0.0, "scoring/failed_images": 0.0}
    assert epoch.metrics == plain.metrics | counts


def test_an_epoch_without_any_group_ends_the_run() -> None:
    config = config_of("scoring.on_failure=drop_group", rewards=f"[{{name: '{HERE}:picky'}}]")
    SPOILT.update(prompt.text for prompt in PROMPTS)
    with pytest.raises(UserError, match=rf"no image in epoch 7 has a reward: reward {HERE}:picky .*2 more failures"):
        scored_epoch(config)


def test_a_reward_without_weight_drops_nothing() -> None:
    rewards = f"[{{name: '{HERE}:level'}}, {{name: '{HERE}:picky', weight: 0}}]"
    config = config_of("scoring.on_failure=drop_group", rewards=rewards)
    SPOILT.add(group_of(config, 2))
    epoch, advantages = scored_epoch(config)
    assert torch.equal(advantages, scored_epoch(config_of())[1])
    expected = float(images_of(config)[GROUPS != 2][:, 0, 0, 0].double().mean())
    assert epoch.metrics[f"reward/{HERE}:picky"] == pytest.approx(expected, rel=1e-6)


def test_buffers_remember_nothing_of_a_group_that_is_left_out() -> None:
    options = ["scoring.on_failure=drop_group", "advantage.normalization=running", "advantage.min_count=2"]
    config = config_of(*options, rewards=f"[{{name: '{HERE}:picky'}}]")
    spoilt = group_of(config, 0)
    SPOILT.add(spoilt)
    running = RunningAdvantages(16, 2)
    scored_epoch(config, running)
    remembered = running.state_dict()["rewards"]
    assert spoilt not in remembered and len(remembered) == 2


def test_two_ranks_leave_out_the_same_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image fails, on one rank; the other rank leaves out its own images of that group."""
    config = config_of("scoring.on_failure=drop_group", rewards=f"[{{name: '{HERE}:broken_pixel'}}]")
    images = images_of(config)
    images[6, 2, 0, 0] = 2.0
    meeting, slots = threading.Barrier(2, timeout=60), {}

    def gather(value: Any) -> list[Any]:
        own = int(threading.current_thread().name)
        slots[own] = value
        meeting.wait()
        parts = [slots[0], slots[1]]
        meeting.wait()
        return parts

    monkeypatch.setattr(pcpo_fast.rollout.epoch_scoring, "gather_objects", gather)
    monkeypatch.setattr(pcpo_fast.rollout.epoch_scoring, "gather_rows", lambda rows: torch.cat(gather(rows)))
    results: dict[int, tuple[ScoredEpoch, Tensor]] = {}

    def one_rank(rank: int) -> None:
        scoring = scoring_of(config, rank, 2)
        results[rank] = (scoring.finish(images[scoring.numbers]), scoring.numbers)

    threads = [threading.Thread(target=one_rank, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results[0][0].metrics == results[1][0].metrics
    assert results[0][0].warning == results[1][0].warning != ""
    for epoch, numbers in results.values():
        assert torch.equal(epoch.advantages == 0, numbers // 4 == 1)
        assert (numbers // 4 == 1).any()


def broken_pixel(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return torch.where(images[:, 2, 0, 0] > 1, torch.nan, images[:, 0, 0, 0])


# Time limits


def rewards_with_timeout(function: Callable[..., Any], policy: str, seconds: float = 0.2) -> RewardSet:
    stand_in[:] = [function]
    config = config_of(
        f"scoring.timeout={seconds}", f"scoring.on_failure={policy}", rewards=f"[{{name: '{HERE}:late'}}]"
    )
    return RewardSet(config.rewards, config.scoring)


stand_in: list[Callable[..., Any]] = []


def late(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
    return stand_in[0](images, prompts, metadata)


def test_a_call_that_takes_too_long_fails_without_waiting_for_it() -> None:
    release = threading.Event()
    rewards = rewards_with_timeout(lambda images, *_: release.wait(120) and [0.0] * len(images), "stop")
    begin = time.perf_counter()
    with pytest.raises(
        UserError, match=rf"^reward {HERE}:late took longer than 0.2 s \(scoring.timeout\) for 2 images"
    ):
        rewards.score(torch.rand(2, 3, 4, 4), ["a", "b"])
    assert time.perf_counter() - begin < 60
    release.set()


def test_a_reward_that_recovers_is_asked_again_and_never_twice_at_once() -> None:
    at_once, most, go_on = 0, 0, threading.Event()

    def busy(images: Tensor, *_: Any) -> list[float]:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        go_on.wait(60)
        at_once -= 1
        return [1.0] * len(images)

    rewards = rewards_with_timeout(busy, "drop_group", 0.2)
    images = torch.rand(2, 3, 4, 4)
    for _ in range(2):  # the second call finds the first still at work, and begins none
        late = rewards.score(images, ["a", "b"])
        assert late.total.isnan().all() and len(late.failures) == 1  # not asked again for each prompt
    rewards._limits[0].seconds = 60
    go_on.set()
    scores = rewards.score(images, ["a", "b"])
    assert scores.total.tolist() == [1.0, 1.0] and scores.failures == ()
    assert most == 1


def test_a_call_within_its_time_is_an_ordinary_call() -> None:
    rewards = rewards_with_timeout(lambda images, *_: images.mean((1, 2, 3)), "stop", 30)
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    scores = rewards.score(images, ["a", "b"])
    assert not scores.total.requires_grad
    torch.testing.assert_close(scores.total, images.detach().mean((1, 2, 3)).double())
    failing = rewards_with_timeout(lambda images, *_: 1 / 0, "stop", 30)
    with pytest.raises(UserError, match="ZeroDivisionError"):
        failing.score(images.detach(), ["a", "b"])
