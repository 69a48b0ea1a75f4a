"""What is Krea 2's own: the template around a prompt, its distilled sister, names of layers."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import Krea2Transformer2DModel
from safetensors.torch import save_file
from tested_families import LORA, Family, randomize_adapters, trained_state
from tiny_pipeline import PROMPTS
from tiny_pipelines import KREA2, build_krea2

from pcpo_fast.errors import UserError
from pcpo_fast.policies.families import check_base_model
from pcpo_fast.policies.krea2 import PUBLISHED_LAYERS, TOKENS_AFTER, Krea2Policy
from pcpo_fast.policies.lora import trained_updates
from pcpo_fast.policies.lora_files import LORA_FILE, read_lora, write_lora


@pytest.fixture(scope="module")
def family(krea2_folder: Path) -> Family:
    return Family("krea2", krea2_folder)


def test_the_templates_constants_are_the_pipelines(family: Family) -> None:
    pipeline = family.pipeline()
    assert pipeline.prompt_template_encode_num_suffix_tokens == TOKENS_AFTER
    pipeline = diffusers.Krea2Pipeline(pipeline.scheduler, pipeline.vae, None, pipeline.tokenizer, pipeline.transformer)
    assert pipeline.text_encoder_select_layers == PUBLISHED_LAYERS


def test_captions_have_no_order_for_the_network(family: Family) -> None:
    """Padding may therefore be left out although the template has more after it."""
    policy = family.policy()
    prompts = ["a circle", PROMPTS[0]]
    given, latents, times = policy.encode(prompts), family.latents(2), torch.tensor([0.9, 0.2])
    assert {int(row.sum()) for row in given["prompt_mask"]} != {given["prompt_mask"].shape[1]}, "no row is padded"
    places = torch.randperm(given["prompt_mask"].shape[1], generator=torch.Generator().manual_seed(0))
    moved = {name: value[:, places] for name, value in given.items()}
    with torch.no_grad():
        expected = policy.predict(latents, times, given)
        torch.testing.assert_close(policy.predict(latents, times, moved), expected, rtol=0, atol=1e-5)
        assert (policy.predict(latents, times, policy.encode(prompts[::-1])) - expected).abs().max() > 1e-2


def test_turbo_has_its_own_times_no_guidance_and_a_word(family: Family, tmp_path: Path) -> None:
    build_krea2(tmp_path / "turbo", distilled=True)
    turbo = Family("krea2", tmp_path / "turbo")
    with pytest.raises(UserError, match=r"^model\.cfg_scale: .* is distilled .*: set it to 1, or take the base model"):
        turbo.policy()
    with pytest.warns(UserWarning, match="is distilled to few steps without noise"):
        policy = turbo.policy("model.cfg_scale=1.0")
    times = policy.schedule(4).times
    assert not torch.allclose(times, family.policy().schedule(4).times)
    pipeline = turbo.pipeline()
    turbo.images(pipeline, turbo.latents(1), list(PROMPTS[:1]), 1.0)
    torch.testing.assert_close(times.float(), pipeline.scheduler.sigmas)


def test_the_authors_names_are_read_by_diffusers_and_back(family: Family, tmp_path: Path) -> None:
    """diffusers takes them with the prefix of the reference trainer, ours with kohya's as well."""
    tuned = family.policy(*LORA)
    randomize_adapters(tuned)
    layers = trained_updates(tuned.module, trained_state(tuned))
    write_lora(tmp_path / LORA_FILE, layers, Krea2Policy, "kohya")
    assert read_lora(tuned.module, tmp_path, "file", Krea2Policy).keys() == layers.keys()
    originals = {ends[0]: name for name, ends in Krea2Policy.release_weights(list(layers)).items()}
    theirs = {}
    for layer, update in layers.items():
        theirs[f"diffusion_model.{originals[layer]}.lora_A.weight"] = update.down.contiguous()
        theirs[f"diffusion_model.{originals[layer]}.lora_B.weight"] = update.scaled_up.contiguous()
    save_file(theirs, tmp_path / "theirs.safetensors")
    pipeline = family.pipeline()
    pipeline.load_lora_weights(tmp_path / "theirs.safetensors")
    other = Krea2Policy(
        pipeline.transformer, tuned.vae, tuned.scheduler, tuned.settings, folder=tuned.folder, cache=tuned.cache
    )
    inputs = family.latents(2), torch.tensor([0.9, 0.2]), tuned.encode(PROMPTS[:2])
    with torch.no_grad():
        assert torch.allclose(other.predict(*inputs), tuned.predict(*inputs), atol=1e-3)
        assert not torch.allclose(family.policy().predict(*inputs), tuned.predict(*inputs), atol=1e-1)


@pytest.mark.parametrize(
    ("index", "network", "says"),
    [
        ({}, {"axes_dims_rope": (4, 4, 8)}, None),
        ({}, {"text_hidden_dim": 16}, r"transformer/config\.json says text_hidden_dim 16, but by text_encoder/config"),
        ({}, {"num_text_layers": 4}, r"says text_encoder_select_layers \[1, 2, 4\], but .* has num_text_layers 4"),
        (
            {"text_encoder_select_layers": [1, 2, 5]},
            {},
            r"text_encoder/config\.json says num_hidden_layers 4; the stat",
        ),
        ({"patch_size": 1}, {}, r"model_index\.json says patch_size 1, which must be 2"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    family: Family, tmp_path: Path, index: dict[str, object], network: dict[str, object], says: str | None
) -> None:
    folder = Path(shutil.copytree(family.folder, tmp_path / "pipeline"))
    if network:
        Krea2Transformer2DModel(**(KREA2 | network)).save_pretrained(folder / "transformer")  # type: ignore[arg-type]
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | index))
    config = Family("krea2", folder).config()
    if says is None:
        check_base_model(config)
    else:
        with pytest.raises(UserError, match=rf"^model\.path: .*{says}"):
            check_base_model(config)
