"""Makes `assets/tiny-flux`, a complete FluxPipeline of 5 MB, from nothing.

    python assets/make_tiny_flux.py --output assets/tiny-flux --work runs/make-tiny-flux

Three stages: the VAE, the latents of rendered scenes, and the transformer with both text encoders. Each leaves its
result in the work folder and is skipped when that result is there; training also saves its state every minute, so an
interrupted run goes on where it stopped. The same seed and thread count give the same weights on the same machine.
Only the training captions of `pcpo_fast.scenes` are ever rendered here.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from pcpo_fast.scenes import IMAGE_SIZE, parse_caption, render, train_captions

CLIP_LENGTH, T5_LENGTH = 16, 512
SCENES = [scene for scene in map(parse_caption, train_captions()) if scene is not None]


@dataclass(frozen=True)
class Plan:
    """How long each stage trains, and on what."""

    vae_steps: int = 1600
    vae_batch: int = 32
    vae_rate: float = 2e-3
    kl_weight: float = 1e-3
    images: int = 24576
    steps: int = 2400
    batch: int = 128
    rate: float = 1e-3


def say(stage: str, text: str) -> None:
    print(f"{stage:<12}{text}", flush=True)


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


def train(
    stage: str,
    modules: nn.ModuleDict,
    loss_of_step: Callable[[int], Tensor],
    *,
    steps: int,
    rate: float,
    weight_decay: float,
    warm_up: int,
    average: float,
    folder: Path,
    seed: int,
    save_seconds: float = 60.0,
) -> dict[str, Tensor]:
    """AdamW with linear warm-up and cosine decay; returns the exponential moving average of the weights.

    Every step draws from generators seeded by (seed, step), so stopping and going on changes nothing.
    """
    optimizer = torch.optim.AdamW(modules.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    mean = {name: value.detach().clone() for name, value in modules.state_dict().items()}
    state_file, first = folder / f"{stage}.state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        mean, first = state["mean"], state["step"]
        say(stage, f"going on from step {first}")
    started = saved = reported = time.time()
    running = torch.zeros(())
    for step in range(first, steps):
        warm, done = min(1.0, (step + 1) / warm_up), step / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        torch.manual_seed(seed * 1_000_003 + step)
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        decay = min(average, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in modules.state_dict().items():
                if value.is_floating_point():
                    mean[name].lerp_(value, 1 - decay)
        running = loss.detach() if step == first else running.lerp(loss.detach(), 0.02)
        now = time.time()
        if now - reported > 10 or step + 1 == steps:
            reported = now
            left = (now - started) / (step + 1 - first) * (steps - step - 1)
            say(stage, f"step {step + 1}/{steps}  loss {running.item():.4f}  {now - started:.0f} s, {left:.0f} s left")
        if now - saved > save_seconds:
            saved = now
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "mean": mean}
            torch.save(state | {"step": step + 1}, folder / "partial.pt")
            (folder / "partial.pt").replace(state_file)
    return mean


def scene_batch(count: int, generator: torch.Generator) -> Tensor:
    chosen = torch.randint(len(SCENES), (count,), generator=generator).tolist()
    return render([SCENES[i] for i in chosen], generator)


def make_vae(plan: Plan, work: Path, seed: int) -> AutoencoderKL:
    """Trains the VAE on reconstruction (L1 + MSE) with a weak KL term; sets the latents' shift and scale from data."""
    folder = work / "vae"
    if folder.exists():
        say("vae", "already made")
        vae = build_vae()
        config = AutoencoderKL.load_config(folder)
        vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
        vae.register_to_config(shift_factor=config["shift_factor"], scaling_factor=config["scaling_factor"])
        return vae.eval()
    torch.manual_seed(seed)
    vae = build_vae()

    def loss_of_step(step: int) -> Tensor:
        generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + step)
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


def build_tokenizers() -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Every word of the captions is one token; CLIP spells other words letter by letter, T5 calls them unknown."""
    words = sorted({word for caption in train_captions() for word in caption.split()})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    # Each word is merged from the left. Longer words first: otherwise the merges of "red" would break up "green".
    for word in sorted(words, key=lambda word: (-len(word), word)):
        left = word[0]
        for i, letter in enumerate(word[1:], start=1):
            pair = (left, letter + ("</w>" if i + 1 == len(word) else ""))
            left = "".join(pair)
            if pair not in merges:
                merges.append(pair)
            if left not in pieces:
                pieces.append(left)
    clip = CLIPTokenizer({piece: i for i, piece in enumerate(pieces)}, merges, model_max_length=CLIP_LENGTH)
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    t5 = T5TokenizerFast(
        vocab=special + [("\u2581" + word, -1.0) for word in words], extra_ids=0, model_max_length=T5_LENGTH
    )
    for word in words:
        if len(clip.tokenize(word)) != 1 or len(t5.tokenize(word)) != 1:
            raise RuntimeError(f"the tokenizers split the word {word!r}")
    return clip, t5


def build_text_and_transformer(clip: CLIPTokenizer, t5: T5TokenizerFast) -> nn.ModuleDict:
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,  # not 2, which selects an older way of pooling
            pad_token_id=clip.pad_token_id,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5),
            d_model=64,
            d_kv=32,
            d_ff=128,
            num_layers=1,
            num_heads=2,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=t5.pad_token_id,
            eos_token_id=t5.eos_token_id,
        )
    )
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


def make_latents(plan: Plan, vae: AutoencoderKL, work: Path, seed: int) -> tuple[Tensor, Tensor]:
    """Packed, normalised latents [N, 16, 32] of training scenes, and the index [N] of each one's caption."""
    file = work / "latents.pt"
    if not file.exists():
        started = time.time()
        generator = torch.Generator().manual_seed(seed + 11)
        chosen = torch.arange(plan.images) % len(SCENES)
        parts = []
        with torch.no_grad():
            for some in chosen.split(512):
                images = render([SCENES[i] for i in some.tolist()], generator)
                latents = vae.encode(images * 2 - 1).latent_dist.mean
                latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
                parts.append(FluxPipeline._pack_latents(latents, *latents.shape))
        torch.save({"latents": torch.cat(parts), "captions": chosen}, work / "latents.partial.pt")
        (work / "latents.partial.pt").replace(file)
        say("latents", f"{plan.images} scenes encoded in {time.time() - started:.0f} s")
    cached = torch.load(file, weights_only=True)
    return cached["latents"], cached["captions"]


def draw_length(plan: Plan, generator: torch.Generator) -> tuple[int, int]:
    """(text tokens, batch size) of one step.

    FluxPipeline pads the T5 text to `max_sequence_length` and the transformer attends to the padding, so the model must
    see all the lengths that a user may ask for; a caption itself has 8 tokens. Long texts come in smaller batches.
    """
    kind, where = torch.rand(2, generator=generator).tolist()
    if kind < 0.60:
        length = 8
    elif kind < 0.82:
        length = 9 + int(where * 8)
    elif kind < 0.94:
        length = int(17 * (T5_LENGTH / 17) ** where)
    else:
        length = T5_LENGTH
    return length, min(plan.batch, max(16, plan.batch * 64 // (length + 16)))


def make_transformer(plan: Plan, latents: Tensor, captions: Tensor, work: Path, seed: int) -> nn.ModuleDict:
    """Trains transformer and text encoders together by flow matching."""
    clip, t5 = build_tokenizers()
    torch.manual_seed(seed + 1)
    modules = build_text_and_transformer(clip, t5)
    folder = work / "transformer.pt"
    if folder.exists():
        say("transformer", "already made")
        modules.load_state_dict(torch.load(folder, weights_only=True))
        return modules
    texts = [*(scene.caption for scene in SCENES), ""]
    clip_ids = clip(texts, padding="max_length", max_length=CLIP_LENGTH, return_tensors="pt").input_ids
    t5_ids = t5(texts, padding="max_length", max_length=T5_LENGTH, return_tensors="pt").input_ids
    side = math.isqrt(latents.shape[1])
    image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, torch.device("cpu"), torch.float32)

    def loss_of_step(step: int) -> Tensor:
        generator = torch.Generator().manual_seed((seed + 2) * 1_000_003 + step)
        length, count = draw_length(plan, generator)
        chosen = torch.randint(len(latents), (count,), generator=generator)
        # A few empty captions, so that classifier-free guidance (`true_cfg_scale`) has something to subtract.
        empty = torch.rand(count, generator=generator) < 0.03
        text = captions[chosen].masked_fill(empty, len(SCENES))
        unique, place = text.unique(return_inverse=True)
        pooled = modules["text_encoder"](clip_ids[unique]).pooler_output[place]
        embeds = modules["text_encoder_2"](t5_ids[unique, :length]).last_hidden_state[place]
        # Two times of three the guidance that FluxPipeline sends by default, else any: the model learns to ignore it.
        any_guidance = 1 + 6 * torch.rand(count, generator=generator)
        guidance = torch.where(torch.rand(count, generator=generator) < 0.67, 3.5, any_guidance)
        time = torch.sigmoid(1.2 * torch.randn(count, generator=generator) + 0.4)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        velocity = modules["transformer"](
            hidden_states=torch.lerp(clean, noise, time[:, None, None]),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=time,
            guidance=guidance,
            img_ids=image_ids,
            txt_ids=torch.zeros(length, 3),
            return_dict=False,
        )[0]
        return (velocity - (noise - clean)).square().mean()

    mean = train(
        "transformer",
        modules,
        loss_of_step,
        steps=plan.steps,
        rate=plan.rate,
        weight_decay=0.01,
        warm_up=100,
        average=0.998,
        folder=work,
        seed=seed,
    )
    torch.save(mean, work / "transformer.partial.pt")
    (work / "transformer.partial.pt").replace(folder)
    modules.load_state_dict(mean)
    return modules


def assemble(vae: AutoencoderKL, modules: nn.ModuleDict) -> FluxPipeline:
    clip, t5 = build_tokenizers()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=modules["text_encoder"],
        tokenizer=clip,
        text_encoder_2=modules["text_encoder_2"],
        tokenizer_2=t5,
        transformer=modules["transformer"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("assets/tiny-flux"), help="folder of the finished pipeline")
    parser.add_argument("--work", type=Path, default=Path("runs/make-tiny-flux"), help="folder of the stages' results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    plan = Plan()
    vae = make_vae(plan, arguments.work, arguments.seed)
    latents, captions = make_latents(plan, vae, arguments.work, arguments.seed)
    modules = make_transformer(plan, latents, captions, arguments.work, arguments.seed)
    assemble(vae, modules).save_pretrained(arguments.output)
    size = sum(file.stat().st_size for file in arguments.output.rglob("*") if file.is_file())
    say("assemble", f"{arguments.output}: {size / 1e6:.2f} MB; judge it with assets/measure_tiny_flux.py")


if __name__ == "__main__":
    main()
