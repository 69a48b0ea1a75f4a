"""ImageReward (Xu et al., arXiv:2304.05977): BLIP's text encoder with cross-attention to the image, and an MLP.

The published mean and standard deviation normalize scores on the authors' training set; about -2 to 2.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.rewards.aesthetic import linear_layers
from pcpo_fast.rewards.checkpoints import depth_of, module_of, read_checkpoint, shape_of
from pcpo_fast.rewards.clip_scoring import load_tokenizer
from pcpo_fast.rewards.learned import LearnedReward
from pcpo_fast.rewards.model_files import model_file
from pcpo_fast.rewards.preprocessing import Preprocessing

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the published model
_LENGTH = 35  # maximum number of prompt tokens
_HEAD = 64  # width of an attention head in both towers
_UNUSED = ("blip.vision_proj", "blip.text_proj")  # BLIP's other task

_VISION = (
    (r"^", "blip.visual_encoder."),
    (r"embeddings\.class_embedding", "cls_token"),
    (r"embeddings\.position_embedding", "pos_embed"),
    (r"embeddings\.patch_embedding", "patch_embed.proj"),
    (r"encoder\.layers", "blocks"),
    (r"post_layernorm", "norm"),
    (r"layer_norm", "norm"),
    (r"self_attn\.projection", "attn.proj"),
    (r"self_attn", "attn"),
)
"""Maps transformers' names of the image tower to the checkpoint's; in the text tower only a prefix differs."""


class ImageReward(LearnedReward):
    """ImageReward of image and prompt.

    Args:
        model: the checkpoint (``.pt`` or ``.safetensors``), a folder with ``ImageReward.pt``, or a hub id.
        tokenizer: folder or hub id of BERT's tokenizer, which the checkpoint does not include.
        device, dtype, batch_size: see :class:`pcpo_fast.rewards.learned.LearnedReward`; the last layers stay in
            float32.

    Raises:
        UserError: an option is invalid, or the checkpoint is missing or not ImageReward's.
    """

    name: ClassVar[str] = "image_reward"
    size: ClassVar[tuple[int, int]] = (303_301_632 + 141_977_088, 927_969)

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
        weights = read_checkpoint(file, f"reward {self.name}")
        what = f"reward {self.name}: {file} is not ImageReward's checkpoint"
        vision, text, head = _networks(weights, what)
        self._vision, self._text = self.keep(vision), self.keep(text)
        self._head = self.keep(head, torch.float32)
        self._tokenizer = load_tokenizer(self.name, tokenizer, None, tokenizer)
        known = text.config.vocab_size
        if len(self._tokenizer) > known:
            raise UserError(
                f"reward {self.name}: the tokenizer {tokenizer} has {counted(len(self._tokenizer), 'token')}, but "
                f"the checkpoint has {known}; use that of bert-base-uncased"
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
    vision_config, text_config = _configs(rest, what)
    words = {name: rest.pop(name) for name in list(rest) if name.startswith("blip.text_encoder.")}
    vision = module_of(lambda: BlipVisionModel(vision_config), rest, what, _VISION)
    text = module_of(
        lambda: BlipTextModel(text_config, add_pooling_layer=False), words, what, [(r"^", "blip.text_encoder.")]
    )
    return vision, text, linear_layers(head, text_config.hidden_size, what, "mlp.layers.")


def _configs(weights: Mapping[str, Tensor], what: str) -> tuple[Any, Any]:
    from transformers import BlipTextConfig, BlipVisionConfig

    shape = partial(shape_of, weights, what=what)
    width, _, patch, _ = shape("blip.visual_encoder.patch_embed.proj.weight", 4)
    _, positions, _ = shape("blip.visual_encoder.pos_embed", 3)
    inner, _ = shape("blip.visual_encoder.blocks.0.mlp.fc1.weight", 2)
    words, text_width = shape("blip.text_encoder.embeddings.word_embeddings.weight", 2)
    length, _ = shape("blip.text_encoder.embeddings.position_embeddings.weight", 2)
    text_inner, _ = shape("blip.text_encoder.encoder.layer.0.intermediate.dense.weight", 2)
    for tower, have in (("image", width), ("text", text_width)):
        if have % _HEAD:
            raise UserError(f"{what}: its {tower} width {have} is not a multiple of {_HEAD}")
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=depth_of(weights, "blip.visual_encoder.blocks"),
        num_attention_heads=width // _HEAD,
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,  # BLIP's; transformers' default differs
    )
    text = BlipTextConfig(
        vocab_size=words,
        hidden_size=text_width,
        encoder_hidden_size=width,
        intermediate_size=text_inner,
        num_hidden_layers=depth_of(weights, "blip.text_encoder.encoder.layer"),
        num_attention_heads=text_width // _HEAD,
        max_position_embeddings=length,
        # These tokens only matter for generation.
        bos_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
    )
    return vision, text
