"""Makes `assets/tiny-z-image`, a complete ZImagePipeline of 6 MB, with the VAE of `assets/tiny-flux`.

    python assets/make_tiny_z_image.py --output assets/tiny-z-image --work runs/make-tiny

Two stages: the latents of rendered scenes, and the transformer with its text encoder. Each leaves its result in the
work folder and is skipped when that result is there; training also saves its state every minute, so an interrupted run
goes on where it stopped. The same seed and thread count give the same weights on the same machine.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from tiny_training import (
    arguments,
    build_qwen_tokenizer,
    chat_tokens,
    draw_texts,
    finish,
    flow_scheduler,
    flow_step,
    load_vae,
    make_latents,
    step_generator,
    train_denoiser,
)
from torch import Tensor, nn
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3Model

from pcpo_fast.policies.z_image import forward_batch

TEXT_LENGTH = 512
CAPTION_LENGTH = 9  # seven words within the chat template
WIDTH = 64


@dataclass(frozen=True)
class Plan:
    """How long the training takes, and on what."""

    steps: int = 1600
    batch: int = 64
    rate: float = 1.5e-3
    empty: float = 0.1


def build_tokenizer() -> Qwen2TokenizerFast:
    return build_qwen_tokenizer(TEXT_LENGTH)


def build_text_and_transformer(tokenizer: Qwen2TokenizerFast) -> nn.ModuleDict:
    """Qwen3 with two layers, of which the pipeline reads the first; the second is never trained."""
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=TEXT_LENGTH,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    transformer = ZImageTransformer2DModel(
        in_channels=8,
        dim=96,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 32, 32],
    )
    return nn.ModuleDict({"text_encoder": text_encoder, "transformer": transformer})


def encode(text_encoder: Qwen3Model, tokens: dict[str, Tensor]) -> Tensor:
    """States [B, 9, width] of the last layer but one, which ZImagePipeline cuts to their lengths."""
    return text_encoder(**tokens, output_hidden_states=True, use_cache=False).hidden_states[-2]


def make_transformer(plan: Plan, latents: Tensor, captions: Tensor, work: Path, seed: int) -> nn.ModuleDict:
    """Trains transformer and text encoder together by flow matching.

    Captions of up to 32 tokens are all the same to the transformer, which fills them up to 32 itself.
    """
    tokenizer = build_tokenizer()
    tokens = chat_tokens(tokenizer, CAPTION_LENGTH, enable_thinking=True)
    torch.manual_seed(seed + 1)
    modules = build_text_and_transformer(tokenizer)

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(seed + 2, step)
        chosen = torch.randint(len(latents), (plan.batch,), generator=generator)
        texts, place = draw_texts(captions[chosen], plan.empty, generator)
        some = {name: value[texts] for name, value in tokens.items()}
        time, noisy, target = flow_step(latents[chosen], 0.4, generator)
        # Z-Image's time and velocity run from noise to image.
        velocity = forward_batch(
            modules["transformer"],
            hidden_states=noisy,
            timestep=1 - time,
            encoder_hidden_states=encode(modules["text_encoder"], some)[place],
            encoder_hidden_states_mask=some["attention_mask"][place],
        )[0]
        return (velocity + target).square().mean()

    train_denoiser("z-image", modules, loss_of_step, steps=plan.steps, rate=plan.rate, folder=work, seed=seed)
    return modules


def assemble(vae: AutoencoderKL, modules: nn.ModuleDict) -> ZImagePipeline:
    return ZImagePipeline(
        scheduler=flow_scheduler(),
        vae=vae,
        text_encoder=modules["text_encoder"],
        tokenizer=build_tokenizer(),
        transformer=modules["transformer"],
    )


def main() -> None:
    given = arguments(__doc__, "tiny-z-image")
    plan, vae = Plan(), load_vae()
    latents, captions = make_latents(vae, given.work, given.seed)
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    finish(assemble(vae, make_transformer(plan, latents, captions, given.work, given.seed)), given.output)


if __name__ == "__main__":
    main()
