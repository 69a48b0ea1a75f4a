"""Checkpoints of the metrics' architectures with random weights, made in milliseconds."""

from pathlib import Path

import torch
from torch import nn


def write_dinov2(folder: Path, hidden: int = 16) -> Path:
    """DINOv2 of two layers and large patches."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=112,
        patch_size=56,
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


def write_clip(folder: Path) -> Path:
    """CLIP with both halves, as the published checkpoints are; it sees 32 x 32."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    half = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    half |= {"projection_dim": 12}
    config = CLIPConfig(
        text_config=half | {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 8},
        vision_config=half | {"image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


def write_lpips(folder: Path) -> str:
    """An AlexNet trunk and linear weights, as --metric lpips=... names them."""
    torch.manual_seed(0)
    shapes = ((0, 3, 64, 11), (3, 64, 192, 5), (6, 192, 384, 3), (8, 384, 256, 3), (10, 256, 256, 3))
    trunk = {}
    for number, inside, outside, kernel in shapes:
        trunk[f"features.{number}.weight"] = (
            torch.randn(outside, inside, kernel, kernel) * (2 / (inside * kernel**2)) ** 0.5
        )
        trunk[f"features.{number}.bias"] = torch.zeros(outside)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(trunk, folder / "alexnet.pth")
    linear = {f"lin{place}.model.1.weight": torch.rand(1, shape[2], 1, 1) for place, shape in enumerate(shapes)}
    torch.save(linear, folder / "alex.pth")
    return f"{folder / 'alexnet.pth'},{folder / 'alex.pth'}"


class FakeInception(nn.Module):
    """Takes what torch-fidelity's Inception takes, and returns features and logits, fewer than the published."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None) -> None:
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(3, 16, generator=generator))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert images.dtype == torch.uint8
        pools = images.float().mean(dim=(2, 3)) @ self.weight / 255
        return pools, pools[:, :10]
