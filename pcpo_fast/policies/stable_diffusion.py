"""Stable Diffusion 1.x as a policy: a UNet that predicts epsilon or v, DDIM's timesteps, classifier-free guidance."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.method.schedules import DiffusionSchedule, Schedule
from pcpo_fast.method.transitions import PredictionType
from pcpo_fast.policies.base import Conditioning
from pcpo_fast.policies.part_checks import about
from pcpo_fast.policies.pipeline_policy import Fit, PipelinePolicy
from pcpo_fast.policies.quiet import quiet_libraries


class StableDiffusionPolicy(PipelinePolicy):
    """Stable Diffusion 1.x and 2.x, or any other :class:`diffusers.StableDiffusionPipeline`.

    Latents are the VAE's, [B, C, h, w]. A time is a timestep over the number of training steps.
    """

    family: ClassVar[str] = "stable_diffusion"
    pipeline_class: ClassVar[Any] = StableDiffusionPipeline
    trained_part: ClassVar[str] = "unet"
    unused_parts: ClassVar[tuple[str, ...]] = ("safety_checker", "feature_extractor", "image_encoder")
    also_recomputed: ClassVar[tuple[str, ...]] = ("ResnetBlock2D",)
    cell: ClassVar[int] = 1
    schedule_kind: ClassVar[type[Schedule]] = DiffusionSchedule
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    fits: ClassVar[tuple[Fit, ...]] = (
        ("cross_attention_dim", 1, "text_encoder", "hidden_size"),
        ("in_channels", 1, "vae", "latent_channels"),
    )
    dispatches_attention: ClassVar[bool] = False
    kohya_keeps_names: ClassVar[bool] = True
    cuts_prompts: ClassVar[bool] = False

    @classmethod
    def head_dim(cls, config: Mapping[str, Any]) -> None:
        """The heads have several sizes, and ``attention_head_dim`` is their number."""

    @classmethod
    def release_weights(cls, layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """CompVis' names, which number blocks and the layers between them consecutively."""
        counted = (re.match(r"down_blocks\.\d+\.\w+\.(\d+)\.", layer) for layer in layers)
        depth = 1 + max((int(match[1]) for match in counted if match), default=1)
        found: dict[str, tuple[str, ...]] = {}
        for layer in layers:
            name = layer.replace("time_emb_proj", "emb_layers.1")
            if match := re.match(r"time_embedding\.linear_(\d)$", name):
                found[f"time_embed.{2 * int(match[1]) - 2}"] = (layer,)
            elif match := re.match(r"(down|up)_blocks\.(\d+)\.(attentions|resnets)\.(\d+)\.(.+)", name):
                stem, first = ("input", 1) if match[1] == "down" else ("output", 0)
                number = first + int(match[2]) * (depth + 1) + int(match[4])
                found[f"{stem}_blocks.{number}.{int(match[3] == 'attentions')}.{match[5]}"] = (layer,)
            elif match := re.match(r"mid_block\.(attentions|resnets)\.(\d+)\.(.+)", name):
                place = 1 if match[1] == "attentions" else 2 * int(match[2])
                found[f"middle_block.{place}.{match[3]}"] = (layer,)
        return found

    def encode_with(self, pipeline: Any, prompts: list[str], device: torch.device) -> Conditioning:
        """CLIP's states of each prompt."""
        states, _ = pipeline.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": states}

    def conditioning_shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        """CLIP's states."""
        return {"prompt_embeds": (clip_tokens, self.network.config["cross_attention_dim"])}

    def readers(self, pipeline: Any) -> list[tuple[Any, int, str]]:
        """CLIP alone."""
        return [(pipeline.tokenizer, pipeline.tokenizer.model_max_length, "CLIP reads")]

    def run_network(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Epsilon or v for a batch whose rows may be at different timesteps."""
        output: Tensor = self.forward_module(
            latents,
            (times * self.scheduler.config["num_train_timesteps"]).round(),  # times are integers over that number
            encoder_hidden_states=conditioning["prompt_embeds"],
            return_dict=False,
        )[0]
        return output

    def schedule(self, steps: int) -> DiffusionSchedule:
        """Alphas and timesteps of a DDIM scheduler made from the pipeline's own, as DDPO and DanceGRPO make it.

        Euler's ``linspace`` spacing, in which DDIM's steps would not meet, becomes DDIM's usual ``leading``, and the
        offset is 1, as the pipeline has it. Clipping and ``set_alpha_to_one`` play no part: see ``transitions.ddim``.

        Raises:
            UserError: the model predicts something else than epsilon or v, or epsilon at a timestep that leaves nothing
                of the image (zero terminal SNR); or it has no room for so many steps.
        """
        with quiet_libraries():  # settings of the other scheduler that DDIM does not know
            scheduler = DDIMScheduler.from_config(self.scheduler.config, steps_offset=1)
            if scheduler.config["timestep_spacing"] == "linspace":
                scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="leading")
        prediction = scheduler.config["prediction_type"]
        if prediction not in ("epsilon", "v_prediction"):
            raise UserError(
                f"model.path: the scheduler has prediction_type {prediction}; allowed are epsilon and v_prediction"
            )
        count = scheduler.config["num_train_timesteps"]
        if steps >= count:
            raise UserError(
                f"sampler.steps: {counted(steps, 'step')} do not fit the {count} that the model was trained on"
            )
        with about("scheduler/scheduler_config.json"):
            scheduler.set_timesteps(steps)
        alphas, timesteps = scheduler.alphas_cumprod.double(), scheduler.timesteps.long().cpu()
        if prediction == "epsilon" and float(alphas[timesteps[0]]) == 0:
            rescaled = scheduler.config["rescale_betas_zero_snr"]
            cause = "sets rescale_betas_zero_snr, which leaves" if rescaled else "has betas that leave"
            remedy = (
                "rescale_betas_zero_snr to false" if rescaled else "beta_start and beta_end to what it was trained on"
            )
            raise UserError(
                f"model.path: scheduler/scheduler_config.json {cause} nothing of the image at timestep "
                f"{int(timesteps[0])}, where prediction_type epsilon carries no information about it: set "
                f"prediction_type to v_prediction if the model was trained with it, otherwise {remedy}"
            )
        return DiffusionSchedule(alphas, timesteps, cast(PredictionType, prediction))
