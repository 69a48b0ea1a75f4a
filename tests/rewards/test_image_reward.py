"""ImageReward against its published layout, written out in plain PyTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_judges import PublishedImageReward, bert_words, scatter
from torch import Tensor

from pcpo_fast.errors import UserError
from pcpo_fast.rewards import load_reward
from pcpo_fast.rewards.image_reward import _networks

SIZE = 32
PROMPTS = ["a red cat", "blue", "many words " * 9]
WITHIN = 1e-3


def published() -> PublishedImageReward:
    model = PublishedImageReward(SIZE, vision=(128, 2), text=(192, 3), words=60)
    scatter(model, 3, 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image_reward")
    torch.save(published().state_dict(), path / "ImageReward.pt")
    bert_words(path)
    return path


def reward(folder: Path, **options: Any) -> Any:
    return load_reward("image_reward", {"model": str(folder), "tokenizer": str(folder)} | options)


@pytest.mark.parametrize("size", [(41, 57), (32, 32), (90, 33)])
def test_equals_the_published_model_on_pillows_pixels(folder: Path, size: tuple[int, int]) -> None:
    from PIL import Image

    batch = torch.rand(3, 3, *size)
    height, width = (round(side * SIZE / min(size) - 0.5 + 1e-9) for side in size)  # the longer side is cut off
    pixels = []
    for row in (batch * 255).round().to(torch.uint8).permute(0, 2, 3, 1):
        image = Image.fromarray(row.numpy()).resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - SIZE) / 2.0), round((height - SIZE) / 2.0)  # torchvision's CenterCrop
        image = image.crop((left, top, left + SIZE, top + SIZE))
        pixels.append(torch.tensor(list(image.tobytes()), dtype=torch.float32).reshape(SIZE, SIZE, 3).permute(2, 0, 1))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    words = bert_words(folder)(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    with torch.no_grad():
        expected = published()((torch.stack(pixels) / 255 - mean) / std, words.input_ids, words.attention_mask)
    scores = reward(folder)(batch, PROMPTS, [{}] * 3)
    # Random layers give scores of any size: relative to that.
    torch.testing.assert_close(scores, expected, rtol=WITHIN, atol=WITHIN * float(expected.abs().max()))
    assert expected.std() > 10 * WITHIN * expected.abs().max(), "the scores do not differ enough to tell"


def test_full_size_names_and_shapes() -> None:
    """BLIP with ViT-L: 303 million weights in the image tower, BERT-base with cross-attention in the text tower."""
    with torch.device("meta"):
        state = PublishedImageReward().state_dict()
    vision, text, head = _networks(state, "test")
    assert (vision.config.num_attention_heads, vision.config.image_size, vision.config.patch_size) == (16, 224, 16)
    assert (text.config.num_attention_heads, text.config.num_hidden_layers, text.config.vocab_size) == (12, 12, 30524)
    assert round(sum(p.numel() for p in vision.parameters()) / 1e6, 1) == 303.3
    assert text.encoder.layer[11].crossattention.self.key.weight.shape == (768, 1024)
    assert [tuple(layer.weight.shape) for layer in head] == [(1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)]
    used = sum(p.numel() for part in (vision, text, head) for p in part.parameters())
    unused = sum(v.numel() for k, v in state.items() if "_proj." in k or "position_ids" in k)
    assert used + unused == sum(tensor.numel() for tensor in state.values())


def no_cross(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if "crossattention" in name]:
        del state[name]


def more(state: dict[str, Tensor]) -> None:
    state["blip.visual_encoder.fc.weight"] = torch.zeros(2)


def wide(state: dict[str, Tensor]) -> None:
    state["mlp.layers.0.weight"] = torch.zeros(1024, 128)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_cross, r"is not ImageReward's checkpoint: it lacks blip.text_encoder.*crossattention.* \(and 29 more\)$"),
        (more, r"it has an unexpected blip.visual_encoder.fc.weight$"),
        (wide, r"mlp.layers.0.weight has the shape \[1024, 128\], which does not fit the others$"),
        (lambda state: state.pop("mlp.layers.7.bias"), r"it lacks mlp.layers.7.bias$"),
    ],
)
def test_checkpoints_that_are_none(
    folder: Path, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    state = published().state_dict()
    spoil(state)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match=message):
        reward(folder, model=str(tmp_path / "other.pt"))


def test_a_folder_without_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward image_reward: option model: the folder .* has no ImageReward.pt$"):
        reward(folder, model=str(tmp_path))
