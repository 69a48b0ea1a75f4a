"""FLUX as a policy, against diffusers' own FluxPipeline."""

import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny_pipeline import CHANNELS, HEIGHT, PROMPTS, TOKENS, WIDTH, build_pipeline, rolled_out, tiny_config
from torch import Tensor

from pcpo_fast.config.schema import LoraConfig, ModelConfig
from pcpo_fast.errors import UserError
from pcpo_fast.method.step_tables import StepTable
from pcpo_fast.method.transitions import euler_ode
from pcpo_fast.policies import Policy
from pcpo_fast.policies.attention import choose_attention
from pcpo_fast.policies.embedding_cache import EmbeddingCache
from pcpo_fast.policies.families import load_policy, load_trained_weights
from pcpo_fast.policies.flux import FluxPolicy
from pcpo_fast.policies.lora import add_lora, only_adapter
from pcpo_fast.policies.pipeline_files import pipeline_folder as locate
from pcpo_fast.policies.pipeline_policy import unpacked

CPU = torch.device("cpu")
SMALL_LORA = ("model.finetune=lora", "model.lora.rank=4", "model.lora.alpha=8")


@pytest.fixture(scope="module")
def policy(pipeline_folder: Path) -> Policy:
    return load_policy(tiny_config(pipeline_folder), CPU)


@pytest.fixture(scope="module")
def flux(pipeline_folder: Path) -> Any:
    pipeline = FluxPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_pipeline(flux: Any, latents: Tensor, prompts: list[str], **options: Any) -> Tensor:
    settings = {
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
        "max_sequence_length": 12,
        "output_type": "pt",
    } | options
    with torch.no_grad():
        return flux(prompts, height=HEIGHT, width=WIDTH, latents=latents, **settings).images


def random_latents(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(seed))


def randomize_adapters(policy: Policy) -> None:
    """LoRA starts as the identity; make it do something."""
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.module.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def trained_state(policy: Policy) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in policy.module.named_parameters() if value.requires_grad}


def test_unpacked_latents_are_those_of_the_pipeline(policy: FluxPolicy) -> None:
    pixels = torch.randn(2, CHANNELS // 4, HEIGHT // 2, WIDTH // 2)
    packed = FluxPipeline._pack_latents(pixels, *pixels.shape)
    assert policy.latent_shape == tuple(packed.shape[1:]) == (TOKENS, CHANNELS)
    assert torch.equal(unpacked(packed, policy.rows, policy.columns), pixels)


def test_the_network_may_stay_in_host_memory(pipeline_folder: Path) -> None:
    meta = torch.device("meta")
    policy: Any = load_policy(tiny_config(pipeline_folder), meta, network_device=CPU)
    assert {p.device for p in policy.network.parameters()} == {CPU}
    assert {p.device for p in policy.vae.parameters()} == {meta}


def test_guidance_reaches_the_model(pipeline_folder: Path, flux: Any) -> None:
    policy = load_policy(tiny_config(pipeline_folder, "model.guidance=1.5"), CPU)
    table = StepTable.of(euler_ode(policy.schedule(4).times), CPU)
    latents = random_latents(1)
    end = rolled_out(policy, policy.encode(PROMPTS[:1]), latents, table).latents[:, -1]
    tuned, other = (run_pipeline(flux, latents, [PROMPTS[0]], guidance_scale=scale) for scale in (1.5, 3.5))
    assert torch.allclose(policy.decode(end), tuned, atol=2e-4)
    assert not torch.allclose(tuned, other, atol=2e-3)


def test_the_time_is_not_cut_to_an_integer(policy: Policy) -> None:
    latents, conditioning = random_latents(1), policy.encode(PROMPTS[:1])
    near, same = (policy.predict(latents, torch.tensor([t]), conditioning) for t in (0.5004, 0.5001))
    assert not torch.allclose(near, same, atol=1e-6)


@pytest.mark.parametrize("dynamic", [True, False])
def test_scheduler_times_are_those_the_pipeline_runs(policy: FluxPolicy, dynamic: bool) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0, use_dynamic_shifting=dynamic)
    other = FluxPolicy(policy.network, policy.vae, scheduler, ModelConfig(height=64, width=32))
    pipeline: Any = FluxPipeline(scheduler, policy.vae, None, None, None, None, policy.network)
    pipeline.set_progress_bar_config(disable=True)
    embeds = policy.encode(PROMPTS[:1])
    with torch.no_grad():
        pipeline(height=64, width=32, num_inference_steps=5, output_type="latent", **embeds)
    assert torch.equal(other.schedule(5).times, scheduler.sigmas.double())
    assert other.schedule(5).times[0] == 1 and other.schedule(5).times[-1] == 0


# ------------------------------------------------------------------------------------------------ prompts


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often the text encoders are loaded."""
    counted: list[int] = []
    load = FluxPolicy._load_parts

    def counting(self: FluxPolicy, *parts: str, **options: Any) -> Any:
        counted.extend([1] * ("text_encoder" in parts))  # not where the tokenizers alone are asked for
        return load(self, *parts, **options)

    monkeypatch.setattr(FluxPolicy, "_load_parts", counting)
    return counted


def test_a_damaged_cache_file_is_encoded_again(pipeline_folder: Path, tmp_path: Path, loads: list[int]) -> None:
    policy = load_policy(tiny_config(pipeline_folder, f"model.embedding_cache={tmp_path}"), CPU)
    before = policy.encode(PROMPTS)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == len(PROMPTS)
    files[0].write_bytes(files[0].read_bytes()[:-5])
    files[1].write_bytes(b"")
    policy.prepare_prompts(PROMPTS)
    assert loads == [1, 1]
    after = policy.encode(PROMPTS)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(tmp_path.rglob("*.*")) == files  # nothing half-written stays


def test_a_cache_that_does_not_fit_the_disk_is_said_before_prompts_are_encoded(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(tiny_config(pipeline_folder, f"model.embedding_cache={tmp_path}"), CPU)
    usage = shutil.disk_usage(tmp_path)
    each = 4 * (12 * 32 + 32)  # bytes: T5's states and CLIP's pooled state
    prompts = ["red " * (1 + n % 5) + "circle " * (n // 5) for n in range(20)]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20 * each - 1))
    policy.warned_of_long_prompts = True  # which loads tokenizers
    monkeypatch.setattr(type(policy), "load_pipeline", lambda *_: pytest.fail("the encoders were loaded"))
    with pytest.raises(
        UserError, match=r"^model\.embedding_cache: 20 prompts would take .* GB \(0\.00166 MB each\) in .* free:"
    ):
        policy.prepare_prompts(prompts)
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_what_a_prompt_takes_is_known_after_the_first_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where padding is left out, a prompt may take more than its own tokens."""
    cache, usage, prompts = EmbeddingCache(tmp_path, "model"), shutil.disk_usage(tmp_path), [str(n) for n in range(20)]

    def fill() -> None:
        cache.fill(prompts, lambda chunk: {"states": torch.zeros(len(chunk), 10)}, lambda missing: 39.0 * len(missing))

    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=779))
    with pytest.raises(UserError, match=r"20 prompts would take 7\.8e-07 GB"):
        fill()
    assert list(tmp_path.rglob("*.safetensors")) == []
    frees = [780, 4 * 40 - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=frees.pop(0)))
    with pytest.raises(UserError, match="20 prompts would take 8e-07 GB"):
        fill()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 16
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=780))
    fill()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 20


def test_the_cache_depends_on_sequence_length_dtype_and_encoder_files(own_pipeline: Path, loads: list[int]) -> None:
    for overrides in ((), ("model.max_sequence_length=9",), ("model.dtype=bfloat16",)):
        embeds = load_policy(tiny_config(own_pipeline, *overrides), CPU).encode(PROMPTS)["prompt_embeds"]
        assert embeds.shape[1] == (9 if overrides == ("model.max_sequence_length=9",) else 12)
    assert len(loads) == 3
    load_policy(tiny_config(own_pipeline), CPU).encode(PROMPTS)
    assert len(loads) == 3
    config = own_pipeline / "text_encoder" / "config.json"
    config.write_text(config.read_text() + "\n")
    load_policy(tiny_config(own_pipeline), CPU).encode(PROMPTS)
    assert len(loads) == 4


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_another_encoder_of_the_same_size_and_date_never_gets_old_embeddings(part: str, own_pipeline: Path) -> None:
    def embeddings(cache: str) -> dict[str, torch.Tensor]:
        config = tiny_config(own_pipeline, f"model.embedding_cache={own_pipeline.parent / cache}")
        return load_policy(config, CPU).encode(PROMPTS[:1])

    old = embeddings("cache")
    file = own_pipeline / part / "model.safetensors"
    before = file.stat()
    save_file({name: 1.5 * value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    new = embeddings("cache")
    truth = embeddings("empty")
    assert all(torch.equal(new[name], truth[name]) for name in truth)
    assert not all(torch.equal(new[name], old[name]) for name in old)


def test_a_prompt_too_long_for_clip_alone_is_said_too(pipeline_folder: Path, tmp_path: Path) -> None:
    policy = load_policy(tiny_config(pipeline_folder, f"model.embedding_cache={tmp_path}"), CPU)
    prompt = "red background on background green background"  # 6 + 1 tokens for T5, 40 + 2 for CLIP
    with pytest.warns(UserWarning, match="longer than the 40 tokens that CLIP reads") as caught:
        policy.prepare_prompts([prompt])
    assert len([w for w in caught if "longer than" in str(w.message)]) == 1


# ---------------------------------------------------------------------------------- published configurations


def published(guidance: bool) -> FluxTransformer2DModel:
    """The transformer of FLUX.1-dev (with guidance) and of FLUX.1-schnell (without), without memory for weights."""
    with torch.device("meta"):
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=guidance,
            axes_dims_rope=(16, 56, 56),
        )


@pytest.mark.parametrize(("guidance", "parameters"), [(True, 11_901_408_320), (False, 11_891_178_560)])
def test_published_flux_on_the_meta_device(policy: FluxPolicy, guidance: bool, parameters: int) -> None:
    transformer = published(guidance)
    assert sum(p.numel() for p in transformer.parameters()) == parameters

    vae: Any = SimpleNamespace(config={"block_out_channels": (128, 256, 512, 512)})  # nothing else is asked of it here
    flux = FluxPolicy(transformer, vae, policy.scheduler, ModelConfig(height=1024, width=1024))
    assert flux.latent_shape == (4096, 64)
    conditioning = {
        "prompt_embeds": torch.empty(2, 512, 4096, device="meta"),
        "pooled_prompt_embeds": torch.empty(2, 768, device="meta"),
    }
    add_lora(transformer, LoraConfig(rank=8, alpha=8), FluxPolicy.lora_targets)
    adapted = {name.removesuffix(".lora_A") for name, _ in transformer.named_modules() if name.endswith(".lora_A")}
    double = {name for name in adapted if name.startswith("transformer_blocks.")}
    single = {name for name in adapted if name.startswith("single_transformer_blocks.")}
    assert len(FluxPolicy.lora_targets) == 12
    assert double == {f"transformer_blocks.{i}.{target}" for i in range(19) for target in FluxPolicy.lora_targets}
    assert single == {f"single_transformer_blocks.{i}.attn.{t}" for i in range(38) for t in ("to_q", "to_k", "to_v")}
    assert len(adapted) == 19 * 12 + 38 * 3
    assert all(("lora_" in name) == p.requires_grad for name, p in transformer.named_parameters())
    with torch.no_grad():
        latents = torch.empty(2, 4096, 64, device="meta")
        output = flux.predict(latents, torch.ones(2, device="meta"), conditioning)
    assert output.shape == (2, 4096, 64)


def test_a_pipeline_without_guidance_refuses_one(tmp_path: Path) -> None:
    build_pipeline(tmp_path / "schnell", guidance_embeds=False)
    with pytest.raises(UserError, match=r"^model\.guidance: only takes effect with an embedded guidance scale"):
        load_policy(tiny_config(tmp_path / "schnell", "model.guidance=5.0"), CPU)
    policy = load_policy(tiny_config(tmp_path / "schnell"), CPU)
    output = policy.predict(random_latents(1), torch.tensor([0.5]), policy.encode(PROMPTS[:1]))
    assert bool(output.isfinite().all())


# ------------------------------------------------------------------------- LoRA, attention, checkpointing


def test_a_lora_target_without_a_module_is_refused(pipeline_folder: Path) -> None:
    config = tiny_config(pipeline_folder, *SMALL_LORA, "model.lora.targets=[attn.to_q, attn.to_w]")
    with pytest.raises(UserError, match=r"model\.lora\.targets: attn\.to_w matches no linear layer"):
        load_policy(config, CPU)


def test_adapters_off_is_the_base_model_and_leaves_gradients_alone(pipeline_folder: Path, policy: Policy) -> None:
    tuned = load_policy(tiny_config(pipeline_folder, *SMALL_LORA), CPU)
    inputs = random_latents(2), torch.tensor([0.9, 0.2]), policy.encode(PROMPTS[:2])
    base = policy.predict(*inputs)
    assert torch.equal(tuned.predict(*inputs), base)  # a fresh adapter changes nothing
    randomize_adapters(tuned)
    trained = [p for p in tuned.module.parameters() if p.requires_grad]
    changed = tuned.predict(*inputs)
    with tuned.as_reference():
        assert torch.equal(tuned.predict(*inputs), base)
        assert all(p.requires_grad for p in trained)
    assert torch.equal(tuned.predict(*inputs), changed) and not torch.allclose(changed, base, atol=1e-3)
    with pytest.raises(RuntimeError, match="inside"), tuned.as_reference():
        raise RuntimeError("inside")
    assert torch.equal(tuned.predict(*inputs), changed)


def test_without_adapters_or_copy_there_is_no_reference(policy: Policy) -> None:
    with pytest.raises(ValueError, match="no adapters"), policy.as_reference():
        pass
    with pytest.raises(ValueError, match="no adapters"), only_adapter(torch.nn.Linear(2, 2), None):
        pass


def test_attention_backends_agree(policy: Policy, pipeline_folder: Path) -> None:
    other = load_policy(tiny_config(pipeline_folder, "model.attention=_native_math"), CPU)
    inputs = random_latents(2), torch.tensor([0.9, 0.2]), policy.encode(PROMPTS[:2])
    used = {str(m.processor._attention_backend) for m in other.module.modules() if hasattr(m, "processor")}
    assert used == {"AttentionBackendName._NATIVE_MATH"} or used == {"_native_math"}
    assert torch.allclose(policy.predict(*inputs), other.predict(*inputs), atol=1e-5)


def test_native_attention_is_native_whatever_the_environment_says(policy: FluxPolicy) -> None:
    module = FluxTransformer2DModel.from_config(policy.network.config)
    choose_attention(module, "native")
    processors = [m.processor for m in module.modules() if hasattr(m, "processor")]
    assert processors and all(p._attention_backend.value == "native" for p in processors)


# --------------------------------------------------------------------------------------- weights in and out


def test_lora_weights_that_do_not_fit_are_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    policy = load_policy(tiny_config(pipeline_folder, *SMALL_LORA), CPU)
    policy.save_weights(tmp_path / "lora", trained_state(policy))
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"

    def refused(match: str, *overrides: str, init: Path = file) -> None:
        with pytest.raises(UserError, match=match) as caught:
            load_policy(tiny_config(pipeline_folder, *SMALL_LORA, f"model.lora.init={init}", *overrides), CPU)
        assert str(caught.value).startswith("model.lora.init: ") and "\n" not in str(caught.value)

    refused("is neither a .safetensors file nor a folder with", init=tmp_path / "nowhere")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(file.read_bytes()[:100])
    refused("cannot be read as LoRA weights", init=damaged)
    pickled = tmp_path / "weights.bin"
    torch.save({}, pickled)
    refused("is neither a .safetensors file nor a folder with", init=pickled)


def test_weights_of_another_kind_are_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(pipeline_folder)
    policy = load_policy(config, CPU)
    with pytest.raises(UserError, match=r"has no transformer/\*\.safetensors"):
        load_trained_weights(policy.module, config, tmp_path)
    build_pipeline(tmp_path / "other", num_layers=2)
    with pytest.raises(UserError, match="does not match the model"):
        load_trained_weights(policy.module, config, tmp_path / "other")


# --------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("path", ["nowhere", "./nowhere/at-all", "a/b/c"])
def test_a_path_that_is_neither_folder_nor_hub_id_is_refused(path: str) -> None:
    with pytest.raises(UserError, match=f"model.path: {path} is neither a folder nor a hub id"):
        locate(path, None, ["FluxPipeline"])


def hub_errors() -> Iterator[Any]:
    from huggingface_hub import errors

    # The HTTP library that the hub's client uses has changed its name before.
    httpx = importlib.import_module(errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    response = httpx.Response(403, request=httpx.Request("GET", "https://example.invalid"))

    def answer(kind: type[Exception]) -> Exception:
        return kind("Client Error.\nA second line", response=response)  # type: ignore[call-arg]

    yield pytest.param(answer(errors.GatedRepoError), r"is gated: accept its license .* `hf auth login`", id="gated")
    yield pytest.param(
        answer(errors.RepositoryNotFoundError), "the hub has no model .* check the spelling", id="missing"
    )
    yield pytest.param(answer(errors.RevisionNotFoundError), r"model\.revision: .* no revision 'v2'", id="revision")
    yield pytest.param(answer(errors.RemoteEntryNotFoundError), "lacks a file that is needed", id="no pipeline")
    yield pytest.param(answer(errors.HfHubHTTPError), "the hub refused", id="refused")
    yield pytest.param(errors.LocalEntryNotFoundError("no"), "nor can the hub be reached", id="not cached")
    yield pytest.param(errors.OfflineModeIsEnabled("no"), "nor can the hub be reached", id="offline")
    yield pytest.param(httpx.ConnectTimeout("slow"), "nor can the hub be reached", id="timeout")
    yield pytest.param(
        OSError(28, "No space left on device"), "could not be downloaded from the hub: .*No space", id="disk"
    )


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("error", "reason"), list(hub_errors()))
def test_a_hub_model_that_cannot_be_had_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, pipeline_folder: Path, error: Exception, reason: str, wrapped: bool
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise OSError("Cannot load model owner/name: the model is not fully cached") from error

    def download_index(*_: Any, **__: Any) -> str:
        if wrapped:
            return str(pipeline_folder / "model_index.json")
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download_index)
    monkeypatch.setattr(DiffusionPipeline, "download", download)  # once it has found no local copy
    with pytest.raises(UserError, match=reason) as caught:
        locate("owner/name", "v2", ["FluxPipeline"])
    assert "owner/name" in str(caught.value) and "\n" not in str(caught.value)


def test_a_hub_model_offline_is_one_sentence() -> None:
    """No mock: the tests run with the hub switched off."""
    with pytest.raises(UserError, match="neither in the local cache nor can the hub be reached"):
        locate("pcpo-fast-tests/no-such-model", None, ["FluxPipeline"])


def test_a_hub_model_is_used_from_its_snapshot(monkeypatch: pytest.MonkeyPatch, pipeline_folder: Path) -> None:
    asked: list[Any] = []

    def download_index(path: str, name: str, revision: str | None = None) -> str:
        asked.append((path, revision, name))
        return str(pipeline_folder / name)

    def download(path: str, revision: str | None = None, variant: str | None = None) -> str:
        asked.append((path, revision, variant))
        return str(pipeline_folder)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download_index)
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    with pytest.raises(UserError, match="is a FluxPipeline; allowed are StableDiffusionPipeline"):
        locate("owner/name", "v2", ["StableDiffusionPipeline"], "fp16")
    assert asked == [("owner/name", "v2", "model_index.json")], "no weights of a model that is refused"
    assert locate("owner/name", "v2", ["FluxPipeline"], "fp16") == (pipeline_folder, "FluxPipeline")
    assert asked[1:] == [("owner/name", "v2", "model_index.json"), ("owner/name", "v2", "fp16")]
