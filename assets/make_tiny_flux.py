"""Makes `assets/tiny-flux`, a complete FluxPipeline of 5 MB, from nothing.

    python assets/make_tiny_flux.py --output assets/tiny-flux --work runs/make-tiny

Three stages: the VAE, the latents of rendered scenes, and the transformer with both text encoders. Each leaves its
result in the work folder and is skipped when that result is there; training also saves its state every minute, so an
interrupted run goes on where it stopped. The same seed and thread count give the same weights on the same machine.
Only the training captions of `pcpo_fast.rewards.scenes` are ever rendered here.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from tiny_training import (
    CLIP_LENGTH,
    IMAGES,
    arguments,
    build_clip_tokenizer,
    build_t5,
    build_t5_tokenizer,
    clip_config,
    draw_length,
    draw_texts,
    finish,
    flow_scheduler,
    flow_step,
    load_vae,
    make_latents,
    say,
    scene_batch,
    step_generator,
    token_ids,
    train,
    train_denoiser,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5TokenizerFast

from pcpo_fast.rewards.scenes import IMAGE_SIZE

T5_LENGTH = 512


@dataclass(frozen=True)
class Plan:
    """How long each stage trains, and on what."""

    vae_steps: int = 1600
    vae_batch: int = 32
    vae_rate: float = 2e-3
    kl_weight: float = 1e-3
    images: int = IMAGES
    steps: int = 2400
    batch: int = 128
    rate: float = 1e-3


def build_vae() -> AutoencoderKL:
    """237 k parameters; 32 x 32 pixels become 8 x 8 latents of 8 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_vae(plan: Plan, work: Path, seed: int) -> AutoencoderKL:
    """Trains the VAE on reconstruction (L1 + MSE) with a weak KL term; sets the latents' shift and scale from data."""
    folder = work / "vae"
    if folder.exists():
        say("vae", "already made")
        return load_vae(folder)
    torch.manual_seed(seed)
    vae = build_vae()

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(seed + 1, step)
        images = scene_batch(plan.vae_batch, generator) * 2 - 1
        posterior = vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        error = vae.decode(latents).sample - images
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return error.abs().mean() + error.square().mean() + plan.kl_weight * kl

    mean = train(
        "vae",
        nn.ModuleDict({"vae": vae}),
        loss_of_step,
        steps=plan.vae_steps,
        rate=plan.vae_rate,
        weight_decay=1e-4,
        warm_up=100,
        average=0.99,
        folder=work,
        seed=seed,
    )
    vae.load_state_dict({name.removeprefix("vae."): value for name, value in mean.items()})
    vae.eval()
    with torch.no_grad():
        images = scene_batch(1024, torch.Generator().manual_seed(seed + 7)) * 2 - 1
        posterior = vae.encode(images).latent_dist
        error = (vae.decode(posterior.mean).sample - images).square().mean() / 4
    shift, scale = posterior.mean.mean().item(), 1 / posterior.mean.std().item()
    vae.register_to_config(shift_factor=round(shift, 5), scaling_factor=round(scale, 5))
    say("vae", f"squared error {error:.5f} on a 0..1 scale; shift {shift:.4f}, scale {scale:.4f}")
    say("vae", f"spread inside the posterior {posterior.std.mean():.4f}; by channel {posterior.mean.std((0, 2, 3))}")
    vae.save_pretrained(work / "vae.partial")
    (work / "vae.partial").rename(folder)
    return vae


def build_text_and_transformer(clip: CLIPTokenizer, t5: T5TokenizerFast) -> nn.ModuleDict:
    text_encoder = CLIPTextModel(clip_config(clip, 64, 1))
    text_encoder_2 = build_t5(t5, 64)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    return nn.ModuleDict({"text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "transformer": transformer})


def make_transformer(plan: Plan, latents: Tensor, captions: Tensor, work: Path, seed: int) -> nn.ModuleDict:
    """Trains transformer and text encoders together by flow matching."""
    clip, t5 = build_clip_tokenizer(), build_t5_tokenizer(T5_LENGTH)
    torch.manual_seed(seed + 1)
    modules = build_text_and_transformer(clip, t5)
    clip_ids, t5_ids = token_ids(clip, CLIP_LENGTH), token_ids(t5, T5_LENGTH)
    latents = FluxPipeline._pack_latents(latents, *latents.shape)
    side = math.isqrt(latents.shape[1])
    image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, torch.device("cpu"), torch.float32)

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(seed + 2, step)
        length, count = draw_length(T5_LENGTH, plan.batch, generator)
        chosen = torch.randint(len(latents), (count,), generator=generator)
        # A few empty captions, so that classifier-free guidance (`true_cfg_scale`) has something to subtract.
        texts, place = draw_texts(captions[chosen], 0.03, generator)
        pooled = modules["text_encoder"](clip_ids[texts]).pooler_output[place]
        embeds = modules["text_encoder_2"](t5_ids[texts, :length]).last_hidden_state[place]
        # Two times of three the guidance that FluxPipeline sends by default, else any: the model learns to ignore it.
        any_guidance = 1 + 6 * torch.rand(count, generator=generator)
        guidance = torch.where(torch.rand(count, generator=generator) < 0.67, 3.5, any_guidance)
        time, noisy, target = flow_step(latents[chosen], 0.4, generator)
        velocity = modules["transformer"](
            hidden_states=noisy,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=time,
            guidance=guidance,
            img_ids=image_ids,
            txt_ids=torch.zeros(length, 3),
            return_dict=False,
        )[0]
        return (velocity - target).square().mean()

    train_denoiser("flux", modules, loss_of_step, steps=plan.steps, rate=plan.rate, folder=work, seed=seed)
    return modules


def assemble(vae: AutoencoderKL, modules: nn.ModuleDict) -> FluxPipeline:
    return FluxPipeline(
        scheduler=flow_scheduler(),
        vae=vae,
        text_encoder=modules["text_encoder"],
        tokenizer=build_clip_tokenizer(),
        text_encoder_2=modules["text_encoder_2"],
        tokenizer_2=build_t5_tokenizer(T5_LENGTH),
        transformer=modules["transformer"],
    )


def main() -> None:
    given = arguments(__doc__, "tiny-flux")
    plan = Plan()
    vae = make_vae(plan, given.work, given.seed)
    latents, captions = make_latents(vae, given.work, given.seed, plan.images)
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    modules = make_transformer(plan, latents, captions, given.work, given.seed)
    finish(assemble(vae, modules), given.output)


if __name__ == "__main__":
    main()
