"""What is FLUX.2-klein's own: its grid, its chat template, distilled models, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import save_file
from tested_families import FIXTURES, Family
from tiny_pipeline import PROMPTS
from tiny_pipelines import KLEIN, build_klein, tiny_qwen

from pcpo_fast.config.schema import ModelConfig
from pcpo_fast.errors import UserError
from pcpo_fast.policies.families import FAMILIES, check_base_model
from pcpo_fast.policies.flux2_klein import Flux2KleinPolicy
from pcpo_fast.policies.pipeline_files import NOT_TRAINED, pipeline_class_of


@pytest.fixture(scope="module")
def family(klein_folder: Path) -> Family:
    return Family("klein", klein_folder)


@pytest.fixture
def folder(klein_folder: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(klein_folder, tmp_path / "pipeline"))


@pytest.mark.parametrize(
    ("dynamic", "height", "width", "steps"), [(True, 16, 24, 10), (True, 64, 32, 5), (False, 16, 16, 3)]
)
def test_scheduler_times_are_those_the_pipeline_runs(
    family: Family, dynamic: bool, height: int, width: int, steps: int
) -> None:
    """The shift depends on the image's size and on the number of steps."""
    policy, scheduler = family.policy(), FlowMatchEulerDiscreteScheduler(shift=2.0, use_dynamic_shifting=dynamic)
    other = Flux2KleinPolicy(policy.network, policy.vae, scheduler, ModelConfig(height=height, width=width))
    pipeline: Any = Flux2KleinPipeline(scheduler, policy.vae, None, None, policy.network)
    pipeline.set_progress_bar_config(disable=True)
    embeds = policy.encode(PROMPTS[:1])
    with torch.no_grad():
        pipeline(
            height=height, width=width, num_inference_steps=steps, guidance_scale=1.0, output_type="latent", **embeds
        )
    assert torch.equal(other.schedule(steps).times, scheduler.sigmas.double())
    assert other.schedule(steps).times[0] == 1 and other.schedule(steps).times[-1] == 0


# ----------------------------------------------------------------------------------------------- distilled


def test_a_distilled_klein_refuses_guidance_and_warns(tmp_path: Path) -> None:
    build_klein(tmp_path / "pipeline", distilled=True)
    distilled = Family("klein", tmp_path / "pipeline")
    with pytest.raises(UserError, match=r"^model\.cfg_scale: .* is distilled .*: set it to 1, or take the base model$"):
        distilled.policy()
    with pytest.warns(UserWarning, match=r"^model\.path: .* is distilled to few steps"):
        policy = distilled.policy("model.cfg_scale=1.0")
    pipeline, latents = distilled.pipeline(), distilled.latents(2)
    with torch.no_grad():
        halves = policy.predict_halves(latents, torch.tensor([1.0, 1.0]), policy.encode(PROMPTS[:2]))
    assert halves.unconditional is None
    # diffusers ignores the scale as well.
    images = [distilled.images(pipeline, latents, list(PROMPTS[:2]), scale) for scale in (1.0, 3.0)]
    assert torch.equal(*images)


def test_an_embedded_guidance_scale_is_refused(family: Family) -> None:
    with pytest.raises(UserError, match=r"^model\.guidance: only takes effect with an embedded guidance scale"):
        family.policy("model.guidance=5.0")


# ------------------------------------------------------------------------------------- folders that are not


def test_a_tokenizer_without_a_chat_template_is_one_sentence(tmp_path: Path) -> None:
    build_klein(tmp_path / "pipeline", template=False)
    policy = Family("klein", tmp_path / "pipeline").policy()
    with pytest.raises(UserError, match=r"^model\.path: the tokenizer of .* has no chat template"):
        policy.prepare_prompts(PROMPTS)


def test_a_text_encoder_without_the_layers_that_are_read_is_refused(family: Family, folder: Path) -> None:
    tiny_qwen(layers=26).save_pretrained(folder / "text_encoder")
    with pytest.raises(UserError, match=r"^model\.path: .*text_encoder/config\.json says num_hidden_layers 26; .* 27$"):
        check_base_model(Family("klein", folder).config())


@pytest.mark.parametrize(
    ("key", "width", "part"), [("joint_attention_dim", 72, "text_encoder"), ("in_channels", 24, "vae")]
)
def test_parts_of_different_kleins_are_refused(folder: Path, key: str, width: int, part: str) -> None:
    Flux2Transformer2DModel(**(KLEIN | {key: width})).save_pretrained(folder / "transformer")
    with pytest.raises(UserError, match=rf"transformer/config\.json says {key} {width}, but by {part}/config\.json"):
        check_base_model(Family("klein", folder).config())


@pytest.mark.parametrize("pipeline", NOT_TRAINED)
def test_models_that_are_not_trained_are_refused_by_name(tmp_path: Path, pipeline: str) -> None:
    modular = "Modular" in pipeline
    (tmp_path / f"{'modular_' * modular}model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(
        UserError, match=r"^model\.path: .* cannot be trained yet; allowed are FluxPipeline, "
    ) as caught:
        pipeline_class_of(tmp_path, FAMILIES)
    assert NOT_TRAINED[pipeline] in str(caught.value)


@pytest.mark.parametrize("name", ["klein", "flux2_dev"])
def test_the_network_as_one_file_with_the_names_of_its_authors(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    family = Family(name, request.getfixturevalue(FIXTURES[name]))
    policy = family.policy()
    state = policy.network.state_dict()
    layers = [name for name, module in policy.network.named_modules() if isinstance(module, torch.nn.Linear)]
    file = {
        f"{original}.weight": torch.cat([state[f"{name}.weight"] for name in names])
        for original, names in Flux2KleinPolicy.release_weights(layers).items()
    }
    modulation = file["final_layer.adaLN_modulation.1.weight"]
    file["final_layer.adaLN_modulation.1.weight"] = torch.cat(modulation.chunk(2)[::-1])
    for weight in state.keys() - {f"{layer}.weight" for layer in layers}:  # the norms of queries and keys
        stem, number, _, norm, _ = weight.split(".")
        stream = "" if stem.startswith("single") else "txt_attn." if "added" in norm else "img_attn."
        of = {"q": "query", "k": "key"}[norm[-1]]
        blocks = "single_blocks" if stem.startswith("single") else "double_blocks"
        file[f"{blocks}.{number}.{stream}norm.{of}_norm.scale"] = state[weight]
    save_file(file, tmp_path / "klein.safetensors")
    shutil.copytree(family.folder, tmp_path / "pipeline")
    other = Family(name, tmp_path / "pipeline").policy(f"model.transformer={tmp_path / 'klein.safetensors'}")
    assert all(torch.equal(other.network.state_dict()[weight], value) for weight, value in state.items())
    (tmp_path / "klein.safetensors").unlink()
    del file["single_stream_modulation.lin.weight"]
    save_file(file, tmp_path / "klein.safetensors")
    with pytest.raises(UserError, match=r"^model\.transformer: .*klein\.safetensors "):
        Family(name, tmp_path / "pipeline").policy(f"model.transformer={tmp_path / 'klein.safetensors'}")
