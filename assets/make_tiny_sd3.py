"""Makes `assets/tiny-sd3`, a complete StableDiffusion3Pipeline of 6 MB, with the VAE of `assets/tiny-flux`.

    python assets/make_tiny_sd3.py --output assets/tiny-sd3 --work runs/make-tiny

Two stages: the latents of rendered scenes, and the transformer with its three text encoders. Each leaves its result in
the work folder and is skipped when that result is there; training also saves its state every minute, so an interrupted
run goes on where it stopped. The same seed and thread count give the same weights on the same machine.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny_training import (
    CLIP_LENGTH,
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
    step_generator,
    token_ids,
    train_denoiser,
)
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5TokenizerFast

T5_LENGTH = 256
# Wider than both CLIP models together, as in the large models: the pipeline fills their states up with zeros.
CLIP_WIDTHS, T5_WIDTH = (32, 48), 96


@dataclass(frozen=True)
class Plan:
    """How long the training takes, and on what."""

    steps: int = 1500
    batch: int = 96
    rate: float = 1.2e-3
    empty: float = 0.1


def build_text_and_transformer(clip: CLIPTokenizer, t5: T5TokenizerFast) -> nn.ModuleDict:
    # Two layers: the pipeline takes the states before the last one, so with one layer it would be words alone.
    small, large = (CLIPTextModelWithProjection(clip_config(clip, width, 2)) for width in CLIP_WIDTHS)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=96,
        pooled_projection_dim=sum(CLIP_WIDTHS),
        pos_embed_max_size=8,
        dual_attention_layers=(0,),  # as in SD3.5-medium, which has them in its first half
        qk_norm="rms_norm",
    )
    encoders = {"text_encoder": small, "text_encoder_2": large, "text_encoder_3": build_t5(t5, T5_WIDTH)}
    return nn.ModuleDict(encoders | {"transformer": transformer})


def encode(modules: nn.ModuleDict, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Text states [B, 16 + T5 tokens, 96] and pooled text [B, 80], as StableDiffusion3Pipeline makes them."""
    both = [modules[name](clip_ids, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    states = torch.cat([one.hidden_states[-2] for one in both], -1)
    states = nn.functional.pad(states, (0, T5_WIDTH - states.shape[-1]))
    long = modules["text_encoder_3"](t5_ids).last_hidden_state
    return torch.cat([states, long], 1), torch.cat([one.text_embeds for one in both], -1)


def make_transformer(plan: Plan, latents: Tensor, captions: Tensor, work: Path, seed: int) -> nn.ModuleDict:
    """Trains transformer and text encoders together by flow matching."""
    clip, t5 = build_clip_tokenizer(), build_t5_tokenizer(T5_LENGTH)
    torch.manual_seed(seed + 1)
    modules = build_text_and_transformer(clip, t5)
    clip_ids, t5_ids = token_ids(clip, CLIP_LENGTH), token_ids(t5, T5_LENGTH)

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(seed + 2, step)
        length, count = draw_length(T5_LENGTH, plan.batch, generator)
        chosen = torch.randint(len(latents), (count,), generator=generator)
        texts, place = draw_texts(captions[chosen], plan.empty, generator)
        embeds, pooled = encode(modules, clip_ids[texts], t5_ids[texts, :length])
        time, noisy, target = flow_step(latents[chosen], 0.4, generator)
        velocity = modules["transformer"](
            hidden_states=noisy,
            encoder_hidden_states=embeds[place],
            pooled_projections=pooled[place],
            timestep=1000 * time,
            return_dict=False,
        )[0]
        return (velocity - target).square().mean()

    train_denoiser("sd3", modules, loss_of_step, steps=plan.steps, rate=plan.rate, folder=work, seed=seed)
    return modules


def assemble(vae: AutoencoderKL, modules: nn.ModuleDict) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=modules["transformer"],
        scheduler=flow_scheduler(),
        vae=vae,
        text_encoder=modules["text_encoder"],
        tokenizer=build_clip_tokenizer(),
        text_encoder_2=modules["text_encoder_2"],
        tokenizer_2=build_clip_tokenizer(),
        text_encoder_3=modules["text_encoder_3"],
        tokenizer_3=build_t5_tokenizer(T5_LENGTH),
    )


def main() -> None:
    given = arguments(__doc__, "tiny-sd3")
    vae = load_vae()
    latents, captions = make_latents(vae, given.work, given.seed)
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    modules = make_transformer(Plan(), latents, captions, given.work, given.seed)
    finish(assemble(vae, modules), given.output)


if __name__ == "__main__":
    main()
