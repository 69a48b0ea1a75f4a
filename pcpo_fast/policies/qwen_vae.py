"""What the families with Qwen-Image's VAE share: packed latents, which it decodes as a video of one frame."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from pcpo_fast.policies.pipeline_policy import PipelinePolicy, unpacked


class QwenVaePolicy(PipelinePolicy):
    """A policy whose VAE is a :class:`diffusers.AutoencoderKLQwenImage`.

    Latents are packed: [B, tokens, channels] with one token per 2 x 2 latent pixels, as the transformer takes them.
    """

    packs_latents: ClassVar[bool] = True

    def __init__(self, network: Any, *others: Any, **places: Any) -> None:
        """As :class:`PipelinePolicy`."""
        super().__init__(network, *others, **places)
        config = self.vae.config
        self._latent_scale = torch.tensor((config["latents_mean"], config["latents_std"]), dtype=torch.float32)

    def to_pixels(self, latents: Tensor) -> Tensor:
        """The packed latents unpacked, with the VAE's mean and deviation of each channel, as a video of one frame."""
        if self._latent_scale.device != latents.device:
            self._latent_scale = self._latent_scale.to(latents.device)
        mean, std = self._latent_scale.to(latents.dtype).view(2, 1, -1, 1, 1)
        return (unpacked(latents, self.rows, self.columns) * std + mean).unsqueeze(2)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images: the video's only frame."""
        return super().decode(latents).squeeze(2)
