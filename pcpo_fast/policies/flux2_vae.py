"""What FLUX.2 and FLUX.3 share: packed latents behind the VAE's batch norm, states of several layers of one encoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pcpo_fast.policies.part_checks import check_encoder_depth, check_rotary_axes
from pcpo_fast.policies.pipeline_policy import PipelinePolicy, unpacked


class Flux2VaePolicy(PipelinePolicy):
    """A policy whose VAE is a :class:`diffusers.AutoencoderKLFlux2`.

    Latents are packed: [B, tokens, channels] with one token per 2 x 2 latent pixels, as the transformer takes them.

    Attributes:
        layers: of the text encoder, whose states the network reads side by side.
        place_scale: distance of neighbouring image tokens in the rotary embeddings.
    """

    layers: ClassVar[tuple[int, ...]]
    place_scale: ClassVar[float] = 1.0
    packs_latents: ClassVar[bool] = True
    caption_width: ClassVar[str | None] = "joint_attention_dim"

    @classmethod
    def check_network(cls, file: Path, config: Mapping[str, Any]) -> None:
        """The axes of the rotary embeddings make up a head, and the text encoder has the layers that are read."""
        check_rotary_axes(file, config, (32, 32, 32, 32))
        check_encoder_depth(file.parent.parent / "text_encoder", cls.layers)

    def places(self, states: Tensor) -> dict[str, Tensor]:
        """Time, row, column and place in the text, of an image's tokens and of those of states [B, L, width]."""
        one, text, rows, columns = (
            torch.arange(count, dtype=torch.float32, device=states.device)
            for count in (1, states.shape[1], self.rows, self.columns)
        )
        image = torch.cartesian_prod(one, self.place_scale * rows, self.place_scale * columns, one)
        return {"img_ids": image, "txt_ids": torch.cartesian_prod(one, one, one, text)}

    def to_pixels(self, latents: Tensor) -> Tensor:
        """The latents as they were before the batch norm that the VAE applies to them, unpacked."""
        std = (self.vae.bn.running_var.to(latents) + self.vae.config["batch_norm_eps"]).sqrt()
        return unpacked(latents * std + self.vae.bn.running_mean.to(latents), self.rows, self.columns)
