"""What is Stable Diffusion 3's own: the scheduler's grid, T5 that may be missing, places, the published transformer."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tested_families import CPU, Family, random_latents
from tiny_pipeline import HEIGHT, PROMPTS, WIDTH
from tiny_pipelines import NEGATIVE, build_sd3

from pcpo_fast.config.schema import LoraConfig, ModelConfig
from pcpo_fast.errors import UserError
from pcpo_fast.policies.families import load_policy
from pcpo_fast.policies.lora import add_lora
from pcpo_fast.policies.saving import save_pipeline
from pcpo_fast.policies.stable_diffusion_3 import StableDiffusion3Policy


@pytest.fixture(scope="module")
def family(sd3_folder: Path) -> Family:
    return Family("sd3", sd3_folder)


@pytest.fixture(scope="module")
def policy(family: Family) -> Any:
    return family.policy()


# -------------------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("height", "width", "steps"), [(16, 24, 10), (64, 32, 5)])
def test_scheduler_times_are_those_the_pipeline_runs(
    policy: Any, dynamic: bool, height: int, width: int, steps: int
) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=dynamic, base_image_seq_len=8, max_image_seq_len=64
    )
    transformer = SD3Transformer2DModel.from_config(policy.network.config, pos_embed_max_size=16)
    other = StableDiffusion3Policy(transformer, policy.vae, scheduler, ModelConfig(height=height, width=width))
    pipeline: Any = StableDiffusion3Pipeline(transformer, scheduler, policy.vae, None, None, None, None, None, None)
    pipeline.set_progress_bar_config(disable=True)
    asked: list[Any] = []
    transformer.register_forward_hook(
        lambda _module, _args, kwargs, _result: asked.append(kwargs["timestep"]), with_kwargs=True
    )
    embeds = policy.encode(PROMPTS[:1])
    with torch.no_grad():
        pipeline(
            height=height, width=width, num_inference_steps=steps, guidance_scale=1.0, output_type="latent", **embeds
        )
    times = other.schedule(steps).times
    assert torch.equal(times, scheduler.sigmas.double())
    assert times[0] == 1 and times[-1] == 0 and len(times) == steps + 1
    for time in times[:-1].float():
        other.predict_halves(torch.zeros(1, *other.latent_shape), time.expand(1), embeds)
    assert torch.equal(torch.cat(asked[steps:]), torch.cat(asked[:steps]))


def test_the_shift_depends_on_the_image_where_it_is_dynamic(policy: Any) -> None:
    grids = []
    for dynamic in (False, True):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic, base_image_seq_len=8)
        small, large = (
            StableDiffusion3Policy(policy.network, policy.vae, scheduler, ModelConfig(height=size, width=size))
            .schedule(6)
            .times
            for size in (8, 32)
        )
        grids.append(torch.equal(small, large))
    assert grids == [True, False]


def test_the_time_is_not_cut_to_an_integer(policy: Any) -> None:
    latents, conditioning = random_latents(1), policy.encode(PROMPTS[:1])
    near, same = (policy.predict(latents, torch.tensor([t]), conditioning) for t in (0.5004, 0.5001))
    assert not torch.allclose(near, same, atol=1e-6)


# --------------------------------------------------------------------------------------------------- without T5


def test_a_pipeline_without_t5_is_the_pipelines(tmp_path: Path) -> None:
    """``text_encoder_3`` is null in model_index.json: zeros stand for what T5 would say."""
    build_sd3(tmp_path / "pipeline", t5=False)
    family = Family("sd3", tmp_path / "pipeline")
    policy = load_policy(family.config(), CPU, PROMPTS)
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(family.folder, text_encoder_3=None, tokenizer_3=None)
    given = policy.encode(PROMPTS[:2])
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(
            list(PROMPTS[:2]), None, None, do_classifier_free_guidance=False, max_sequence_length=12
        )
    assert torch.allclose(given["prompt_embeds"], states, atol=1e-6)
    assert torch.allclose(given["pooled_prompt_embeds"], pooled, atol=1e-6)
    assert not given["prompt_embeds"][:, 40:].any() and given["prompt_embeds"].shape == (2, 52, 32)
    halves = policy.predict_halves(random_latents(2), torch.tensor([0.9, 0.3]), given)
    assert halves.conditional.shape == (2, *policy.latent_shape)


def test_a_pipeline_without_t5_warns_of_clip_alone_and_is_exported(tmp_path: Path) -> None:
    build_sd3(tmp_path / "pipeline", t5=False)
    family = Family("sd3", tmp_path / "pipeline")
    config = family.config("model.max_sequence_length=5")
    with pytest.warns(UserWarning, match="longer than") as caught:
        policy = load_policy(config, CPU, ["red background on background green background"])
    assert [str(w.message).count("CLIP") for w in caught if "longer than" in str(w.message)] == [1]
    policy.save_weights(tmp_path / "weights", dict(policy.module.named_parameters()))
    save_pipeline(config.model, tmp_path / "weights", tmp_path / "exported")
    again = Family("sd3", tmp_path / "exported").policy("model.max_sequence_length=5")
    inputs = random_latents(1), torch.tensor([0.4]), policy.encode([NEGATIVE])
    assert torch.allclose(again.predict(*inputs), policy.predict(*inputs), atol=1e-5)


def test_taking_t5_away_is_another_encoding(tmp_path: Path) -> None:
    """Its folder may stay: model_index.json alone says whether it is used."""
    build_sd3(tmp_path / "pipeline")
    family = Family("sd3", tmp_path / "pipeline")
    with_t5 = family.policy().encode(PROMPTS[:1])["prompt_embeds"]
    index = family.folder / "model_index.json"
    nulls = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    index.write_text(json.dumps(json.loads(index.read_text()) | nulls))
    without = family.policy().encode(PROMPTS[:1])["prompt_embeds"]
    assert torch.equal(with_t5[:, :40], without[:, :40])
    assert with_t5[:, 40:].any() and not without[:, 40:].any()


# --------------------------------------------------------------------------------------------------- image size


@pytest.mark.parametrize(("key", "size"), [("height", 36), ("width", 64)])
def test_an_image_beyond_the_models_places_is_refused(family: Family, key: str, size: int) -> None:
    with pytest.raises(UserError, match=rf"^model\.{key}: {size} is more than the 32 pixels that"):
        family.policy(f"model.{key}={size}")


def test_an_image_as_large_as_the_models_places_is_taken(family: Family) -> None:
    policy = family.policy("model.height=32", "model.width=32")
    output = policy.predict(torch.randn(1, *policy.latent_shape), torch.tensor([0.5]), policy.encode(PROMPTS[:1]))
    assert policy.decode(output).shape == (1, 3, 32, 32)


# ---------------------------------------------------------------------------------- published configuration


def test_published_transformer_on_the_meta_device(policy: Any) -> None:
    """Stable Diffusion 3.5 medium."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            out_channels=16,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        )
    assert sum(p.numel() for p in transformer.parameters()) == 2_243_171_520
    vae: Any = SimpleNamespace(config={"block_out_channels": (128, 256, 512, 512)})  # nothing else is asked of it here
    stable = StableDiffusion3Policy(
        transformer, vae, policy.scheduler, ModelConfig(height=512, width=768, cfg_scale=4.5)
    )
    assert stable.latent_shape == (16, 64, 96)
    conditioning = {
        "prompt_embeds": torch.empty(2, 77 + 256, 4096, device="meta"),
        "pooled_prompt_embeds": torch.empty(2, 2048, device="meta"),
    }
    stable._negative = {name: value[:1] for name, value in conditioning.items()}
    targets = StableDiffusion3Policy.lora_targets
    add_lora(transformer, LoraConfig(rank=32, alpha=64), targets)
    adapted = {name.removesuffix(".lora_A") for name, _ in transformer.named_modules() if name.endswith(".lora_A")}
    every = {f"transformer_blocks.{i}.{target}" for i in range(24) for target in targets}
    assert len(targets) == 8 and adapted == every - {"transformer_blocks.23.attn.to_add_out"}
    assert all(("lora_" in name) == p.requires_grad for name, p in transformer.named_parameters())
    with torch.no_grad():
        latents = torch.empty(2, *stable.latent_shape, device="meta")
        halves = stable.predict_halves(latents, torch.ones(2, device="meta"), conditioning)
    assert halves.conditional.shape == halves.unconditional.shape == latents.shape


def test_height_and_width_are_not_mixed_up(policy: Any) -> None:
    assert policy.latent_shape == (4, HEIGHT // 2, WIDTH // 2)
