"""ImageReward (Xu et al., arXiv:2304.05977): BLIP reads the prompt with the image in view, linear layers rate it.

The published mean and standard deviation make the scores of their training set 0 and 1; about -2 to 2.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pcpo_fast.errors import UserError
from pcpo_fast.rewards.aesthetic import linear_layers
from pcpo_fast.rewards.checkpoints import Source, check_names, fill, read_weights
from pcpo_fast.rewards.clip_scoring import load_tokenizer
from pcpo_fast.rewards.learned import LearnedReward
from pcpo_fast.rewards.model_files import model_file
from pcpo_fast.rewards.preprocessing import Preprocessing

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the published model
_LENGTH = 35  # tokens of a prompt that are read
_HEAD = 64  # width of an attention head in both towers
_UNUSED = ("blip.vision_proj", "blip.text_proj")  # BLIP's other task

_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_BLOCK = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.qkv": "self_attn.qkv"}
_BLOCK |= {"attn.proj": "self_attn.projection", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


class ImageReward(LearnedReward):
    """ImageReward of image and prompt.

    Args:
        model: the checkpoint (``.pt`` or ``.safetensors``), a folder with ``ImageReward.pt``, or a hub id.
        tokenizer: folder or hub id of BERT's tokenizer, which the checkpoint does not come with.
        device, dtype, batch_size: see :class:`pcpo_fast.rewards.learned.LearnedReward`; the last layers stay in
            float32.

    Raises:
        UserError: an option is wrong, or the checkpoint is not there or not ImageReward's.
    """

    name: ClassVar[str] = "image_reward"

    def __init__(
        self,
        model: str = "THUDM/ImageReward",
        tokenizer: str = "google-bert/bert-base-uncased",
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
    ) -> None:
        super().__init__(device=device, dtype=dtype, batch_size=batch_size)
        file = model_file(self.name, "model", model, "ImageReward.pt")
        weights = read_weights(file, f"reward {self.name}")
        what = f"reward {self.name}: {file} is not ImageReward's checkpoint"
        vision, text, head = _networks(weights, what)
        self._vision, self._text = self.keep(vision), self.keep(text)
        self._head = self.keep(head, torch.float32)
        self._tokenizer = load_tokenizer(self.name, tokenizer, None, tokenizer)
        known = text.config.vocab_size
        if len(self._tokenizer) > known:
            raise UserError(
                f"reward {self.name}: the tokenizer {tokenizer} has {len(self._tokenizer)} words, but the checkpoint "
                f"knows {known}; allowed is that of bert-base-uncased"
            )
        size = vision.config.image_size
        self._prepare = Preprocessing(size, (size, size), half_pixel=round)

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Scores, float32 [b]."""
        seen = self._vision(pixel_values=self._prepare(images).to(self.dtype)).last_hidden_state
        words = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=_LENGTH, return_tensors="pt"
        ).to(images.device)
        read = self._text(
            input_ids=words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=seen
        ).last_hidden_state
        rating: Tensor = self._head(read[:, 0].float())
        return (rating.squeeze(1) - _MEAN) / _STD


def _networks(weights: Mapping[str, Tensor], what: str) -> tuple[Any, Any, Any]:
    """Image tower, text tower with cross-attention, and the last layers."""
    from transformers import BlipTextModel, BlipVisionModel

    rest = {name: tensor for name, tensor in weights.items() if not name.startswith(_UNUSED)}
    rest.pop("blip.text_encoder.embeddings.position_ids", None)
    head = {name: rest.pop(name) for name in list(rest) if name.startswith("mlp.")}
    vision_layers = _depth(rest, r"blip\.visual_encoder\.blocks\.(\d+)\.")
    text_layers = _depth(rest, r"blip\.text_encoder\.encoder\.layer\.(\d+)\.")
    vision_sources = _vision_sources(vision_layers)
    needed = {source.name for source in vision_sources.values()}
    text_needed = {f"blip.text_encoder.{name}" for name in _text_names(text_layers)}
    check_names(rest, needed | text_needed, (), what)
    vision_config, text_config = _configs(rest, vision_layers, text_layers, what)
    with torch.device("meta"):
        vision = BlipVisionModel(vision_config)
        text = BlipTextModel(text_config, add_pooling_layer=False)
    fill(vision, rest, vision_sources, what)
    fill(text, rest, {name: Source(f"blip.text_encoder.{name}") for name in text.state_dict()}, what)
    return vision, text, linear_layers(head, text_config.hidden_size, what, "mlp.layers.")


def _depth(weights: Mapping[str, Tensor], pattern: str) -> int:
    found = [int(match[1]) for match in (re.match(pattern, name) for name in weights) if match]
    return max(found, default=0) + 1


def _vision_sources(layers: int) -> dict[str, Source]:
    sources = {ours: Source(f"blip.visual_encoder.{theirs}") for theirs, ours in _VISION.items()}
    for layer in range(layers):
        for old, new in _BLOCK.items():
            for kind in ("weight", "bias"):
                name = f"blip.visual_encoder.blocks.{layer}.{old}.{kind}"
                sources[f"encoder.layers.{layer}.{new}.{kind}"] = Source(name)
    return sources


def _text_names(layers: int) -> set[str]:
    """BLIP's text tower has the same names in both; transformers took it over."""
    names = {"embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"}
    parts = ["embeddings.LayerNorm"]
    for layer in range(layers):
        place = f"encoder.layer.{layer}"
        for attention in ("attention", "crossattention"):
            parts += [f"{place}.{attention}.self.{part}" for part in ("query", "key", "value")]
            parts += [f"{place}.{attention}.output.{part}" for part in ("dense", "LayerNorm")]
        parts += [f"{place}.{part}" for part in ("intermediate.dense", "output.dense", "output.LayerNorm")]
    return names | {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}


def _configs(weights: Mapping[str, Tensor], vision_layers: int, text_layers: int, what: str) -> tuple[Any, Any]:
    from transformers import BlipTextConfig, BlipVisionConfig

    def shape(name: str, dimensions: int) -> list[int]:
        found = list(weights[name].shape)
        if len(found) != dimensions:
            raise UserError(f"{what}: {name} has the shape {found}, not {dimensions} dimensions")
        return found

    width, _, patch, _ = shape("blip.visual_encoder.patch_embed.proj.weight", 4)
    _, positions, _ = shape("blip.visual_encoder.pos_embed", 3)
    inner, _ = shape("blip.visual_encoder.blocks.0.mlp.fc1.weight", 2)
    words, text_width = shape("blip.text_encoder.embeddings.word_embeddings.weight", 2)
    length, _ = shape("blip.text_encoder.embeddings.position_embeddings.weight", 2)
    text_inner, _ = shape("blip.text_encoder.encoder.layer.0.intermediate.dense.weight", 2)
    for tower, have in (("image", width), ("text", text_width)):
        if have % _HEAD:
            raise UserError(f"{what}: its {tower} width {have} is no multiple of {_HEAD}")
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=vision_layers,
        num_attention_heads=width // _HEAD,
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,  # BLIP's; transformers' default is another
    )
    text = BlipTextConfig(
        vocab_size=words,
        hidden_size=text_width,
        encoder_hidden_size=width,
        intermediate_size=text_inner,
        num_hidden_layers=text_layers,
        num_attention_heads=text_width // _HEAD,
        max_position_embeddings=length,
        # Words with a meaning in generation, of which this model does none.
        bos_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
    )
    return vision, text
