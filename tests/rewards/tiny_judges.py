"""Reward models of random weights, as their publishers lay them out, and small enough for milliseconds.

OpenCLIP and BLIP are written here a second time, in plain PyTorch with the published names, so that what the rewards
make of a checkpoint is held against something that does not share their code.
"""

import itertools
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIZE = 28  # pixels that the tiny CLIP models see


def clip_words(last: bool = True) -> Any:
    """CLIP's tokenizer on letters; ``last``: the end of the text is the last word, as in the real one."""
    from transformers import CLIPTokenizer

    pieces = [*LETTERS, *(letter + "</w>" for letter in LETTERS)]
    marks = ["<|startoftext|>", "<|endoftext|>"]
    ordered = [*pieces, *marks] if last else [*marks, *pieces]
    return CLIPTokenizer({piece: i for i, piece in enumerate(ordered)}, [], model_max_length=20)


def scatter(module: nn.Module, seed: int, scale: float = 0.2) -> None:
    """Random weights, every one: what starts as zero or one would hide a mix-up."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
        if parameter.ndim == 1:
            parameter.data += 0.5


def build_clip(folder: Path, seed: int = 0, **vision: Any) -> None:
    """A CLIP model with tokenizer and preprocessing, as transformers saves them."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = clip_words()
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPModel(
        CLIPConfig(
            text_config=tower
            | {
                "vocab_size": len(words),
                "max_position_embeddings": 20,
                "eos_token_id": words.eos_token_id,
                "bos_token_id": words.bos_token_id,
                "pad_token_id": words.pad_token_id,
            },
            vision_config=tower | {"image_size": SIZE, "patch_size": 14} | vision,
            projection_dim=24,
        )
    )
    scatter(model, seed)
    model.logit_scale.data.fill_(4.6)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(
        folder
    )


# OpenCLIP.


class OpenClipBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class OpenClipTower(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(OpenClipBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenClipVision(nn.Module):
    def __init__(self, size: int, patch: int, width: int, layers: int, head: int, out: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((size // patch) ** 2 + 1, width))
        self.proj = nn.Parameter(torch.zeros(width, out))
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = OpenClipTower(width, layers, width // head)
        self.ln_post = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj  # type: ignore[no-any-return]


class OpenClip(nn.Module):
    """``open_clip``'s CLIP with the names of its state dictionary. The defaults are ViT-H-14's."""

    def __init__(
        self,
        *,
        embed: int = 1024,
        size: int = 224,
        vision: tuple[int, int, int] = (1280, 32, 80),  # width, layers, width of a head
        text: tuple[int, int, int] = (1024, 24, 64),
        words: int = 49408,
        length: int = 77,
    ) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(length, text[0]))
        self.text_projection = nn.Parameter(torch.zeros(text[0], embed))
        self.logit_scale = nn.Parameter(torch.tensor(0.0))
        self.visual = OpenClipVision(size, 14, *vision, embed)
        self.transformer = OpenClipTower(text[0], text[1], text[0] // text[2])
        self.token_embedding = nn.Embedding(words, text[0])
        self.ln_final = nn.LayerNorm(text[0])

    def encode_text(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.full((length, length), -math.inf).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection  # type: ignore[no-any-return]

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        return (F.normalize(self.visual(pixels), dim=-1) * F.normalize(self.encode_text(tokens), dim=-1)).sum(1)


def tiny_open_clip() -> OpenClip:
    model = OpenClip(embed=24, size=SIZE, vision=(160, 2, 80), text=(128, 3, 64), words=len(clip_words()), length=20)
    scatter(model, 1)
    return model.eval()


# BLIP and ImageReward.


class BlipAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class BlipBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = BlipAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))  # type: ignore[no-any-return]


class BlipVision(nn.Module):
    def __init__(self, size: int, width: int, layers: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // 16) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 16, 16)})
        self.blocks = nn.ModuleList(BlipBlock(width, width // 64) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]


class MedAttention(nn.Module):
    """BERT's attention; ``source`` is the width of what is attended to."""

    def __init__(self, width: int, source: int) -> None:
        super().__init__()
        parts = {"query": nn.Linear(width, width), "key": nn.Linear(source, width), "value": nn.Linear(source, width)}
        self.self = nn.ModuleDict(parts)
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})
        self.heads = width // 64

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        inputs = {"query": x, "key": source, "value": source}
        q, k, v = (
            self.self[name](value).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name, value in inputs.items()
        )
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.output["LayerNorm"](self.output["dense"](seen) + x)  # type: ignore[no-any-return]


class MedLayer(nn.Module):
    def __init__(self, width: int, source: int) -> None:
        super().__init__()
        self.attention = MedAttention(width, width)
        self.crossattention = MedAttention(width, source)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = nn.ModuleDict({"dense": nn.Linear(4 * width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
        x = self.crossattention(self.attention(x, x, mask), seen, None)
        y = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](y + x)  # type: ignore[no-any-return]


class MedEmbeddings(nn.Module):
    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.register_buffer("position_ids", torch.arange(512)[None])
        self.word_embeddings = nn.Embedding(words, width)
        self.position_embeddings = nn.Embedding(512, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.position_embeddings.weight[: tokens.shape[1]]
        return self.LayerNorm(self.word_embeddings(tokens) + positions)  # type: ignore[no-any-return]


class MedEncoder(nn.Module):
    def __init__(self, words: int, width: int, layers: int, source: int) -> None:
        super().__init__()
        self.embeddings = MedEmbeddings(words, width)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(MedLayer(width, source) for _ in range(layers))})

    def forward(self, tokens: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        x = self.embeddings(tokens)
        for layer in self.encoder["layer"]:  # type: ignore[attr-defined]
            x = layer(x, seen, mask[:, None, None, :].bool())
        return x  # type: ignore[no-any-return]


class PublishedImageReward(nn.Module):
    """ImageReward with the names of its checkpoint. The defaults are the published sizes."""

    def __init__(
        self,
        size: int = 224,
        vision: tuple[int, int] = (1024, 24),
        text: tuple[int, int] = (768, 12),
        words: int = 30524,
    ) -> None:
        super().__init__()
        self.blip = nn.ModuleDict(
            {
                "visual_encoder": BlipVision(size, *vision),
                "text_encoder": MedEncoder(words, *text, vision[0]),
                "vision_proj": nn.Linear(vision[0], 256),
                "text_proj": nn.Linear(text[0], 256),
            }
        )
        widths = (text[0], 1024, 128, 64, 16, 1)
        linear = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        drop = nn.Dropout(0.2)
        layers = nn.Sequential(linear[0], drop, linear[1], drop, linear[2], drop, linear[3], linear[4])
        self.mlp = nn.ModuleDict({"layers": layers})

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        read = self.blip["text_encoder"](tokens, mask, self.blip["visual_encoder"](pixels))
        return (self.mlp["layers"](read[:, 0]).squeeze(1) - 0.16717362830052426) / 1.0333394966054072  # type: ignore[no-any-return]


def bert_words(folder: Path) -> Any:
    """BERT's tokenizer on letters, saved in a folder."""
    from transformers import BertTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + letter for letter in LETTERS)]
    words = BertTokenizer({piece: i for i, piece in enumerate(pieces)}, model_max_length=64)
    words.save_pretrained(folder)
    return words
