"""Candidates: which are chosen, that they are sampled again from the same noise, and what they are compared with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from tiny_pipeline import PROMPTS, tiny_config
from torch import Tensor

import pcpo_fast.rollout.candidates
from pcpo_fast.config.loading import load_config
from pcpo_fast.config.schema import AdvantageConfig, Config
from pcpo_fast.errors import UserError
from pcpo_fast.method.advantages import RunningAdvantages, compute_advantages
from pcpo_fast.method.noise_keys import Purpose, random_key
from pcpo_fast.method.step_advantages import StepAdvantages
from pcpo_fast.method.step_tables import RunTables
from pcpo_fast.policies import Conditioning, Policy
from pcpo_fast.policies.families import load_policy
from pcpo_fast.prompts import Prompt
from pcpo_fast.rewards import RewardSet
from pcpo_fast.rewards.composition import compose_advantages
from pcpo_fast.rollout.candidates import Candidates, choose, ranked_by, sample_candidates
from pcpo_fast.rollout.epoch_plan import plan_epoch
from pcpo_fast.rollout.epoch_scoring import RolloutScoring, ScoredEpoch
from pcpo_fast.rollout.rollout import Rollout, collect_rollout

CPU = torch.device("cpu")
FAILING: set[str] = set()
"""Prompts whose candidates, not their other images, get no score."""
sampling_candidates = [False]


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    scores = images.mean(dim=(1, 2, 3))
    lost = torch.tensor([sampling_candidates[0] and prompt in FAILING for prompt in prompts])
    return scores.masked_fill(lost & (torch.arange(len(prompts)) % 2 == 0), torch.nan)


@pytest.fixture(scope="module")
def policy(pipeline_folder: Path) -> Policy:
    return load_policy(tiny_config(pipeline_folder), CPU)


@pytest.fixture
def config_of(pipeline_folder: Path) -> Callable[..., Config]:
    FAILING.clear()
    return lambda *overrides: tiny_config(
        pipeline_folder,
        f"rewards=[{{name: '{__name__}:brightness'}}]",
        "rollout.prompts_per_epoch=2",
        "rollout.candidates=11",
        "rollout.batch_size=5",
        *overrides,
    )


def epoch_of(policy: Policy, config: Config, epoch: int = 3) -> tuple[ScoredEpoch, Rollout, Candidates]:
    at = RunTables(config, policy.schedule(config.sampler.steps), CPU).at(epoch)
    plan = plan_epoch(config, len(PROMPTS), at.steps, epoch, 0, 1)
    prompts, rewards = [Prompt(text) for text in PROMPTS], RewardSet(config.rewards, config.scoring)
    stepwise = StepAdvantages(config.advantage, config.sampler.steps)
    scoring = RolloutScoring(config, rewards, prompts, RunningAdvantages(), stepwise, at, plan, CPU)

    def encode(indices: list[int]) -> Conditioning:
        return policy.encode([PROMPTS[index] for index in indices])

    sampling_candidates[0] = True
    with policy.cheaper(config.rollout):
        found = sample_candidates(policy, encode, config, at.sampler, plan.prompts, prompts, epoch, rewards)
    sampling_candidates[0] = False
    scoring.candidates = found
    settings, seed = config.rollout, config.seed
    rollout = collect_rollout(
        policy, encode, plan, settings, at.sampler, seed, scoring.add, scoring.predicted, found.chosen
    )
    return scoring.finish(rollout.images), rollout, found


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [[2], [4]]), (2, [[0, 2], [1, 4]]), (3, [[0, 2, 4], [1, 2, 4]]), (5, [[*range(5)]] * 2)]
)
def test_the_worst_and_the_best_are_chosen(count: int, expected: list[list[int]]) -> None:
    totals = torch.tensor([[-1.0, 0.1, 7.0, 0.1, 3.0], [2.0, 1.0, 5.0, 3.0, 6.0]])
    assert choose(totals, count).tolist() == expected


@pytest.mark.parametrize(
    "overrides",
    [("rollout.same_initial_noise=false",), ("rollout.share_first_steps=true",), ("scoring.overlap=true",)],
    ids=str,
)
def test_the_chosen_ones_are_sampled_again_from_their_own_noise(
    policy: Policy, config_of: Callable[..., Config], overrides: tuple[str, ...]
) -> None:
    config = config_of("rollout.candidate_weights=full", *overrides)
    _, rollout, found = epoch_of(policy, config)
    numbers = rollout.plan.images.flatten()
    groups, places = numbers // 4, numbers % 4
    again = rollout.images.mean(dim=(1, 2, 3)).double()
    # The same policy from the same noise: the same reward, although the batches were cut differently.
    torch.testing.assert_close(again, found.scores[groups, found.chosen[groups, places], 0], rtol=1e-5, atol=1e-6)
    members = found.chosen[groups, places].tolist()
    names = zip(groups.tolist(), members, strict=True)
    assert rollout.seeds.tolist() == [random_key(Purpose.STEP_NOISE, config.seed, 3, *name) for name in names]
    for group in range(2):
        ranked = found.scores[group, :, 0].argsort().tolist()
        assert found.chosen[group].tolist() == sorted(ranked[:2] + ranked[-2:])


@pytest.mark.parametrize("normalize", ["sum", "each"])
@pytest.mark.parametrize("normalization", ["group", "global"])
def test_advantages_compare_with_all_candidates(
    policy: Policy, config_of: Callable[..., Config], normalize: str, normalization: str
) -> None:
    config = config_of(f"scoring.normalize={normalize}", f"advantage.normalization={normalization}")
    epoch, rollout, found = epoch_of(policy, config)
    numbers = rollout.plan.images.flatten()
    groups, places = numbers // 4, numbers % 4
    exact = rollout.images.mean(dim=(1, 2, 3)).double()
    rewards = found.scores[..., 0].clone()
    assert float((rewards[groups, found.chosen[groups, places]] - exact).abs().max()) > 0  # 8 bits are another policy
    rewards[groups, found.chosen[groups, places]] = exact
    everyone = torch.arange(2).repeat_interleave(11)
    expected = compute_advantages(rewards.flatten(), everyone, normalization).reshape(2, 11)
    if normalize == "each":
        expected = (expected - expected.mean()) / expected.std(correction=0)
    torch.testing.assert_close(epoch.advantages, expected[groups, found.chosen[groups, places]], rtol=1e-5, atol=1e-5)
    metrics = epoch.metrics
    assert metrics["reward/mean"] == pytest.approx(float(exact.mean()))
    assert metrics["candidates/reward_mean"] == pytest.approx(float(found.scores[..., 0].mean()))
    spreads = [found.scores[..., 0].std(dim=1, correction=0), torch.stack([exact[groups == g] for g in range(2)])]
    ratio = spreads[1].std(dim=1, correction=0).mean() / spreads[0].mean()
    assert metrics["candidates/spread_ratio"] == pytest.approx(float(ratio)) and ratio > 1


def test_gains_are_centred_among_the_chosen_and_divided_by_the_spread_of_all(
    policy: Policy, config_of: Callable[..., Config]
) -> None:
    config = config_of("advantage.steps=gain", "advantage.calibrated=false", "advantage.normalization=group")
    epoch, rollout, found = epoch_of(policy, config)
    numbers = rollout.plan.images.flatten()
    groups, places = numbers // 4, numbers % 4
    exact = rollout.images.mean(dim=(1, 2, 3)).double()
    rewards = found.scores[..., 0].clone()
    rewards[groups, found.chosen[groups, places]] = exact
    at = RunTables(config, policy.schedule(config.sampler.steps), CPU).at(3)
    scale, slope = at.sampler.clean[2]
    clean = scale * rollout.trajectories.latents[:, 2] + slope * rollout.trajectories.outputs[:, 2].float()
    predicted = policy.decode(clean).mean(dim=(1, 2, 3)).double()
    for group in range(2):
        mine = groups == group
        value = predicted[mine] - predicted[mine].mean()
        final = exact[mine] - rewards[group].mean()
        expected = (final - value) / rewards[group].std(correction=0)
        torch.testing.assert_close(epoch.advantages[mine, 2], expected, rtol=1e-4, atol=1e-4)


def test_agreement_is_the_rank_correlation_within_prompts() -> None:
    cheap, again = torch.randn(1, 9).double(), torch.randn(4).double()
    found = Candidates(cheap[..., None], choose(cheap, 4))
    expected = spearmanr(cheap[0, found.chosen[0]], again).statistic
    assert found.metrics(again)["candidates/agreement"] == pytest.approx(expected)
    assert found.metrics(torch.full((4,), torch.nan)) == {}


@pytest.mark.parametrize("normalization", ["group", "flow_grpo", "global"])
def test_candidates_are_ranked_by_what_advantages_are_made_of(
    config_of: Callable[..., Config], normalization: str
) -> None:
    """With normalize=each a reward with large scores counts by its weight alone, in the choice as in the advantages."""
    rewards = "rewards=[{name: a, weight: 2}, {name: b, weight: 1}]"
    scores = torch.randn(3, 7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores[..., 1] *= 100
    whole = torch.cat([scores @ torch.tensor([[2.0], [1.0]]).double(), scores], dim=2)
    config = config_of(rewards, "scoring.normalize=each", f"advantage.normalization={normalization}")
    groups = torch.arange(3).repeat_interleave(7)
    settings = AdvantageConfig(normalization=normalization, clip=1e3)
    flat = whole.flatten(0, 1)
    advantages = compose_advantages(flat[:, 0], flat[:, 1:], config.rewards, groups, settings, "each").reshape(3, 7)
    found = ranked_by(whole, config)
    assert torch.equal(choose(found, 4), choose(advantages, 4))
    assert not torch.equal(choose(found, 4), choose(whole[..., 0], 4))
    assert torch.equal(choose(ranked_by(whole, config_of(rewards)), 4), choose(whole[..., 0], 4))


@pytest.mark.parametrize("normalize", ["sum", "each"])
def test_a_prompt_with_a_failed_candidate_changes_no_other_choice(
    config_of: Callable[..., Config], normalize: str
) -> None:
    config = config_of(f"scoring.normalize={normalize}", "advantage.normalization=global")
    scores = torch.randn(3, 7, 1, dtype=torch.float64).expand(3, 7, 2).clone()
    expected = ranked_by(scores[1:], config)
    scores[0, 2] = torch.nan
    assert torch.equal(ranked_by(scores, config)[1:], expected)
    scores[:, 0] = torch.nan
    assert choose(ranked_by(scores, config), 4).tolist() == [[0, 1, 5, 6]] * 3


def test_equal_rewards_share_a_rank_and_do_not_count_as_agreement() -> None:
    cheap, again = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0]]).double(), torch.tensor([0.0, 1.0, 0.0, 0.0]).double()
    found = Candidates(cheap[..., None], choose(cheap, 4))
    expected = spearmanr(cheap[0, found.chosen[0]], again).statistic
    assert found.metrics(again)["candidates/agreement"] == pytest.approx(expected)
    same = Candidates(torch.ones(2, 6, 1).double(), choose(torch.ones(2, 6).double(), 4))
    assert "candidates/agreement" not in same.metrics(torch.ones(8).double())


def test_a_prompt_with_a_candidate_without_a_score_is_dropped_and_said_so(
    policy: Policy, config_of: Callable[..., Config]
) -> None:
    config = config_of("scoring.on_failure=drop_group")
    lost = plan_epoch(config, len(PROMPTS), [0], 3, 0, 1).prompts[0]
    FAILING.add(PROMPTS[int(lost)])
    epoch, rollout, _ = epoch_of(policy, config)
    assert "1 of 2 groups dropped" in epoch.warning
    dropped = rollout.plan.images.flatten() // 4 == 0
    assert not epoch.advantages[dropped].any() and epoch.advantages[~dropped].any()
    with pytest.raises(UserError, match="returned nan"):
        epoch_of(policy, config_of(f"rewards=[{{name: '{__name__}:brightness'}}]", "scoring.on_failure=stop"))


def test_ranks_share_the_work_and_choose_alike(
    policy: Policy, config_of: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("rollout.candidate_weights=full")
    _, _, whole = epoch_of(policy, config)
    module, parts = pcpo_fast.rollout.candidates, []
    monkeypatch.setattr(module, "world_size", lambda: 3)
    monkeypatch.setattr(module, "gather_rows", lambda rows: parts.append(rows) or rows.repeat(3, 1))
    for number in range(3):
        monkeypatch.setattr(module, "rank", lambda number=number: number)
        epoch_of(policy, config)
    assert [len(part) for part in parts] == [8, 8, 8]  # 22 candidates and two repetitions
    torch.testing.assert_close(torch.cat(parts)[:22], whole.scores.flatten(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("rollout.candidates=24",), r"24 leave nothing to choose for rollout\.images_per_prompt=24"),
        (("rollout.candidates=48", "advantage.normalization=running"), "compared within an epoch"),
        (("rollout.candidates=48", "advantage.steps=baseline"), "chosen by their final reward"),
        (("rollout.candidates=48", "advantage.steps=gain", "advantage.gain_lambda=1"), "chosen by their final reward"),
        (
            ("rollout.candidates=48", "model.finetune=lora", "model.base_weights=nf4"),
            r"candidate_weights: fp8 has no layers to change",
        ),
        (("rollout.candidate_weights=full",), "only takes effect with rollout.candidates"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, overrides)
