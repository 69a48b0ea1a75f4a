"""FLUX as a policy: packed latents, embedded guidance, CLIP and T5 conditioning."""

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import _collate_lora_metadata
from peft import get_peft_model_state_dict
from torch import Tensor

from pcpo_fast.config import ModelConfig
from pcpo_fast.distributed import rank
from pcpo_fast.errors import UserError
from pcpo_fast.policies.attention import choose_attention
from pcpo_fast.policies.base import Conditioning, Policy
from pcpo_fast.policies.embedding_cache import EmbeddingCache, folder_fingerprint
from pcpo_fast.policies.locating import pipeline_folder
from pcpo_fast.policies.lora import add_lora, load_lora
from pcpo_fast.policies.quiet import quiet_libraries
from pcpo_fast.policies.truncation import warn_of_long_prompts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DECODED_PIXELS = 1 << 21
"""Pixels that the VAE decodes at once: two images of 1024 x 1024."""
ENCODERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


class FluxPolicy(Policy):
    """FLUX.1-dev, FLUX.1-schnell, or any other :class:`diffusers.FluxPipeline`.

    Latents are packed: [B, tokens, channels] with one token per 2 x 2 latent pixels, as the transformer takes them.
    """

    family: ClassVar[str] = "flux"

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        vae: AutoencoderKL,
        scheduler: FlowMatchEulerDiscreteScheduler,
        *,
        height: int,
        width: int,
        guidance: float = 3.5,
        folder: Path | None = None,
        cache: EmbeddingCache | None = None,
        max_sequence_length: int = 512,
    ) -> None:
        """Put a policy together from loaded parts.

        Raises:
            UserError: the VAE and the 2 x 2 packing cannot take the image size.
        """
        super().__init__(transformer)
        self.transformer = transformer
        self.vae = vae
        self.scheduler = scheduler
        self.guidance = guidance
        self.folder = folder
        self.cache = cache
        self.max_sequence_length = max_sequence_length
        self.encoding_device: torch.device | None = None
        self.warned_of_long_prompts = False
        self.vae_scale = vae_factor(vae.config)
        self.rows, self.columns = token_grid(vae.config, height, width)

    @classmethod
    def load(
        cls, settings: ModelConfig, cache_folder: Path, device: torch.device, prompts: Sequence[str] = ()
    ) -> "FluxPolicy":
        """Load transformer and VAE of a pipeline folder or hub id.

        Args:
            settings: the configuration's ``model`` section.
            cache_folder: where encoded prompts are kept.
            device: where transformer and VAE go.
            prompts: encoded first, so that text encoders and transformer are never on the device together.

        Raises:
            UserError: as in :func:`pcpo_fast.policies.locating.pipeline_folder`; LoRA, attention or image size refused.
        """
        folder = pipeline_folder(settings.path, settings.revision, "FluxPipeline")
        _check_size(folder, settings)
        dtype = DTYPES[settings.dtype]
        pipeline = _load_pipeline(folder, dtype=dtype, **dict.fromkeys(ENCODERS))
        fingerprint = folder_fingerprint(
            [folder / name for name in ENCODERS], settings.max_sequence_length, settings.dtype, FluxPipeline.__name__
        )
        policy = cls(
            pipeline.transformer,
            pipeline.vae,
            pipeline.scheduler,
            height=settings.height,
            width=settings.width,
            guidance=settings.guidance,
            folder=folder,
            cache=EmbeddingCache(cache_folder, fingerprint),
            max_sequence_length=settings.max_sequence_length,
        )
        choose_attention(policy.transformer, settings.attention, device)
        if settings.finetune == "lora":
            add_lora(policy.transformer, settings.lora)
            if settings.lora.init is not None:
                load_lora(policy.transformer, settings.lora.init, FluxPipeline)
        else:
            policy.transformer.requires_grad_(True)
        if settings.gradient_checkpointing:
            policy.transformer.enable_gradient_checkpointing()
        policy.transformer.train()
        policy.encoding_device = device
        if prompts and rank() == 0:
            policy._warn_of_long_prompts(prompts)
        policy.prepare_prompts(prompts)
        policy.vae.requires_grad_(False).to(device)
        policy.transformer.to(device)
        return policy

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(tokens, channels) of one image."""
        return self.rows * self.columns, int(self.transformer.config["in_channels"])

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """T5 states and pooled CLIP state of each prompt, from the cache."""
        cache = self._cache()
        if cache.missing(prompts):
            self.prepare_prompts(prompts)
        return cache.load(prompts)

    def prepare_prompts(self, prompts: Sequence[str]) -> None:
        """Encode what the cache lacks; the encoders load only for that, and leave the memory afterwards."""
        cache, encoders, device = self._cache(), list[Any](), self.encoding_device or self.device

        def encode_now(chunk: list[str]) -> Conditioning:
            if not encoders:
                encoders.append(self._load_encoders().to(device))
            with torch.no_grad(), quiet_libraries():  # diffusers reports every cut prompt at length
                states, pooled, _ = encoders[0].encode_prompt(
                    chunk, prompt_2=chunk, device=device, max_sequence_length=self.max_sequence_length
                )
            return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}

        if cache.missing(prompts) and rank() == 0:
            self._warn_of_long_prompts(prompts)
        cache.fill(prompts, encode_now)
        if encoders:
            encoders.clear()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _cache(self) -> EmbeddingCache:
        if self.cache is None:
            raise ValueError("this policy was put together without a pipeline folder, so it has no text encoders")
        return self.cache

    def _load_encoders(self) -> Any:
        return _load_pipeline(self.folder, dtype=self.dtype, transformer=None, vae=None)

    def _warn_of_long_prompts(self, prompts: Sequence[str]) -> None:
        if self.warned_of_long_prompts:
            return
        self.warned_of_long_prompts = True
        models = dict.fromkeys(("transformer", "vae", "text_encoder", "text_encoder_2"))
        tokenizers = _load_pipeline(self.folder, **models)
        limit = self.max_sequence_length
        warn_of_long_prompts(prompts, tokenizers.tokenizer_2, limit, "T5 reads (model.max_sequence_length)")
        clip = tokenizers.tokenizer
        warn_of_long_prompts(prompts, clip, clip.model_max_length, "CLIP reads for its one summary vector")

    def predict(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity for a batch whose rows may be at different times.

        The times go in as they are, not cut to an integer; diffusers rounds them to the model's dtype.
        """
        device, dtype = latents.device, self.dtype
        states = conditioning["prompt_embeds"].to(device, dtype)
        guidance = None
        if self.transformer.config["guidance_embeds"]:
            guidance = torch.full((latents.shape[0],), self.guidance, device=device, dtype=torch.float32)
        return self.forward_module(
            hidden_states=latents.to(dtype),
            encoder_hidden_states=states,
            pooled_projections=conditioning["pooled_prompt_embeds"].to(device, dtype),
            timestep=times.to(device, torch.float32),
            img_ids=self._image_ids(device, dtype),
            txt_ids=torch.zeros(states.shape[1], 3, device=device, dtype=dtype),
            guidance=guidance,
            return_dict=False,
        )[0]

    def _image_ids(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        row = torch.arange(self.rows, device=device).repeat_interleave(self.columns)
        column = torch.arange(self.columns, device=device).repeat(self.rows)
        return torch.stack((torch.zeros_like(row), row, column), dim=1).to(dtype)

    def unpack(self, latents: Tensor) -> Tensor:
        """[B, tokens, 4 C] to the VAE's [B, C, 2 rows, 2 columns]."""
        batch, _, channels = latents.shape
        pixels = latents.reshape(batch, self.rows, self.columns, channels // 4, 2, 2)
        return pixels.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, 2 * self.rows, 2 * self.columns)

    def pack(self, latents: Tensor) -> Tensor:
        """Inverse of :meth:`unpack`."""
        batch, channels, height, width = latents.shape
        pixels = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
        return pixels.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode packed latents to images."""
        config = self.vae.config
        pixels = self.unpack(latents) / config["scaling_factor"] + (config["shift_factor"] or 0.0)
        pixels = pixels.to(next(self.vae.parameters()).dtype)
        # A few images at a time: the decoder's activations, not the transformer's, would limit the batch.
        at_once = max(1, DECODED_PIXELS // (4 * self.rows * self.columns * self.vae_scale**2))
        parts = [self.vae.decode(part, return_dict=False)[0].float() for part in pixels.split(at_once)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    def scheduler_times(self, steps: int) -> Tensor:
        """The grid of the pipeline's scheduler for this image size (static or resolution-dependent shift)."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        get = scheduler.config.get
        mu = calculate_shift(
            self.rows * self.columns,
            get("base_image_seq_len", 256),
            get("max_image_seq_len", 4096),
            get("base_shift", 0.5),
            get("max_shift", 1.15),
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        return scheduler.sigmas.double()

    def save_weights(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """``pytorch_lora_weights.safetensors`` for :meth:`FluxPipeline.load_lora_weights`, or ``transformer/``."""
        if hasattr(self.transformer, "peft_config"):
            FluxPipeline.save_lora_weights(
                folder,
                transformer_lora_layers=get_peft_model_state_dict(self.transformer, state_dict=dict(state)),
                **_collate_lora_metadata({"transformer": self.transformer}),
            )
        else:
            self.transformer.save_pretrained(folder / "transformer", state_dict=dict(state))


def _check_size(folder: Path, settings: ModelConfig) -> None:
    """Refuse an impossible image size before gigabytes of weights are read."""
    try:
        config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        blocks = config["block_out_channels"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # loading the pipeline says what is wrong with it
    token_grid({"block_out_channels": blocks}, settings.height, settings.width)


def vae_factor(vae_config: Mapping[str, Any]) -> int:
    """How many pixels across a latent is: the VAE halves the image between its blocks."""
    return int(2 ** (len(vae_config["block_out_channels"]) - 1))


def token_grid(vae_config: Mapping[str, Any], height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens of an image.

    Raises:
        UserError: the VAE and the 2 x 2 packing cannot take the image size.
    """
    factor = vae_factor(vae_config)
    unit = 2 * factor
    for name, size in (("height", height), ("width", width)):
        if size % unit:
            below = max(size // unit, 1) * unit
            raise UserError(
                f"model.{name}: {size} is not a multiple of {unit} (VAE factor {factor}, packed 2 x 2); "
                f"nearest sizes: {below} and {below + unit}"
            )
    return height // unit, width // unit


def _load_pipeline(folder: Path | None, **options: Any) -> Any:
    try:
        with quiet_libraries():
            return FluxPipeline.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model.path: {folder} cannot be loaded as a FluxPipeline: {str(error).splitlines()[0]}"
        ) from None
