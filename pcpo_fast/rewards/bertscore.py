"""BERTScore (Zhang et al., arXiv:1904.09675): how well the words of one text are matched by those of another.

Both texts go through one layer of a BERT-like encoder; every word piece of the reference takes its best cosine among
those of the candidate, and recall is their mean. Without idf weights and without rescaling, as DDPO uses it.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from pcpo_fast.errors import UserError
from pcpo_fast.rewards.clip_scoring import load_pretrained
from pcpo_fast.rewards.options import checked_option


def load_encoder(reward: str, folder: Path, layer: int) -> Any:
    """The encoder up to the layer whose output is compared, in float32.

    Args:
        reward: for messages.
        folder: a model of transformers whose layers are ``encoder.layer``: BERT, RoBERTa, DeBERTa and their kin.
        layer: the number of layers to keep; 40 of 48 for ``microsoft/deberta-xlarge-mnli``.

    Raises:
        UserError: no such model, or it has fewer layers.
    """
    from transformers import AutoModel

    # Heads of other tasks are of no use here, and a pooler comes after the layers.
    model = load_pretrained(AutoModel, folder, f"reward {reward}: {folder}", unused=("",), spare=("pooler.",))
    layers = getattr(getattr(model, "encoder", None), "layer", None)
    if layers is None:
        raise UserError(
            f"reward {reward}: {folder} is not an encoder like BERT, RoBERTa or DeBERTa, but of type "
            f"{model.config.model_type}"
        )
    number = Annotated[int, Field(ge=1, le=len(layers))]
    model.encoder.layer = layers[: checked_option(reward, "layer", layer, number, f"an integer of 1 to {len(layers)}")]
    return model


def recall(encoder: Any, tokenizer: Any, candidates: list[str], references: list[str]) -> Tensor:
    """Share of each reference that its candidate has: float32 [B], at most 1, mostly 0.3 to 1; 0 for empty texts."""
    have, have_known, have_counted = _embed(encoder, tokenizer, candidates)
    want, want_known, want_counted = _embed(encoder, tokenizer, references)
    cosines = torch.bmm(want, have.transpose(1, 2)) * (want_known[:, :, None] * have_known[:, None, :])
    best = cosines.max(dim=2).values
    mean = (best * want_counted).sum(1) / want_counted.sum(1).clamp(min=1)
    return mean * (have_counted.sum(1) > 0)


def _embed(encoder: Any, tokenizer: Any, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [B, T, D] of length 1; 1 where there is a token, [B, T]; 1 where it counts: the marks of beginning and
    end can be matched, but need not be."""
    device = next(encoder.parameters()).device
    words = tokenizer([text.strip() for text in texts], padding=True, truncation=True, return_tensors="pt").to(device)
    states = encoder(input_ids=words.input_ids, attention_mask=words.attention_mask).last_hidden_state.float()
    known = words.attention_mask.float()
    marks = (words.input_ids == tokenizer.cls_token_id) | (words.input_ids == tokenizer.sep_token_id)
    return torch.nn.functional.normalize(states, dim=-1), known, known * ~marks
