"""Folders of pipelines that are not whole: one sentence with part, file and weight, before anything is loaded."""

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipeline import PROMPTS, tiny_config
from tiny_pipelines import SD_RUN
from torch import Tensor

import pcpo_fast.distributed.collectives
from pcpo_fast.errors import UserError
from pcpo_fast.policies import part_checks
from pcpo_fast.policies.families import check_base_model, find_family, load_policy
from pcpo_fast.policies.folder_checks import check_folder
from pcpo_fast.policies.lora_files import describe_run
from pcpo_fast.policies.weight_files import variants
from pcpo_fast.training.run_inputs import read_contents

CPU = torch.device("cpu")
Q = "encoder.block.0.layer.0.SelfAttention.q.weight"
TO_Q = "transformer_blocks.0.attn.to_q.weight"
Spoil = Callable[[Path], object]


def check(folder: Path, *overrides: str) -> None:
    settings = tiny_config(folder, *overrides).model
    check_folder(*find_family(settings), settings)


def refusal(folder: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        check(folder, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights_of(part: Path) -> Path:
    return next(part.glob("*.safetensors"))


def edited(change: Callable[[dict[str, Tensor]], Any], part: str = "text_encoder_2") -> Spoil:
    """Change the weights of a part."""

    def spoil(folder: Path) -> None:
        file = weights_of(folder / part)
        state = load_file(file)
        save_file(change(state) or state, file, metadata={"format": "pt"})

    return spoil


def settings_of(part: str, file: str = "config.json", **changes: Any) -> Spoil:
    """Change the JSON file of a part."""

    def spoil(folder: Path) -> None:
        path = folder / part / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def written(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def cut(part: str) -> Spoil:
    def spoil(folder: Path) -> None:
        file = weights_of(folder / part)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return spoil


def renamed(part: str, name: str) -> Spoil:
    return lambda folder: weights_of(folder / part).rename(folder / part / name)


def tokenizer_without(*names: str) -> Spoil:
    """CLIP's tokenizer as vocab.json and merges.txt, some of them missing."""

    def spoil(folder: Path) -> None:
        part = folder / "tokenizer"
        whole = json.loads((part / "tokenizer.json").read_text())
        (part / "tokenizer.json").unlink()
        (part / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
        (part / "merges.txt").write_text("#version: 0.2\n")
        for name in names:
            (part / name).unlink()

    return spoil


def no_merges(folder: Path) -> None:
    """A word is in the vocabulary, and nothing makes it of its letters."""
    tokenizer_without()(folder)
    file = folder / "tokenizer/vocab.json"
    vocabulary = json.loads(file.read_text())
    file.write_text(json.dumps(vocabulary | {"red</w>": len(vocabulary)}))


def without_shard(folder: Path) -> None:
    sharded(folder / "transformer")
    (folder / "transformer/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


def sharded(part: Path, variant: str = "") -> None:
    """The weights of a network in two files with an index."""
    file = weights_of(part)
    state = load_file(file)
    file.unlink()
    names, places = sorted(state), {}
    for number, chosen in enumerate((names[::2], names[1::2]), start=1):
        name = f"diffusion_pytorch_model{variant}-{number:05d}-of-00002.safetensors"
        save_file({key: state[key] for key in chosen}, part / name, metadata={"format": "pt"})
        places |= dict.fromkeys(chosen, name)
    index = part / f"diffusion_pytorch_model.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
ENCODER, NETWORK = "text_encoder_2/model.safetensors", "transformer/diffusion_pytorch_model.safetensors"
QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True}

FAULTS: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "missing": (
        edited(lambda state: {name: value for name, value in state.items() if name != Q}),
        (ENCODER, f"lacks {Q}"),
    ),
    "renamed": (
        edited(lambda state: {f"model.{name}": value for name, value in state.items()}),
        (f"{ENCODER} is not the T5EncoderModel", "lacks encoder.", "and has model.encoder."),
    ),
    "unexpected": (edited(lambda state: state | {"extra": torch.zeros(1)}), (f"{ENCODER} has extra, which",)),
    "shape": (
        edited(lambda state: state | {Q: torch.zeros(3, 32)}),
        (f"{ENCODER}: {Q} has the shape [3, 32], but by config.json it must be [32, 32]",),
    ),
    "missing in the network": (
        edited(lambda state: {name: value for name, value in state.items() if name != TO_Q}, "transformer"),
        (NETWORK, f"lacks {TO_Q}"),
    ),
    "missing in CLIP": (
        edited(lambda state: {name: state[name] for name in sorted(state)[1:]}, "text_encoder"),
        ("text_encoder/model.safetensors lacks embeddings.position_embedding.weight",),
    ),
    "missing in the VAE": (
        edited(lambda state: {name: value for name, value in state.items() if name != "decoder.conv_in.bias"}, "vae"),
        ("vae/diffusion_pytorch_model.safetensors lacks decoder.conv_in.bias",),
    ),
    "more layers": (settings_of("transformer", num_layers=2), (f"{NETWORK} lacks transformer_blocks.1.",)),
    "fewer layers": (
        settings_of("transformer", num_single_layers=0),
        (f"{NETWORK} has single_transformer_blocks.0.", "which config.json does not have"),
    ),
    "nonsense layers": (settings_of("transformer", num_layers="many"), ("transformer/config.json makes no Flux",)),
    "cut": (cut("text_encoder_2"), (f"{ENCODER} is truncated or not a safetensors file", "download it again")),
    "cut network": (cut("transformer"), (f"{NETWORK} is truncated",)),
    "empty": (written(NETWORK, b""), (f"{NETWORK} is empty",)),
    "pointer": (written(ENCODER, POINTER), (f"{ENCODER} is a git-lfs pointer", "git lfs pull")),
    "pointer in the place of JSON": (written("vae/config.json", POINTER), ("vae/config.json is a git-lfs pointer",)),
    "other JSON": (written("vae/config.json", b"{"), ("vae/config.json is not valid JSON",)),
    "no object": (written("text_encoder/config.json", b"[]"), ("text_encoder/config.json must contain a JSON object",)),
    "no weights": (lambda folder: (folder / NETWORK).unlink(), ("transformer holds no diffusion_pytorch_model.saf",)),
    "pickles": (renamed("transformer", "diffusion_pytorch_model.bin"), ("transformer holds no", "pickled weights are")),
    "other name": (renamed("transformer", "flux.safetensors"), ("transformer holds no", "but flux.safetensors; name")),
    "no part": (lambda folder: shutil.rmtree(folder / "vae"), ("names vae, but there is no vae/",)),
    "no shard": (without_shard, ("model.safetensors.index.json says that", "00002-of-00002.safetensors, but there")),
    "T5 for CLIP": (
        lambda folder: shutil.copytree(folder / "text_encoder_2", folder / "text_encoder", dirs_exist_ok=True),
        ("text_encoder/config.json is of a model of the type t5; text_encoder must be a CLIPTextModel",),
    ),
    "T5 for CLIP by name": (
        settings_of("", "model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
        ("model_index.json says that text_encoder is a T5EncoderModel; it must be a CLIPTextModel",),
    ),
    "null part": (
        settings_of("", "model_index.json", text_encoder_2=[None, None]),
        ("model_index.json names no text_encoder_2, which a FluxPipeline needs",),
    ),
    "null VAE": (settings_of("", "model_index.json", vae=None), ("model_index.json names no vae",)),
    "own code": (
        settings_of("", "model_index.json", _class_name=["pipeline", "Mine"]),
        ("custom code (pipeline.Mi",),
    ),
    **{
        f"a scale that is {value!r}": (
            settings_of("vae", scaling_factor=value),
            ("vae/config.json: scaling_factor must be a number above 0, got",),
        )
        for value in (None, "0.18", 0, math.nan)
    },
    "a shift that is no number": (
        settings_of("vae", shift_factor="0.1"),
        ("vae/config.json: shift_factor must be a number, got '0.1'",),
    ),
    "four bits": (
        settings_of("transformer", quantization_config=QUANTISED),
        ("transformer is quantised (bitsandbytes, 4 bits; quantization_config in", "transformer/config.json"),
    ),
    "fp8": (
        edited(lambda state: {name: value.to(torch.float8_e4m3fn) for name, value in state.items()}, "transformer"),
        (f"{NETWORK} is quantised: ", "is stored as F8_E4M3"),
    ),
    "whole numbers": (
        edited(lambda state: {name: value.to(torch.int64) for name, value in state.items()}),
        (f"{ENCODER}: ", "is stored as I64, but weights must be floating-point numbers"),
    ),
    "GGUF": (renamed("transformer", "flux.gguf"), ("transformer holds no", "but flux.gguf; quantised weights cannot")),
    "no vocabulary": (
        lambda folder: (folder / "tokenizer_2/tokenizer.json").unlink(),
        ("tokenizer_2 has no vocabulary: neither tokenizer.json nor spiece.model is there",),
    ),
    "no vocab.json": (tokenizer_without("vocab.json"), ("tokenizer has no vocabulary", "nor vocab.json is there")),
    "no merges.txt": (tokenizer_without("merges.txt"), ("tokenizer has no vocabulary", "nor merges.txt is there")),
    "no merges": (no_merges, ("tokenizer/merges.txt lacks merges: no merge produces 'red</w>'",)),
    "broken vocabulary": (written("tokenizer/tokenizer.json", b"{"), ("tokenizer/tokenizer.json is not valid JSON",)),
    "empty vocabulary": (written("tokenizer/tokenizer.json", b"{}"), ("tokenizer/tokenizer.json",)),
    "larger vocabulary": (
        settings_of("text_encoder", vocab_size=10),
        ("text_encoder/model.safetensors: embeddings.token_embedding.weight has the shape",),
    ),
    "no length": (
        settings_of("tokenizer", "tokenizer_config.json", model_max_length=1000),
        ("tokenizer_config.json must set model_max_length to at most 40",),
    ),
    "a length that is no number": (
        settings_of("tokenizer", "tokenizer_config.json", model_max_length="40"),
        ("tokenizer_config.json must set model_max_length to at most 40",),
    ),
    "a class that is no name": (
        settings_of("", "model_index.json", _class_name={"a": 1}),
        ("is a {'a': 1}; allowed are FluxPipeline",),
    ),
    "no scheduler": (
        lambda folder: (folder / "scheduler/scheduler_config.json").unlink(),
        ("scheduler/scheduler_config.json does not exist",),
    ),
    "scheduler of another kind": (
        settings_of("", "model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
        ("scheduler/scheduler_config.json: a DDIMScheduler is for diffusion models, and this is a flow model",),
    ),
    "unknown scheduler": (
        settings_of("", "model_index.json", scheduler=["diffusers", "FlowMatchNothing"]),
        ("scheduler/scheduler_config.json makes no FlowMatchNothing",),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_whole_is_refused(fault: str, own_pipeline: Path) -> None:
    spoil, words = FAULTS[fault]
    spoil(own_pipeline)
    message = refusal(own_pipeline)
    assert message.startswith("model.path: ") and [word for word in words if word not in message] == [], message


def test_a_refusal_reaches_the_ranks_that_did_not_look(own_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(pcpo_fast.distributed.collectives, "gather_objects", lambda mine: ["model.path: cut off", mine])
    with pytest.raises(UserError, match=r"^model\.path: cut off$"):
        check_base_model(tiny_config(own_pipeline))


def test_a_file_that_changes_is_looked_at_again(own_pipeline: Path) -> None:
    check(own_pipeline)
    cut("vae")(own_pipeline)
    assert "vae/diffusion_pytorch_model.safetensors is truncated" in refusal(own_pipeline)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_that_are_no_numbers_are_refused(part: str, own_pipeline: Path) -> None:
    broken: list[str] = []

    def spoil(state: dict[str, Tensor]) -> None:
        broken.append(next(name for name in state if name.endswith("weight")))
        state[broken[0]].view(-1)[0] = float("nan")

    edited(spoil, part)(own_pipeline)
    with pytest.raises(UserError, match=rf"^model\.path: .*/{part}: {broken[0]} holds values that are infinite"):
        load_policy(tiny_config(own_pipeline, f"model.embedding_cache={own_pipeline / 'cache'}"), CPU, PROMPTS[:1])


def test_names_of_older_files_are_the_libraries_business(own_pipeline: Path, tmp_path: Path) -> None:
    """CLIP with its prefix and buffer of old; the VAE's attention as its first releases called it."""
    edited(
        lambda state: (
            {f"text_model.{name}": value for name, value in state.items()}
            | {"text_model.embeddings.position_ids": torch.arange(40)[None]}
        ),
        "text_encoder",
    )(own_pipeline)
    check(own_pipeline)
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    vae.save_pretrained(tmp_path / "vae")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, value in state.items():
            for new, former in old.items():
                name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
            found[name] = value
        return found

    edited(rename, "vae")(tmp_path)
    assert any("proj_attn" in name for name in load_file(weights_of(tmp_path / "vae")))
    part_checks.check_model(tmp_path / "vae", AutoencoderKL, None)


# Variants and shards


def test_files_of_a_variant_load(own_pipeline: Path, pipeline_folder: Path) -> None:
    plain = load_policy(tiny_config(pipeline_folder), CPU, PROMPTS[:1])
    sharded(own_pipeline / "transformer", ".fp16")
    renamed("vae", "diffusion_pytorch_model.fp16.safetensors")(own_pipeline)
    renamed("text_encoder", "model.fp16.safetensors")(own_pipeline)
    assert [variants(own_pipeline / part, "diffusers") for part in ("transformer", "vae")] == [["fp16"], ["fp16"]]
    for overrides in ((), ("model.variant=fp16",)):
        config = tiny_config(own_pipeline, f"model.embedding_cache={own_pipeline / 'cache'}", *overrides)
        policy = load_policy(config, CPU, PROMPTS[:1])
        for name, value in plain.module.state_dict().items():
            assert torch.equal(policy.module.state_dict()[name], value), name
        assert torch.equal(policy.encode(PROMPTS[:1])["prompt_embeds"], plain.encode(PROMPTS[:1])["prompt_embeds"])


def test_a_variant_is_the_one_that_was_asked_for(own_pipeline: Path) -> None:
    part = own_pipeline / "transformer"
    state = load_file(weights_of(part))
    save_file({name: value + 1 for name, value in state.items()}, part / "diffusion_pytorch_model.ema.safetensors")
    for variant, added in (("null", 0), ("ema", 1)):
        policy = load_policy(tiny_config(own_pipeline, f"model.variant={variant}"), CPU)
        assert torch.equal(policy.module.state_dict()[TO_Q], state[TO_Q] + added)
    assert refusal(own_pipeline, "model.variant=fp16") == (
        f"model.variant: {own_pipeline} has no weights of the variant fp16; available: ema"
    )
    (part / "diffusion_pytorch_model.safetensors").rename(part / "diffusion_pytorch_model.fp16.safetensors")
    assert "the variants ema, fp16: choose one with model.variant" in refusal(own_pipeline)


# Parts that are never used


def test_unused_parts_need_not_be_there(sd_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd_folder, tmp_path / "sd"))
    settings_of(
        "",
        "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )(folder)
    policy = load_policy(tiny_config(folder, *SD_RUN), CPU)
    assert policy.module.state_dict().keys() == load_file(weights_of(folder / "unet")).keys()


def test_the_third_encoder_is_there_whole_or_not_at_all(sd3_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd3_folder, tmp_path / "sd3"))
    settings_of("", "model_index.json", text_encoder_3=[None, None])(folder)
    assert "model_index.json names no text_encoder_3" in refusal(folder)
    settings_of("", "model_index.json", tokenizer_3=[None, None])(folder)
    check(folder)


# Single files


def published_unet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tiny UNet by the names of its authors (CompVis/latent-diffusion's openaimodel.py), in a whole checkpoint."""
    blocks = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.attentions.0": "input_blocks.1.1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
        "up_blocks.1.attentions.1": "output_blocks.3.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    within = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    found = {"first_stage_model.quant_conv.weight": torch.zeros(1), "cond_stage_model.ids": torch.zeros(1, 2).long()}
    for name, value in state.items():
        start = next(start for start in blocks if name.startswith(f"{start}."))
        rest = name.removeprefix(f"{start}.")
        layer = rest.partition(".")[0]
        if "resnets" in start:
            rest = rest.replace(layer, within[layer], 1)
        found[f"model.diffusion_model.{blocks[start]}.{rest}"] = value
    return found


def test_a_published_checkpoint_takes_the_place_of_the_unet(sd_folder: Path, tmp_path: Path) -> None:
    """Of the folder nothing but the network's configuration is read."""
    folder = Path(shutil.copytree(sd_folder, tmp_path / "sd"))
    weights = weights_of(folder / "unet")
    state = {name: value + 0.5 for name, value in load_file(weights).items()}
    weights.unlink()
    single = published_unet(state)
    save_file(single, tmp_path / "model.safetensors")
    config = tiny_config(folder, *SD_RUN, f"model.unet={tmp_path / 'model.safetensors'}")
    loaded = load_policy(config, CPU).module.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], value) for name, value in state.items())
    inputs = SimpleNamespace(prompts=[], heldout=[], rewards=SimpleNamespace(sources={}))
    read = read_contents(config, cast(Any, inputs))
    assert read["model.unet"]["files"].keys() == {"model.safetensors"}
    assert "model.unet" not in read["model.path"]["files"]  # a change is named where it is, and once
    assert describe_run(config)["base_model"] == "sd with model.safetensors"
    save_file({name: value for name, value in single.items() if "output_blocks.3.0" not in name}, tmp_path / "cut.sft")
    message = refusal(folder, f"model.unet={tmp_path / 'cut.sft'}")
    assert message.startswith(f"model.unet: {tmp_path / 'cut.sft'} ") and "up_blocks.1.resnets.1" in message


def test_a_published_flux_file_is_known_by_its_names(own_pipeline: Path, tmp_path: Path) -> None:
    """By the names of black-forest-labs/flux's model.py; diffusers' conversion knows the published width only."""
    width, inner = 3072, 4 * 3072
    settings_of("transformer", num_attention_heads=24, attention_head_dim=128, axes_dims_rope=[16, 56, 56])(
        own_pipeline
    )
    shapes: dict[str, list[int]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes.update({f"{name}.weight": [rows, columns], f"{name}.bias": [rows]})

    for name, columns in (("time_in", 256), ("vector_in", 32), ("guidance_in", 256)):
        linear(f"{name}.in_layer", width, columns)
        linear(f"{name}.out_layer", width, width)
    linear("img_in", width, 16)
    linear("txt_in", width, 32)
    for side in ("img", "txt"):
        linear(f"double_blocks.0.{side}_mod.lin", 6 * width, width)
        linear(f"double_blocks.0.{side}_attn.qkv", 3 * width, width)
        linear(f"double_blocks.0.{side}_attn.proj", width, width)
        linear(f"double_blocks.0.{side}_mlp.0", inner, width)
        linear(f"double_blocks.0.{side}_mlp.2", width, inner)
        shapes |= {f"double_blocks.0.{side}_attn.norm.{each}_norm.scale": [128] for each in ("query", "key")}
    linear("single_blocks.0.modulation.lin", 3 * width, width)
    linear("single_blocks.0.linear1", 3 * width + inner, width)
    linear("single_blocks.0.linear2", width, width + inner)
    shapes |= {f"single_blocks.0.norm.{each}_norm.scale": [128] for each in ("query", "key")}
    linear("final_layer.linear", 16, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    check(own_pipeline, f"model.transformer={hollow(tmp_path / 'flux.safetensors', shapes)}")
    shapes.pop("double_blocks.0.txt_attn.qkv.weight")
    file = hollow(tmp_path / "less.safetensors", shapes)
    message = refusal(own_pipeline, f"model.transformer={file}")
    assert message.startswith(f"model.transformer: {file} lacks double_blocks.0.txt_attn.qkv.weight")


def hollow(file: Path, shapes: dict[str, list[int]]) -> Path:
    """A safetensors file of bf16 zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)
    return file


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.safetensors", None, "does not exist"),
        ("model.gguf", b"GGUF0000", "is a GGUF file: quantised weights cannot be trained"),
        ("model.ckpt", b"PK", "is not a .safetensors file, and pickled weights are not supported"),
        ("model.safetensors", POINTER, "is a git-lfs pointer"),
        ("fp8.safetensors", {TO_Q: torch.zeros(2, 2).to(torch.float8_e4m3fn)}, f"{TO_Q} is stored as F8_E4M3"),
        (
            "lora.safetensors",
            {"lora_A.weight": torch.zeros(2, 2)},
            "holds no FluxTransformer2DModel: its names, such as lora_A.weight, are",
        ),
    ],
)
def test_single_files_that_are_no_network(
    name: str, content: Any, words: str, pipeline_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / name
    if isinstance(content, dict):
        save_file(content, file)
    elif content is not None:
        file.write_bytes(content)
    message = refusal(pipeline_folder, f"model.transformer={file}")
    assert message.startswith(f"model.transformer: {file} ") and words in message


def test_a_single_file_in_the_wrong_place(pipeline_folder: Path, tmp_path: Path) -> None:
    file = weights_of(pipeline_folder / "transformer")
    assert refusal(pipeline_folder, f"model.unet={file}").startswith("model.unet: the model of model.path has no unet")
    assert refusal(file).startswith(f"model.path: {file} is a single file, ")
    assert "is a folder; give one" in refusal(pipeline_folder, f"model.transformer={tmp_path}")


# Zero terminal signal-to-noise ratio


def test_zero_terminal_snr_is_the_schedulers_own_step_for_v(sd_v_folder: Path, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    from pcpo_fast.method.samplers import build_transitions

    folder = Path(shutil.copytree(sd_v_folder, tmp_path / "sd"))
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    settings_of("scheduler", "scheduler_config.json", **changes)(folder)
    config = tiny_config(folder, *SD_RUN, "sampler.noise=0.5")
    table = build_transitions(config.sampler, load_policy(config, CPU).schedule(4))
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[0] == 999 and scheduler.alphas_cumprod[-1] == 0
    latents, output, noise = torch.randn(3, 1, 4, 2, 2, dtype=torch.float64)
    for step, timestep in enumerate(scheduler.timesteps[:2]):
        theirs = scheduler.step(output, timestep, latents, eta=0.5, variance_noise=noise).prev_sample
        ours = table.a[step] * latents + table.b[step] * output + table.std[step] * noise
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)
    settings_of("scheduler", "scheduler_config.json", prediction_type="epsilon")(folder)
    with pytest.raises(UserError, match=r"rescale_betas_zero_snr, .*prediction_type epsilon.* set prediction_type"):
        load_policy(config, CPU).schedule(4)
    settings_of("scheduler", "scheduler_config.json", rescale_betas_zero_snr=False, beta_end=5.0)(folder)
    with pytest.raises(UserError, match=r"has betas that leave nothing .* otherwise beta_start and beta_end to what"):
        load_policy(config, CPU).schedule(4)
    settings_of("scheduler", "scheduler_config.json", timestep_spacing="wide")(folder)
    with pytest.raises(UserError, match=r"scheduler/scheduler_config\.json: ValueError: wide is not supported"):
        load_policy(config, CPU).schedule(4)


def test_parts_of_different_models(sd_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = Path(shutil.copytree(sd_folder, tmp_path / "sd"))
    config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    wide = 2 * config.hidden_size
    config.hidden_size = wide
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    message = refusal(folder, *SD_RUN)
    assert f"text_encoder/config.json (hidden_size {wide})" in message and "cross_attention_dim" in message


def test_a_rotary_embedding_of_another_width_than_the_heads(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pipeline_folder, tmp_path / "flux"))
    settings_of("transformer", axes_dims_rope=[2, 2, 2])(folder)
    message = refusal(folder)
    assert "transformer/config.json says axes_dims_rope [2, 2, 2], which must add up to attention_head_dim" in message
