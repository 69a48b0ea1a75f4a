"""CLIP models that score: loading, tokenizing, and features in float32 of unit length."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.policies.weight_files import and_more
from pcpo_fast.rewards.model_files import has_tokenizer, model_folder
from pcpo_fast.rewards.preprocessing import Preprocessing, read_preprocessing

# Parts of a CLIP checkpoint that an image tower does without; older files also hold the numbers of the positions.
_TEXT = ("text_model.", "text_projection.", "logit_scale")


def load_clip(reward: str, option: str, path: str, *, text: bool = True) -> tuple[Any, Preprocessing, Path]:
    """A CLIP model of transformers, its preprocessing and its folder.

    Args:
        reward, option: for messages.
        path: folder or hub id.
        text: whether the text tower is wanted, too.

    Returns:
        ``CLIPModel`` (or ``CLIPVisionModelWithProjection``) on the CPU, preprocessing, folder.

    Raises:
        UserError: it is not there, is no CLIP model, or its weights do not fit its configuration.
    """
    folder = model_folder(reward, option, path)
    where = f"reward {reward}: {path}"
    kind = check_model_type(folder, where, *(("clip",) if text else ("clip", "clip_vision_model")))
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

    if text:
        model = load_pretrained(CLIPModel, folder, where)
        return model, read_preprocessing(folder, model.config.vision_config.image_size, where), folder
    options = {}
    if kind == "clip":
        # The width of the projection belongs to both towers, and the image tower's own entry may be a default.
        config = CLIPConfig.from_pretrained(folder)
        config.vision_config.projection_dim = config.projection_dim
        options["config"] = config.vision_config
    model = load_pretrained(CLIPVisionModelWithProjection, folder, where, unused=_TEXT, **options)
    return model, read_preprocessing(folder, model.config.image_size, where), folder


def load_pretrained(
    kind: Any, folder: Path, where: str, *, unused: tuple[str, ...] = (), spare: tuple[str, ...] = (), **options: Any
) -> Any:
    """A model of transformers with all its weights, in float32, or a sentence that says what is wrong.

    Args:
        kind: the class.
        folder: the model's.
        where: reward and model, for messages.
        unused: beginnings of names that the files may hold without the model having them.
        spare: beginnings of names that the model has and the files may lack.
        options: for ``from_pretrained``.

    Raises:
        UserError: files and model do not fit, or the files cannot be read.
    """
    from pcpo_fast.policies.quiet import quiet_libraries

    try:
        with quiet_libraries():
            model, report = kind.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, **options
            )
    except Exception as error:  # of several libraries, for files that do not go together
        raise UserError(f"{where} cannot be loaded: {reason_of(error)}") from None
    missing = [name for name in sorted(report["missing_keys"]) if not name.startswith(spare)]
    unknown = [name for name in sorted(report["unexpected_keys"]) if not name.startswith(unused)]
    unknown = [name for name in unknown if not name.endswith("position_ids")]
    for problem, names in (("lacks", missing), ("has the unknown", unknown)):
        if names:
            raise UserError(f"{where}: its checkpoint {problem} {names[0]}{and_more(names)}")
    return model


def load_tokenizer(reward: str, path: str | None, folder: Path | None, published: str) -> Any:
    """A tokenizer: the one asked for, else the one in the model's folder, else the published one.

    Raises:
        UserError: it is not there or cannot be read.
    """
    from transformers import AutoTokenizer

    if path is None and folder is not None and has_tokenizer(folder):
        place = folder
    else:
        place = model_folder(reward, "tokenizer", published if path is None else path, weights=False)
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True)
    except Exception as error:  # of several libraries
        raise UserError(f"reward {reward}: the tokenizer in {place} cannot be loaded: {reason_of(error)}") from None


class ClipFeatures:
    """Features of a CLIP model with both towers.

    Args:
        reward: for messages.
        model: a ``CLIPModel``.
        preprocessing: for its images.
        tokenizer: for its texts.

    Raises:
        UserError: the tokenizer has words that the model has not.
    """

    def __init__(self, reward: str, model: Any, preprocessing: Preprocessing, tokenizer: Any) -> None:
        self.model, self.preprocessing, self.tokenizer = model, preprocessing, tokenizer
        self._length = model.config.text_config.max_position_embeddings
        known = model.config.text_config.vocab_size
        if len(tokenizer) > known:
            raise UserError(
                f"reward {reward}: the tokenizer has {len(tokenizer)} words, but the model knows {known}; name the "
                "model's own with the option tokenizer"
            )

    def images(self, images: Tensor) -> Tensor:
        """float32 [B, 3, H, W] in 0..1 -> float32 [B, D] of length 1."""
        return image_features(self.model, self.preprocessing(images))

    def texts(self, texts: list[str]) -> Tensor:
        """B texts -> float32 [B, D] of length 1; equal texts are computed once, long ones cut."""
        different = list(dict.fromkeys(texts))
        tokens = self.tokenizer(
            different, padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        ).input_ids.to(self.model.logit_scale.device)
        # The text tower is causal and read at the end of the text: padding behind it needs no mask.
        features = self.model.text_projection(self.model.text_model(input_ids=tokens).pooler_output)
        row = {text: index for index, text in enumerate(different)}
        return _unit(features)[[row[text] for text in texts]]

    def cosines(self, images: Tensor, texts: list[str]) -> Tensor:
        """Cosine of each image with its text, float32 [B] in -1..1."""
        return (self.images(images) * self.texts(texts)).sum(1)


def image_features(model: Any, pixels: Tensor) -> Tensor:
    """Prepared pixels -> projected image features, float32 [B, D] of length 1."""
    pixels = pixels.to(model.visual_projection.weight.dtype)
    return _unit(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output))


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features.float(), dim=-1)


def check_model_type(folder: Path, where: str, *allowed: str) -> str:
    """The type of model that a folder's ``config.json`` names.

    Raises:
        UserError: it is none of the allowed ones, or the file is not valid JSON; ``where`` begins the message.
    """
    try:
        kind = str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
    except (ValueError, AttributeError):
        raise UserError(f"{where}: its config.json is not valid JSON") from None
    if kind not in allowed:
        raise UserError(f"{where} is a model of type {kind}; allowed is {' or '.join(allowed)}")
    return kind
