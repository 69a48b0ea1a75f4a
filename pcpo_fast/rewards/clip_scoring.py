"""CLIP models for rewards: loading, tokenizing, and unit-length float32 features."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.policies.weight_files import and_more
from pcpo_fast.rewards.model_files import has_tokenizer, model_folder
from pcpo_fast.rewards.preprocessing import Preprocessing, read_preprocessing

# Parts of a CLIP checkpoint that the image tower does not have.
_TEXT = ("text_model.", "text_projection.", "logit_scale")


def load_clip(reward: str, option: str, path: str, *, text: bool = True) -> tuple[Any, Preprocessing, Path]:
    """A transformers CLIP model, its preprocessing and its folder.

    Args:
        reward, option: names for error messages.
        path: folder or hub id.
        text: whether to load the text tower as well.

    Returns:
        ``CLIPModel`` (or ``CLIPVisionModelWithProjection``) on the CPU, preprocessing, folder.

    Raises:
        UserError: it is missing, not a CLIP model, or its weights do not match its configuration.
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
        # The projection width is shared by both towers; the image tower's own entry may be a wrong default.
        config = CLIPConfig.from_pretrained(folder)
        config.vision_config.projection_dim = config.projection_dim
        options["config"] = config.vision_config
    model = load_pretrained(CLIPVisionModelWithProjection, folder, where, unused=_TEXT, **options)
    return model, read_preprocessing(folder, model.config.image_size, where), folder


def load_pretrained(
    kind: Any, folder: Path, where: str, *, unused: tuple[str, ...] = (), spare: tuple[str, ...] = (), **options: Any
) -> Any:
    """A transformers model with all its weights, in float32.

    Args:
        kind: the model class.
        folder: folder of the model.
        where: reward and model, as prefix of error messages.
        unused: prefixes of names that may be in the files without being in the model.
        spare: prefixes of names that may be missing from the files.
        options: options of ``from_pretrained``.

    Raises:
        UserError: files and model do not match, or the files cannot be read.
    """
    from pcpo_fast.policies.quiet import quiet_libraries

    try:
        with quiet_libraries():
            model, report = kind.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, **options
            )
    except Exception as error:  # errors of several libraries for inconsistent files
        raise UserError(f"{where} cannot be loaded: {reason_of(error)}") from None
    missing = [name for name in sorted(report["missing_keys"]) if not name.startswith(spare)]
    unknown = [name for name in sorted(report["unexpected_keys"]) if not name.startswith(unused)]
    unknown = [name for name in unknown if not name.endswith("position_ids")]
    for problem, names in (("lacks", missing), ("has the unknown", unknown)):
        if names:
            raise UserError(f"{where}: its checkpoint {problem} {names[0]}{and_more(names)}")
    return model


def load_tokenizer(reward: str, path: str | None, folder: Path | None, published: str) -> Any:
    """The tokenizer at ``path``, otherwise the one in the model's folder, otherwise the published one.

    Raises:
        UserError: it is missing or cannot be read.
    """
    from transformers import AutoTokenizer

    if path is None and folder is not None and has_tokenizer(folder):
        place = folder
    else:
        place = model_folder(reward, "tokenizer", published if path is None else path, weights=False)
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True)
    except Exception as error:  # errors of several libraries
        raise UserError(f"reward {reward}: the tokenizer in {place} cannot be loaded: {reason_of(error)}") from None


class ClipFeatures:
    """Image and text features of a CLIP model.

    Args:
        reward: name of the reward, for error messages.
        model: a ``CLIPModel``.
        preprocessing: preprocessing of images.
        tokenizer: tokenizer of texts.

    Raises:
        UserError: the tokenizer's vocabulary is larger than the model's.
    """

    def __init__(self, reward: str, model: Any, preprocessing: Preprocessing, tokenizer: Any) -> None:
        self.model, self.preprocessing, self.tokenizer = model, preprocessing, tokenizer
        self._length = model.config.text_config.max_position_embeddings
        known = model.config.text_config.vocab_size
        if len(tokenizer) > known:
            raise UserError(
                f"reward {reward}: the tokenizer has {counted(len(tokenizer), 'token')}, but the model {known}; give "
                "the model's own tokenizer with the option tokenizer"
            )

    def images(self, images: Tensor) -> Tensor:
        """float32 [B, 3, H, W] in 0..1 -> unit-length float32 [B, D]."""
        return image_features(self.model, self.preprocessing(images))

    def texts(self, texts: list[str]) -> Tensor:
        """B texts -> unit-length float32 [B, D]; equal texts are encoded once, long ones are truncated."""
        different = list(dict.fromkeys(texts))
        tokens = self.tokenizer(
            different, padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        ).input_ids.to(self.model.logit_scale.device)
        # The text tower is causal and read at the end of the text, so the padding after it needs no mask.
        features = self.model.text_projection(self.model.text_model(input_ids=tokens).pooler_output)
        row = {text: index for index, text in enumerate(different)}
        return _unit(features)[[row[text] for text in texts]]

    def cosines(self, images: Tensor, texts: list[str]) -> Tensor:
        """Cosine of each image with its text, float32 [B] in -1..1."""
        return (self.images(images) * self.texts(texts)).sum(1)


def image_features(model: Any, pixels: Tensor) -> Tensor:
    """Preprocessed pixels -> projected image features, unit-length float32 [B, D]."""
    pixels = pixels.to(model.visual_projection.weight.dtype)
    return _unit(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output))


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features.float(), dim=-1)


def check_model_type(folder: Path, where: str, *allowed: str) -> str:
    """The model type in a folder's ``config.json``.

    Raises:
        UserError: it is not one of the allowed types, or the file is not valid JSON; ``where`` is the message's prefix.
    """
    try:
        kind = str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
    except (ValueError, AttributeError):
        raise UserError(f"{where}: its config.json is not valid JSON") from None
    if kind not in allowed:
        raise UserError(f"{where} is a model of type {kind}; allowed: {', '.join(allowed)}")
    return kind
