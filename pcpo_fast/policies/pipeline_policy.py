"""Base class of policies for diffusers pipelines: loading, prompts, guidance, decoding, saving."""

import gc
import json
import os
import warnings
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
from pcpo_fast.files.content import INDEX, RECORD_FOLDER, Contents, digest, pipeline_files
from pcpo_fast.method.schedules import Schedule
from pcpo_fast.policies.attention import attention_backend, choose_attention
from pcpo_fast.policies.base import Conditioning, Policy, PolicyOutput
from pcpo_fast.policies.depth import Depth
from pcpo_fast.policies.embedding_cache import EmbeddingCache
from pcpo_fast.policies.folder_checks import single_file, used_parts
from pcpo_fast.policies.lora import add_lora, differing_from, merged_adapters, trained_updates
from pcpo_fast.policies.lora_files import LORA_FILE, read_lora, write_lora
from pcpo_fast.policies.part_checks import check_finite
from pcpo_fast.policies.pipeline_files import part_classes
from pcpo_fast.policies.quiet import quiet_libraries
from pcpo_fast.policies.speed import checkpoint_blocks, compile_blocks, needed
from pcpo_fast.policies.truncation import warn_of_long_prompts
from pcpo_fast.policies.weight_files import find_weights

Fit = tuple[str, int, str, str]
"""A width of the network, by its key, is so many times that of another part, by its key there."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
"""Names of the files that diffusers reads a network from."""
DECODED_PIXELS = 1 << 21
"""Pixels that the VAE decodes at once: two images of 1024 x 1024."""


class PipelinePolicy(Policy):
    """A policy made of the parts of a diffusers pipeline.

    A subclass names its pipeline and its parts, encodes prompts and runs the network; everything else is here.

    Attributes:
        pipeline_class: diffusers' pipeline.
        trained_part: the pipeline's part that is trained: "transformer" or "unet".
        encoder_parts: text encoders and tokenizers, which load for encoding only.
        optional_parts: those of them that a pipeline may do without.
        unused_parts: parts that a policy never needs, such as a safety checker; they need not be in the folder.
        cell: latent pixels across that the network takes as one; the image size is a multiple of it.
        schedule_kind: what :meth:`schedule` returns, known without loading anything.
        lora_targets: linear layers that get an adapter where the configuration names none.
        about: what the headers of LoRA files say of the run.
        cuts_prompts: whether ``model.max_sequence_length`` says how many tokens are read.
        fits: the widths by which the parts of a pipeline fit together.
        dispatches_attention: whether the network's attention layers ask diffusers' dispatcher for their backend.
        kohya_keeps_names: whether kohya's sd-scripts call the layers what diffusers calls them, not what the original
            release does; ComfyUI reads the names of which this is so.
    """

    pipeline_class: ClassVar[Any]
    trained_part: ClassVar[str]
    encoder_parts: ClassVar[tuple[str, ...]]
    optional_parts: ClassVar[tuple[str, ...]] = ()
    unused_parts: ClassVar[tuple[str, ...]] = ()
    cell: ClassVar[int]
    schedule_kind: ClassVar[type[Schedule]]
    lora_targets: ClassVar[tuple[str, ...]]
    cuts_prompts: ClassVar[bool] = True
    fits: ClassVar[tuple[Fit, ...]]
    dispatches_attention: ClassVar[bool] = True
    kohya_keeps_names: ClassVar[bool] = False

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
        """Put a policy together from loaded parts; one without folder and cache has no text encoders.

        Raises:
            UserError: VAE and network cannot take the image size.
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
            cache_folder: where encoded prompts are kept, and what is known of files' content.
            device: where network and VAE go.
            prompts: encoded first, so that text encoders and network are never on the device together.
            network_device: where the network goes if not to ``device``.

        Raises:
            UserError: the folder cannot be loaded; LoRA, attention or image size refused.
        """
        vae = _config_of(folder, "vae")
        if isinstance(vae.get("block_out_channels"), list):  # before gigabytes of weights are read
            cell_grid(vae, settings.height, settings.width, cls.cell)
        cls.check_settings(folder, settings)
        pipeline = cls.load_pipeline(folder, settings, (cls.trained_part, "vae"))
        files = {INDEX: folder / INDEX} | pipeline_files(folder, cls.encoder_parts, settings.variant)
        others = (settings.max_sequence_length, settings.dtype, cls.pipeline_class.__name__, settings.variant)
        known = repr(others if settings.variant else others[:3])  # of a time without variants
        fingerprint = once_per_machine(lambda: digest([Contents(cache_folder / RECORD_FOLDER).of_files(files), known]))
        network = getattr(pipeline, cls.trained_part)
        cache = EmbeddingCache(cache_folder, fingerprint)
        policy = cls(network, pipeline.vae, pipeline.scheduler, settings, folder=folder, cache=cache)
        cls.prepare_network(network, settings, device)
        policy.encoding_device = device
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
        """Refuse settings of the user's that this model has no use for (:mod:`pcpo_fast.config.unused_settings`).

        Raises:
            UserError: naming the setting.
        """
        unused = {}
        if not cls.cuts_prompts:
            unused["max_sequence_length"] = (
                "T5 or Qwen3 (FLUX, FLUX.2, SD3); CLIP reads as many tokens as it was made for"
            )
        if not _config_of(folder, cls.trained_part).get("guidance_embeds"):
            unused["guidance"] = "an embedded guidance scale (FLUX.1-dev); that of other models is model.cfg_scale"
        for name, what in unused.items():
            if name in settings.model_fields_set and getattr(settings, name) != ModelConfig.model_fields[name].default:
                raise UserError(f"model.{name}: only takes effect with {what}: remove it")

    @classmethod
    def prepare_network(cls, network: Any, settings: ModelConfig, device: torch.device) -> None:
        """Give a network just loaded its attention, its trainable weights, and what makes its blocks fast or small.

        Raises:
            UserError: LoRA or attention refused, or the network has no block that can be accelerated, recomputed or
                compiled where that is asked for.
        """
        choose_attention(network, settings.attention, device)
        if settings.finetune == "lora":
            lora, targets = settings.lora, settings.lora.targets or cls.lora_targets
            start = None if lora.init is None else read_lora(network, lora.init, "model.lora.init", cls)
            add_lora(network, lora, targets, start=start)
            differences = differing_from(lora, targets, network, start) if start else ""
            if differences and rank() == 0:
                warnings.warn(f"model.lora.init: {lora.init}: {differences}", stacklevel=2)
        else:
            network.requires_grad_(True)
        if settings.block_kernels:
            needed(network, cls.accelerated_blocks(network), "model.block_kernels")
            if settings.compile:  # the compiler sees into the kernels only where that leaves their bits as they are
                os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")
            try:
                pcpo_kernels.accelerate(network)
            except ValueError as error:
                raise UserError(f"model.block_kernels: {error}") from None
        checkpoint_blocks(network, cls.recomputed_blocks(network), settings.recomputed_share)
        if settings.compile:
            compile_blocks(network, cls.compiled_blocks(network))
        network.train()

    @classmethod
    def network_class(cls) -> str:
        """diffusers' class of the network."""
        return str(cls.pipeline_class._get_signature_types()[cls.trained_part][0].__name__)

    @classmethod
    def head_dim(cls, config: Mapping[str, Any]) -> int | None:
        """Elements of the network's attention heads by its configuration; None where they differ or it does not say."""
        size = config.get("attention_head_dim")
        return size if isinstance(size, int) else None

    @classmethod
    def check_network(cls, file: Path, config: Mapping[str, Any]) -> None:
        """Refuse a configuration of the network whose settings do not fit each other.

        Raises:
            UserError: naming the file.
        """

    @classmethod
    @abstractmethod
    def release_weights(cls, layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Weights of the model's original release, and the layers of diffusers' network that are their rows, in order.

        Args:
            layers: linear layers of the network, by diffusers' names.

        Returns:
            The weights that have at least one of the layers; names without ``.weight``.
        """

    @classmethod
    def depth(cls, config: Mapping[str, Any]) -> Depth:
        """The depth of the trained network by its configuration; a family whose blocks all differ has none to tell."""
        return Depth()

    @abstractmethod
    def encode_with(self, pipeline: Any, prompts: list[str], device: torch.device) -> Conditioning:
        """Conditioning of some prompts by a pipeline that holds the text encoders."""

    @abstractmethod
    def run_network(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """One forward; latents and conditioning are on the device and in the model's dtype, times float32."""

    @abstractmethod
    def readers(self, pipeline: Any) -> list[tuple[Any, int, str]]:
        """(tokenizer, tokens read, who reads them) of each text encoder, to warn of prompts that are cut."""

    def conditioning_shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one prompt's row of what :meth:`encode_with` returns, for planning without text encoders.

        Args:
            clip_tokens: tokens that CLIP's tokenizer reads.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how its conditioning is shaped")

    def to_pixels(self, latents: Tensor) -> Tensor:
        """The sampler's latents as the VAE takes them, [B, C, h, w]: scaled back, and unpacked if packed."""
        config = self.vae.config
        scaled: Tensor = latents / config["scaling_factor"] + (config["shift_factor"] or 0.0)
        return scaled

    def predict_halves(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> PolicyOutput:
        """One forward, or both halves of classifier-free guidance in one forward of twice the batch.

        The times go in as they are; diffusers rounds them to the model's dtype.
        """
        device, dtype, count = latents.device, self.dtype, latents.shape[0]
        latents, times = latents.to(dtype), times.to(device, torch.float32)
        given = {name: value.to(device, dtype) for name, value in conditioning.items()}
        self.work.count_network(count if self.cfg_scale == 1 else 2 * count)
        if self.cfg_scale == 1:
            return PolicyOutput(self.run_network(latents, times, given), None)
        negative = self._negative_conditioning(device)
        both = {
            name: torch.cat((negative[name].to(dtype).expand(count, *value.shape[1:]), value))
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
        """Conditioning of each prompt, from the cache."""
        cache = self._cache()
        if cache.missing(prompts):
            self.prepare_prompts(prompts)
        return cache.load(prompts)

    def prepare_prompts(self, prompts: Sequence[str]) -> None:
        """Encode what the cache lacks; the encoders load only for that, and leave the memory afterwards."""
        prompts = self._with_negative(prompts)
        cache, encoders, device = self._cache(), list[Any](), self.encoding_device or self.device

        def encode_now(chunk: list[str]) -> Conditioning:
            if not encoders:
                encoders.append(self._load_parts(*self.encoder_parts).to(device))
                for name in self.encoder_parts:
                    if isinstance(part := getattr(encoders[0], name), nn.Module):
                        check_finite(part, cast(Path, self.folder) / name)
            with torch.no_grad(), quiet_libraries():  # diffusers reports every cut prompt at length
                return self.encode_with(encoders[0], chunk, device)

        if cache.missing(prompts) and rank() == 0:
            self._warn_of_long_prompts(prompts)
        cache.fill(prompts, encode_now)
        if encoders:
            encoders.clear()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _with_negative(self, prompts: Sequence[str]) -> Sequence[str]:
        """Whoever asks for prompts needs the unconditional half, too."""
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
        """Within the block the network has the rollout's attention backend, and its adapters merged if so wished."""
        merged = merged_adapters(self.network) if settings.merge_lora else nullcontext()
        with attention_backend(self.network, settings.attention), merged:
            yield

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images."""
        self.work.decodes += len(latents)
        pixels = self.to_pixels(latents).to(next(self.vae.parameters()).dtype)
        # A few images at a time: the decoder's activations, not the network's, would limit the batch.
        at_once = max(1, DECODED_PIXELS // (self.rows * self.columns * (self.cell * self.vae_scale) ** 2))
        parts = [self.vae.decode(part, return_dict=False)[0].float() for part in pixels.split(at_once)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    def save_weights(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """``pytorch_lora_weights.safetensors``, by names that diffusers and ComfyUI read, or the network's folder."""
        if hasattr(self.network, "peft_config"):
            folder.mkdir(parents=True, exist_ok=True)
            layers = trained_updates(self.network, state)
            write_lora(folder / LORA_FILE, layers, type(self), about=self.about)
        else:
            # save_pretrained would write what this rank holds of the weights, which under ZeRO 3 is nothing.
            target = folder / self.trained_part
            self.network.save_config(target)
            whole = {**self.network.state_dict(), **state}  # buffers, such as SD3's places, are not trained
            save_torch_state_dict(whole, target, filename_pattern=WEIGHTS_PATTERN, max_shard_size="10GB")
            for file in target.glob("*.safetensors"):
                file.chmod(0o644)  # the library lets nobody else read it

    @classmethod
    def load_pipeline(cls, folder: Path, settings: ModelConfig, parts: Collection[str] | None = None) -> Any:
        """diffusers' pipeline of a folder that :func:`pcpo_fast.policies.folder_checks.check_folder` has passed.

        Args:
            folder: the pipeline's.
            settings: the configuration's ``model`` section: dtype, variant, and a single file of the network.
            parts: what to load besides the scheduler; None: all that are used.

        Raises:
            UserError: diffusers cannot load it.
        """
        # diffusers wants to be told what model_index.json says already: which parts there are not.
        given: dict[str, Any] = dict.fromkeys(part_classes(folder))
        try:
            with quiet_libraries():
                for name, kind in used_parts(folder, cls).items():
                    if name == "scheduler":
                        del given[name]
                    elif parts is None or name in parts:
                        given[name] = cls._load_part(folder, name, kind, settings)
                return cls.pipeline_class.from_pretrained(folder, local_files_only=True, **given)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, UnpicklingError) as error:
            reason = reason_of(error)
            name = cls.pipeline_class.__name__
            raise UserError(f"model.path: {folder} cannot be loaded as a {name}: {reason}") from None

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
        """A pipeline of nothing but a scheduler and some of the encoders and tokenizers."""
        assert self.folder is not None  # as for the cache
        return self.load_pipeline(self.folder, self.settings, parts)


def _config_of(folder: Path, part: str) -> dict[str, Any]:
    """``config.json`` of a part; empty where it cannot be read, since loading the part says what is wrong with it."""
    try:
        config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def vae_factor(vae_config: Mapping[str, Any]) -> int:
    """How many pixels across a latent is: the VAE halves the image between its blocks."""
    return int(2 ** (len(vae_config["block_out_channels"]) - 1))


def cell_grid(vae_config: Mapping[str, Any], height: int, width: int, cell: int) -> tuple[int, int]:
    """Rows and columns of the cells that an image makes.

    Args:
        vae_config: of the pipeline.
        height, width: of the image, in pixels.
        cell: latent pixels across that the network takes as one.

    Raises:
        UserError: VAE and network cannot take the image size.
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
