"""Z-Image as a policy: time runs from noise to image in its network, and an image's places follow its caption's."""

from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar

import torch
from diffusers import ZImagePipeline
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from torch import Tensor
from torch.nn.functional import pad
from transformers import Qwen2TokenizerFast, Qwen3Model

from pcpo_fast.config.schema import ModelConfig
from pcpo_fast.errors import UserError
from pcpo_fast.method.schedules import FlowSchedule
from pcpo_fast.policies.base import Conditioning
from pcpo_fast.policies.embedding_cache import Encoded
from pcpo_fast.policies.flow_grids import shifted_schedule
from pcpo_fast.policies.lora_names import BlockNames
from pcpo_fast.policies.pipeline_policy import Fit, PipelinePolicy, warn_of_distillation, with_masks
from pcpo_fast.policies.speed import run_block

# The layers of diffusers' network that are the rows of each weight of the original release, as in diffusers'
# convert_z_image_transformer_checkpoint_to_diffusers; the others have the same names in both.
_FUSED = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
}
_SAME = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")
_BLOCKS: BlockNames = {
    name: (name, _FUSED | {layer: (layer,) for layer in _SAME})
    for name in ("layers", "noise_refiner", "context_refiner")
}
_REST = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
} | {name: name for name in ("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")}


class ZImagePolicy(PipelinePolicy):
    """Z-Image and Z-Image-Turbo: any :class:`diffusers.ZImagePipeline`.

    Latents are the VAE's, [B, C, h, w]; the transformer patches them itself.
    """

    family: ClassVar[str] = "z_image"
    pipeline_class: ClassVar[Any] = ZImagePipeline
    lora_targets: ClassVar[tuple[str, ...]] = (
        *(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *_SAME[:3],
    )
    # The pipeline would take any.
    other_kinds: ClassVar[dict[str, Any]] = {"text_encoder": Qwen3Model, "tokenizer": Qwen2TokenizerFast}
    # The refiners before them are few, and stay.
    block_lists: ClassVar[Mapping[str, tuple[str, ...]]] = {"layers": ("n_layers", "layers")}
    release_names: ClassVar[tuple[BlockNames, Mapping[str, str]]] = (_BLOCKS, _REST)
    fits: ClassVar[tuple[Fit, ...]] = (
        ("cap_feat_dim", 1, "text_encoder", "hidden_size"),
        ("in_channels", 1, "vae", "latent_channels"),
    )
    masks_prompts: ClassVar[bool] = True
    guidance_offset: ClassVar[float] = 1.0
    caption_width: ClassVar[str | None] = "cap_feat_dim"

    def __init__(self, network: Any, *others: Any, **places: Any) -> None:
        """As :class:`PipelinePolicy`; the network gets a forward of whole batches.

        Raises:
            UserError: VAE and network cannot take the image size, or the image has more places than the network knows.
        """
        super().__init__(network, *others, **places)
        self.check_places(*network.config["axes_lens"][1:])
        network.rope_embedder(network.x_pad_token.new_zeros(1, 3, dtype=torch.long))  # makes its tables
        network.forward = MethodType(forward_batch, network)

    @classmethod
    def head_dim(cls, config: Mapping[str, Any]) -> int | None:
        """The width over the number of heads."""
        return int(config.get("dim", 3840)) // int(config.get("n_heads", 30))

    @classmethod
    def check_network(cls, file: Path, config: Mapping[str, Any]) -> None:
        """The axes of the rotary embeddings make up a head, and patches are of 2 x 2 latent pixels."""
        axes, width = config.get("axes_dims", (32, 48, 48)), cls.head_dim(config)
        if sum(axes) != width:
            raise UserError(f"model.path: {file} says axes_dims {axes}, which must add up to dim / n_heads = {width}")
        if 2 not in config.get("all_patch_size", (2,)):
            raise UserError(f"model.path: {file} says all_patch_size {config['all_patch_size']}, which must contain 2")

    @classmethod
    def check_settings(cls, folder: Path, settings: ModelConfig) -> None:
        """Warns about training Z-Image-Turbo, which only its name distinguishes from Z-Image."""
        super().check_settings(folder, settings)
        if "z-image-turbo" in settings.path.lower():
            warn_of_distillation(settings.path)

    def encode_with(self, pipeline: Any, prompts: list[str], device: torch.device) -> Encoded:
        """States of Qwen3's last layer but one for each prompt in the chat template, without padding.

        Raises:
            UserError: the tokenizer has no chat template.
        """
        self.readers(pipeline)
        states, _ = pipeline.encode_prompt(
            list(prompts),  # the pipeline writes into the list
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.settings.max_sequence_length,
        )
        return with_masks(states)

    def readers(self, pipeline: Any) -> list[tuple[Any, int, str]]:
        """Qwen3, which reads the chat template around a prompt as well."""
        return [self.within_template(pipeline.tokenizer, "Qwen3", enable_thinking=True)]

    def run_network(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity for a batch whose rows may be at different times: the network's from noise to image, reversed."""
        scale = self.scheduler.config["num_train_timesteps"]
        reversed_velocity: Tensor = self.forward_module(
            hidden_states=latents,
            timestep=(scale - scale * times) / scale,  # with the rounding of the pipeline
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_hidden_states_mask=conditioning["prompt_mask"],
        )[0]
        return -reversed_velocity

    def schedule(self, steps: int) -> FlowSchedule:
        """The grid of the pipeline's scheduler for this image size (static or resolution-dependent shift)."""
        sigmas = get_default_z_image_sigmas(steps)
        return shifted_schedule(self.scheduler.config, self.rows * self.columns, steps, sigmas)


def forward_batch(
    network: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor,
) -> tuple[Tensor]:
    """What diffusers' network makes of lists of images and captions, for a batch of images of one size.

    diffusers cuts the captions to their lengths, which the host would have to wait for. Here they stay padded, with a
    mask, and their lengths stay on the device: an image's places follow its caption's.

    Args:
        network: a :class:`diffusers.ZImageTransformer2DModel`.
        hidden_states: latents [B, C, h, w].
        timestep: [B], 0 noise to 1 image.
        encoder_hidden_states: captions [B, L, width].
        encoder_hidden_states_mask: [B, L], 1 where a caption is and 0 after its end.

    Returns:
        The velocity from noise to image, [B, C, h, w].
    """

    batch, channels, height, width = hidden_states.shape
    rows, columns, device = height // 2, width // 2, hidden_states.device
    tokens = rows * columns
    missing = -encoder_hidden_states.shape[1] % SEQ_MULTI_OF
    written = pad(encoder_hidden_states_mask, (0, missing)) > 0
    # A caption ends at a multiple of 32 tokens; what it lacks is filled with a learned token, and is not masked.
    ends = (written.sum(dim=1, keepdim=True) + SEQ_MULTI_OF - 1) // SEQ_MULTI_OF * SEQ_MULTI_OF
    place = torch.arange(written.shape[1], device=device)
    seen = None if len(place) == SEQ_MULTI_OF else place < ends

    caption = network.cap_embedder(pad(encoder_hidden_states, (0, 0, 0, missing)))
    caption = torch.where(written.unsqueeze(-1), caption, network.cap_pad_token)
    caption_places = network.rope_embedder(pad(1 + place.unsqueeze(1), (0, 2))).expand(batch, -1, -1)
    for block in network.context_refiner:
        caption = run_block(network, block, caption, seen, caption_places)

    modulation = network.t_embedder(timestep * network.t_scale).to(hidden_states.dtype)
    patches = hidden_states.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 3, 5, 1)
    image = network.all_x_embedder["2-1"](patches.reshape(batch, tokens, 4 * channels))
    filled = -tokens % SEQ_MULTI_OF
    image = torch.cat((image, network.x_pad_token.expand(batch, filled, -1)), dim=1)
    across = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
    places = torch.cat(((1 + ends).expand(batch, tokens).unsqueeze(-1), across.expand(batch, -1, -1)), dim=-1)
    image_places = network.rope_embedder(pad(places, (0, 0, 0, filled)).flatten(0, 1)).unflatten(0, (batch, -1))
    for block in network.noise_refiner:
        image = run_block(network, block, image, None, image_places, modulation)

    both, both_places = torch.cat((image, caption), dim=1), torch.cat((image_places, caption_places), dim=1)
    both_seen = None if seen is None else pad(seen, (image.shape[1], 0), value=True)
    for block in network.layers:
        both = run_block(network, block, both, both_seen, both_places, modulation)
    patches = network.all_final_layer["2-1"](both[:, :tokens], c=modulation)
    patches = patches.reshape(batch, rows, columns, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
    return (patches.reshape(hidden_states.shape),)
