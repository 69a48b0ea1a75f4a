"""A FluxPipeline of random weights, small enough to run in milliseconds, and a configuration that trains it.

Images are 16 x 24: a height that differs from the width shows every mix-up of rows and columns.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:  # the kernels' tests run where only PyTorch and Triton are installed
    from pcpo_fast.config.schema import Config

HEIGHT, WIDTH, TOKENS, CHANNELS = 16, 24, 24, 16
WORDS = ("a", "red", "green", "blue", "circle", "square", "on", "background")
PROMPTS = ("a red circle", "a green square", "a blue circle on a red background", "a red square")
TRANSFORMER = {
    "patch_size": 1,
    "in_channels": CHANNELS,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


def build_pipeline(folder: Path, **transformer: Any) -> None:
    """Write the pipeline; keyword arguments change the transformer's configuration."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=8
        ),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=tiny_clip(CLIPTextModel),
        tokenizer=clip_tokenizer(),
        text_encoder_2=tiny_t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(**(TRANSFORMER | transformer)),
    ).save_pretrained(folder)


def tiny_vae(**config: Any) -> Any:
    """A VAE that halves the image once, without weights for anything else."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=CHANNELS // 4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.7,
        **config,
    )


def clip_tokenizer() -> Any:
    """Letters only; reads 40 tokens."""
    from transformers import CLIPTokenizer

    letters = sorted(set("".join(WORDS)))
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer({piece: i for i, piece in enumerate(pieces)}, [], model_max_length=40)


def tiny_clip(kind: Any, width: int = 32, layers: int = 1) -> Any:
    """CLIP's text model of a class of transformers'."""
    from transformers import CLIPTextConfig

    clip = clip_tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=width,
            intermediate_size=32,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=40,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
    )


def t5_tokenizer() -> Any:
    """Words only."""
    from transformers import T5TokenizerFast

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(vocab=special + [("\u2581" + w, -1.0) for w in WORDS], extra_ids=0, model_max_length=512)


def tiny_t5() -> Any:
    """T5's encoder."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=32,
            d_kv=16,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the pipeline; do not write into it."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    build_pipeline(folder)
    return folder


@pytest.fixture
def own_pipeline(pipeline_folder: Path, tmp_path: Path) -> Path:
    """A copy of the pipeline that tests may modify."""
    return Path(shutil.copytree(pipeline_folder, tmp_path / "pipeline"))


@pytest.fixture
def process_group() -> Iterator[torch.device]:
    """DeepSpeed's process group in this process; kept between tests, because starting it takes seconds."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from pcpo_fast.engine.engine import start_distributed

    yield start_distributed()


def tiny_config(pipeline: Path, *overrides: str) -> "Config":
    """A run of two updates of four images on the pipeline, in float32; ``overrides`` are ``key=value``.

    Later overrides take precedence; settings that then have no effect are dropped, because they would be rejected.
    """
    from pcpo_fast.config.loading import load_config

    last = dict(override.split("=", 1) for override in overrides)
    unused = ("model.lora.",) if last.get("model.finetune") == "full" else ()
    unused += ("model.negative_prompt",) if float(last.get("model.cfg_scale", 1)) == 1 else ()
    unused += ("sampler.grid", "sampler.shift") if last.get("sampler.name") == "ddim" else ()
    overrides = tuple(override for override in overrides if not override.startswith(unused or ("\n",)))
    heldout = () if "prompts.heldout=null" in overrides else ("evaluation.prompts=2",)
    tokens = () if (pipeline / "unet").is_dir() else ("model.max_sequence_length=12",)  # T5's
    return load_config(
        None,
        [
            f"model.path={pipeline}",
            f"model.embedding_cache={pipeline.parent / 'embeddings'}",
            f"output_dir={pipeline.parent / 'run'}",
            f"model.height={HEIGHT}",
            f"model.width={WIDTH}",
            *tokens,
            "sampler.steps=4",
            "sampler.noise=0.7",
            "rollout.prompts_per_epoch=2",
            "rollout.images_per_prompt=4",
            "rollout.batch_size=8",
            "rewards=[{name: 'tiny_pipeline:redness'}]",
            "optimizer.lr=1e-3",
            "train.epochs=2",
            "train.updates_per_epoch=2",
            "train.micro_batch_size=6",
            *heldout,
            "logging.tensorboard=false",
            *overrides,
        ],
    )


def rolled_out(policy: Any, conditioning: Any, latents: Tensor, table: Any) -> Any:
    """Trajectories of a sampler without noise, for which seeds do not matter."""
    from pcpo_fast.rollout.rollout import Trajectories, sampler_steps

    seeds = torch.zeros(len(latents), dtype=torch.int64)
    return Trajectories.of(latents, sampler_steps(policy, conditioning, latents, seeds, table))


def redness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """A reward that depends smoothly on the pixels."""
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))
