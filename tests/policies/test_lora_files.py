"""LoRA files of other programs read, and ours read by other programs: names, ranks, alphas, and the strength."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipeline import TRANSFORMER
from torch import Tensor, nn

from pcpo_fast.config.schema import LoraConfig
from pcpo_fast.errors import UserError
from pcpo_fast.planning.published import PUBLISHED
from pcpo_fast.policies.families import family_of_network
from pcpo_fast.policies.lora import add_lora, differing_from, trained_updates
from pcpo_fast.policies.lora_files import LowRank, read_lora, read_own_lora, write_lora

KEY = "model.lora.init"
FLUX, SD3, SD = "FluxTransformer2DModel", "SD3Transformer2DModel", "UNet2DConditionModel"
SD3_CONFIG = {
    "sample_size": 8,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 16,
    "out_channels": 4,
    "dual_attention_layers": (0,),
}
SD_CONFIG = {
    "block_out_channels": (8, 16),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
CONFIGS = {FLUX: TRANSFORMER, SD3: SD3_CONFIG, SD: SD_CONFIG}
PARTS = {FLUX: "transformer", SD3: "transformer", SD: "unet"}


@pytest.fixture(scope="module", params=CONFIGS)
def network(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    return getattr(diffusers, kind)(**CONFIGS[kind])


def kind_of(network: nn.Module) -> str:
    return type(network).__name__


def linear_layers(network: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in network.named_modules() if isinstance(child, nn.Linear)}


def published(model: str, part: str) -> dict[str, nn.Linear]:
    """The linear layers of a model of full size, without memory for them."""
    name, config = PUBLISHED[model]["parts"][part]
    with torch.device("meta"):
        return linear_layers(getattr(diffusers, name).from_config(dict(config)))


def random_updates(layers: Mapping[str, nn.Linear], rank: int = 3, scale: float = 1.5) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: LowRank(
            0.1 * torch.randn(rank, layer.in_features, generator=generator),
            0.1 * torch.randn(layer.out_features, rank, generator=generator),
            scale,
        )
        for name, layer in layers.items()
    }


def loaded(network: nn.Module, path: Path) -> dict[str, LowRank]:
    return read_lora(network, path, KEY, family_of_network(kind_of(network)))


def delta(update: LowRank) -> Tensor:
    return update.scale * update.up.float() @ update.down.float()


def attention(network: nn.Module) -> dict[str, nn.Linear]:
    """Layers that every format has: the attentions' projections."""
    return {
        name: layer
        for name, layer in linear_layers(network).items()
        if re.search(r"attn\d?\.(to_|add_)", name) and "to_add_out" not in name
    }


def same_effect(found: Mapping[str, LowRank], expected: Mapping[str, LowRank], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(delta(found[name]), delta(update), rtol=0, atol=tolerance, msg=name)


# ------------------------------------------------------------------------------------- ours, read by other programs


class KohyaReader(dict[str, Any]):
    """A checkpoint of the original release made of nothing but what a LoRA adds to it, by the rules of kohya's readers:
    ``lora_unet_`` and the weight's name with underscores; ``alpha / rank * up @ down``. Two columns of each weight."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
        super().__init__(dict.fromkeys(names))
        self.tensors, self.used = tensors, set[str]()

    def __getitem__(self, name: str) -> Tensor:
        if name.endswith(".bias"):
            return torch.zeros(7 * 3072)
        layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{layer}.lora_up.weight" not in self.tensors:
            return torch.zeros(1, 1)
        down, up, alpha = (self.tensors[f"{layer}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        self.used.add(layer)
        return alpha / down.shape[0] * up @ down[:, :2]

    def pop(self, name: str, *_: Any) -> Tensor:  # type: ignore[override]
        return self[name]


@pytest.mark.parametrize(
    ("model", "convert", "names"),
    [
        (
            "black-forest-labs/FLUX.1-dev",
            convert_flux_transformer_checkpoint_to_diffusers,
            [f"double_blocks.{n}.x" for n in range(19)]
            + [f"single_blocks.{n}.x" for n in range(38)]
            + ["guidance_in."],
        ),
        (
            "stabilityai/stable-diffusion-3.5-medium",
            convert_sd3_transformer_checkpoint_to_diffusers,
            [f"joint_blocks.{n}.x" for n in range(24)] + [f"joint_blocks.{n}.x_block.attn2.x" for n in range(13)],
        ),
    ],
    ids=["flux", "sd3"],
)
def test_a_kohya_file_has_every_layer_of_a_transformer_where_the_original_release_has_it(
    tmp_path: Path, model: str, convert: Callable[[dict[str, Any]], dict[str, Tensor]], names: list[str]
) -> None:
    layers = published(model, "transformer")
    updates = random_updates(layers, rank=1)
    kind = FLUX if "FLUX" in model else SD3
    write_lora(tmp_path / "x.safetensors", updates, family_of_network(kind), "kohya", torch.float32)
    tensors = load_file(tmp_path / "x.safetensors")
    reader = KohyaReader(tensors, names)
    made = convert(reader)
    for name, update in updates.items():
        expected = update.scale * update.up @ update.down[:, :2]
        torch.testing.assert_close(made[f"{name}.weight"], expected, rtol=1e-5, atol=1e-7, msg=name)
    assert reader.used == {name.partition(".")[0] for name in tensors}, "layers that no reader looks for"
    if kind == FLUX:  # diffusers reads the file itself, but for what it gives no prefix, or no scale
        wanted = {name: update for name, update in updates.items() if "transformer_blocks" in name}
        theirs: Any = diffusers.FluxPipeline.lora_state_dict(dict(tensors))
        for name, update in wanted.items():
            up, down = (theirs[f"transformer.{name}.lora_{which}.weight"] for which in "BA")
            torch.testing.assert_close(up @ down[:, :2], update.scale * update.up @ update.down[:, :2], msg=name)


def comfy_names(kind: str, layers: Iterable[str]) -> dict[str, str]:
    """ComfyUI's names of diffusers' layers, with the endings that it tries in this order, and alpha beside them."""
    if kind != SD:
        return {name: f"transformer.{name}" for name in layers}
    return {name: "lora_unet_" + name.replace(".", "_") for name in layers}


def comfy_effect(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
        if f"{name}.{up}.weight" in tensors:
            b, a = tensors[f"{name}.{up}.weight"].float(), tensors[f"{name}.{down}.weight"].float()
            alpha = tensors.get(f"{name}.alpha")
            return (1.0 if alpha is None else float(alpha) / a.shape[0]) * b @ a
    raise AssertionError(f"{name} is not in the file")


@pytest.mark.parametrize(
    ("model", "known"),
    [
        (
            "black-forest-labs/FLUX.1-dev",
            r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|ff(_context)?\.net\.(0\.proj|2)"
            r"|norm1(_context)?\.linear)|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)"
            r"|(x|context)_embedder|time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]|proj_out|norm_out\.linear",
        ),
        (
            "stabilityai/stable-diffusion-3.5-medium",
            r"transformer_blocks\.\d+\.(attn2?\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|ff(_context)?\.net\.(0\.proj|2)"
            r"|norm1(_context)?\.linear)|context_embedder|time_text_embed\.(timestep|text)_embedder\.linear_[12]|proj_out"
            r"|norm_out\.linear",
        ),
    ],
)
def test_comfyui_knows_every_layer_of_a_transformer_by_diffusers_name(tmp_path: Path, model: str, known: str) -> None:
    """Its tables of diffusers' names (flux_to_diffusers, mmdit_to_diffusers) at full size, behind ``transformer.``."""
    updates = random_updates(published(model, "transformer"), rank=1)
    few = {name: LowRank(update.down[:, :1], update.up[:1]) for name, update in updates.items()}
    write_lora(tmp_path / "x.safetensors", few, family_of_network(FLUX if "FLUX" in model else SD3))
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        names = list(opened.keys())
    pattern = re.compile(rf"transformer\.({known})\.lora_[AB]\.weight")
    assert [name for name in names if not pattern.fullmatch(name)] == [] and len(names) == 2 * len(updates)


@pytest.mark.parametrize("names", [None, "comfyui"])
def test_comfyui_finds_every_layer_at_the_trained_strength(network: Any, tmp_path: Path, names: Any) -> None:
    kind, updates = kind_of(network), random_updates(linear_layers(network))
    write_lora(tmp_path / "x.safetensors", updates, family_of_network(kind), names)
    tensors = load_file(tmp_path / "x.safetensors")
    for layer, name in comfy_names(kind, updates).items():
        torch.testing.assert_close(comfy_effect(tensors, name), delta(updates[layer]), rtol=1e-5, atol=1e-7)
    assert len(tensors) == (3 if kind == SD else 2) * len(updates)


def test_the_webuis_find_every_layer_of_sd_1(tmp_path: Path) -> None:
    """By the WebUIs' rules, in the places that the original release's UNet has."""
    layers = published("stable-diffusion-v1-5/stable-diffusion-v1-5", "unet")
    write_lora(tmp_path / "x.safetensors", random_updates(layers, rank=1), family_of_network(SD))
    leaves = [f"attn{n}_to_{end}" for n in (1, 2) for end in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]
    attended = [f"input_blocks_{n}_1" for n in (1, 2, 4, 5, 7, 8)] + ["middle_block_1"]
    attended += [f"output_blocks_{n}_1" for n in range(3, 12)]
    places = {f"{place}_transformer_blocks_0_{leaf}" for place in attended for leaf in leaves}
    places |= {f"input_blocks_{n}_0_emb_layers_1" for n in (1, 2, 4, 5, 7, 8, 10, 11)}
    places |= {f"middle_block_{n}_emb_layers_1" for n in (0, 2)} | {
        f"output_blocks_{n}_0_emb_layers_1" for n in range(12)
    }
    places |= {"time_embed_0", "time_embed_2"}

    def place(name: str) -> str:
        name = name.replace("time_emb_proj", "emb_layers_1")
        if match := re.fullmatch(r"lora_unet_time_embedding_linear_(\d)", name):
            return f"time_embed_{2 * int(match[1]) - 2}"
        match = re.fullmatch(r"lora_unet_(down|up)_blocks_(\d)_(attentions|resnets)_(\d)_(.+)", name)
        if match:
            number = int(match[2]) * 3 + int(match[4]) + (match[1] == "down")
            blocks = "input" if match[1] == "down" else "output"
            return f"{blocks}_blocks_{number}_{int(match[3] == 'attentions')}_{match[5]}"
        match = re.fullmatch(r"lora_unet_mid_block_(attentions|resnets)_(\d)_(.+)", name)
        assert match, name
        return f"middle_block_{1 if match[1] == 'attentions' else 2 * int(match[2])}_{match[3]}"

    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        written = {name.partition(".")[0] for name in opened.keys()}  # noqa: SIM118
    assert {place(name) for name in written} == places and len(written) == len(layers) == 184
    assert read_own_lora(tmp_path / "x.safetensors", "x")[1].keys() == layers.keys()


@pytest.mark.parametrize(("kind", "names"), [(FLUX, "diffusers"), (SD3, "diffusers"), (SD, "diffusers"), (SD, "kohya")])
def test_diffusers_loads_every_layer_at_the_trained_strength(tmp_path: Path, kind: str, names: Any) -> None:
    """kohya's names of FLUX.1 it reads at full size alone (above), those of SD3 not at all."""
    model: Any = tiny(kind)
    updates = random_updates(linear_layers(model))
    updates |= {name: u._replace(down=u.down[:2], up=u.up[:, :2]) for name, u in updates.items() if "to_q" in name}
    write_lora(tmp_path / "x.safetensors", updates, family_of_network(kind), names)
    if kind == SD:
        theirs, alphas = diffusers.StableDiffusionPipeline.lora_state_dict(tmp_path, weight_name="x.safetensors")
        diffusers.StableDiffusionPipeline.load_lora_into_unet(theirs, alphas, model, adapter_name="default")
    else:
        model.load_lora_adapter(tmp_path, weight_name="x.safetensors", adapter_name="default")
    state = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    same_effect(trained_updates(model, state), updates)


def test_what_is_written(tmp_path: Path) -> None:
    file, updates = tmp_path / "x.safetensors", random_updates(linear_layers(tiny(SD)))
    write_lora(
        file,
        updates,
        family_of_network(SD),
        dtype=torch.bfloat16,
        about={"base_model": "a/b", "reward": "1 * pickscore"},
    )
    assert file.stat().st_mode & 0o777 == 0o644
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "network": SD, "base_model": "a/b", "reward": "1 * pickscore"}
    dtypes = {name.rpartition(".")[2]: value.dtype for name, value in load_file(file).items()}
    assert dtypes == {"weight": torch.bfloat16, "alpha": torch.float32}  # bfloat16 has no 257
    huge = {name: update._replace(scale=1e8) for name, update in updates.items()}
    with pytest.raises(UserError, match=r"--dtype float16: lora_unet_\w+\.lora_up\.weight has values beyond its range"):
        write_lora(file, huge, family_of_network(SD), dtype=torch.float16)


# --------------------------------------------------------------------------------- other programs' files, read by us


def saved(folder: Path, tensors: Mapping[str, Tensor], name: str = "style.safetensors", **metadata: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, {"format": "pt", **metadata})
    return folder / name


def peft_names(updates: Mapping[str, LowRank], prefix: str, middle: str = "") -> dict[str, Tensor]:
    named = {}
    for name, update in updates.items():
        named[f"{prefix}{name}.lora_A{middle}.weight"] = update.down
        named[f"{prefix}{name}.lora_B{middle}.weight"] = update.up
    return named


@pytest.mark.parametrize(
    ("prefix", "middle"),
    [
        ("", ""),
        ("PART.", ""),
        ("PART.", ".default"),
        ("base_model.model.", ""),
        ("PART.base_model.model.", ""),
        ("base_model.model.PART.", ".my-style"),
        ("diffusion_model.", ""),
    ],
)
def test_diffusers_names_with_any_prefix(network: Any, tmp_path: Path, prefix: str, middle: str) -> None:
    updates = random_updates(linear_layers(network), scale=1)
    prefix = prefix.replace("PART", PARTS[kind_of(network)])
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 3}))
    same_effect(loaded(network, saved(tmp_path, peft_names(updates, prefix, middle))), updates)


def test_the_older_names_of_diffusers(tmp_path: Path) -> None:
    unet = tiny(SD)
    updates = random_updates(attention(unet), scale=1)
    old = {}
    for name, update in updates.items():
        layer = "unet." + name.replace(".to_", ".processor.to_").removesuffix(".0")
        old |= {f"{layer}_lora.down.weight": update.down, f"{layer}_lora.up.weight": update.up}
    same_effect(loaded(unet, saved(tmp_path, old)), updates)
    other = {name.replace("_lora.", ".lora."): value for name, value in old.items()}
    same_effect(loaded(unet, saved(tmp_path, other)), updates)


def test_kohya_files_of_their_own_alphas_and_ranks(network: Any, tmp_path: Path) -> None:
    """As its trainer writes them: fused layers share a dense update, and every layer has a rank and an alpha."""
    kind = kind_of(network)
    originals = family_of_network(kind).release_weights(list(linear_layers(network)))
    layers, tensors, expected = linear_layers(network), {}, {}
    for number, (original, ends) in enumerate(originals.items()):
        rank, alpha = 2 + number % 3, 0.5 + number % 4
        down = torch.randn(rank, layers[ends[0]].in_features)
        ups = [torch.randn(layers[end].out_features, rank) for end in ends]
        expected |= {end: LowRank(down, up, alpha / rank) for end, up in zip(ends, ups, strict=True)}
        if original.endswith("adaLN_modulation.1") and ups[0].shape[0] == 2 * down.shape[1]:
            ups = [torch.cat(ups[0].chunk(2)[::-1])]
        name = "lora_unet_" + (ends[0] if kind == SD and number % 2 else original).replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": torch.cat(ups)}
        tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.bfloat16)
    file = saved(tmp_path, tensors)
    same_effect(loaded(network, file), expected, 1e-5)
    dotted = {key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): v for key, v in tensors.items()}
    names = {"lora_unet_" + o.replace(".", "_"): f"diffusion_model.{o}" for o in originals}
    if kind != SD:  # ComfyUI's own, in the original release's names
        renamed = {names[k.partition(".")[0]] + "." + k.partition(".")[2]: v for k, v in dotted.items()}
        same_effect(loaded(network, saved(tmp_path, renamed)), expected, 1e-5)


@pytest.mark.parametrize("names", ["diffusers", "comfyui", "kohya"])
def test_our_own_files_come_back(network: Any, tmp_path: Path, names: Any) -> None:
    updates = random_updates(attention(network), rank=3, scale=0.7)
    write_lora(tmp_path / "x.safetensors", updates, family_of_network(kind_of(network)), names)
    back = loaded(network, tmp_path)
    same_effect(back, updates)
    assert {update.down.shape[0] for update in back.values()} == {3}, "fused layers come apart at their own rank"


def alpha_of(settings: dict[str, Any], tmp_path: Path, network: Any, *, peft: bool) -> dict[str, float]:
    layers = attention(network)
    tensors = peft_names(random_updates(layers, scale=1), "base_model.model." if peft else "transformer.")
    if peft:
        file = saved(tmp_path, tensors, "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    else:
        packed = json.dumps({f"transformer.{name}": value for name, value in settings.items()})
        file = saved(tmp_path, tensors, lora_adapter_metadata=packed)
    for path in (file, tmp_path):
        found = {name: update.scale for name, update in loaded(network, path).items()}
    return found


@pytest.mark.parametrize("peft", [True, False], ids=["adapter_config.json", "header"])
def test_the_strength_is_that_of_the_adapters_settings(tmp_path: Path, peft: bool) -> None:
    flux = tiny(FLUX)
    assert set(alpha_of({"r": 3, "lora_alpha": 12}, tmp_path / "a", flux, peft=peft).values()) == {4.0}
    rooted = alpha_of({"lora_alpha": 6, "use_rslora": True}, tmp_path / "b", flux, peft=peft)
    assert set(rooted.values()) == {6 / 3**0.5}
    per_layer = alpha_of({"lora_alpha": 3, "alpha_pattern": {"attn.to_q": 30}}, tmp_path / "c", flux, peft=peft)
    assert {name: scale for name, scale in per_layer.items() if scale != 1} == {
        name: 10.0 for name in per_layer if name.endswith("attn.to_q")
    }


def test_a_folder_that_peft_wrote(network: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"use_rslora": True, "alpha_pattern": {"to_q": 9}, "rank_pattern": {"to_k": 2}}
    model = tiny(kind_of(network))
    theirs = get_peft_model(model, PeftConfig(r=5, lora_alpha=11, target_modules=["to_q", "to_k", "to_v"], **settings))
    for name, weight in theirs.named_parameters():
        if "lora_" in name:
            weight.data.normal_()
    theirs.save_pretrained(tmp_path)
    expected = {name: child for name, child in model.named_modules() if hasattr(child, "get_delta_weight")}
    found = loaded(network, tmp_path)
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        torch.testing.assert_close(delta(found[name]), layer.get_delta_weight("default"), msg=name)


def test_peft_weights_without_their_settings_are_told_of(tmp_path: Path) -> None:
    flux = tiny(FLUX)
    file = saved(tmp_path, peft_names(random_updates(attention(flux)), "base_model.model."))
    with pytest.warns(UserWarning, match="does not say its alpha .*taken to be the rank"):
        found = loaded(flux, file)
    assert {update.scale for update in found.values()} == {1.0}


# ---------------------------------------------------------------------- adapters of other layers and of other ranks


def test_adapters_take_up_what_does_not_fit_them(network: Any, tmp_path: Path) -> None:
    """Lower ranks are padded, higher ones kept, other layers added, and absent ones begin without effect."""
    kind, layers = kind_of(network), linear_layers(network)
    targets = ["to_q", "to_k"]
    names = [name for name in layers if name.endswith(("to_q", "to_v"))]
    ranks = {name: 2 + 2 * (number % 3) for number, name in enumerate(names)}
    updates = {name: random_updates({name: layers[name]}, rank=rank)[name] for name, rank in ranks.items()}
    settings = LoraConfig(rank=4, alpha=6.0)
    write_lora(tmp_path / "x.safetensors", updates, family_of_network(kind), "diffusers")
    model = tiny(kind)
    start = loaded(model, tmp_path)
    add_lora(model, settings, targets, start=start)
    state = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    made = trained_updates(model, state)
    keys = {name for name in layers if name.endswith("to_k")}
    assert made.keys() == set(names) | keys
    for name, update in made.items():
        expected = delta(updates[name]) if name in updates else torch.zeros(1)
        torch.testing.assert_close(delta(update), expected.expand_as(delta(update)), rtol=0, atol=1e-6)
        assert update.down.shape[0] == max(4, ranks.get(name, 0)) and update.scale == 1.5
        assert (update.down != 0).all(), "the padding could not be trained"
    told = differing_from(settings, targets, model, start)
    extra, missing = sum(name.endswith("to_v") for name in names), len(keys)
    assert "rank 2 is padded to model.lora.rank=4; layers of rank 6 keep it instead of model.lora.rank=4" in told
    assert f"adapters also for {extra} layers that model.lora.targets does not name" in told
    assert f"no effect at first in {missing} layers that it lacks" in told
    # And out again: everything is in the file.
    write_lora(tmp_path / "y.safetensors", made, family_of_network(kind), "diffusers")
    again = {name: update for name, update in loaded(model, tmp_path / "y.safetensors").items() if name in updates}
    same_effect(again, updates)


# -------------------------------------------------------------------------------------------- what cannot be taken


def refused(path: Path, network: Any) -> str:
    with pytest.raises(UserError) as caught:
        loaded(network, path)
    message = str(caught.value)
    assert message.startswith(f"{KEY}: ") and "\n" not in message
    return message


LAYER = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (f"{LAYER}.dora_scale", "is a DoRA adapter"),
        (f"{LAYER}.lora_magnitude_vector", "is a DoRA adapter"),
        (f"{LAYER}.lokr_w1", "is a LoKr adapter"),
        (f"{LAYER}.hada_w1_a", "is a LoHa adapter"),
        (f"{LAYER}.lora_mid.weight", "is a LoCon adapter with a Tucker core"),
        (f"{LAYER}.oft_blocks", "is an OFT adapter"),
        (f"{LAYER}.diff_b", "is an adapter with changes of whole weights"),
        (f"{LAYER}.lora_B.bias", "is an adapter with biases"),
        (f"{LAYER}.weight", "is not a LoRA weight"),
        (f"{LAYER}.lora_A.other.weight", "holds several adapters of"),
        (f"{LAYER}.lora_A.weight", "lacks its lora_B (lora_up) weight"),
        (
            "lora_te1_text_model_encoder_layers_0_mlp_fc1",
            "(FluxTransformer2DModel, linear layers): 1 of text encoders (",
        ),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "1 of text encoders ("),
        ("text_encoders.t5xxl.transformer.encoder.block.0", "1 of text encoders ("),
        ("transformer.transformer_blocks.7.attn.to_q", "1 that the FluxTransformer2DModel does not have ("),
    ],
)
def test_what_is_no_lora_of_the_network(tmp_path: Path, extra: str, words: str) -> None:
    flux = tiny(FLUX)
    tensors = peft_names(random_updates({LAYER.removeprefix("transformer."): nn.Linear(32, 32)}), "transformer.")
    if extra.endswith("lora_A.weight"):
        tensors = {extra: tensors[extra]}
    elif re.search(r"(weight|bias|scale|vector|_a|_b|w1|blocks)$", extra):
        tensors[extra] = torch.ones(3, 3)
    else:
        tensors |= {f"{extra}.lora_A.weight": torch.ones(2, 32), f"{extra}.lora_B.weight": torch.ones(32, 2)}
    message = refused(saved(tmp_path, tensors), flux)
    assert words in message and (extra in message or LAYER in message)


def test_convolutions_and_other_models_are_refused(tmp_path: Path) -> None:
    unet = tiny(SD)
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 8, 1, 1), f"{name}.lora_up.weight": torch.ones(8, 2, 1, 1)}
    tensors |= {key.replace("unet_down_blocks_0", "te_x"): value.clone() for key, value in tensors.items()}
    message = refused(saved(tmp_path, tensors), unet)  # all at once
    assert f"1 that are convolutions, or not linear for another reason ({name})" in message
    assert "1 of text encoders (lora_te_x" in message
    for name, size in (("lora_unet_down_blocks_0_resnets_0_conv1", 3), ("lora_unet_input_blocks_1_1_proj_in", 1)):
        tensors = {
            f"{name}.lora_down.weight": torch.ones(2, 8, size, size),
            f"{name}.lora_up.weight": torch.ones(8, 2, 1, 1),
        }
        assert f"convolutions, or not linear for another reason ({name})" in refused(saved(tmp_path, tensors), unet)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    wide = random_updates({layer: nn.Linear(320, 320)})
    message = refused(saved(tmp_path, peft_names(wide, "unet.")), unet)
    assert "was made for another model" in message and "320 x 320, but" in message and "has 8 x 8" in message
    pixel = {
        key: value[..., None, None] for key, value in peft_names(random_updates({layer: nn.Linear(8, 8)}), "").items()
    }
    assert loaded(unet, saved(tmp_path, pixel))[layer].down.shape == (3, 8)  # a linear layer for all that


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "LOHA"}, "of type LOHA"),
        ({"peft_type": "LORA", "use_dora": True}, "of type DoRA"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}, "base weights modified by pissa_niter_4"),
        ({"lora_alpha": "many"}, "lora_alpha or alpha_pattern in the settings of"),
        ({"alpha_pattern": [1]}, "lora_alpha or alpha_pattern in the settings of"),
        ([], "must hold an adapter's settings, got a list"),
        ("{", "adapter_config.json cannot be read"),
    ],
)
def test_settings_of_other_adapters_are_refused(tmp_path: Path, settings: Any, words: str) -> None:
    flux = tiny(FLUX)
    file = saved(
        tmp_path, peft_names(random_updates(attention(flux)), "base_model.model."), "adapter_model.safetensors"
    )
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (tmp_path / "adapter_config.json").write_text(text)
    assert words in refused(file, flux)


def test_files_that_are_none(tmp_path: Path) -> None:
    flux = tiny(FLUX)
    assert "is neither a .safetensors file nor a folder" in refused(tmp_path / "nowhere", flux)
    (tmp_path / "x.bin").write_bytes(b"")
    assert "is neither a .safetensors file" in refused(tmp_path / "x.bin", flux)
    assert "is a folder without pytorch_lora_weights.safetensors" in refused(tmp_path, flux)
    pointer = tmp_path / "sub" / "adapter_model.safetensors"
    pointer.parent.mkdir()
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "there is sub/adapter_model.safetensors in it" in refused(tmp_path, flux)
    assert "git-lfs pointer" in refused(pointer, flux)
    whole = saved(tmp_path / "two", peft_names(random_updates(attention(flux)), "transformer."))
    pointer.write_bytes(whole.read_bytes()[:-100])
    assert "cannot be read as LoRA weights" in refused(pointer, flux)
    whole.with_name("other.safetensors").write_bytes(whole.read_bytes())
    assert "holds 2 .safetensors files (other.safetensors, style.safetensors, ...)" in refused(whole.parent, flux)
    assert "holds no weights" in refused(saved(tmp_path, {}), flux)
    broken = {name: value * float("nan") for name, value in load_file(whole).items()}
    assert "is not a matrix of finite numbers" in refused(saved(tmp_path, broken), flux)
