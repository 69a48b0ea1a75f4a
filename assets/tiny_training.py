"""Shared code of the make_tiny_*.py scripts: scenes, latents, text encoders, training.

Not a script.
"""

import argparse
import hashlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTokenizer, Qwen2TokenizerFast, T5Config, T5EncoderModel, T5TokenizerFast

from pcpo_fast.rewards.scenes import parse_caption, render, train_captions

CLIP_LENGTH = 16
IMAGES = 24576
# What is left of Qwen3's when a prompt is all of the conversation.
CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
# Only training captions are ever rendered for training.
SCENES = [scene for scene in map(parse_caption, train_captions()) if scene is not None]
# All captions, and last the empty one, which classifier-free guidance subtracts.
TEXTS = [*(scene.caption for scene in SCENES), ""]


def say(stage: str, text: str) -> None:
    print(f"{stage:<12}{text}", flush=True)


def arguments(description: str, name: str) -> argparse.Namespace:
    """The command line of the scripts."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("assets", name), help="folder of the finished pipeline")
    parser.add_argument("--work", type=Path, default=Path("runs/make-tiny"), help="folder of the stages' results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    parsed.work.mkdir(parents=True, exist_ok=True)
    return parsed


# Training.


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

    Every step draws from generators seeded by (seed, step), so an interruption does not change the result.
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
            save(state | {"step": step + 1}, state_file)
    return mean


def train_averaged(
    stage: str,
    modules: nn.ModuleDict,
    loss_of_step: Callable[[int], Tensor],
    *,
    steps: int,
    rate: float,
    average: float,
    folder: Path,
    seed: int,
) -> None:
    """Trains modules and leaves their averaged weights in them; does nothing but load them where that was done."""
    file = folder / f"{stage}.weights.pt"
    if file.exists():
        say(stage, "already made")
        modules.load_state_dict(torch.load(file, weights_only=True))
        return
    settings = {"weight_decay": 0.01, "warm_up": 100, "average": average}
    mean = train(stage, modules, loss_of_step, steps=steps, rate=rate, folder=folder, seed=seed, **settings)
    save(mean, file)
    modules.load_state_dict(mean)


def train_denoiser(
    stage: str,
    modules: nn.ModuleDict,
    loss_of_step: Callable[[int], Tensor],
    *,
    steps: int,
    rate: float,
    folder: Path,
    seed: int,
) -> None:
    """Trains the denoiser, and text encoders with it, and leaves their averaged weights in the modules."""
    train_averaged(stage, modules, loss_of_step, steps=steps, rate=rate, average=0.998, folder=folder, seed=seed)


def save(content: object, file: Path) -> None:
    """Write a file atomically, even if another process writes the same one."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    torch.save(content, partial)
    partial.replace(file)


def finish(pipeline: DiffusionPipeline, folder: Path) -> None:
    pipeline.save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    say("assemble", f"{folder}: {size / 1e6:.2f} MB; judge it with assets/measure_tiny.py --pipeline {folder}")


def step_generator(seed: int, step: int) -> torch.Generator:
    """What a step draws from."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def flow_step(clean: Tensor, near_noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Times [B], noised latents, and the velocity to predict, of one step of flow matching on latents [B, ...].

    The logits of the times are normal with the mean `near_noise`.
    """
    time = torch.sigmoid(1.2 * torch.randn(len(clean), generator=generator) + near_noise)
    noise = torch.randn(clean.shape, generator=generator)
    return time, torch.lerp(clean, noise, time.view(-1, *[1] * (clean.dim() - 1))), noise - clean


# Images.


def flow_scheduler(*, dynamic: bool = False) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of the flow models: shift 3, or with ``dynamic`` the pipeline's own for each image size."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=dynamic)


def load_vae(folder: Path = Path(__file__).parent / "tiny-flux" / "vae") -> AutoencoderKL:
    """A finished VAE; the other pipelines use that of `assets/tiny-flux`."""
    # from_pretrained would write the folder's path into the config.
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
    vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return vae.eval()


def scene_batch(count: int, generator: torch.Generator) -> Tensor:
    chosen = torch.randint(len(SCENES), (count,), generator=generator).tolist()
    return render([SCENES[i] for i in chosen], generator)


def make_latents(
    vae: AutoencoderKL | AutoencoderKLFlux2, work: Path, seed: int, images: int = IMAGES
) -> tuple[Tensor, Tensor]:
    """Latents [N, 8, 8, 8] of training scenes as the VAE encodes them, and the index [N] of each one's caption.

    Neither shifted nor scaled. Kept under the VAE's fingerprint, so the scripts share one file and never an old one.
    """
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in vae.state_dict().values()))
    file = work / f"latents-{digest.hexdigest()[:12]}-{images}-{seed}.pt"
    if not file.exists():
        started = time.time()
        generator = torch.Generator().manual_seed(seed + 11)
        chosen = torch.arange(images) % len(SCENES)
        parts = []
        with torch.no_grad():
            for some in chosen.split(512):
                pixels = render([SCENES[i] for i in some.tolist()], generator)
                parts.append(vae.encode(pixels * 2 - 1).latent_dist.mean)
        save({"latents": torch.cat(parts), "captions": chosen}, file)
        say("latents", f"{images} scenes encoded in {time.time() - started:.0f} s")
    cached = torch.load(file, weights_only=True)
    return cached["latents"], cached["captions"]


# Text.


def caption_words() -> list[str]:
    return sorted({word for caption in train_captions() for word in caption.split()})


def build_clip_tokenizer() -> CLIPTokenizer:
    """Every word of the captions is one token; other words are spelled letter by letter."""
    words = caption_words()
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
    check_words(clip, words)
    return clip


def build_t5_tokenizer(longest: int) -> T5TokenizerFast:
    """Every word of the captions is one token; other words are unknown."""
    words = caption_words()
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    t5 = T5TokenizerFast(
        vocab=special + [("\u2581" + word, -1.0) for word in words], extra_ids=0, model_max_length=longest
    )
    check_words(t5, words)
    return t5


def build_qwen_tokenizer(longest: int) -> Qwen2TokenizerFast:
    """Every word of the captions is one token, at the beginning and after a space; other words are spelled."""
    words = caption_words()
    alphabet, space = sorted(ByteLevel.alphabet()), "\u0120"
    # Longer words first, as for CLIP.
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    merges = dict.fromkeys((word[:end], word[end]) for word in longest_first for end in range(1, len(word)))
    merges |= dict.fromkeys((space, word) for word in longest_first)
    pieces = dict.fromkeys(["<|endoftext|>", *alphabet, *map("".join, merges)])
    qwen = Qwen2TokenizerFast(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=list(merges),
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=longest,
    )
    qwen.chat_template = CHAT_TEMPLATE
    check_words(qwen, [*words, *(f" {word}" for word in words)])
    return qwen


def check_words(tokenizer: CLIPTokenizer | T5TokenizerFast | Qwen2TokenizerFast, words: list[str]) -> None:
    for word in words:
        if len(tokenizer.tokenize(word)) != 1:
            raise RuntimeError(f"the tokenizer splits the word {word!r}")


def clip_config(clip: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,  # not 2, which selects an older way of pooling
        pad_token_id=clip.pad_token_id,
    )


def build_t5(t5: T5TokenizerFast, width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5),
            d_model=width,
            d_kv=32,
            d_ff=2 * width,
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


def token_ids(tokenizer: CLIPTokenizer | T5TokenizerFast, length: int) -> Tensor:
    """Tokens [captions + 1, length] of TEXTS, padded as the pipelines do it."""
    return tokenizer(TEXTS, padding="max_length", max_length=length, return_tensors="pt").input_ids


def chat_tokens(tokenizer: Qwen2TokenizerFast, length: int, **options: bool) -> dict[str, Tensor]:
    """Tokens and mask [captions + 1, length] of TEXTS in the chat template, padded as the pipelines do it."""
    settings = {"tokenize": False, "add_generation_prompt": True} | options
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": text}], **settings) for text in TEXTS]
    return dict(tokenizer(chats, padding="max_length", max_length=length, return_tensors="pt"))


def draw_length(longest: int, batch: int, generator: torch.Generator, caption: int = 8) -> tuple[int, int]:
    """(text tokens, batch size) of one step.

    The FLUX and SD3 pipelines pad the text to `max_sequence_length` and the transformer attends to the padding, so
    the model must see all the lengths that a user may ask for; a caption itself has `caption` tokens. Long texts come
    in smaller batches.
    """
    kind, where = torch.rand(2, generator=generator).tolist()
    if kind < 0.60:
        length = caption
    elif kind < 0.82:
        length = caption + 1 + int(where * 8)
    elif kind < 0.94:
        length = int((caption + 9) * (longest / (caption + 9)) ** where)
    else:
        length = longest
    return length, min(batch, max(16, batch * 64 // (length + 16)))


def draw_texts(captions: Tensor, empty: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices into TEXTS of a batch, each caption once, and the place [B] of each row's; some are dropped."""
    dropped = torch.rand(len(captions), generator=generator) < empty
    return captions.masked_fill(dropped, len(SCENES)).unique(return_inverse=True)
