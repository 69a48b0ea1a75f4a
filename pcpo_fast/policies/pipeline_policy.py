"""Base class of policies for diffusers pipelines: loading, prompts, guidance, decoding, saving."""

import gc
import json
import os
import warnings
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, Self, cast

import pcpo_kernels
import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from pcpo_fast.config.schema import ModelConfig, RolloutConfig
from pcpo_fast.distributed.collectives import once_per_machine, rank
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.files.content import INDEX, RECORD_FOLDER, Contents, digest, index_of, pipeline_files
from pcpo_fast.method.schedules import FlowSchedule, Schedule
from pcpo_fast.policies.attention import attention_backend, choose_attention
from pcpo_fast.policies.base import Conditioning, Policy, PolicyOutput
from pcpo_fast.policies.depth import Depth, listed_blocks
from pcpo_fast.policies.embedding_cache import EmbeddingCache, Encoded
from pcpo_fast.policies.folder_checks import single_file, used_parts
from pcpo_fast.policies.four_bit import quantize_blocks
from pcpo_fast.policies.lora import add_lora, differing_from, merged_adapters, trained_updates
from pcpo_fast.policies.lora_files import LORA_FILE, read_lora, write_lora
from pcpo_fast.policies.lora_names import BlockNames, release_weights
from pcpo_fast.policies.low_precision import low_precision
from pcpo_fast.policies.part_checks import check_finite
from pcpo_fast.policies.pipeline_files import clip_tokens, part_classes
from pcpo_fast.policies.quiet import quiet_libraries
from pcpo_fast.policies.speed import checkpoint_blocks, compile_blocks, needed
from pcpo_fast.policies.truncation import template_tokens, warn_of_long_prompts
from pcpo_fast.policies.weight_files import find_weights, read_json

Fit = tuple[str, int, str, str]
"""(key, factor, part, key there): a width of the network is a multiple of a width of another part."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
"""Names of the files that diffusers loads a network from."""
HALVINGS = ("block_out_channels", "temperal_downsample")
"""Keys of a VAE's configuration that tell how often it halves an image; the second is that of VAEs for video."""
DECODED_PIXELS = 1 << 21
"""Pixels that the VAE decodes at a time: two images of 1024 x 1024."""


class PipelinePolicy(Policy):
    """A policy built from the parts of a diffusers pipeline.

    Subclasses name the pipeline, encode prompts and run the network; everything else is shared. The defaults are those
    of a flow model whose transformer takes the states of one text encoder.

    Attributes:
        pipeline_class: the pipeline's class in diffusers.
        trained_part: the part of the pipeline that is trained: "transformer" or "unet".
        encoder_parts: text encoders and tokenizers, which are loaded only to encode prompts.
        other_kinds: classes of parts that are not those which the pipeline declares.
        optional_parts: encoder parts that a pipeline may lack.
        also_named: other classes by which an index may call a part.
        unused_parts: parts that a policy never needs, such as a safety checker; the folder may lack them.
        cell: side of the latent patch that becomes one token; the image size must be a multiple of its pixels.
        packs_latents: whether the network takes these patches, [B, tokens, channels], and the latents are they.
        schedule_kind: the type that :meth:`schedule` returns, known without loading anything.
        lora_targets: linear layers that get an adapter if the configuration names none.
        about: metadata about the run for the headers of LoRA files.
        cuts_prompts: whether ``model.max_sequence_length`` sets the number of tokens read from a prompt.
        fits: widths that must agree between the parts of a pipeline.
        block_lists: the network's blocks (:func:`pcpo_fast.policies.depth.listed_blocks`).
        release_names: the names of the network's layers in the model's original release, within blocks and of the rest
            (:func:`pcpo_fast.policies.lora_names.release_weights`).
        dispatches_attention: whether the network's attention layers use diffusers' attention dispatcher.
        linear_guidance: whether guidance is linear in its halves, as in the loss; any other serves sampling only.
        guidance_offset: what ``model.cfg_scale`` is above the ``guidance_scale`` of diffusers' pipeline; 1 where that
            scales the difference of both halves that is added to the conditional one.
        masks_prompts: whether attention leaves out the padding of prompts, which not every backend can.
        caption_width: the key of the network's configuration for the width of encoded prompts; None for a family with
            several text encoders.
        kohya_keeps_names: whether kohya's sd-scripts use diffusers' layer names instead of those of the original
            release; ComfyUI reads these.
        kohya_in_diffusers: whether diffusers reads LoRA files with kohya's names.
    """

    pipeline_class: ClassVar[Any]
    trained_part: ClassVar[str] = "transformer"
    encoder_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    other_kinds: ClassVar[dict[str, Any]] = {}
    optional_parts: ClassVar[tuple[str, ...]] = ()
    also_named: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    unused_parts: ClassVar[tuple[str, ...]] = ()
    cell: ClassVar[int] = 2
    packs_latents: ClassVar[bool] = False
    schedule_kind: ClassVar[type[Schedule]] = FlowSchedule
    lora_targets: ClassVar[tuple[str, ...]]
    cuts_prompts: ClassVar[bool] = True
    fits: ClassVar[tuple[Fit, ...]]
    block_lists: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    release_names: ClassVar[tuple[BlockNames, Mapping[str, str]]]
    dispatches_attention: ClassVar[bool] = True
    linear_guidance: ClassVar[bool] = True
    guidance_offset: ClassVar[float] = 0.0
    masks_prompts: ClassVar[bool] = False
    caption_width: ClassVar[str | None] = None
    kohya_keeps_names: ClassVar[bool] = False
    kohya_in_diffusers: ClassVar[bool] = True

    def __init__(
        self,
        network: Any,
        vae: Any,
        scheduler: Any,
        settings: ModelConfig,
        *,
        folder: Path | None = None,
        cache: EmbeddingCache | None = None,
    ) -> None:
        """Assemble a policy from loaded parts; without a folder and cache it cannot encode prompts.

        Raises:
            UserError: the image size does not suit the VAE and the network.
        """
        super().__init__(network)
        self.network = network
        self.vae = vae
        self.scheduler = scheduler
        self.settings = settings
        self.folder = folder
        self.cache = cache
        self.cfg_scale = settings.cfg_scale
        self.encoding_device: torch.device | None = None
        self.warned_of_long_prompts = False
        self.vae_scale = vae_factor(vae.config)
        self.rows, self.columns = cell_grid(vae.config, settings.height, settings.width, self.cell)
        self.about: dict[str, str] = {}
        self._negative: Conditioning | None = None

    def check_places(self, rows: int, columns: int) -> None:
        """Check that the image has no more cells than the network has position embeddings for.

        Raises:
            UserError: naming the setting.
        """
        unit = self.cell * self.vae_scale
        for name, count, limit in (("height", self.rows, rows), ("width", self.columns, columns)):
            if count > limit:
                raise UserError(
                    f"model.{name}: {count * unit} is more than the {limit * unit} pixels that the model has position "
                    "embeddings for"
                )

    @classmethod
    def load(
        cls,
        folder: Path,
        settings: ModelConfig,
        cache_folder: Path,
        device: torch.device,
        prompts: Sequence[str] = (),
        network_device: torch.device | None = None,
    ) -> Self:
        """Load network and VAE of a pipeline folder.

        Args:
            folder: the pipeline.
            settings: the configuration's ``model`` section.
            cache_folder: folder for encoded prompts and content hashes of files.
            device: device for the network and the VAE.
            prompts: encoded first, so that text encoders and network are never on the device together.
            network_device: device for the network if it differs from ``device``.

        Raises:
            UserError: the folder cannot be loaded, or the LoRA, attention or image size is refused.
        """
        vae = _config_of(folder, "vae")
        if any(isinstance(vae.get(name), list) for name in HALVINGS):  # before gigabytes of weights are read
            cell_grid(vae, settings.height, settings.width, cls.cell)
        cls.check_settings(folder, settings)
        pipeline = cls.load_pipeline(folder, settings, (cls.trained_part, "vae"))
        index = index_of(folder)
        files = {index.name: index} | pipeline_files(folder, cls.encoder_parts, settings.variant)
        others = (settings.max_sequence_length, settings.dtype, cls.pipeline_class.__name__, settings.variant)
        known = repr(others if settings.variant else others[:3])  # as caches were named before variants existed
        fingerprint = once_per_machine(lambda: digest([Contents(cache_folder / RECORD_FOLDER).of_files(files), known]))
        network = getattr(pipeline, cls.trained_part)
        cache = EmbeddingCache(cache_folder, fingerprint)
        policy = cls(network, pipeline.vae, pipeline.scheduler, settings, folder=folder, cache=cache)
        if settings.base_weights == "nf4":
            quantize_blocks(network, cls.compiled_blocks(network), device, folder / cls.trained_part)
        cls.prepare_network(network, settings, device)
        policy.encoding_device = torch.device("cpu") if settings.encode_on == "cpu" else device
        if prompts and rank() == 0:
            policy._warn_of_long_prompts(policy._with_negative(prompts))
        policy.prepare_prompts(prompts)
        policy.vae.requires_grad_(False).to(device)
        network.to(device if network_device is None else network_device)
        check_finite(policy.vae, folder / "vae")
        check_finite(network, folder / cls.trained_part)
        return policy

    @classmethod
    def check_settings(cls, folder: Path, settings: ModelConfig) -> None:
        """Refuse settings that have no effect with this model (:mod:`pcpo_fast.config.unused_settings`).

        Raises:
            UserError: such a setting was given; names it.
        """
        unused = {}
        if not cls.cuts_prompts:
            unused["max_sequence_length"] = (
                "a text encoder other than CLIP, which always reads the number of tokens that it was made for"
            )
        if not _config_of(folder, cls.trained_part).get("guidance_embeds"):
            unused["guidance"] = (
                "an embedded guidance scale (FLUX.1-dev, FLUX.2-dev); that of other models is model.cfg_scale"
            )
        for name, what in unused.items():
            if name in settings.model_fields_set and getattr(settings, name) != ModelConfig.model_fields[name].default:
                raise UserError(f"model.{name}: only takes effect with {what}: remove it")

    @classmethod
    def check_training(cls, settings: ModelConfig) -> None:
        """Refuse settings that serve sampling, but not training.

        Raises:
            UserError: naming the setting.
        """
        if settings.cfg_scale != 1 and not cls.linear_guidance:
            raise UserError(
                f"model.cfg_scale: must be 1 to train a {cls.pipeline_class.__name__}, whose guidance rescales the "
                "result to the norm of the conditional half, while the loss needs guidance that is linear in both "
                "halves; other scales are for sampling only"
            )

    @classmethod
    def call_options(cls, settings: ModelConfig) -> dict[str, Any]:
        """Arguments of diffusers' pipeline for images of the run's size with its guidance; empty if it takes none."""
        options: dict[str, Any] = {
            "height": settings.height,
            "width": settings.width,
            "guidance_scale": settings.cfg_scale - cls.guidance_offset,
        }
        if settings.cfg_scale != 1 and settings.negative_prompt:
            options["negative_prompt"] = settings.negative_prompt
        return options

    @classmethod
    def lora_readers(cls, names: str | None) -> frozenset[str]:
        """Which of diffusers and ComfyUI read a LoRA file of this family with the names of ``export --format``."""
        unread = set()
        if names == "kohya" and not cls.kohya_in_diffusers:
            unread.add("diffusers")
        if names == "diffusers" and cls.kohya_keeps_names:
            unread.add("ComfyUI")
        return frozenset(("diffusers", "ComfyUI")) - unread

    @classmethod
    def prepare_network(cls, network: Any, settings: ModelConfig, device: torch.device) -> None:
        """Set up a loaded network: attention backend, trainable weights, block kernels, recomputation, compilation.

        Raises:
            UserError: the LoRA or attention setting is refused, or the network has no block that can be accelerated,
                recomputed or compiled although that was asked for.
        """
        choose_attention(network, settings.attention, device, masked=cls.masks_prompts)
        if settings.finetune == "lora":
            lora, targets = settings.lora, settings.lora.targets or cls.lora_targets
            start = None if lora.init is None else read_lora(network, lora.init, "model.lora.init", cls)
            add_lora(network, lora, targets, start=start, idle=cls.idle_layers)
            differences = differing_from(lora, targets, network, start) if start else ""
            if differences and rank() == 0:
                warnings.warn(f"model.lora.init: {lora.init}: {differences}", stacklevel=2)
        else:
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(parameter.is_floating_point() and not cls.is_idle(name))
        if settings.block_kernels:
            needed(network, cls.accelerated_blocks(network), "model.block_kernels")
            if settings.compile:  # the compiler sees into the kernels only if that keeps their results bit for bit
                os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")
            try:
                pcpo_kernels.accelerate(network)
            except ValueError as error:
                raise UserError(f"model.block_kernels: {error}") from None
        blocks, selective = cls.recomputed_blocks(network), settings.gradient_checkpointing == "selective"
        checkpoint_blocks(network, blocks, settings.recomputed_share, selective=selective)
        if settings.compile:
            compile_blocks(network, cls.compiled_blocks(network))
        network.train()

    @classmethod
    def part_kinds(cls) -> dict[str, Any]:
        """The class of each part: :attr:`other_kinds`, or as the pipeline's constructor declares it."""
        return {name: kind[0] for name, kind in cls.pipeline_class._get_signature_types().items()} | cls.other_kinds

    @classmethod
    def default_scheduler(cls) -> tuple[str, dict[str, Any]] | None:
        """Class and configuration of the scheduler where the folder has none; None: it must have one."""
        return None

    @classmethod
    def network_class(cls) -> str:
        """The network's class name in diffusers."""
        return str(cls.part_kinds()[cls.trained_part].__name__)

    @classmethod
    def head_dim(cls, config: Mapping[str, Any]) -> int | None:
        """Size of the network's attention heads by its configuration; None if they differ or it does not say."""
        size = config.get("attention_head_dim")
        return size if isinstance(size, int) else None

    @classmethod
    def check_network(cls, file: Path, config: Mapping[str, Any]) -> None:
        """Refuse an inconsistent configuration of the network.

        Raises:
            UserError: it is inconsistent; names the file.
        """

    @classmethod
    def release_weights(cls, layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Map weights of the model's original release to the diffusers layers that make up their rows, in order.

        Args:
            layers: linear layers of the network, by their diffusers names.

        Returns:
            Original weights (names without ``.weight``) that contain at least one of the layers.
        """
        return release_weights(*cls.release_names, layers)

    @classmethod
    def depth(cls, config: Mapping[str, Any]) -> Depth:
        """Depth of the trained network by its configuration; empty for families whose blocks all differ."""
        return listed_blocks(config, cls.block_lists)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one image: (tokens, channels) of packed latents, else (channels, rows, columns) of the VAE's."""
        channels = int(self.network.config["in_channels"])
        if self.packs_latents:
            return self.rows * self.columns, channels
        return channels, self.cell * self.rows, self.cell * self.columns

    @abstractmethod
    def encode_with(self, pipeline: Any, prompts: list[str], device: torch.device) -> Encoded:
        """Encode prompts with a pipeline that has the text encoders loaded.

        A family that masks padding returns rows without it (:func:`with_masks`).
        """

    @abstractmethod
    def run_network(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """One forward; latents and conditioning are on the device and in the model's dtype, times float32."""

    @abstractmethod
    def readers(self, pipeline: Any) -> list[tuple[Any, int, str]]:
        """(tokenizer, tokens read, name) of each text encoder, to warn about truncated prompts."""

    def within_template(self, tokenizer: Any, name: str, *messages: Any, **options: Any) -> tuple[Any, int, str]:
        """An entry of :meth:`readers`: a text encoder that reads the chat template around a prompt as well.

        Args:
            tokenizer: of transformers.
            name: of the text encoder.
            messages, options: as for :func:`pcpo_fast.policies.truncation.template_tokens`.

        Raises:
            UserError: the tokenizer has no chat template.
        """
        limit = self.settings.max_sequence_length - template_tokens(tokenizer, self.folder, *messages, **options)
        return tokenizer, limit, f"{name} reads within its chat template (model.max_sequence_length)"

    def conditioning_shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one prompt's row in the result of :meth:`encode_with`, for planning without text encoders.

        Here those of a family with one text encoder: the longest prompt that is not cut, and its mask, if it has one.

        Args:
            clip_tokens: number of tokens that CLIP's tokenizer reads.
        """
        if self.caption_width is None:
            raise NotImplementedError(f"{type(self).__name__} does not say how its conditioning is shaped")
        tokens = self.settings.max_sequence_length
        shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (tokens, self.network.config[self.caption_width])}
        return shapes | ({"prompt_mask": (tokens,)} if self.masks_prompts else {})

    def to_pixels(self, latents: Tensor) -> Tensor:
        """Convert the sampler's latents to the VAE's input, [B, C, h, w]: unscaled, and unpacked if packed."""
        config = self.vae.config
        if self.packs_latents:
            latents = unpacked(latents, self.rows, self.columns)
        scaled: Tensor = latents / config["scaling_factor"] + (config["shift_factor"] or 0.0)
        return scaled

    def predict_halves(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> PolicyOutput:
        """One forward, or both halves of classifier-free guidance in one forward of twice the batch.

        Times are passed as they are; diffusers rounds them to the model's dtype.
        """
        device, dtype, count = latents.device, self.dtype, latents.shape[0]
        latents, times = latents.to(dtype), times.to(device, torch.float32)
        given = {name: value.to(device, dtype) for name, value in conditioning.items()}
        self.work.count_network(count if self.cfg_scale == 1 else 2 * count)
        if self.cfg_scale == 1:
            return PolicyOutput(self.run_network(latents, times, given), None)
        negative = self._negative_conditioning(device)
        both = {
            name: torch.cat(_equally_long(negative[name].to(dtype).expand(count, *negative[name].shape[1:]), value))
            for name, value in given.items()
        }
        output = self.run_network(latents.repeat(2, *[1] * (latents.dim() - 1)), times.repeat(2), both)
        unconditional, conditional = output.chunk(2)
        return PolicyOutput(conditional, unconditional)

    def _negative_conditioning(self, device: torch.device) -> Conditioning:
        if self._negative is None or next(iter(self._negative.values())).device != device:
            self._negative = {
                name: value.to(device) for name, value in self.encode([self.settings.negative_prompt]).items()
            }
        return self._negative

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of each prompt, from the cache; missing prompts are encoded first."""
        cache = self._cache()
        if cache.missing(prompts):
            self.prepare_prompts(prompts)
        return cache.load(prompts)

    def prepare_prompts(self, prompts: Sequence[str]) -> None:
        """Encode prompts that the cache lacks; the encoders are loaded only if needed, and freed afterwards."""
        prompts = self._with_negative(prompts)
        cache, encoders, device = self._cache(), list[Any](), self.encoding_device or self.device

        def encode_now(chunk: list[str]) -> Encoded:
            if not encoders:
                encoders.append(self._load_parts(*self.encoder_parts).to(device))
                for name in self.encoder_parts:
                    if isinstance(part := getattr(encoders[0], name), nn.Module):
                        check_finite(part, cast(Path, self.folder) / name)
            with torch.no_grad(), quiet_libraries():  # diffusers reports every truncated prompt at length
                return self.encode_with(encoders[0], chunk, device)

        if cache.missing(prompts) and rank() == 0:
            self._warn_of_long_prompts(prompts)
        cache.fill(prompts, encode_now, self._encoded_bytes)
        if encoders:
            encoders.clear()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _encoded_bytes(self, prompts: Sequence[str]) -> float:
        """Bytes that prompts take in the cache; where padding is left out, at least those of their own tokens."""
        assert self.folder is not None  # as for the cache
        shapes = self.conditioning_shapes(clip_tokens(self.folder))
        each = float(sum(map(prod, shapes.values())) * self.dtype.itemsize)
        if not self.masks_prompts:
            return each * len(prompts)
        tokenizers = self._load_parts(*(name for name in self.encoder_parts if name.startswith("tokenizer")))
        tokenizer, limit, _ = self.readers(tokenizers)[0]
        lengths = map(len, tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"])
        return each / self.settings.max_sequence_length * sum(min(length, limit) for length in lengths)

    def _with_negative(self, prompts: Sequence[str]) -> Sequence[str]:
        """The prompts, plus the negative prompt if classifier-free guidance needs it."""
        return [*prompts, self.settings.negative_prompt] if prompts and self.cfg_scale != 1 else prompts

    def _cache(self) -> EmbeddingCache:
        if self.cache is None:
            raise ValueError("this policy was built without a pipeline folder, so it has no text encoders")
        return self.cache

    def _warn_of_long_prompts(self, prompts: Sequence[str]) -> None:
        if self.warned_of_long_prompts:
            return
        self.warned_of_long_prompts = True
        tokenizers = self._load_parts(*(name for name in self.encoder_parts if name.startswith("tokenizer")))
        for tokenizer, limit, reader in self.readers(tokenizers):
            warn_of_long_prompts(prompts, tokenizer, limit, reader)

    @contextmanager
    def sampling(self, settings: RolloutConfig) -> Iterator[None]:
        """Within the block, use the rollout's attention backend and, if configured, merged adapters."""
        merged = merged_adapters(self.network) if settings.merge_lora else nullcontext()
        with attention_backend(self.network, settings.attention), merged:
            yield

    @contextmanager
    def cheaper(self, settings: RolloutConfig) -> Iterator[None]:
        """Within the block, the blocks' linear layers compute in 8 bits, unless candidates are sampled as they are."""
        if settings.candidate_weights == "full":
            yield
            return
        with low_precision(self.network, self.compiled_blocks(self.network)):
            yield

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images."""
        self.work.decodes += len(latents)
        pixels = self.to_pixels(latents).to(next(self.vae.parameters()).dtype)
        parts = [self.vae.decode(part, return_dict=False)[0].float() for part in pixels.split(self.decoded_at_once)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    @property
    def decoded_at_once(self) -> int:
        """Images that the VAE decodes at a time: few, or its activations would limit the batch."""
        return max(1, DECODED_PIXELS // (self.rows * self.columns * (self.cell * self.vae_scale) ** 2))

    def save_weights(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write ``pytorch_lora_weights.safetensors``, in names that diffusers and ComfyUI read, or the network."""
        if hasattr(self.network, "peft_config"):
            folder.mkdir(parents=True, exist_ok=True)
            layers = trained_updates(self.network, state)
            write_lora(folder / LORA_FILE, layers, type(self), about=self.about)
        else:
            # save_pretrained would write this rank's share of the weights, which is empty under ZeRO 3.
            target = folder / self.trained_part
            self.network.save_config(target)
            whole = {
                **self.network.state_dict(),
                **state,
            }  # buffers, such as SD3's position embeddings, are not trained
            save_torch_state_dict(whole, target, filename_pattern=WEIGHTS_PATTERN, max_shard_size="10GB")
            for file in target.glob("*.safetensors"):
                file.chmod(0o644)  # the library makes it readable by its owner only

    @classmethod
    def load_pipeline(cls, folder: Path, settings: ModelConfig, parts: Collection[str] | None = None) -> Any:
        """Load a pipeline from a folder that has passed :func:`pcpo_fast.policies.folder_checks.check_folder`.

        Args:
            folder: the pipeline's folder.
            settings: the configuration's ``model`` section: dtype, variant, and a single file with the network.
            parts: parts to load besides the scheduler; None for all that are used.

        Raises:
            UserError: diffusers cannot load it.
        """
        try:
            with quiet_libraries():
                loaded = {
                    name: cls._load_part(folder, name, kind, settings)
                    for name, kind in used_parts(folder, cls).items()
                    if name != "scheduler" and (parts is None or name in parts)
                }
                return cls._assemble(folder, loaded)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, UnpicklingError) as error:
            reason = reason_of(error)
            name = cls.pipeline_class.__name__
            raise UserError(f"model.path: {folder} cannot be loaded as a {name}: {reason}") from None

    @classmethod
    def _assemble(cls, folder: Path, parts: Mapping[str, Any]) -> Any:
        """A folder's pipeline of its scheduler and parts that are loaded."""
        # diffusers requires an explicit None for every part that is not loaded.
        others = {name: None for name in part_classes(folder) if name not in ("scheduler", *parts)}
        return cls.pipeline_class.from_pretrained(folder, local_files_only=True, **others, **parts)

    @classmethod
    def replace_part(cls, pipeline: Any, name: str, part: Any) -> None:
        """Put another network into a pipeline."""
        pipeline.register_modules(**{name: part})

    @classmethod
    def write_pipeline(cls, pipeline: Any, folder: Path, target: Path) -> None:
        """Write a pipeline that was loaded from ``folder`` into another folder."""
        pipeline.save_pretrained(target)

    @classmethod
    def _load_part(cls, folder: Path, name: str, kind: Any, settings: ModelConfig) -> Any:
        part = folder / name
        if name.startswith("tokenizer"):
            return kind.from_pretrained(part, local_files_only=True)
        dtype = DTYPES[settings.dtype]
        file, _ = single_file(settings, cls.trained_part)
        if name == cls.trained_part and file is not None:
            return kind.from_single_file(str(file), config=str(part), dtype=dtype, local_files_only=True)
        variant = find_weights(part, kind.__module__.partition(".")[0], settings.variant).variant
        return kind.from_pretrained(part, local_files_only=True, use_safetensors=True, variant=variant, dtype=dtype)

    def _load_parts(self, *parts: str) -> Any:
        """A pipeline with only the scheduler and the given encoders and tokenizers."""
        assert self.folder is not None  # as for the cache
        return self.load_pipeline(self.folder, self.settings, parts)


def _config_of(folder: Path, part: str) -> dict[str, Any]:
    """A part's ``config.json``; empty if it cannot be read, since loading the part reports the reason."""
    try:
        config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def warn_of_distillation(model: str | Path) -> None:
    """Say once what training does to a model that was distilled to few steps."""
    if rank() == 0:
        warnings.warn(
            f"model.path: {model} is distilled to few steps without noise. Training samples with noise and can "
            "undo the distillation; train its base model instead if there is one",
            stacklevel=2,
        )


def is_distilled(folder: Path) -> bool:
    """Whether the pipeline's index says that its network is distilled, as those of FLUX.2-klein and Krea 2 do."""
    return bool(read_json(folder / INDEX).get("is_distilled"))


def check_distillation(folder: Path, settings: ModelConfig) -> None:
    """Warn about training a distilled network, which has no classifier-free guidance.

    Raises:
        UserError: guidance is asked of it.
    """
    if not is_distilled(folder):
        return
    if settings.cfg_scale != 1:
        raise UserError(
            f"model.cfg_scale: {folder} is distilled (is_distilled in {INDEX}) and was made for images without "
            "classifier-free guidance: set it to 1, or take the base model"
        )
    warn_of_distillation(folder)


def with_masks(rows: Sequence[Tensor]) -> Encoded:
    """Prompts [tokens, width] of different lengths, each with a mask of ones, to which padding will add zeros."""
    return {"prompt_embeds": list(rows), "prompt_mask": [row.new_ones(len(row)) for row in rows]}


def _equally_long(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings or masks [B, tokens, ...] of two sets of prompts, padded with zeros to the same number of tokens."""
    missing = other.shape[1] - one.shape[1]
    places = (0, 0) * (one.dim() - 2)
    return (
        nn.functional.pad(one, (*places, 0, max(missing, 0))),
        nn.functional.pad(other, (*places, 0, max(-missing, 0))),
    )


def unpacked(latents: Tensor, rows: int, columns: int) -> Tensor:
    """Packed latents [B, tokens, 4 C], one token per 2 x 2 latent pixels, as the VAE's [B, C, 2 rows, 2 columns]."""
    batch, _, channels = latents.shape
    pixels = latents.reshape(batch, rows, columns, channels // 4, 2, 2)
    return pixels.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, 2 * rows, 2 * columns)


def vae_factor(vae_config: Mapping[str, Any]) -> int:
    """Pixels per latent along each side: the VAE halves the image between its blocks."""
    blocks = vae_config.get(HALVINGS[0])
    return int(2 ** (len(vae_config[HALVINGS[1]]) if blocks is None else len(blocks) - 1))


def cell_grid(vae_config: Mapping[str, Any], height: int, width: int, cell: int) -> tuple[int, int]:
    """Rows and columns of latent patches (network tokens) in an image.

    Args:
        vae_config: the VAE's configuration.
        height, width: image size in pixels.
        cell: side of a patch in latent pixels.

    Raises:
        UserError: the image size does not suit the VAE and the network.
    """
    factor = vae_factor(vae_config)
    unit = cell * factor
    for name, size in (("height", height), ("width", width)):
        if size % unit:
            below = max(size // unit, 1) * unit
            packed = f", packed {cell} x {cell}" if cell > 1 else ""
            raise UserError(
                f"model.{name}: {size} is not a multiple of {unit} (VAE factor {factor}{packed}); "
                f"nearest sizes: {below} and {below + unit}"
            )
    return height // unit, width // unit
