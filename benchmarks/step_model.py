"""FLUX with random weights in four sizes, and what a training step needs around it: no download, no text encoder."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor

from pcpo_fast.config.loading import load_config
from pcpo_fast.config.schema import Config
from pcpo_fast.errors import UserError
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.models import Architecture
from pcpo_fast.planning.published import PUBLISHED
from pcpo_fast.policies.flux import FluxPolicy

SHARE_OF_MEMORY = 0.92
"""Share of a GPU's memory for the planned peak; the rest is for the context, libraries and fragmentation."""
FLUX = PUBLISHED["black-forest-labs/FLUX.1-dev"]
TRANSFORMER, VAE = (dict(FLUX["parts"][name][1]) for name in ("transformer", "vae"))


@dataclass(frozen=True)
class Size:
    """A model and the step that is measured on it.

    Attributes:
        transformer, vae: diffusers' configurations.
        image: height and width in pixels.
        text: T5 tokens.
        images: group size; one prompt is sampled.
        steps: denoising steps.
        trained: share of the steps that are trained, of each image.
        together: (image, step) pairs in a micro-batch of the fast paths.
        dtype: of the model.
        lora: settings of the adapters.
        counted: operations of one image's (forward, training step) by way of fine-tuning; without them they are counted
            when they are asked for, which takes seconds at FLUX's size.
        memory: GiB that the plan needs with LoRA and nothing recomputed: for everything but the micro-batch, and for
            each of its pairs.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    image: int
    text: int
    images: int
    steps: int
    trained: float
    together: int
    dtype: str
    lora: tuple[str, ...] = field(default=())
    counted: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    memory: tuple[float, float] | None = None

    def fitting(self, gib: float) -> "Size":
        """The same step in micro-batches that a GPU with this much memory has room for.

        Raises:
            UserError: it has none for a single pair.
        """
        if self.memory is None:
            return self
        base, each = self.memory
        fits = math.floor((SHARE_OF_MEMORY * gib - base) / each)
        if fits < 1:
            raise UserError(f"this size needs {(base + each) / SHARE_OF_MEMORY:.0f} GiB, but this GPU has {gib:.0f}")
        return replace(self, together=min(self.together, fits))

    def operations(self, config: Config) -> tuple[float, float]:
        """Of one image's forward, and of one trained pair: recomputation is never among them."""
        found = self.counted.get(config.model.finetune)
        if found is None:
            costs = model_costs(self, config)
            found = costs.forward(1).flops, costs.training(1, False).flops
        return found

    def config(self, finetune: str, *overrides: str) -> Config:
        """A run of PCPO with one prompt and one update in an epoch, and nothing fast switched on."""
        return load_config(
            None,
            [
                "model.path=random-flux",
                f"model.dtype={self.dtype}",
                f"model.finetune={finetune}",
                f"model.height={self.image}",
                f"model.width={self.image}",
                f"model.max_sequence_length={self.text}",
                "prompts.heldout=null",
                f"sampler.steps={self.steps}",
                f"rollout.images_per_prompt={self.images}",
                "rollout.prompts_per_epoch=1",
                "rollout.batch_size=1",
                f"credit.fraction={self.trained}",
                "train.updates_per_epoch=1",
                "train.micro_batch_size=1",
                "optimizer.lr=1e-6",
                *(self.lora if finetune == "lora" else ()),
                *overrides,
            ],
        )


# FLUX.1-dev, and DanceGRPO's step for one prompt: 12 images, 16 steps, 9 of them trained, 720 x 720.
FULL = Size(
    transformer=TRANSFORMER,
    vae=VAE,
    image=720,
    text=512,
    images=12,
    steps=16,
    trained=0.6,
    together=4,
    dtype="bfloat16",
    lora=("model.lora.rank=128", "model.lora.alpha=256"),
    counted={"lora": (38419263762432.0, 82314038022144.0), "full": (37282012311552.0, 111832347906048.0)},
    memory=(27.9, 12.5),
)
SIZES = {
    "cpu": Size(
        transformer=TRANSFORMER
        | {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 4,
            "attention_head_dim": 32,
            "num_attention_heads": 4,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (8, 12, 12),
        },
        vae=VAE
        | {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (16, 16),
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 8,
            "mid_block_add_attention": False,
        },
        image=64,
        text=32,
        images=12,
        steps=6,
        trained=0.6,
        together=6,
        dtype="float32",
        lora=("model.lora.rank=8", "model.lora.alpha=16"),
    ),
    # A fifth of FLUX's depth at its full width, for GPUs of 24 GB.
    "small": replace(
        FULL,
        transformer=TRANSFORMER | {"num_layers": 4, "num_single_layers": 8},
        image=512,
        counted={"lora": (4682707107840.0, 9752916000768.0), "full": (4537751961600.0, 13599960465408.0)},
        memory=None,
    ),
    "full": FULL,
}
"""What ``--size`` takes."""
# Two blocks and four tiny images: runs every line of the benchmark in seconds; the numbers are meaningless.
SIZES["dry"] = replace(
    SIZES["cpu"],
    transformer={**SIZES["cpu"].transformer, "num_layers": 1, "num_single_layers": 1},
    image=16,
    text=4,
    images=4,
    steps=4,
    together=2,
)


def random_network(size: Size, device: torch.device, dtype: torch.dtype) -> Any:
    """FLUX's transformer with the same random weights every time."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            network = FluxTransformer2DModel(**size.transformer)
    finally:
        torch.set_default_dtype(before)
    return network.requires_grad_(False)


def random_policy(size: Size, config: Config, device: torch.device, network: Any) -> FluxPolicy:
    """A policy around a network, with a random VAE."""
    torch.manual_seed(1)
    with device:  # drawn where they are used: a CPU takes seconds for what a GPU does at once
        vae: Any = AutoencoderKL(**size.vae)
    return FluxPolicy(
        network,
        vae.to(device, network.dtype).requires_grad_(False).eval(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        config.model,
    )


def random_embeddings(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the text encoders would have said of one prompt: [1, ...] each."""
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "prompt_embeds": (1, size.text, size.transformer["joint_attention_dim"]),
        "pooled_prompt_embeds": (1, size.transformer["pooled_projection_dim"]),
    }
    return {name: torch.randn(*shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}


def model_costs(size: Size, config: Config) -> ModelCosts:
    """Counted operations of the model: recomputation is never among them."""
    parts = {
        "transformer": ("FluxTransformer2DModel", dict(size.transformer)),
        "vae": ("AutoencoderKL", dict(size.vae)),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    }
    return ModelCosts(Architecture(FLUX["pipeline"], parts, FLUX["clip_tokens"], "random weights"), config.model)
