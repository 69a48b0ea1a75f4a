"""Pipelines of random weights of the other families, small enough to run in milliseconds, and what trains them.

Images are those of :mod:`tiny_pipeline`, 16 x 24, and so are the words.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipeline import CHANNELS, WORDS, clip_tokenizer, t5_tokenizer, tiny_clip, tiny_t5, tiny_vae

NEGATIVE = "a blue square"
GUIDED = ("model.cfg_scale=3.0", f"model.negative_prompt={NEGATIVE}")
SD_RUN = (*GUIDED, "sampler.name=ddim", "sampler.noise=1.0", "credit.rule=uniform")
FLOW_RUN = ("sampler.name=flow", "sampler.noise=0.7", "sampler.grid=scheduler", "credit.rule=native")
SD3_RUN = (*GUIDED, *FLOW_RUN)
EMBEDDED_RUN = ("model.guidance=3.0", *FLOW_RUN)

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
"""What the published scheduler_config.json of Stable Diffusion 1.x says besides its class, PNDMScheduler."""

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
}
TRANSFORMER = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}

QWEN_IMAGE = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS // 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}
Z_IMAGE = {
    "in_channels": CHANNELS // 4,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "axes_dims": (4, 6, 6),
    "axes_lens": (600, 32, 32),
}
KREA2 = {
    "in_channels": CHANNELS,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "timestep_embed_dim": 16,
    "text_hidden_dim": 8,
    "num_text_layers": 3,
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 2,
    "text_intermediate_size": 16,
    "num_layerwise_text_blocks": 1,
    "num_refiner_text_blocks": 1,
    "axes_dims_rope": (4, 6, 6),
}
FLUX3 = {
    "in_channels": CHANNELS,
    "cond_in_channels": CHANNELS,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8 * 8,
    "axes_dims_rope": (4, 4, 4, 4),
}
KLEIN = {
    "in_channels": CHANNELS,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 3 * 16,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}


def build_sd(folder: Path, prediction: str = "epsilon", **unet: Any) -> None:
    """Write a StableDiffusionPipeline that predicts ``prediction``; keyword arguments change the UNet."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(1)
    StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_clip(CLIPTextModel),
        tokenizer=clip_tokenizer(),
        unet=scaled(UNet2DConditionModel(**(UNET | unet)), "conv_out", 3.0),
        scheduler=PNDMScheduler.from_config(SCHEDULER, prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def build_sd3(folder: Path, *, t5: bool = True, shift: float = 3.0, dynamic: bool = False, **transformer: Any) -> None:
    """Write a StableDiffusion3Pipeline; ``t5``: with its third text encoder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(2)
    StableDiffusion3Pipeline(
        transformer=scaled(SD3Transformer2DModel(**(TRANSFORMER | transformer)), "proj_out", 1.5),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic, base_image_seq_len=8),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=tiny_clip(CLIPTextModelWithProjection, 16, 2),
        tokenizer=clip_tokenizer(),
        text_encoder_2=tiny_clip(CLIPTextModelWithProjection, 8, 2),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=tiny_t5() if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    ).save_pretrained(folder)


def build_z_image(folder: Path, *, template: bool = True, **transformer: Any) -> None:
    """Write a ZImagePipeline; ``template``: its tokenizer has a chat template."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(4)
    network = ZImageTransformer2DModel(**(Z_IMAGE | transformer))
    with torch.no_grad():
        scaled(network.all_final_layer["2-1"], "linear", 3.0)
        for token in (network.x_pad_token, network.cap_pad_token):
            token.normal_()  # zeros before training
        network.t_embedder.mlp[2].weight.mul_(8)  # the time matters
        network.cap_embedder[1].weight.mul_(4)  # and so does the text
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=tiny_qwen(layers=3).model,
        tokenizer=qwen_tokenizer(template),
        transformer=network,
    ).save_pretrained(folder)


def build_qwen_image(folder: Path, **transformer: Any) -> None:
    """Write a QwenImagePipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(5)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=8, shift_terminal=0.02
    )
    network = scaled(QwenImageTransformer2DModel(**(QWEN_IMAGE | transformer)), "proj_out", 2.0)
    tokenizer = qwen_tokenizer(False)
    pipeline: Any = QwenImagePipeline(scheduler, tiny_qwen_vae(), None, tokenizer, network)
    add_template(tokenizer, pipeline.prompt_template_encode.partition("{}")[0], pipeline)
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=sight))
    pipeline.register_modules(text_encoder=encoder)
    pipeline.save_pretrained(folder)


def add_template(tokenizer: Any, before: str, pipeline: Any) -> None:
    """Add tokens to a tokenizer so that what the pipeline puts before a prompt are as many as it leaves out."""
    rest, last = before.removeprefix("<|im_start|>"), pipeline.prompt_template_encode_start_idx - 2
    tokenizer.add_tokens([rest[4 * i : 4 * i + 4] for i in range(last)] + [rest[4 * last :]], special_tokens=True)


def tiny_qwen_vae() -> Any:
    """The VAE of Qwen-Image, halving the image once."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS // 4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.4, 0.3, 0.9],
        latents_std=[1.5, 0.7, 2.1, 1.1],
    )


def build_krea2(folder: Path, *, distilled: bool = False, layers: int = 4, **transformer: Any) -> None:
    """Write a Krea2Pipeline; ``layers``: of its text encoder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel

    torch.manual_seed(7)
    network = scaled(Krea2Transformer2DModel(**(KREA2 | transformer)), "final_layer.linear", 2.0)
    with torch.no_grad():  # text and time matter; tables and scales start at zero
        network.time_mod_proj.weight.mul_(8)
        network.txt_in.linear_2.weight.mul_(4)
        for name, value in network.named_parameters():
            if name.endswith(("scale_shift_table", "norm1.weight", "norm2.weight", "norm_q.weight", "norm_k.weight")):
                value.uniform_(-0.5, 0.5)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=8, max_image_seq_len=200
    )
    tokenizer = qwen_tokenizer(False)
    pipeline: Any = Krea2Pipeline(
        scheduler, tiny_qwen_vae(), None, tokenizer, network, (1, 2, 4), is_distilled=distilled
    )
    add_template(tokenizer, pipeline.prompt_template_encode_prefix, pipeline)
    tokenizer.add_tokens(["\n", "assistant"], special_tokens=True)  # with the other two, what follows a prompt
    pipeline.register_modules(text_encoder=tiny_qwen3_vl(layers, len(tokenizer)).model)
    pipeline.save_pretrained(folder)


def build_klein(folder: Path, *, distilled: bool = False, template: bool = True, **transformer: Any) -> None:
    """Write a Flux2KleinPipeline; ``template``: its tokenizer has a chat template."""
    from diffusers import Flux2KleinPipeline

    torch.manual_seed(3)
    pipeline: Any = Flux2KleinPipeline(
        text_encoder=tiny_qwen(),
        tokenizer=qwen_tokenizer(template),
        is_distilled=distilled,
        **flux2_parts(**transformer),
    )
    pipeline.save_pretrained(folder)


def build_flux2_dev(folder: Path, *, template: bool = True, layers: int = 31, **transformer: Any) -> None:
    """Write a Flux2Pipeline; ``template``: its tokenizer has a chat template, ``layers``: of its text encoder.

    The tokenizer's folder has what a PixtralProcessor is loaded from.
    """
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    torch.manual_seed(6)
    tokenizer = mistral_tokenizer(template)
    text: dict[str, Any] = {
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.2,
    }
    sight = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config=text, vision_config=sight, image_token_index=tokenizer.convert_tokens_to_ids("[IMG]")
        )
    )
    parts = flux2_parts(**({"guidance_embeds": True} | transformer))
    with torch.no_grad():  # random weights tell 3 from 3.008, which it becomes in bf16, and a trained network does not
        parts["transformer"].time_guidance_embed.guidance_embedder.linear_2.weight.mul_(0.4)
    pipeline: Any = Flux2Pipeline(text_encoder=encoder, tokenizer=None, **parts)
    pipeline.save_pretrained(folder)
    for part in (tokenizer, PixtralImageProcessorPil()):
        part.save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "processor_config.json").write_text('{"processor_class": "PixtralProcessor"}')
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"tokenizer": ["transformers", "PixtralProcessor"]}, indent=2)
    )


def flux2_parts(**transformer: Any) -> dict[str, Any]:
    """What FLUX.2's pipelines have in common; keyword arguments change the transformer's configuration."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    vae = tiny_flux2_vae()
    network = scaled(Flux2Transformer2DModel(**(KLEIN | transformer)), "proj_out", 1.5)
    with torch.no_grad():  # the text matters
        for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
            getattr(network, name).linear.weight.mul_(8)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"scheduler": scheduler, "vae": vae, "transformer": network}


def build_flux3(folder: Path, **transformer: Any) -> None:
    """Write a Flux3ModularPipeline as its ``save_pretrained`` does: without a scheduler. Of the processor the tokenizer
    alone is there, since images cannot be processed without torchvision.
    """
    from diffusers import Flux3ModularPipeline, Flux3Transformer2DModel

    torch.manual_seed(6)
    network = scaled(Flux3Transformer2DModel(**(FLUX3 | transformer)), "proj_out", 3.0)
    with torch.no_grad():  # text and time matter
        for modulation in (*network.early_stream_modulations.values(), *network.single_stream_modulations.values()):
            modulation.linear.weight.mul_(8)
    pipeline: Any = Flux3ModularPipeline()
    parts = {"transformer": network, "vae": tiny_flux2_vae(), "text_encoder": tiny_qwen3_vl()}
    for name, part in (parts | {"tokenizer": qwen_tokenizer()}).items():
        setattr(pipeline, name, part)
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)


def tiny_flux2_vae() -> Any:
    """The VAE of FLUX.2 and FLUX.3, halving the image once."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=CHANNELS // 4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.uniform_(-1, 1)
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def tiny_qwen3_vl(layers: int = 33, tokens: int | None = None) -> Any:
    """Qwen3-VL, with one layer more than the last whose states FLUX.3 reads; ``tokens``: None for those of Qwen's."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text: dict[str, Any] = {
        "vocab_size": tokens or len(qwen_tokenizer()),
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }
    sight = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 8}
    sight |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 4}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=sight))


def qwen_tokenizer(template: bool = True) -> Any:
    """A token for each word, with and without a space before it; ``template``: with a chat template."""
    from transformers import Qwen2TokenizerFast

    vocabulary, merges = byte_pairs("<|endoftext|>")
    tokenizer = Qwen2TokenizerFast(
        vocab=vocabulary,
        merges=merges,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=131072,  # more than Qwen3's max_position_embeddings, as published
    )
    if template:
        tokenizer.chat_template = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    return tokenizer


def mistral_tokenizer(template: bool = True) -> Any:
    """As Qwen's, with what Mistral's does besides: a token before each text, and padding before that.

    The system message of FLUX.2-dev is one token.
    """
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary, merges = byte_pairs("<unk>", "<s>", "<pad>", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", SYSTEM_MESSAGE],
        padding_side="left",
        model_max_length=10**30,  # as published
    )
    if template:
        tokenizer.chat_template = (
            "{{ bos_token }}{% for message in messages %}{{ message.content[0].text }}{% endfor %}[/INST]"
        )
    return tokenizer


def byte_pairs(*special: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges of a tokenizer of :data:`WORDS`."""
    space, words = "\u0120", sorted(WORDS, key=len, reverse=True)
    # A longer word's letters are merged before a shorter one's, which would split it.
    merges = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    merges += [(space, word) for word in words]
    letters = [*sorted(set("".join(WORDS))), space]
    pieces = dict.fromkeys([*special, *letters, *map("".join, merges)])
    return {piece: number for number, piece in enumerate(pieces)}, merges


def tiny_qwen(width: int = 16, layers: int = 28) -> Any:
    """Qwen3, with one layer more than the last whose states are read."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(qwen_tokenizer()),
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=40960,
            initializer_range=0.2,
            tie_word_embeddings=True,
        )
    )


def scaled(network: Any, layer: str, factor: float) -> Any:
    """The network with its last layer enlarged, so that what it predicts is of size 1, as a trained one's is."""
    with torch.no_grad():
        network.get_submodule(layer).weight.mul_(factor)
    return network


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 1.x; do not write into it."""
    folder = tmp_path_factory.mktemp("sd") / "pipeline"
    build_sd(folder)
    return folder


@pytest.fixture(scope="session")
def sd_v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 2.x: the UNet predicts v; do not write into it."""
    folder = tmp_path_factory.mktemp("sd_v") / "pipeline"
    build_sd(folder, "v_prediction")
    return folder


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 3; do not write into it."""
    folder = tmp_path_factory.mktemp("sd3") / "pipeline"
    build_sd3(folder)
    return folder


@pytest.fixture(scope="session")
def z_image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Z-Image; do not write into it."""
    folder = tmp_path_factory.mktemp("z_image") / "pipeline"
    build_z_image(folder)
    return folder


@pytest.fixture(scope="session")
def qwen_image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen-Image; do not write into it."""
    folder = tmp_path_factory.mktemp("qwen_image") / "pipeline"
    build_qwen_image(folder)
    return folder


@pytest.fixture(scope="session")
def krea2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Krea 2; do not write into it."""
    folder = tmp_path_factory.mktemp("krea2") / "pipeline"
    build_krea2(folder)
    return folder


@pytest.fixture(scope="session")
def flux3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.3; do not write into it."""
    folder = tmp_path_factory.mktemp("flux3") / "pipeline"
    build_flux3(folder)
    return folder


@pytest.fixture(scope="session")
def klein_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.2-klein; do not write into it."""
    folder = tmp_path_factory.mktemp("klein") / "pipeline"
    build_klein(folder)
    return folder


@pytest.fixture(scope="session")
def flux2_dev_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.2-dev; do not write into it."""
    folder = tmp_path_factory.mktemp("flux2_dev") / "pipeline"
    build_flux2_dev(folder)
    return folder
