"""Mean gradients of per-step credit: products between rollouts alone, and what is measured on the tiny pipeline."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipeline import tiny_config
from torch import Tensor

import pcpo_fast.training.step_gradients
from pcpo_fast.config.loading import load_config
from pcpo_fast.errors import UserError
from pcpo_fast.training.step_gradients import _changed, compare_gradients, measure_gradients


def alike(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return torch.ones(len(images))


def products_of(gradients: Tensor) -> Tensor:
    """[K, 3, K, 3] of [K, 3, D]."""
    return torch.einsum("kad,lbd->kalb", gradients, gradients)


def normalized(products: Tensor) -> Tensor:
    lengths = products.reshape(9, 9).diagonal().sqrt()
    return (products.reshape(9, 9) / lengths / lengths[:, None]).reshape(3, 3, 3, 3)


def test_products_are_of_different_rollouts_and_their_cosine_has_no_bias_by_noise() -> None:
    generator = torch.Generator().manual_seed(5)
    means = torch.zeros(3, 200, dtype=torch.float64)
    means[0, 0], means[1, :2], means[2, 2] = 1.0, torch.tensor([0.6, 0.8]), 1.0  # cosines 0.6, 0 and 0
    noise = 0.3 * torch.randn(40, 1, 200, generator=generator, dtype=torch.float64)  # the same for all: a rollout's own
    gradients = means + noise
    found = compare_gradients(products_of(gradients))
    for a, b in itertools.product(range(3), repeat=2):
        pairs = [gradients[k, a] @ gradients[m, b] for k, m in itertools.permutations(range(40), 2)]
        lengths = [
            sum(float(gradients[k, c] @ gradients[m, c]) for k, m in itertools.permutations(range(40), 2)) / len(pairs)
            for c in (a, b)
        ]
        assert float(found.cosines[a, b]) == pytest.approx(
            float(sum(pairs)) / len(pairs) / math.sqrt(lengths[0] * lengths[1]), rel=1e-9
        )
    truth = torch.tensor([[1.0, 0.6, 0.0], [0.6, 1.0, 0.0], [0.0, 0.0, 1.0]]).double()
    naive = torch.nn.functional.cosine_similarity(gradients.mean(0)[:, None], gradients.mean(0)[None], dim=2)
    assert float((naive - truth).abs().max()) > 0.2  # the noise that the three share
    assert bool(((found.cosines - truth).abs() <= 3 * found.errors + 1e-9).all())
    assert float(found.errors[0, 1]) < 0.15
    # One rollout of `final` has noise of length 0.3 sqrt(200) beside a mean of length 1.
    assert float(found.towards_final[0]) == pytest.approx(1 / math.sqrt(1 + 0.09 * 200), rel=0.2)


def test_a_mean_that_drowns_in_noise_has_no_cosine() -> None:
    alternating = torch.tensor([1.0, -1.0, 1.0, -1.0]).double()[:, None, None] * torch.ones(4, 3, 2).double()
    found = compare_gradients(products_of(alternating))
    assert found.cosines.isnan().all() and found.errors.isnan().all() and found.towards_final.isnan().all()
    one_sided = torch.tensor([3.0, 1.0, -1.0]).double()[:, None, None] * torch.ones(3, 3, 2).double()
    found = compare_gradients(products_of(one_sided))  # a length, but not without the first rollout
    assert found.cosines.isnan().all() and found.errors.isnan().all()


def test_gradients_are_of_the_whole_rollout_and_differ_by_what_steps_are_credited_with(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Tensor] = []
    monkeypatch.setattr(pcpo_fast.training.step_gradients, "compare_gradients", taken.append)
    automatic = ("train.micro_batch_size=auto", "rollout.batch_size=auto")
    for settings in (
        ("train.updates_per_epoch=1", *automatic),
        ("train.micro_batch_size=2", "advantage.gain_lambda=1"),
    ):
        config = tiny_config(pipeline_folder, "advantage.steps=gain", "rollout.same_initial_noise=false", *settings)
        measure_gradients(config, None, 2, 3, 1, torch.device("cpu"))
    one, other = taken  # in one update, and in two of smaller micro-batches, with a gain that is the baseline
    assert one.shape == (3, 3, 3, 3)
    torch.testing.assert_close(one, one.permute(2, 3, 0, 1), rtol=1e-12, atol=1e-15)
    cosine, again = normalized(one), normalized(other)
    torch.testing.assert_close(again[:, :2, :, :2], cosine[:, :2, :, :2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again[:, 2], again[:, 1])
    for k in range(3):
        assert float(cosine[k, 0, k, 2]) < 0.99 and float(cosine[k, 1, k, 2]) < 0.99


def test_what_cannot_be_measured_is_one_sentence(pipeline_folder: Path) -> None:
    config = tiny_config(pipeline_folder, "advantage.normalization=running")
    with pytest.raises(UserError, match=r"cannot be measured here: advantage.steps: gain compares images of one epoch"):
        measure_gradients(config, None, 0, 3, 1, torch.device("cpu"))
    config, told = tiny_config(pipeline_folder, f"rewards=[{{name: '{__name__}:alike'}}]", "rollout.candidates=8"), []
    with pytest.raises(UserError, match="there is no gradient to compare: in every rollout all images of a prompt"):
        measure_gradients(config, None, 0, 3, 1, torch.device("cpu"), told.append)
    assert told[0].startswith("rollout.candidates is not used here")


def test_a_rollout_is_measured_whole_even_if_the_run_chooses_among_candidates() -> None:
    config = load_config(None, ["rollout.candidates=48", "rollout.images_per_prompt=24", "advantage.steps=gain"])
    assert _changed(config).rollout.candidates is None
