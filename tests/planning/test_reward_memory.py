"""Memory of reward models in the plan: the published sizes, counted with transformers' own classes."""

from typing import Any

import pytest
import torch
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
    DebertaConfig,
    DebertaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from pcpo_fast.config.loading import load_config
from pcpo_fast.planning.memory import uncounted_rewards
from pcpo_fast.rewards.registry import learned_rewards, model_bytes


def clip(text: tuple[int, int], vision: tuple[int, int], patch: int) -> CLIPConfig:
    """Widths and depths of both towers; heads do not matter to the number of parameters."""

    def tower(width: int, depth: int, **more: int) -> dict[str, int]:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}
        return sizes | {"projection_dim": text[0], "num_attention_heads": 8} | more

    return CLIPConfig(text_config=tower(*text), vision_config=tower(*vision, patch_size=patch), projection_dim=text[0])


LARGE, HUGE = clip((768, 12), (1024, 24), 14), clip((1024, 24), (1280, 32), 14)
DEBERTA = DebertaConfig(
    vocab_size=50265,
    hidden_size=1024,
    num_hidden_layers=40,
    num_attention_heads=16,
    intermediate_size=4096,
    relative_attention=True,
    pos_att_type="c2p|p2c",
    position_biased_input=False,
    type_vocab_size=0,
)
BLIP_VISION = BlipVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, image_size=224, num_attention_heads=16
)
BLIP_TEXT = BlipTextConfig(vocab_size=30524, encoder_hidden_size=1024, num_attention_heads=12)
LLAVA = LlavaConfig(
    vision_config={"model_type": "clip_vision_model", **LARGE.vision_config.to_dict(), "image_size": 336},
    text_config={"model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008},
)


def head() -> torch.nn.Module:
    widths = (768, 1024, 128, 64, 16, 1)
    return torch.nn.Sequential(*map(torch.nn.Linear, widths, widths[1:]))


MODELS: dict[str, tuple[list[Any], list[Any]]] = {
    "hpsv2": ([lambda: CLIPModel(HUGE)], []),
    "pickscore": ([lambda: CLIPModel(HUGE)], []),
    "clip_score": ([lambda: CLIPModel(clip((512, 12), (768, 12), 32))], []),
    "aesthetic": ([lambda: CLIPVisionModelWithProjection(LARGE.vision_config)], [head]),
    "image_reward": (
        [lambda: BlipVisionModel(BLIP_VISION), lambda: BlipTextModel(BLIP_TEXT, add_pooling_layer=False)],
        [head],
    ),
    "caption_bertscore": ([lambda: LlavaForConditionalGeneration(LLAVA)], [lambda: DebertaModel(DEBERTA)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_of_the_published_models(name: str) -> None:
    def count(makers: list[Any]) -> int:
        with torch.device("meta"):
            return sum(p.numel() for make in makers for p in make().parameters())

    own, single = map(count, MODELS[name])
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        assert model_bytes(name, {"dtype": dtype}) == own * width + 4 * single


def test_what_needs_none_and_what_is_not_known() -> None:
    assert set(MODELS) | {"ocr_accuracy"} == set(learned_rewards)
    for name in ("caption_match", "jpeg_compressibility", "remote", "vision_judge", "ocr_accuracy"):
        assert model_bytes(name, {}) == 0
    assert model_bytes("pickscore", {"device": "cpu"}) == model_bytes("pickscore", {"device": "cuda:1"}) == 0
    assert model_bytes("hpsv2", {"model": "here.pt"}) == model_bytes("hpsv2", {})
    rewards = "rewards=[{name: pickscore, options: {model: mine}}, {name: 'my_module:mine'}, {name: hpsv2}]"
    assert uncounted_rewards(load_config(None, [rewards])) == ["pickscore", "my_module:mine"]
