"""The KL to the base model with the LoRA that a run started from."""

from pathlib import Path

import pytest
import torch
from published_loss import Published, distance
from tiny_pipeline import tiny_config
from tiny_runs import CPU, LORA, Bench, randomize_adapters, trained_parameters

from pcpo_fast.policies.families import keep_reference, load_policy
from pcpo_fast.policies.lora import START, merged_adapters, only_adapter
from pcpo_fast.runs.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("process_group")
SETTINGS = (*LORA, "credit.kl_coefficient=0.1", "credit.kl_reference=start", "optimizer.lr=0.02")


@pytest.fixture
def lora(pipeline_folder: Path, tmp_path: Path) -> Path:
    """A LoRA file's folder."""
    policy = load_policy(tiny_config(pipeline_folder, *LORA), CPU)
    randomize_adapters(policy)
    policy.save_weights(tmp_path / "lora", {name: p.detach() for name, p in trained_parameters(policy).items()})
    return tmp_path / "lora"


def test_an_update_with_the_kl_to_the_start_is_the_published_one(
    pipeline_folder: Path, lora: Path, tmp_path: Path
) -> None:
    config = tiny_config(pipeline_folder, *SETTINGS, f"model.lora.init={lora}")
    bench = Bench.build(config)
    records, published = bench.run(), Published(bench)
    for update, record in enumerate(records):
        expected, gradients = published.metrics(update, bench.weights[update], ("itself", "stored")[update])
        assert bench.gradients[update].keys() == gradients.keys()  # none of the frozen copy
        assert distance(bench.gradients[update], gradients) < 2e-4
        for metric, value in expected.items():
            assert record[metric] == pytest.approx(value, rel=2e-3, abs=1e-6), metric
    assert records[0]["policy/kl"] == 0 < records[1]["policy/kl"]
    frozen = {name: p for name, p in bench.policy.module.named_parameters() if f".{START}." in name}
    assert frozen and all(torch.equal(p, bench.weights[0][name]) for name, p in frozen.items())
    checkpoint = save_checkpoint(tmp_path / "checkpoints", bench.engine, bench.policy, 1, {}, 1)
    resumed = Bench.build(config, record=False)
    load_checkpoint(checkpoint, resumed.engine)
    for (name, ours), theirs in zip(
        resumed.policy.module.named_parameters(), bench.policy.module.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_the_start_is_frozen_and_takes_part_in_nothing_else(pipeline_folder: Path, lora: Path, tmp_path: Path) -> None:
    config = tiny_config(pipeline_folder, *SETTINGS, f"model.lora.init={lora}")
    policy = load_policy(config, CPU)
    inputs = torch.randn(2, *policy.latent_shape), torch.tensor([0.9, 0.2]), policy.encode(["a red circle"] * 2)
    with torch.no_grad():
        start = policy.predict(*inputs)
        keep_reference(policy, config, CPU)
        assert torch.equal(policy.predict(*inputs), start)
        for parameter in trained_parameters(policy).values():
            parameter.mul_(1.5)
        tuned = policy.predict(*inputs)
        assert not torch.allclose(tuned, start, atol=1e-3)
        with only_adapter(policy.module, START):
            assert torch.equal(policy.predict(*inputs), start)
        with policy.as_reference():  # the base model
            assert not torch.allclose(policy.predict(*inputs), start, atol=1e-3)
        with merged_adapters(policy.module):
            assert torch.allclose(policy.predict(*inputs), tuned, atol=1e-5)
    policy.save_weights(tmp_path / "again", {name: p.detach() for name, p in trained_parameters(policy).items()})
    again = load_policy(tiny_config(pipeline_folder, *LORA, f"model.lora.init={tmp_path / 'again'}"), CPU)
    with torch.no_grad():
        assert torch.equal(again.predict(*inputs), tuned)
