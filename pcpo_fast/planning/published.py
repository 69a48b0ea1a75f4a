"""Architectures of the published models that the shipped configurations train, so that planning needs no download.

The numbers are those of the ``config.json`` files that the models' authors publish on the hub under the same names,
in diffusers' and transformers' terms. Three of these models are gated; their configurations are also stated in the
libraries' own defaults and conversion scripts, and the parameter counts that follow from them in the model cards and
papers: FLUX.1-dev 11,901,408,320; SD3.5-medium 2.24 billion; Stable Diffusion 1.x 859,520,964.
"""

from typing import Any

CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "projection_dim": 1280,
}
T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
}
"""The decoder that all three families have; they differ in the latent channels and their scale."""

FLUX_DEV: dict[str, Any] = {
    "pipeline": "FluxPipeline",
    "clip_tokens": 77,
    "parts": {
        "transformer": (
            "FluxTransformer2DModel",
            {
                "patch_size": 1,
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
                "guidance_embeds": True,
                "axes_dims_rope": [16, 56, 56],
            },
        ),
        "vae": (
            "AutoencoderKL",
            VAE
            | {
                "latent_channels": 16,
                "scaling_factor": 0.3611,
                "shift_factor": 0.1159,
                "use_quant_conv": False,
                "use_post_quant_conv": False,
            },
        ),
        "text_encoder": ("CLIPTextModel", CLIP_L),
        "text_encoder_2": ("T5EncoderModel", T5_XXL),
        "scheduler": (
            "FlowMatchEulerDiscreteScheduler",
            {
                "num_train_timesteps": 1000,
                "shift": 3.0,
                "use_dynamic_shifting": True,
                "base_shift": 0.5,
                "max_shift": 1.15,
                "base_image_seq_len": 256,
                "max_image_seq_len": 4096,
            },
        ),
    },
}

SD35_MEDIUM: dict[str, Any] = {
    "pipeline": "StableDiffusion3Pipeline",
    "clip_tokens": 77,
    "parts": {
        "transformer": (
            "SD3Transformer2DModel",
            {
                "sample_size": 128,
                "patch_size": 2,
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 24,
                "attention_head_dim": 64,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "caption_projection_dim": 1536,
                "pooled_projection_dim": 2048,
                "pos_embed_max_size": 384,
                "dual_attention_layers": list(range(13)),
                "qk_norm": "rms_norm",
            },
        ),
        "vae": (
            "AutoencoderKL",
            VAE
            | {
                "latent_channels": 16,
                "scaling_factor": 1.5305,
                "shift_factor": 0.0609,
                "use_quant_conv": False,
                "use_post_quant_conv": False,
            },
        ),
        "text_encoder": ("CLIPTextModelWithProjection", CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
        "text_encoder_3": ("T5EncoderModel", T5_XXL),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": 3.0}),
    },
}

SD1: dict[str, Any] = {
    "pipeline": "StableDiffusionPipeline",
    "clip_tokens": 77,
    "parts": {
        "unet": (
            "UNet2DConditionModel",
            {
                "sample_size": 64,
                "in_channels": 4,
                "out_channels": 4,
                "block_out_channels": [320, 640, 1280, 1280],
                "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
                "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
                "layers_per_block": 2,
                "cross_attention_dim": 768,
                "attention_head_dim": 8,
                "norm_num_groups": 32,
            },
        ),
        "vae": ("AutoencoderKL", VAE | {"latent_channels": 4, "scaling_factor": 0.18215, "sample_size": 512}),
        "text_encoder": ("CLIPTextModel", CLIP_L),
        "scheduler": (
            "PNDMScheduler",
            {
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "num_train_timesteps": 1000,
                "set_alpha_to_one": False,
                "skip_prk_steps": True,
                "steps_offset": 1,
            },
        ),
    },
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "black-forest-labs/FLUX.1-dev": FLUX_DEV,
    "stabilityai/stable-diffusion-3.5-medium": SD35_MEDIUM,
    "CompVis/stable-diffusion-v1-4": SD1,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD1,
}
"""By hub id: the pipeline's class, the tokens that CLIP reads, and each part's class and configuration."""
