"""Makes `assets/tiny-sd`, a complete StableDiffusionPipeline of 5 MB, with the VAE of `assets/tiny-flux`.

    python assets/make_tiny_sd.py --output assets/tiny-sd --work runs/make-tiny

Two stages: the latents of rendered scenes, and the UNet with its text encoder. Each leaves its result in the work
folder and is skipped when that result is there; training also saves its state every minute, so an interrupted run goes
on where it stopped. The same seed and thread count give the same weights on the same machine.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tiny_training import (
    CLIP_LENGTH,
    arguments,
    build_clip_tokenizer,
    clip_config,
    draw_texts,
    finish,
    load_vae,
    make_latents,
    step_generator,
    token_ids,
    train_denoiser,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class Plan:
    """How long the training takes, and on what."""

    steps: int = 1600
    batch: int = 64
    rate: float = 1.5e-3
    empty: float = 0.1


def set_scale(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents of unit root mean square, as they are for diffusion; the VAE remembers the factor.

    StableDiffusionPipeline knows no shift: it decodes `latents / scaling_factor`. Without one it is the root mean
    square, not the standard deviation, that is compared with the unit noise.
    """
    vae.register_to_config(shift_factor=None, scaling_factor=round(1 / latents.square().mean().sqrt().item(), 5))
    return latents * vae.config.scaling_factor


def build_scheduler() -> DDIMScheduler:
    """The noise of Stable Diffusion 1.x."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def build_text_and_unet(clip: CLIPTokenizer) -> nn.ModuleDict:
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 48),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=64,
        attention_head_dim=3,  # the number of heads, in spite of its name: 3 heads of 16
    )
    return nn.ModuleDict({"text_encoder": CLIPTextModel(clip_config(clip, 64, 1)), "unet": unet})


def make_unet(plan: Plan, latents: Tensor, captions: Tensor, work: Path, seed: int) -> nn.ModuleDict:
    """Trains UNet and text encoder together to predict the noise, at times drawn evenly."""
    clip = build_clip_tokenizer()
    torch.manual_seed(seed + 1)
    modules = build_text_and_unet(clip)
    ids = token_ids(clip, CLIP_LENGTH)
    scheduler = build_scheduler()

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(seed + 2, step)
        chosen = torch.randint(len(latents), (plan.batch,), generator=generator)
        texts, place = draw_texts(captions[chosen], plan.empty, generator)
        embeds = modules["text_encoder"](ids[texts]).last_hidden_state[place]
        time = torch.randint(1000, (plan.batch,), generator=generator)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        found = modules["unet"](scheduler.add_noise(clean, noise, time), time, embeds, return_dict=False)[0]
        return (found - noise).square().mean()

    train_denoiser("sd", modules, loss_of_step, steps=plan.steps, rate=plan.rate, folder=work, seed=seed)
    return modules


def assemble(vae: AutoencoderKL, modules: nn.ModuleDict) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=modules["text_encoder"],
        tokenizer=build_clip_tokenizer(),
        unet=modules["unet"],
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    given = arguments(__doc__, "tiny-sd")
    vae = load_vae()
    latents, captions = make_latents(vae, given.work, given.seed)
    modules = make_unet(Plan(), set_scale(vae, latents), captions, given.work, given.seed)
    finish(assemble(vae, modules), given.output)


if __name__ == "__main__":
    main()
