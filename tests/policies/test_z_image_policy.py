"""What is Z-Image's own: captions of different lengths, names of layers, Turbo, refusals."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models import attention_dispatch
from safetensors.torch import save_file
from tested_families import CPU, Family
from tiny_pipeline import PROMPTS
from tiny_pipelines import Z_IMAGE, build_z_image

from pcpo_fast.errors import UserError
from pcpo_fast.policies import attention
from pcpo_fast.policies.attention import check_backend
from pcpo_fast.policies.families import check_base_model
from pcpo_fast.policies.z_image import ZImagePolicy

LONG = ("a red circle", "a blue circle on a red background " * 4, "red " * 29, "red " * 30, "a blue circle " * 21)
"""Captions whose lengths lie on both sides of 32 tokens, and of twice as many."""


@pytest.fixture(scope="module")
def family(z_image_folder: Path) -> Family:
    return Family("z_image", z_image_folder)


@pytest.fixture
def folder(z_image_folder: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(z_image_folder, tmp_path / "pipeline"))


@pytest.mark.parametrize("size", [(16, 24), (16, 16), (32, 32)])  # 24 and 16 tokens, which are filled up, and 64
def test_captions_of_every_length_in_one_batch_are_those_of_diffusers_lists(
    family: Family, size: tuple[int, int]
) -> None:
    """Its own forward cuts captions to their lengths, and places the image after each."""
    settings = (f"model.height={size[0]}", f"model.width={size[1]}", "model.max_sequence_length=100")
    policy = family.policy(*settings, "model.cfg_scale=1.0")
    conditioning = policy.encode(LONG)
    lengths = conditioning["prompt_mask"].sum(dim=1).int().tolist()
    assert len({-(-length // 32) for length in lengths}) == 3 and 32 in lengths, lengths
    latents, times = torch.randn(5, *policy.latent_shape), torch.tensor([1.0, 0.8, 0.5, 0.3, 0.1])
    captions = [row[:length] for row, length in zip(conditioning["prompt_embeds"], lengths, strict=True)]
    theirs = ZImageTransformer2DModel.from_pretrained(family.folder, subfolder="transformer")
    with torch.no_grad():
        expected = -torch.stack(theirs([*latents.unsqueeze(2)], 1 - times, captions, return_dict=False)[0]).squeeze(2)
        together = policy.predict(latents, times, conditioning)
        alone = [
            policy.predict(latents[row : row + 1], times[row : row + 1], {"prompt_embeds": c[None], "prompt_mask": m})
            for row, c in enumerate(captions)
            for m in [torch.ones(1, len(c))]
        ]
    assert torch.allclose(together, expected, atol=1e-4)
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)
    assert (together - policy.predict(latents, times, policy.encode(LONG[::-1]))).abs().max() > 1e-2


def test_padding_is_not_stored(family: Family, tmp_path: Path) -> None:
    policy = family.policy(f"model.embedding_cache={tmp_path}", "model.max_sequence_length=512")
    policy.prepare_prompts([*LONG, *PROMPTS])
    sizes = {path.stat().st_size for path in tmp_path.rglob("*.safetensors")}
    width, word = 16, 4
    assert min(sizes) < 5 * (width + 1) * word + 300 and max(sizes) < 80 * (width + 1) * word + 300
    assert policy.encode(PROMPTS[:1])["prompt_embeds"].shape[1] < 10 < policy.encode(LONG)["prompt_embeds"].shape[1]


def test_the_network_as_one_file_with_the_names_of_its_authors(family: Family, folder: Path, tmp_path: Path) -> None:
    policy = family.policy()
    state = policy.network.state_dict()
    layers = [name for name, module in policy.network.named_modules() if isinstance(module, torch.nn.Linear)]
    originals = ZImagePolicy.release_weights(layers)
    assert {layer for ends in originals.values() for layer in ends} == set(layers)
    file = {
        f"{original}.{kind}": torch.cat([state[f"{name}.{kind}"] for name in names])
        for original, names in originals.items()
        for kind in ("weight", "bias")
        if f"{names[0]}.{kind}" in state
    }
    for name in state.keys() - {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}:
        file[name.replace("norm_q", "q_norm").replace("norm_k", "k_norm")] = state[name]
    save_file(file, tmp_path / "z.safetensors")
    other = Family("z_image", folder).policy(f"model.transformer={tmp_path / 'z.safetensors'}")
    assert all(torch.equal(other.network.state_dict()[name], value) for name, value in state.items())


def test_turbo_comes_with_a_word(z_image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(z_image_folder, tmp_path / "Z-Image-Turbo")
    with pytest.warns(UserWarning, match=r"^model\.path: .*Z-Image-Turbo is distilled to few steps"):
        Family("z_image", tmp_path / "Z-Image-Turbo").policy("model.cfg_scale=1.0")


# ------------------------------------------------------------------------------------------------ refused


def test_a_tokenizer_without_a_chat_template_is_one_sentence(tmp_path: Path) -> None:
    build_z_image(tmp_path / "pipeline", template=False)
    policy = Family("z_image", tmp_path / "pipeline").policy()
    with pytest.raises(UserError, match=r"^model\.path: the tokenizer of .* has no chat template"):
        policy.prepare_prompts(PROMPTS)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"cap_feat_dim": 24},
            r"says cap_feat_dim 24, but by text_encoder/config\.json \(hidden_size 16\) it would be 16",
        ),
        ({"in_channels": 8}, r"says in_channels 8, but by vae/config\.json \(latent_channels 4\) it would be 4"),
        ({"all_patch_size": (1,)}, r"says all_patch_size \[1\], which must contain 2"),
    ],
)
def test_parts_that_do_not_fit_are_refused(folder: Path, changes: dict[str, Any], says: str) -> None:
    ZImageTransformer2DModel(**(Z_IMAGE | changes)).save_pretrained(folder / "transformer")
    with pytest.raises(UserError, match=rf"^model\.path: .*transformer/config\.json {says}"):
        check_base_model(Family("z_image", folder).config())


def test_an_image_with_more_places_than_the_network_knows_is_refused(family: Family) -> None:
    with pytest.raises(UserError, match=r"^model\.height: 132 is more than the 128 pixels that .* embeddings for$"):
        family.policy("model.height=132")


def test_attention_that_does_not_leave_padding_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers drops a mask that a backend has no argument for."""
    check_backend("native", CPU, 16, True, torch.float32, masked=True)
    true = attention_dispatch.dispatch_attention_fn
    monkeypatch.setattr(
        attention, "dispatch_attention_fn", lambda *given, **how: true(*given, **(how | {"attn_mask": None}))
    )
    check_backend("native", CPU, 16, True, torch.float32)
    with pytest.raises(
        UserError, match=r"^model\.attention: native cannot be used here: it does not leave out the pad"
    ):
        check_backend("native", CPU, 16, True, torch.float32, masked=True)
