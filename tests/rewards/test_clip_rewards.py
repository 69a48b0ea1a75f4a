"""Rewards on CLIP models: HPS v2.1, PickScore, CLIPScore, LAION's aesthetic predictor, against what was published."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tiny_judges import SIZE, OpenClip, build_clip, clip_words, scatter, tiny_open_clip
from torch import Tensor, nn

from pcpo_fast.config.schema import RewardConfig
from pcpo_fast.errors import UserError
from pcpo_fast.rewards import RewardSet, load_reward
from pcpo_fast.rewards.open_clip import clip_from_open_clip

PROMPTS = ["a red cat", "blue", "a red cat", "some words more than the others have and than the model can read at once"]
WITHIN = 1e-3  # of the score: what the published processors and ours may differ by


def images(height: int, width: int, count: int = 4) -> Tensor:
    """Blocks and noise: edges for the filters to overshoot at, and something at every frequency."""
    blocks = F.interpolate(torch.rand(count, 3, 5, 7).round(), (height, width), mode="nearest")
    return (blocks + 0.2 * torch.randn(count, 3, height, width)).clamp(0, 1)


def as_files(batch: Tensor) -> list[Image.Image]:
    pixels = (batch * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(row)) for row in pixels]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything: a CLIP model, an aesthetic head for it, and an OpenCLIP checkpoint."""
    path = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    build_clip(path / "clip")
    head = published_head()
    scatter(head, 2)
    torch.save({f"layers.{name}": tensor for name, tensor in head.state_dict().items()}, path / "aesthetic-model.pth")
    torch.save({"epoch": 3, "state_dict": tiny_open_clip().state_dict()}, path / "HPS_v2.1_compressed.pt")
    return path


def published_head(width: int = 24) -> nn.Sequential:
    """The layers of improved-aesthetic-predictor, with the dropouts that give them their numbers."""
    return nn.Sequential(
        *(nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64)),
        *(nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)),
    )


def published_clip(folder: Path, batch: Tensor, texts: list[str]) -> tuple[Tensor, Tensor, float]:
    """Unit features of images and texts, and the scale, by transformers' processor, tokenizer and model."""
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(folder)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(as_files(batch), return_tensors="pt").pixel_values
    words = AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=pixels, **words)
    return output.image_embeds, output.text_embeds, float(model.logit_scale.detach().exp())


SIZES = [(41, 57), (64, 33), (28, 28), (19, 23)]


@pytest.mark.parametrize("size", SIZES)
def test_clip_rewards_equal_the_published_processor_and_model(folder: Path, size: tuple[int, int]) -> None:
    batch, clip = images(*size), str(folder / "clip")
    image, text, scale = published_clip(folder / "clip", batch, PROMPTS)
    cosines = (image * text).sum(1)
    pick = load_reward("pickscore", {"model": clip})(batch, PROMPTS, [{}] * 4)
    torch.testing.assert_close(pick, scale * cosines, rtol=WITHIN, atol=WITHIN * scale)
    plain = load_reward("clip_score", {"model": clip, "prefix": "", "scale": 100})(batch, PROMPTS, [{}] * 4)
    torch.testing.assert_close(plain, 100 * cosines.clamp(min=0), rtol=WITHIN, atol=100 * WITHIN)
    head = published_head()
    head.load_state_dict({k.removeprefix("layers."): v for k, v in torch.load(folder / "aesthetic-model.pth").items()})
    ratings = head.eval()(image).squeeze(1).detach()
    aesthetic = load_reward("aesthetic", {"model": clip, "head": str(folder)})(batch, PROMPTS, [{}] * 4)
    torch.testing.assert_close(aesthetic, ratings, rtol=WITHIN, atol=WITHIN)
    assert ratings.std() > 10 * WITHIN and cosines.std() > 10 * WITHIN, "the images do not differ enough to tell"


def test_aesthetic_with_the_single_linear_layer(folder: Path, tmp_path: Path) -> None:
    """LAION's first predictor: its file holds the weight and bias of one layer on the features of length 1."""
    batch, layer = images(30, 40), nn.Linear(24, 1)
    torch.save(layer.state_dict(), tmp_path / "sa_0_4_vit_l_14_linear.pth")
    image, _, _ = published_clip(folder / "clip", batch, PROMPTS)
    options = {"model": str(folder / "clip"), "head": str(tmp_path / "sa_0_4_vit_l_14_linear.pth")}
    scores = load_reward("aesthetic", options)(batch, PROMPTS, [{}] * 4)
    torch.testing.assert_close(scores, layer(image).squeeze(1).detach(), rtol=WITHIN, atol=WITHIN)
    torch.save({"weight": torch.zeros(1, 24)}, tmp_path / "sa_0_4_vit_l_14_linear.pth")
    with pytest.raises(UserError, match=r"is not the head of LAION's aesthetic predictor .*: it lacks bias$"):
        load_reward("aesthetic", options)
    torch.save({"weight": torch.zeros(1, 23), "bias": torch.zeros(1)}, tmp_path / "sa_0_4_vit_l_14_linear.pth")
    with pytest.raises(UserError, match=r"weight has the shape \[1, 23\], which does not fit the others$"):
        load_reward("aesthetic", options)


def test_clip_score_is_hessels_by_default(folder: Path) -> None:
    batch = images(30, 40, 2)
    captions = ["a cat", "a dog"]
    image, text, _ = published_clip(folder / "clip", batch, [f"A photo depicts {caption}" for caption in captions])
    for sign in (1, -1):  # a negative cosine counts as 0
        reward: Any = load_reward("clip_score", {"model": str(folder / "clip")})
        reward._clip.model.visual_projection.weight.mul_(sign)
        expected = 2.5 * (sign * (image * text).sum(1)).clamp(min=0)
        torch.testing.assert_close(reward(batch, captions, [{}] * 2), expected, rtol=0, atol=2.5 * WITHIN)


# HPS v2.1.


def published_hps(batch: Tensor, prompts: list[str]) -> Tensor:
    """The authors' package, hpsv2 1.2.0 (its transform with light_augmentation): bytes as floats, the longer side to
    224 with torchvision's resize of a tensor, black around it, then normalised; OpenCLIP's padded text."""
    height, width = batch.shape[-2:]
    scale = SIZE / float(max(height, width))
    target = (round(height * scale), round(width * scale))
    pixels = (batch * 255).round() / 255
    if target != (height, width):
        pixels = F.interpolate(pixels, target, mode="bicubic", antialias=True, align_corners=False)
    square = torch.zeros(len(batch), 3, SIZE, SIZE)
    top, left = (SIZE - target[0]) // 2, (SIZE - target[1]) // 2
    square[..., top : top + target[0], left : left + target[1]] = pixels
    pixels = square
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    words = clip_words()
    tokens = torch.zeros(len(prompts), 20, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids = words(prompt).input_ids
        ids = ids if len(ids) <= 20 else [*ids[:19], words.eos_token_id]
        tokens[row, : len(ids)] = torch.tensor(ids)
    with torch.no_grad():
        return tiny_open_clip()((pixels - mean) / std, tokens)  # type: ignore[no-any-return]


def hps(folder: Path, **options: Any) -> Any:
    return load_reward("hpsv2", {"model": str(folder), "tokenizer": str(folder / "clip")} | options)


@pytest.mark.parametrize("size", SIZES)
def test_hps_equals_open_clip(folder: Path, size: tuple[int, int]) -> None:
    batch = images(*size)
    expected = published_hps(batch, PROMPTS)
    scores = hps(folder)(batch, PROMPTS, [{}] * 4)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert expected.std() > 1e-3, "the images do not differ enough to tell"


def test_hps_from_safetensors_and_with_the_names_of_distributed_training(folder: Path, tmp_path: Path) -> None:
    batch, state = images(30, 40), tiny_open_clip().state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "hps.safetensors")
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "hps.pt")
    expected = hps(folder)(batch, PROMPTS, [{}] * 4)
    for name in ("hps.safetensors", "hps.pt"):
        scores = hps(folder, model=str(tmp_path / name))(batch, PROMPTS, [{}] * 4)
        torch.testing.assert_close(scores, expected, rtol=0, atol=0)


def test_hps_without_antialiasing_samples(folder: Path) -> None:
    batch = images(200, 200)
    assert (
        hps(folder)(batch, PROMPTS, [{}] * 4) - hps(folder, antialias=False)(batch, PROMPTS, [{}] * 4)
    ).abs().max() > WITHIN


def vit_h_14() -> dict[str, tuple[int, ...]]:
    """Names and shapes of OpenCLIP's ViT-H-14, as its checkpoints list them."""
    names: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, 1024),
        "text_projection": (1024, 1024),
        "logit_scale": (),
        "visual.class_embedding": (1280,),
        "visual.positional_embedding": (257, 1280),
        "visual.proj": (1280, 1024),
        "visual.conv1.weight": (1280, 3, 14, 14),
        "token_embedding.weight": (49408, 1024),
    }
    for norm, width in (("visual.ln_pre", 1280), ("visual.ln_post", 1280), ("ln_final", 1024)):
        names |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for tower, width, layers in (("visual.transformer", 1280, 32), ("transformer", 1024, 24)):
        for layer in range(layers):
            block = f"{tower}.resblocks.{layer}"
            names |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            for part, rows, columns in (
                ("attn.out_proj", width, width),
                ("mlp.c_fc", 4 * width, width),
                ("mlp.c_proj", width, 4 * width),
            ):
                names |= {f"{block}.{part}.weight": (rows, columns), f"{block}.{part}.bias": (rows,)}
            for norm in ("ln_1", "ln_2"):
                names |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
    return names


def test_full_size_names_and_shapes() -> None:
    """OpenCLIP's profile of ViT-H-14 counts 986.11 million weights, 632.08 in the image tower."""
    with torch.device("meta"):
        published = {name: torch.empty(shape) for name, shape in vit_h_14().items()}
        ours = {name: tuple(tensor.shape) for name, tensor in OpenClip().state_dict().items()}
    assert ours == vit_h_14()
    model = clip_from_open_clip(published, "test")
    image = sum(p.numel() for p in [*model.vision_model.parameters(), *model.visual_projection.parameters()])
    assert round(image / 1e6, 2) == 632.08
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 986.11
    vision, text = model.config.vision_config, model.config.text_config
    assert (vision.num_attention_heads, vision.image_size, text.num_attention_heads) == (16, 224, 16)
    assert (text.eos_token_id, vision.hidden_act, text.hidden_act) == (49407, "gelu", "gelu")


def without(state: dict[str, Tensor]) -> None:
    del state["visual.transformer.resblocks.1.ln_1.weight"]


def two_more(state: dict[str, Tensor]) -> None:
    state |= {"head.weight": torch.zeros(1), "head.bias": torch.zeros(1)}


def wrong_shape(state: dict[str, Tensor]) -> None:
    state["visual.proj"] = torch.zeros(160, 25)


def wrong_width(state: dict[str, Tensor]) -> None:
    state["visual.conv1.weight"] = torch.zeros(96, 3, 14, 14)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without, r"is not an OpenCLIP ViT-H-14: it lacks visual.transformer.resblocks.1.ln_1.weight$"),
        (two_more, r"is not an OpenCLIP ViT-H-14: it has an unexpected head.bias \(and 1 more\)$"),
        (wrong_shape, r"visual.proj has the shape \[160, 25\], which does not fit the others$"),
        (wrong_width, r"its visual width 96 is not a multiple of 80$"),
    ],
)
def test_hps_checkpoints_that_are_none(
    folder: Path, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    state = tiny_open_clip().state_dict()
    spoil(state)
    torch.save(state, tmp_path / "hps.pt")
    with pytest.raises(UserError, match=message):
        hps(folder, model=str(tmp_path / "hps.pt"))


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def test_a_checkpoint_with_code_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}, "code": Code()}, tmp_path / "hps.pt")
    with pytest.raises(UserError, match="holds objects other than tensors, which are not loaded for safety"):
        hps(folder, model=str(tmp_path / "hps.pt"))
    (tmp_path / "hps.safetensors").write_text("no")
    with pytest.raises(UserError, match=r"hps.safetensors cannot be read as a checkpoint"):
        hps(folder, model=str(tmp_path / "hps.safetensors"))
    assert "run" not in capsys.readouterr().out


def test_hps_with_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    clip_words(last=False).save_pretrained(tmp_path / "words")
    with pytest.raises(UserError, match=r"ends prompts with token 1, but the checkpoint expects 53"):
        hps(folder, tokenizer=str(tmp_path / "words"))


# What all of them share.


def test_the_model_is_frozen_and_batches_do_not_matter(folder: Path) -> None:
    batch = images(30, 40, 4)
    one = hps(folder, batch_size=1)
    many = hps(folder, batch_size=3)
    torch.testing.assert_close(one(batch, PROMPTS, [{}] * 4), many(batch, PROMPTS, [{}] * 4), rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for module in one.modules for parameter in module.parameters())
    assert not any(part.training for module in one.modules for part in module.modules())
    batch.requires_grad_()
    assert not one(batch, PROMPTS, [{}] * 4).requires_grad
    assert one(batch[:0], [], []).shape == (0,)


def test_half_precision_changes_the_weights_and_little_else(folder: Path) -> None:
    batch = images(30, 40, 4)
    full, half = hps(folder), hps(folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in half.modules[0].parameters()} == {torch.bfloat16}
    scores = half(batch, PROMPTS, [{}] * 4)
    assert scores.dtype == torch.float32
    # A dozen roundings to 8 bits of mantissa on the way to a cosine.
    torch.testing.assert_close(scores, full(batch, PROMPTS, [{}] * 4), rtol=0, atol=12 * 2**-9)


def test_scored_as_a_run_scores(folder: Path) -> None:
    options = {"model": str(folder / "clip"), "device": "cpu"}
    batch = images(30, 40, 4)
    rewards = RewardSet([RewardConfig(name="pickscore", options=options, weight=2.0)])
    assert {"config.json", "model.safetensors"} <= rewards.sources["pickscore"]["model"].keys()
    scores = rewards.score(batch, PROMPTS)
    expected = load_reward("pickscore", options)(batch, PROMPTS, [{}] * 4)
    torch.testing.assert_close(scores.components["pickscore"], torch.as_tensor(expected).double())


OPTIONS = [
    ({"dtype": "int8"}, r"^reward clip_score: option dtype must be one of float32, bfloat16, float16, got 'int8'$"),
    ({"batch_size": 0}, r"^reward clip_score: option batch_size must be an integer of at least 1, got 0$"),
    ({"batch_size": True}, "option batch_size must be an integer of at least 1, got True$"),
    ({"device": "gpu"}, r"^reward clip_score: there is no device 'gpu' here; available: cpu"),
    ({"device": "meta"}, "there is no device 'meta' here; available: cpu"),
    ({"device": "cuda:99"}, "there is no device 'cuda:99' here; available: cpu"),
    ({"scale": "much"}, "option scale must be a finite number, got 'much'$"),
    ({"prefix": 3}, "option prefix must be a string, got 3$"),
    ({"size": 3}, r"reward clip_score cannot be created with the options .*'size'"),
    ({"model": "./nowhere"}, r"option model: ./nowhere is neither a folder nor a hub id of the form owner/name$"),
    ({"model": 7}, "option model must be a folder or a hub id of the form owner/name, got 7$"),
    ({"tokenizer": "./nowhere"}, "option tokenizer: ./nowhere is neither a folder"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_wrong_options(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward("clip_score", {"model": str(folder / "clip")} | options)


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "clip", tmp_path / "clip"))


def test_folders_that_are_no_clip_model(folder: Path, tmp_path: Path) -> None:
    own = copy(folder, tmp_path)
    config = (own / "config.json").read_text()
    for text, message in (
        (
            config.replace('"model_type": "clip",', '"model_type": "siglip",'),
            "a model of type siglip; allowed: clip$",
        ),
        (config.replace('"projection_dim": 24', '"projection_dim": 25'), "cannot be loaded"),
        (
            config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'),
            "its checkpoint lacks .*layers.2.* \\(and",
        ),
        (
            config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'),
            "its checkpoint has the unknown .*layers.1.",
        ),
        ("{", "its config.json is not valid JSON$"),
    ):
        assert text != config
        (own / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load_reward("clip_score", {"model": str(own)})
    (own / "config.json").write_text(config)
    (own / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 56}, "crop_size": 56}')
    with pytest.raises(UserError, match=r"produces images of \(56, 56\), but the model sees 28 x 28$"):
        load_reward("clip_score", {"model": str(own)})


def test_aesthetic_head_of_another_model(folder: Path, tmp_path: Path) -> None:
    torch.save({f"layers.{k}": v for k, v in published_head(25).state_dict().items()}, tmp_path / "head.pth")
    with pytest.raises(UserError, match=r"is not the head of LAION's aesthetic predictor for .* \[1024, 25\], which"):
        load_reward("aesthetic", {"model": str(folder / "clip"), "head": str(tmp_path / "head.pth")})
