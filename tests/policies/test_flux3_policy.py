"""What is FLUX.3's own: windows of prompts, idle layers, modular folders, distilled models."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler, Flux3Transformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_flux3_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_flux3_transformer_checkpoint_to_diffusers
from huggingface_hub.errors import RemoteEntryNotFoundError
from tested_families import LORA, Family
from tiny_pipeline import PROMPTS
from tiny_pipelines import FLUX3, build_flux3, tiny_qwen3_vl
from torch import nn

from pcpo_fast.config.loading import load_config
from pcpo_fast.errors import UserError
from pcpo_fast.planning.models import build_on_meta, find_architecture
from pcpo_fast.policies.families import FAMILIES, check_base_model
from pcpo_fast.policies.flux3 import WINDOW, Flux3Policy
from pcpo_fast.policies.pipeline_files import pipeline_class_of, pipeline_folder

LONG = "a red circle on a green background " * 14  # 98 tokens: more than a window
PUBLISHED = "black-forest-labs/flux-3-image-klein-base"


@pytest.fixture(scope="module")
def family(flux3_folder: Path) -> Family:
    return Family("flux3", flux3_folder)


@pytest.fixture
def folder(flux3_folder: Path, tmp_path: Path) -> Path:
    """A copy to spoil; its index says that the parts are in the other folder, as it does after a move."""
    return Path(shutil.copytree(flux3_folder, tmp_path / "pipeline"))


def change(file: Path, **values: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    before = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(before | values))


def refusal(folder: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        Family("flux3", folder).policy(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------------- what is computed


@torch.no_grad()
def test_prompts_of_different_windows_share_a_batch(family: Family) -> None:
    """The network sees the padding to a window, and must not see what a batch or guidance adds to it."""
    prompts = (PROMPTS[0], LONG, PROMPTS[1])
    policy = family.policy("model.max_sequence_length=200")
    conditioning = policy.encode(prompts)
    assert conditioning["prompt_mask"].sum(dim=1).tolist() == [WINDOW, 2 * WINDOW, WINDOW]
    latents, times = family.latents(3), torch.tensor([0.9, 0.5, 0.1])
    together = policy.predict(latents, times, conditioning)
    for row, prompt in enumerate(prompts):
        alone = policy.predict(latents[row : row + 1], times[row : row + 1], policy.encode([prompt]))
        assert torch.allclose(together[row], alone[0], atol=1e-5)
    states, zero = conditioning["prompt_embeds"][1:2], torch.zeros(1)
    places = torch.cartesian_prod(zero, torch.arange(4) / 2, torch.arange(6) / 2, zero)
    words = torch.cartesian_prod(zero, zero, zero, torch.arange(2.0 * WINDOW))
    theirs = family.pipeline().transformer(latents[1:2], states, times[1:2], places, words).sample
    assert torch.allclose(policy.predict_halves(latents, times, conditioning).conditional[1], theirs[0], atol=1e-4)


@pytest.mark.parametrize("own", [None, {"shift": 2.0}])
def test_scheduler_times_are_those_the_pipeline_runs(folder: Path, own: dict[str, Any] | None) -> None:
    """Those of the pipeline's blocks, or of the scheduler in the folder."""
    if own is not None:
        FlowMatchEulerDiscreteScheduler(**own).save_pretrained(folder / "scheduler")
        spec = {"subfolder": "scheduler", "type_hint": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
        spec |= {"pretrained_model_name_or_path": "elsewhere", "variant": None, "revision": None}
        change(folder / "modular_model_index.json", scheduler=[None, None, spec])
    family = Family("flux3", folder)
    pipeline, policy = family.pipeline(), family.policy()
    if own is not None:
        pipeline.load_components(["scheduler"])
    family.images(pipeline, family.latents(1), [PROMPTS[0]], 1.0, num_inference_steps=5)
    times = policy.schedule(5).times
    assert torch.equal(times, pipeline.scheduler.sigmas.double())
    shift = 6.93 if own is None else 2.0
    assert times[2] == pytest.approx(shift * 0.6 / (1 + (shift - 1) * 0.6), rel=1e-6)


def test_layers_of_reference_images_are_left_alone(family: Family) -> None:
    """Nothing runs them, so an optimizer would only decay them."""
    for settings in (("model.finetune=full",), LORA):
        policy = family.policy(*settings)
        trained = {name for name, p in policy.module.named_parameters() if p.requires_grad}
        assert trained and not any(".image_cond." in name for name in trained)
    settings = family.config("model.finetune=full").model
    planned = build_on_meta(find_architecture(settings), settings)
    kept = [p.numel() for name, p in planned.policy.network.named_parameters() if ".image_cond." in name]
    assert len(kept) == 11 and planned.trained_parameters == planned.all_parameters - sum(kept)


# ------------------------------------------------------------------------------------ the published network


def test_layers_of_reference_images_are_a_tenth_of_the_published_network() -> None:
    settings = load_config(None, [f"model.path={PUBLISHED}", "model.finetune=lora"]).model
    network = build_on_meta(find_architecture(settings), settings).policy.network
    assert sum(p.numel() for name, p in network.named_parameters() if ".image_cond." in name) == 670_434_560


def test_the_names_of_the_original_release_are_those_of_diffusers(family: Family) -> None:
    network = family.policy().network
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    originals = Flux3Policy.release_weights(layers)
    assert sorted(layers) == sorted(layer for ends in originals.values() for layer in ends)
    given = {f"{original}.weight": torch.zeros(2, 1) for original in originals}
    assert convert_flux3_transformer_checkpoint_to_diffusers(given).keys() == {f"{layer}.weight" for layer in layers}
    adapted = {f"diffusion_model.{name}.lora_A.weight": ends for name, ends in originals.items() if "block" in name}
    for name, (layer,) in adapted.items():
        assert list(_convert_non_diffusers_flux3_lora_to_diffusers({name: 0})) == [f"transformer.{layer}.lora_A.weight"]


# ----------------------------------------------------------------------------------------- modular folders


@torch.no_grad()
def test_an_exported_pipeline_is_a_modular_folder_that_moves(family: Family, folder: Path, tmp_path: Path) -> None:
    """A processor's other files come along, and the index still says how diffusers reads them."""
    (folder / "tokenizer" / "preprocessor_config.json").write_text("{}")
    pipeline = Flux3Policy.load_pipeline(folder, family.config().model)
    Flux3Policy.write_pipeline(pipeline, folder, tmp_path / "made")
    (tmp_path / "made").rename(tmp_path / "moved")
    shutil.rmtree(folder)
    moved = Family("flux3", tmp_path / "moved")
    index = json.loads((moved.folder / "modular_model_index.json").read_text())
    assert index["tokenizer"][2]["type_hint"] == ["transformers", "AutoProcessor"]
    assert (moved.folder / "tokenizer" / "preprocessor_config.json").is_file()
    inputs = family.latents(2), torch.tensor([0.9, 0.2])
    ours, theirs = (one.policy() for one in (moved, family))
    assert torch.equal(
        ours.predict(*inputs, ours.encode(PROMPTS[:2])), theirs.predict(*inputs, theirs.encode(PROMPTS[:2]))
    )


def test_a_processors_own_chat_template_is_used(folder: Path) -> None:
    """Older processors keep it in a file of their own."""
    before = Family("flux3", folder).policy().encode(PROMPTS[:1])["prompt_embeds"]
    change(folder / "tokenizer" / "chat_template.json", chat_template="{{ messages[0].content }}<|im_end|>")
    family = Family("flux3", folder)
    policy, pipeline = family.policy(), family.pipeline()
    pipeline.tokenizer.chat_template = "{{ messages[0].content }}<|im_end|>"
    found = policy.encode(PROMPTS[:1])["prompt_embeds"]
    assert torch.allclose(found, family.encoded(pipeline, [PROMPTS[0]])["prompt_embeds"], atol=1e-6)
    assert not torch.allclose(found, before, atol=1e-2)


def test_what_a_modular_folder_lacks_is_one_sentence(folder: Path) -> None:
    index = folder / "modular_model_index.json"
    whole = json.loads(index.read_text())
    shutil.move(folder / "vae", folder / "other")
    assert refusal(folder).endswith("is incomplete: modular_model_index.json names vae, but there is no vae/")
    shutil.move(folder / "other", folder / "vae")
    change(index, vae=[None, None, whole["vae"][2] | {"subfolder": "fine", "pretrained_model_name_or_path": "me/mine"}])
    assert "says that vae is in the subfolder 'fine' of me/mine, but a part is read from vae/" in refusal(folder)
    change(index, vae=[None, None, whole["vae"][2] | {"type_hint": ["diffusers", "AutoencoderKL"]}])
    assert "says that vae is a AutoencoderKL; it must be a AutoencoderKLFlux2" in refusal(folder)
    change(index, vae=[None, None, whole["vae"][2] | {"type_hint": [None, None]}])
    assert refusal(folder).endswith("names no vae, which a Flux3ModularPipeline needs")
    change(index, vae=whole["vae"], tokenizer=[None, None, whole["tokenizer"][2] | {"type_hint": ["x", "Tokens"]}])
    assert "says that tokenizer is a Tokens; it must be a Qwen2Tokenizer" in refusal(folder)
    index.write_text(json.dumps(whole | {"_class_name": "WanModularPipeline"}))
    assert "is a modular pipeline (WanModularPipeline in modular_model_index.json), which cannot" in refusal(folder)


def test_another_guidance_than_the_plain_one_is_refused(folder: Path) -> None:
    ClassifierFreeGuidance(guidance_rescale=0.7).save_pretrained(folder / "guider")
    assert "guider_config.json says guidance_rescale 0.7, and guidance here is" in refusal(folder)
    Family("flux3", folder).policy("model.cfg_scale=1.0")
    ClassifierFreeGuidance(guidance_scale=5.0).save_pretrained(folder / "guider")
    Family("flux3", folder).policy()


def test_a_modular_pipeline_on_the_hub_is_to_be_downloaded_first(monkeypatch: Any, flux3_folder: Path) -> None:
    def download(path: str, name: str, revision: str | None = None) -> str:
        if name == "model_index.json":
            raise RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError)
        return str(flux3_folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UserError, match=r"is a modular pipeline, .*`hf download owner/hub-name --local-dir FOLDER`"):
        pipeline_folder("owner/hub-name", None, FAMILIES)


# -------------------------------------------------------------------------------------- models that are not


def test_a_distilled_flux3_is_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    change(folder / "transformer" / "config.json", flow_map=True)
    build_flux3(tmp_path / "distilled", flow_map=True)
    assert "says flow_map true: a distilled FLUX.3 predicts jumps" in refusal(tmp_path / "distilled")
    change(folder / "modular_model_index.json", _class_name="Flux3DistilledModularPipeline")
    with pytest.raises(UserError, match=r"is distilled FLUX\.3, whose network predicts jumps between times"):
        pipeline_class_of(folder, FAMILIES)


def test_a_tokenizer_without_a_chat_template_is_one_sentence(folder: Path) -> None:
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"^model\.path: the tokenizer of .* has no chat template"):
        Family("flux3", folder).policy().prepare_prompts(PROMPTS)


def test_a_text_encoder_without_the_layers_that_are_read_is_refused(folder: Path) -> None:
    tiny_qwen3_vl(layers=31).save_pretrained(folder / "text_encoder")
    assert refusal(folder).endswith("it must be at least 32")


@pytest.mark.parametrize(
    ("key", "width", "part"), [("joint_attention_dim", 72, "text_encoder"), ("in_channels", 24, "vae")]
)
def test_parts_of_different_models_are_refused(folder: Path, key: str, width: int, part: str) -> None:
    Flux3Transformer2DModel(**(FLUX3 | {key: width})).save_pretrained(folder / "transformer")
    with pytest.raises(UserError, match=rf"transformer/config\.json says {key} {width}, but by {part}/config\.json "):
        check_base_model(Family("flux3", folder).config())
