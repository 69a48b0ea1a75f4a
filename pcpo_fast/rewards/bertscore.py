"""BERTScore (Zhang et al., arXiv:1904.09675): how well the tokens of one text are matched by those of another.

Both texts are encoded by one layer of a BERT-like encoder; recall is the mean, over tokens of the reference, of the
highest cosine with a token of the candidate. Without idf weights and rescaling, as in DDPO.
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
        reward: name of the reward, for error messages.
        folder: a transformers model whose layers are in ``encoder.layer``: BERT, RoBERTa, DeBERTa and similar.
        layer: number of layers to keep; 40 of 48 for ``microsoft/deberta-xlarge-mnli``.

    Raises:
        UserError: the model cannot be loaded, is of another kind, or has fewer layers.
    """
    from transformers import AutoModel

    # Task heads in the checkpoint are ignored, and a missing pooler does not matter.
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
    """BERTScore recall of each reference in its candidate, float32 [B]; at most 1, mostly 0.3 to 1; 0 if empty."""
    have, have_known, have_counted = _embed(encoder, tokenizer, candidates)
    want, want_known, want_counted = _embed(encoder, tokenizer, references)
    cosines = torch.bmm(want, have.transpose(1, 2)) * (want_known[:, :, None] * have_known[:, None, :])
    best = cosines.max(dim=2).values
    mean = (best * want_counted).sum(1) / want_counted.sum(1).clamp(min=1)
    return mean * (have_counted.sum(1) > 0)


def _embed(encoder: Any, tokenizer: Any, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Unit-length embeddings [B, T, D]; 1 where there is a token, [B, T]; 1 where it counts in the mean, [B, T]: start
    and end tokens can be matched, but are not counted."""
    device = next(encoder.parameters()).device
    words = tokenizer([text.strip() for text in texts], padding=True, truncation=True, return_tensors="pt").to(device)
    states = encoder(input_ids=words.input_ids, attention_mask=words.attention_mask).last_hidden_state.float()
    known = words.attention_mask.float()
    marks = (words.input_ids == tokenizer.cls_token_id) | (words.input_ids == tokenizer.sep_token_id)
    return torch.nn.functional.normalize(states, dim=-1), known, known * ~marks
