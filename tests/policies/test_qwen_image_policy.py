"""What is Qwen-Image's own: guidance that is sampled with but not trained."""

import shutil
from pathlib import Path

import pytest
import torch
from cli_runs import call, write_config
from diffusers import QwenImageTransformer2DModel
from tested_families import Family
from tiny_pipeline import PROMPTS
from tiny_pipelines import QWEN_IMAGE

from pcpo_fast.errors import UserError
from pcpo_fast.policies.families import check_base_model
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
