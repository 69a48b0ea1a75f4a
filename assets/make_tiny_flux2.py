"""Makes `assets/tiny-flux2`, a complete Flux2KleinPipeline of 6 MB, with the convolutions of `assets/tiny-flux`'s VAE.

    python assets/make_tiny_flux2.py --output assets/tiny-flux2 --work runs/make-tiny

Four stages: the latents of rendered scenes, the text encoder, which learns to write captions, and the transformer in
two parts, which reads its states and leaves it as it is. Each leaves its result in the work folder and is skipped when
that result is there; training also saves its state every minute, so an interrupted run goes on where it stopped. The
same seed and thread count give the same weights on the same machine.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tiny_training import (
    SCENES,
    TEXTS,
    arguments,
    build_qwen_tokenizer,
    chat_tokens,
    draw_length,
    draw_texts,
    finish,
    flow_scheduler,
    flow_step,
    load_vae,
    make_latents,
    step_generator,
    train_averaged,
    train_denoiser,
)
from torch import Tensor, nn
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

TEXT_LENGTH = 512
CAPTION_LENGTH = 9  # seven words within the chat template
READ_LAYERS = (9, 18, 27)


@dataclass(frozen=True)
class Plan:
    """How long the training takes, and on what."""

    text_steps: int = 250
    text_batch: int = 32
    text_rate: float = 2e-3
    steps: int = 1300
    short_steps: int = 600  # of the shapes' steps, those before the texts' lengths vary
    shape_steps: int = 850
    batch: int = 64
    rate: float = 1.5e-3
    empty: float = 0.1


def build_vae() -> AutoencoderKLFlux2:
    """The VAE of `tiny-flux`, and a batch norm that knows nothing yet."""
    trained = load_vae()
    names = ("down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "latent_channels")
    names += ("norm_num_groups", "sample_size", "mid_block_add_attention", "use_quant_conv", "use_post_quant_conv")
    vae = AutoencoderKLFlux2(**{name: trained.config[name] for name in names})
    vae.load_state_dict(vae.state_dict() | trained.state_dict())
    return vae.eval()


def set_scale(vae: AutoencoderKLFlux2, latents: Tensor) -> None:
    """The batch norm, over patches of 2 x 2 latents, is what the pipeline undoes before it decodes."""
    patches = Flux2KleinPipeline._patchify_latents(latents)
    vae.bn.running_mean.copy_(patches.mean((0, 2, 3)))
    vae.bn.running_var.copy_(patches.var((0, 2, 3)))


def pack(vae: AutoencoderKLFlux2, latents: Tensor) -> Tensor:
    """Tokens [N, 16, 32] behind the batch norm, of latents [N, 8, 8, 8]."""
    return Flux2KleinPipeline._pack_latents(vae.bn(Flux2KleinPipeline._patchify_latents(latents)))


def build_tokenizer() -> Qwen2TokenizerFast:
    return build_qwen_tokenizer(TEXT_LENGTH)


def build_text_encoder(tokenizer: Qwen2TokenizerFast) -> Qwen3ForCausalLM:
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=READ_LAYERS[-1],
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=TEXT_LENGTH,
            initializer_range=0.18,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with torch.no_grad():  # so many layers learn only if each begins by adding little
        for layer in text_encoder.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.2)
            layer.mlp.down_proj.weight.mul_(0.2)
    return text_encoder


def build_transformer() -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=len(READ_LAYERS) * 32,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )


def encode(text_encoder: Qwen3ForCausalLM, tokens: dict[str, Tensor]) -> Tensor:
    """States [B, tokens, 96] of three layers side by side, as Flux2KleinPipeline makes them."""
    states = text_encoder.model(**tokens, output_hidden_states=True, use_cache=False).hidden_states
    return torch.cat([states[layer] for layer in READ_LAYERS], -1)


def make_text_encoder(plan: Plan, work: Path, seed: int) -> Qwen3ForCausalLM:
    """Trains the text encoder as the language model that it is: each word of a caption from those before it."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed + 3)
    modules = nn.ModuleDict({"text_encoder": build_text_encoder(tokenizer)})
    ids = chat_tokens(tokenizer, TEXT_LENGTH)["input_ids"][: len(SCENES), :CAPTION_LENGTH]

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(seed + 4, step)
        some = ids[torch.randint(len(ids), (plan.text_batch,), generator=generator)]
        logits = modules["text_encoder"](some[:, :-1]).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten())

    train_averaged(
        "qwen", modules, loss_of_step, steps=plan.text_steps, rate=plan.text_rate, average=0.97, folder=work, seed=seed
    )
    return modules["text_encoder"].eval()


def whitening(states: Tensor) -> Tensor:
    """[96, 96]: what makes all directions of states [..., 96] equally strong."""
    rows = states.flatten(0, -2)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    return (vectors * (values.clamp_min(0) + 1e-3).rsqrt()) @ vectors.T


def make_transformer(
    plan: Plan, text_encoder: Qwen3ForCausalLM, latents: Tensor, captions: Tensor, work: Path, seed: int
) -> Flux2Transformer2DModel:
    """Trains the transformer by flow matching on the text encoder's states, in two parts.

    A color, on which later words depend, changes the states four times as much as a shape, and the transformer does not
    normalise them: in the first part it learns images and colors. The second begins with states whose directions are
    equally strong, and learns shapes.
    """
    tokens = chat_tokens(build_tokenizer(), TEXT_LENGTH)
    with torch.no_grad():
        parts = torch.arange(len(TEXTS)).split(16)
        states = torch.cat([encode(text_encoder, {name: value[i] for name, value in tokens.items()}) for i in parts])
    torch.manual_seed(seed + 1)
    modules = nn.ModuleDict({"transformer": build_transformer()})
    image_ids = Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 32, 4, 4))

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(seed + 2, step)
        length, count = CAPTION_LENGTH, plan.batch
        if not plan.steps <= step < plan.steps + plan.short_steps:
            length, count = draw_length(TEXT_LENGTH, plan.batch, generator, CAPTION_LENGTH)
        chosen = torch.randint(len(latents), (count,), generator=generator)
        texts, place = draw_texts(captions[chosen], plan.empty, generator)
        embeds = states[texts, :length][place]
        # The pipeline's shift is 5 to 7 for images this small: most steps are near the noise.
        time, noisy, target = flow_step(latents[chosen], 0.6, generator)
        velocity = modules["transformer"](
            hidden_states=noisy,
            encoder_hidden_states=embeds,
            timestep=time,
            img_ids=image_ids,
            txt_ids=Flux2KleinPipeline._prepare_text_ids(embeds[:1]),
            guidance=None,
            return_dict=False,
        )[0]
        return (velocity - target).square().mean()

    train_denoiser("flux2", modules, loss_of_step, steps=plan.steps, rate=plan.rate, folder=work, seed=seed)
    modules["transformer"].context_embedder.weight.data.copy_(whitening(states[:, :16]))

    def loss_of_shape_step(step: int) -> Tensor:
        return loss_of_step(plan.steps + step)

    train_denoiser(
        "shapes", modules, loss_of_shape_step, steps=plan.shape_steps, rate=plan.rate, folder=work, seed=seed
    )
    return modules["transformer"]


def assemble(
    vae: AutoencoderKLFlux2, text_encoder: Qwen3ForCausalLM, transformer: Flux2Transformer2DModel
) -> Flux2KleinPipeline:
    return Flux2KleinPipeline(
        scheduler=flow_scheduler(dynamic=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(),
        transformer=transformer,
        is_distilled=False,
    )


def main() -> None:
    given = arguments(__doc__, "tiny-flux2")
    plan, vae = Plan(), build_vae()
    latents, captions = make_latents(vae, given.work, given.seed)
    set_scale(vae, latents)
    text_encoder = make_text_encoder(plan, given.work, given.seed)
    transformer = make_transformer(plan, text_encoder, pack(vae, latents), captions, given.work, given.seed)
    finish(assemble(vae, text_encoder, transformer), given.output)


if __name__ == "__main__":
    main()
