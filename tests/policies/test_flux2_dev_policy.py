"""What is FLUX.2-dev's own: its processor, its grid, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from tested_families import KEPT, Family
from tiny_pipeline import PROMPTS
from tiny_pipelines import build_flux2_dev

from pcpo_fast.config.schema import ModelConfig
from pcpo_fast.errors import UserError
from pcpo_fast.policies.families import check_base_model
from pcpo_fast.policies.flux2_dev import Flux2DevPolicy
from pcpo_fast.policies.saving import save_pipeline


@pytest.fixture(scope="module")
def family(flux2_dev_folder: Path) -> Family:
    return Family("flux2_dev", flux2_dev_folder)


@pytest.mark.parametrize(("height", "width", "steps"), [(16, 24, 10), (64, 32, 5)])
def test_scheduler_times_are_those_the_pipeline_runs(family: Family, height: int, width: int, steps: int) -> None:
    policy, scheduler = family.policy(), FlowMatchEulerDiscreteScheduler(shift=2.0, use_dynamic_shifting=True)
    other = Flux2DevPolicy(policy.network, policy.vae, scheduler, ModelConfig(height=height, width=width))
    tokenizer: Any = None
    pipeline = Flux2Pipeline(scheduler, policy.vae, tokenizer, tokenizer, policy.network)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipeline(
            height=height, width=width, num_inference_steps=steps, output_type="latent", **policy.encode(PROMPTS[:1])
        )
    assert torch.equal(other.schedule(steps).times, scheduler.sigmas.double())


def test_tokens_are_those_of_pixtrals_processor(family: Family) -> None:
    """Which needs torchvision; nothing else here does."""
    pytest.importorskip("torchvision", reason="torchvision is not installed, and PixtralProcessor needs it")
    from transformers import AutoProcessor

    asked: Any = {"padding": "max_length", "truncation": True, "max_length": KEPT, "return_tensors": "pt"}
    theirs, ours = (
        processor.apply_chat_template(format_input([*PROMPTS]), tokenize=True, return_dict=True, **asked)
        for processor in (
            AutoProcessor.from_pretrained(family.folder / "tokenizer"),
            family.policy()._load_parts("tokenizer").tokenizer,
        )
    )
    assert type(theirs) is type(ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ("input_ids", "attention_mask"))


def test_an_exported_pipeline_has_the_whole_processor(family: Family, tmp_path: Path) -> None:
    policy = family.policy()
    policy.save_weights(tmp_path / "weights", policy.module.state_dict())
    save_pipeline(family.config().model, tmp_path / "weights", tmp_path / "exported")
    ours, theirs = tmp_path / "exported" / "tokenizer", family.folder / "tokenizer"
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == {
        path.name: path.read_bytes() for path in theirs.iterdir()
    }
    index = json.loads((tmp_path / "exported" / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "PixtralProcessor"]


def test_classifier_free_guidance_is_refused(family: Family) -> None:
    with pytest.raises(
        UserError, match=r"^model\.cfg_scale: .* has no classifier-free guidance: set it to 1; .* model\.guid"
    ):
        family.policy("model.cfg_scale=3.0")


def test_folders_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    build_flux2_dev(tmp_path / "short", layers=29)
    with pytest.raises(
        UserError, match=r"config\.json says num_hidden_layers 29; the states of layers 10, 20 and 30 are"
    ):
        check_base_model(Family("flux2_dev", tmp_path / "short").config())
    build_flux2_dev(tmp_path / "mute", template=False)
    mute = Family("flux2_dev", tmp_path / "mute")
    with pytest.raises(UserError, match=r"^model\.path: the tokenizer of .* has no chat template"):
        mute.policy().prepare_prompts(PROMPTS)
    (tmp_path / "mute" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(
        UserError, match=r"^model\.path: .* has no vocabulary: neither tokenizer\.json nor tokenizer\.model is"
    ):
        check_base_model(mute.config())
