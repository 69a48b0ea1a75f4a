"""What is Qwen-Image's own: guidance that is sampled with but not trained, the published network, names of layers."""

import shutil
from pathlib import Path

import pytest
import torch
from cli_runs import call, write_config
from diffusers import QwenImageTransformer2DModel
from tested_families import LORA, Family, randomize_adapters, trained_state
from tiny_pipeline import PROMPTS
from tiny_pipelines import QWEN_IMAGE

from pcpo_fast.config.loading import load_config
from pcpo_fast.errors import UserError
from pcpo_fast.planning.models import build_on_meta, find_architecture
from pcpo_fast.policies.families import check_base_model
from pcpo_fast.policies.lora import trained_updates
from pcpo_fast.policies.lora_files import LORA_FILE, read_lora, write_lora
from pcpo_fast.policies.qwen_image import QwenImagePolicy
from pcpo_fast.preflight.checks import check_model


@pytest.fixture(scope="module")
def family(qwen_image_folder: Path) -> Family:
    return Family("qwen_image", qwen_image_folder)


def test_guidance_is_for_sampling_only(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It keeps the norm of the conditional half, as no linear loss does: a run is refused before anything is loaded."""
    inputs = family.latents(2), torch.tensor([0.9, 0.2]), family.policy().encode(PROMPTS[:2])
    guided, plain = family.policy().predict(*inputs), family.policy("model.cfg_scale=1.0").predict(*inputs)
    torch.testing.assert_close(guided.norm(dim=-1), plain.norm(dim=-1))
    assert (guided - plain).abs().max() > 1e-2
    config = write_config(tmp_path, family.folder, model__cfg_scale=3.0, sampler__grid="scheduler")
    for command in ("train", "plan"):
        answer = call(capsys, command, "--config", config)
        assert answer.code == 2 and "model.cfg_scale: must be 1 to train a QwenImagePipeline" in answer.err
        assert "Traceback" not in answer.err and not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(UserError, match=r"^model\.cfg_scale: must be 1 to train a QwenImagePipeline, whose guidance "):
        check_model(family.config())
    with pytest.raises(UserError, match=r"^model\.cfg_scale: 0\.5 is below 1, where Qwen-Image has no guidance"):
        family.policy("model.cfg_scale=0.5")


@pytest.mark.slow
def test_the_published_network_on_the_meta_device() -> None:
    path = "model.path=Qwen/Qwen-Image"
    settings = load_config(None, [path, "model.finetune=lora", "model.height=512", "model.width=768"]).model
    model = build_on_meta(find_architecture(settings), settings)
    assert model.network_parameters == 20_430_401_088 and model.encoders == {"text_encoder": 8_292_166_656}
    policy, network = model.policy, model.policy.module
    adapted = {name.removesuffix(".lora_A") for name, _ in network.named_modules() if name.endswith(".lora_A")}
    assert adapted == {f"transformer_blocks.{i}.{target}" for i in range(60) for target in QwenImagePolicy.lora_targets}
    assert len(policy.compiled_blocks(network)) == len(policy.recomputed_blocks(network)) == 60
    conditioning = {
        name: torch.empty(2, *shape, device="meta") for name, shape in policy.conditioning_shapes(0).items()
    }
    with torch.no_grad():
        latents = torch.empty(2, *policy.latent_shape, device="meta")
        assert policy.predict(latents, torch.ones(2, device="meta"), conditioning).shape == (2, 32 * 48, 64)
    assert policy.decode(latents[:1]).shape == (1, 3, settings.height, settings.width)


def test_kohyas_names_are_read_by_diffusers_and_back(family: Family, tmp_path: Path) -> None:
    tuned = family.policy(*LORA)
    randomize_adapters(tuned)
    layers = trained_updates(tuned.module, trained_state(tuned))
    write_lora(tmp_path / LORA_FILE, layers, QwenImagePolicy, "kohya")
    assert read_lora(tuned.module, tmp_path, "file", QwenImagePolicy).keys() == layers.keys()
    pipeline = family.pipeline()
    pipeline.load_lora_weights(tmp_path)
    other = QwenImagePolicy(pipeline.transformer, tuned.vae, tuned.scheduler, tuned.settings, cache=tuned.cache)
    inputs = family.latents(2), torch.tensor([0.9, 0.2]), tuned.encode(PROMPTS[:2])
    with torch.no_grad():
        assert torch.allclose(other.predict(*inputs), tuned.predict(*inputs), atol=1e-3)
        assert not torch.allclose(family.policy().predict(*inputs), tuned.predict(*inputs), atol=1e-1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"zero_cond_t": True}, r"says zero_cond_t True, so it is not a text-to-image Qwen-Image"),
        (
            {"joint_attention_dim": 24},
            r"says joint_attention_dim 24, but by text_encoder/config\.json \(hidden_size 16\) it would be 16",
        ),
        ({"in_channels": 32}, r"says in_channels 32, but by vae/config\.json \(z_dim 4\) it would be 16"),
        ({"axes_dims_rope": (4, 4, 6)}, r"says axes_dims_rope \[4, 4, 6\], which must add up to attention_head_dim 16"),
    ],
)
def test_other_networks_are_refused(family: Family, tmp_path: Path, changes: dict[str, object], says: str) -> None:
    folder = Path(shutil.copytree(family.folder, tmp_path / "pipeline"))
    QwenImageTransformer2DModel(**(QWEN_IMAGE | changes)).save_pretrained(folder / "transformer")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"^model\.path: .*transformer/config\.json {says}"):
        check_base_model(Family("qwen_image", folder).config())
