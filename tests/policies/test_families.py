"""Every model family as a policy, against diffusers' own pipelines of random weights.

A new family gets all of it by an entry in ``tested_families.KINDS`` and its miniature.
"""

import json
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tested_families import (
    CPU,
    FIXTURES,
    LORA,
    Call,
    Family,
    randomize_adapters,
    trained_state,
)
from tiny_pipeline import HEIGHT, PROMPTS, WIDTH, rolled_out, tiny_config
from tiny_pipelines import NEGATIVE
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pcpo_fast.config.loading import load_config
from pcpo_fast.errors import UserError
from pcpo_fast.method.samplers import build_transitions, deterministic_transitions
from pcpo_fast.method.step_tables import StepTable
from pcpo_fast.planning.models import build_on_meta, find_architecture
from pcpo_fast.policies import pipeline_policy
from pcpo_fast.policies.attention import choose_attention
from pcpo_fast.policies.embedding_cache import EmbeddingCache
from pcpo_fast.policies.families import load_policy, load_trained_weights
from pcpo_fast.policies.lora import only_adapter, trained_updates
from pcpo_fast.policies.lora_files import LORA_FILE, read_lora, write_lora
from pcpo_fast.policies.pipeline_policy import PipelinePolicy
from pcpo_fast.policies.saving import save_pipeline

META = torch.device("meta")
FAMILIES = tuple(name for name in FIXTURES if name != "sd_v")
TOKENS = ("flux", "flux3", "klein", "flux2_dev", "qwen_image")
"""Those whose pipelines multiply the time by 1000 and divide again: a unit in the last place of a sine's argument."""
with_v_prediction = pytest.mark.parametrize("family", FIXTURES, indirect=True)
first_families = pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.slow if name not in ("flux", "klein", "sd", "sd3") else ())
        for name in FAMILIES
    ],
    indirect=True,
)
"""For what is the same code for all: some are enough for ``make test``."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return Family(request.param, request.getfixturevalue(FIXTURES[request.param]))


@pytest.fixture(scope="module")
def policy(family: Family) -> Any:
    return family.policy()


@pytest.fixture(scope="module")
def pipeline(family: Family) -> Any:
    return family.pipeline()


def deterministic(policy: Any, family: Family) -> StepTable:
    settings = family.config().sampler
    return StepTable.of(deterministic_transitions(settings, policy.schedule(4)), CPU)


def roll_out(policy: Any, prompts: tuple[str, ...], latents: Tensor, table: StepTable) -> Tensor:
    end: Tensor = rolled_out(policy, policy.encode(prompts), latents, table).latents[:, -1]
    return end


def network_calls(pipeline: Any, part: str) -> tuple[list[Any], Any]:
    """Each call of the network, and the hook."""
    calls: list[Call] = []

    def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        latents = args[0] if args else kwargs["hidden_states"]
        time = args[1] if len(args) > 1 else kwargs["timestep"]
        states = args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]
        if (mask := kwargs.get("encoder_attention_mask")) is not None:  # Krea 2's pipeline has padding in the middle
            states = pad_sequence([row[kept] for row, kept in zip(states, mask, strict=True)], True)
        calls.append(Call(latents, time, states, result[0]))

    return calls, getattr(pipeline, part).register_forward_hook(note, with_kwargs=True)


# ------------------------------------------------------------------------------------------- what is computed


@with_v_prediction
def test_both_halves_are_those_of_the_pipeline_in_every_step(family: Family, policy: Any, pipeline: Any) -> None:
    calls, hook = network_calls(pipeline, family.part)
    family.images(pipeline, family.latents(2), list(PROMPTS[:2]), 3.0)
    hook.remove()
    ours, own_hook = network_calls(policy, "module")
    conditioning, times = policy.encode(PROMPTS[:2]), deterministic(policy, family).times
    calls = family.halves(calls)
    assert len(calls) == 4
    for step, (latents, timestep, states, expected) in enumerate(calls):
        halves = policy.predict_halves(latents[:2], times[step].expand(2), conditioning)
        *other, conditional = expected.split(2)
        asked, wanted = ours[-1][1].float(), timestep.float().reshape(-1)[:1]
        assert torch.allclose(asked, wanted.expand(len(states)), rtol=1e-6 if family.name in TOKENS else 0, atol=0)
        assert torch.allclose(ours[-1][2], states, atol=1e-6)
        atol = 1e-4 if family.name in TOKENS else 1e-5
        assert torch.allclose(halves.conditional, conditional, atol=atol)
        assert len(other) == family.kind.guided and (halves.unconditional is None) == (not other)
        guided = conditional
        for unconditional in other:
            assert torch.allclose(halves.unconditional, unconditional, atol=atol)
            assert (conditional - unconditional).abs().max() > 1e-2
            guided = family.guided(unconditional, conditional, 3.0)
        output = policy.predict(latents[:2], times[step].expand(2), conditioning)
        assert output.dtype == torch.float32
        assert torch.allclose(output, guided, atol=5 * atol)
    own_hook.remove()


def test_what_prompts_take_on_disk_is_known_before_they_are_encoded(policy: Any) -> None:
    policy.prepare_prompts(PROMPTS)
    stored = sum(value.nbytes for prompt in PROMPTS for value in policy.cache.load([prompt]).values())
    known = policy._encoded_bytes(PROMPTS)
    assert known <= stored if policy.masks_prompts else known == stored
    assert known > 0.3 * stored


@with_v_prediction
def test_a_deterministic_rollout_gives_the_pipelines_images(family: Family, policy: Any, pipeline: Any) -> None:
    latents = family.latents(3)
    expected = family.images(pipeline, latents, list(PROMPTS[:3]), 3.0)
    images = policy.decode(roll_out(policy, PROMPTS[:3], latents, deterministic(policy, family)))
    assert images.dtype == torch.float32 and images.shape == (3, 3, HEIGHT, WIDTH)
    assert images.std() > 0.05
    assert torch.allclose(images, expected, atol=2e-4), (images - expected).abs().max()
    other = family.images(pipeline, latents, list(PROMPTS[:3]), 1.0)
    assert not torch.allclose(images, other, atol=2e-3), "guidance changes nothing here: the test compares nothing"


@first_families
def test_without_guidance_there_is_one_forward_of_the_batch(family: Family, pipeline: Any) -> None:
    policy = family.policy(family.unguided)
    calls, hook = network_calls(policy, "module")
    latents = family.latents(3)
    images = policy.decode(roll_out(policy, PROMPTS[:3], latents, deterministic(policy, family)))
    assert [len(call[0]) for call in calls] == [3] * 4
    hook.remove()
    halves = policy.predict_halves(latents, torch.full((3,), 0.5), policy.encode(PROMPTS[:3]))
    assert halves.unconditional is None
    assert torch.allclose(images, family.images(pipeline, latents, list(PROMPTS[:3]), 1.0), atol=2e-4)


@first_families
def test_guidance_is_one_forward_of_twice_the_batch(family: Family, policy: Any) -> None:
    calls, hook = network_calls(policy, "module")
    policy.predict(family.latents(3), torch.full((3,), 0.5), policy.encode(PROMPTS[:3]))
    hook.remove()
    assert [len(call[0]) for call in calls] == [6 if family.kind.guided else 3]


@pytest.mark.parametrize("family", ("sd3",), indirect=True)  # the same code for all
def test_scales_of_0_and_2_need_both_halves(family: Family, policy: Any) -> None:
    inputs = family.latents(2), torch.tensor([0.501, 0.251]), policy.encode(PROMPTS[:2])
    halves = policy.predict_halves(*inputs)
    assert torch.equal(family.policy("model.cfg_scale=0.0").predict(*inputs), halves.unconditional)
    twice = family.policy("model.cfg_scale=2.0").predict(*inputs)
    assert torch.allclose(twice, 2 * halves.conditional - halves.unconditional, atol=1e-5)


@pytest.mark.parametrize("family", ("sd3",), indirect=True)  # the same code for all
def test_the_negative_prompt_is_used(family: Family, pipeline: Any) -> None:
    """And none is the empty prompt, as in diffusers."""
    for negative in ("", "a green circle"):
        policy = family.policy(f"model.negative_prompt='{negative}'")
        latents = family.latents(2)
        images = policy.decode(roll_out(policy, PROMPTS[:2], latents, deterministic(policy, family)))
        same, other = (
            family.images(pipeline, latents, list(PROMPTS[:2]), 3.0, negative_prompt=[text] * 2)
            for text in (negative, NEGATIVE)
        )
        assert torch.allclose(images, same, atol=2e-4)
        assert not torch.allclose(same, other, atol=1e-3)


def test_rows_at_different_times_equal_single_rows(family: Family, policy: Any) -> None:
    latents, times = family.latents(4), torch.tensor([0.999, 0.83, 0.4, 0.02])
    conditioning = policy.encode(PROMPTS)
    together = policy.predict(latents, times, conditioning)
    for row in range(4):
        alone = {name: value[row : row + 1] for name, value in conditioning.items()}
        single = policy.predict(latents[row : row + 1], times[row : row + 1], alone)
        assert torch.allclose(together[row], single[0], atol=1e-5)
    swapped = policy.predict(latents, times.flip(0), conditioning)
    assert not torch.allclose(together, swapped, atol=1e-3)


def test_decode_is_the_pipelines(family: Family, policy: Any, pipeline: Any) -> None:
    latents = family.latents(2)
    assert policy.latent_shape == family.kind.latents
    expected = family.decoded(pipeline, latents)
    images = policy.decode(latents)
    assert torch.allclose(images, expected, atol=1e-6)
    assert np.ptp(images.numpy()) > 0.3 and not torch.allclose(images[0], images[1], atol=0.05)


@first_families
def test_a_bfloat16_model_keeps_its_dtype_and_guides_in_float32(family: Family) -> None:
    policy = family.policy("model.dtype=bfloat16")
    conditioning = policy.encode(PROMPTS[:2])
    assert all(value.dtype == torch.bfloat16 for value in conditioning.values())
    inputs = family.latents(2), torch.tensor([0.501, 0.251]), conditioning
    halves, output = policy.predict_halves(*inputs), policy.predict(*inputs)
    dtype = torch.float32 if family.kind.guided else torch.bfloat16
    assert output.dtype == dtype and halves.conditional.dtype == torch.bfloat16
    guided = halves.conditional
    if family.kind.guided:
        assert halves.unconditional.dtype == torch.bfloat16
        guided = family.guided(halves.unconditional.float(), guided.float(), 3.0)
    assert torch.allclose(output, guided, rtol=1e-5, atol=1e-5)
    exact = family.policy().predict(*inputs)
    gap = (output - exact).norm() / exact.norm()
    assert 1e-5 < gap < 0.1
    trajectories = rolled_out(policy, conditioning, family.latents(2), deterministic(policy, family))
    assert trajectories.outputs.dtype == dtype and trajectories.latents.dtype == torch.float32
    assert policy.decode(trajectories.latents[:, -1]).dtype == torch.float32


@first_families
@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_gradient_checkpointing_gives_the_same_gradients_to_both_halves(family: Family, finetune: str) -> None:
    gradients = []
    for checkpointing in ("false", "true"):
        policy = family.policy(*LORA, f"model.finetune={finetune}", f"model.gradient_checkpointing={checkpointing}")
        if finetune == "lora":
            randomize_adapters(policy)
        assert policy.module.is_gradient_checkpointing == (checkpointing == "true")
        halves = policy.predict_halves(family.latents(2), torch.tensor([0.901, 0.201]), policy.encode(PROMPTS[:2]))
        if family.kind.guided:
            halves.unconditional.square().sum().backward(retain_graph=True)
        assert (
            not family.kind.guided
            or sum(float(p.grad.abs().sum()) for p in policy.module.parameters() if p.grad is not None) > 1
        )
        halves.conditional.square().sum().backward()
        gradients.append({name: p.grad for name, p in policy.module.named_parameters() if p.requires_grad})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys() and len(plain) > 10
    largest = max(float(gradient.abs().max()) for gradient in plain.values() if gradient is not None)
    for name, gradient in plain.items():
        if gradient is None:  # the last block's text side never reaches the output
            assert recomputed[name] is None
        else:
            assert torch.allclose(gradient, recomputed[name], rtol=1e-4, atol=1e-6 * largest), name


# ------------------------------------------------------------------------------------- what is published


class Published(NamedTuple):
    """A published model, by its makers' numbers.

    Attributes:
        path: hub id.
        parameters: of the network, and of all text encoders.
        latents: shape of an image of 512 x 768.
        caption: states of a prompt, of the longest that is not cut.
        adapted: for each list of blocks their number, and the layers with adapters in one.
        compiled: blocks that are compiled; None: all of these.
    """

    path: str
    parameters: tuple[int, int]
    latents: tuple[int, ...]
    caption: tuple[int, ...]
    adapted: dict[str, tuple[int, int]]
    guidance: str = "model.cfg_scale=4.0"
    compiled: int | None = None


PUBLISHED = {
    "klein 4B": Published(
        "black-forest-labs/FLUX.2-klein-base-4B",
        (3_875_544_576, 4_022_468_096),
        (32 * 48, 128),
        (512, 3 * 2560),
        {"transformer_blocks": (5, 12), "single_transformer_blocks": (20, 2)},
    ),
    "klein 9B": Published(
        "black-forest-labs/FLUX.2-klein-base-9B",
        (9_078_581_248, 8_190_735_360),
        (32 * 48, 128),
        (512, 3 * 4096),
        {"transformer_blocks": (8, 12), "single_transformer_blocks": (24, 2)},
    ),
    "flux2_dev": Published(
        "black-forest-labs/FLUX.2-dev",
        (32_223_281_152, 24_011_361_280),
        (32 * 48, 128),
        (512, 3 * 5120),
        {"transformer_blocks": (8, 12), "single_transformer_blocks": (48, 2)},
        guidance="model.guidance=4.0",
    ),
    "flux3": Published(
        "black-forest-labs/flux-3-image-klein-base",
        (5_538_458_368, 4_437_815_808),
        (32 * 48, 128),
        (512, 8 * 2560),
        {"mode_blocks.image": (5, 6), "txt_mode_blocks": (5, 6), "single_transformer_blocks": (28, 6)},
    ),
    "krea2": Published(
        "krea/Krea-2-Raw",
        (12_820_073_036, 4_437_815_808),
        (32 * 48, 64),
        (512, 12, 2560),
        {"transformer_blocks": (28, 8), "text_fusion.layerwise_blocks": (2, 8), "text_fusion.refiner_blocks": (2, 8)},
        compiled=28,
    ),
    "qwen_image": Published(
        "Qwen/Qwen-Image",
        (20_430_401_088, 8_292_166_656),
        (32 * 48, 64),
        (512, 3584),
        {"transformer_blocks": (60, 12)},
        guidance="model.cfg_scale=1.0",
    ),
    "z_image": Published(
        "Tongyi-MAI/Z-Image",
        (6_154_908_736, 4_022_468_096),
        (16, 64, 96),
        (512, 2560),
        {"layers": (30, 7), "noise_refiner": (2, 7), "context_refiner": (2, 7)},
    ),
}


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "qwen_image" else ()) for name in PUBLISHED]
)
def test_the_published_network_on_the_meta_device(name: str) -> None:
    published = PUBLISHED[name]
    size = ("model.height=512", "model.width=768")
    settings = load_config(
        None, [f"model.path={published.path}", "model.finetune=lora", *size, published.guidance]
    ).model
    model = build_on_meta(find_architecture(settings), settings)
    assert (model.network_parameters, sum(model.encoders.values())) == published.parameters
    policy, network = model.policy, model.policy.module
    adapted = [layer.removesuffix(".lora_A") for layer, _ in network.named_modules() if layer.endswith(".lora_A")]
    places = Counter(re.match(r"(.*?)\.(\d+)\.", layer).groups() for layer in adapted)
    assert {(stem, str(i)): each for stem, (count, each) in published.adapted.items() for i in range(count)} == places
    blocks = len(places) if published.compiled is None else published.compiled
    assert len(policy.compiled_blocks(network)) == len(policy.recomputed_blocks(network)) == blocks
    shapes = policy.conditioning_shapes(0)
    assert (policy.latent_shape, shapes["prompt_embeds"]) == (published.latents, published.caption)
    conditioning = {key: torch.empty(2, *shape, device=META) for key, shape in shapes.items()}
    policy._negative = {key: value[:1] for key, value in conditioning.items()}
    latents = torch.empty(2, *policy.latent_shape, device=META)
    assert policy.predict(latents, torch.ones(2, device=META), conditioning).shape == latents.shape
    assert policy.decode(latents[:1]).shape == (1, 3, 512, 768)


# ------------------------------------------------------------------------------------------------ prompts


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parts that were loaded for encoding, one entry for each time that weights were."""
    counted: list[str] = []
    load = PipelinePolicy._load_parts

    def counting(self: PipelinePolicy, *parts: str, **options: Any) -> Any:
        counted.extend(part for part in parts if part == "text_encoder")
        return load(self, *parts, **options)

    monkeypatch.setattr(PipelinePolicy, "_load_parts", counting)
    return counted


def test_prompts_are_encoded_once_and_as_the_pipeline_does(
    family: Family, pipeline: Any, tmp_path: Path, loads: list[str]
) -> None:
    cache = f"model.embedding_cache={tmp_path}"
    policy = family.policy(cache)
    policy.prepare_prompts([*PROMPTS, PROMPTS[0]])
    assert len(loads) == 1
    conditioning = policy.encode([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    again = family.policy(cache)
    again.prepare_prompts(PROMPTS)
    again.predict(family.latents(1), torch.tensor([0.5]), again.encode(PROMPTS[:1]))
    assert len(loads) == 1  # the negative prompt was encoded with the others
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(PROMPTS) + family.kind.guided
    expected = family.encoded(pipeline, [PROMPTS[1], PROMPTS[0]])
    assert conditioning.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(conditioning[name], value[[0, 1, 0]], atol=1e-6)
        assert name == "prompt_mask" or not torch.allclose(value[0], value[1], atol=1e-3)


@pytest.mark.parametrize("family", ("sd3",), indirect=True)  # the same code for all
def test_without_guidance_no_negative_prompt_is_encoded(family: Family, tmp_path: Path) -> None:
    family.policy("model.cfg_scale=1.0", f"model.embedding_cache={tmp_path}").prepare_prompts(PROMPTS)
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(PROMPTS)


@pytest.mark.parametrize("family", ("sd3",), indirect=True)  # the same code for all
def test_prompts_given_to_the_loader_are_encoded_before_the_network_moves(
    family: Family, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    network = type(family.policy().network)
    fill, to = EmbeddingCache.fill, network.to
    monkeypatch.setattr(EmbeddingCache, "fill", lambda *given: order.append("encode") or fill(*given))
    monkeypatch.setattr(network, "to", lambda self, *given: order.append("move") or to(self, *given))
    policy = load_policy(family.config(f"model.embedding_cache={tmp_path}"), CPU, PROMPTS)
    assert order.index("encode") < order.index("move")
    policy.predict(family.latents(1), torch.tensor([0.5]), policy.encode(PROMPTS[:1]))
    assert len(loads) == 1


def test_a_prompt_that_is_too_long_warns_once_and_says_what_is_cut(
    family: Family, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    long = "red background on background green background"  # 6 words, 40 letters, and what marks begin and end
    read = 8 if family.name == "krea2" else 5  # whose template has five tokens after a prompt
    settings = [
        f"model.embedding_cache={tmp_path}",
        *([f"model.max_sequence_length={read}"] if family.kind.cuts else []),
    ]
    with pytest.warns(UserWarning) as caught:
        policy = load_policy(family.config(*settings), CPU, ["a circle", long, long])
    said = [str(warning.message) for warning in caught if "longer than" in str(warning.message)]
    known = {"CLIP": 40, "T5": 5, "Qwen2.5-VL": 5} | dict.fromkeys(("Qwen3", "Qwen3-VL", "Mistral"), 5 - 2)
    limits = [known[reader.partition(" ")[0]] for reader in family.kind.readers]
    prompts = 2 + family.kind.guided  # the third is the negative prompt
    assert [message.partition(";")[0] for message in said] == [
        f"prompts longer than the {limit} tokens that {reader}: 1 of {prompts}"
        for limit, reader in zip(limits, family.kind.readers, strict=True)
    ]
    assert all('this is cut: "' in message and "background" in message for message in said)
    assert "truncated" not in capfd.readouterr().err  # diffusers' own report, once for every batch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.prepare_prompts([long])
        policy.encode([long])


@pytest.mark.parametrize("family", ("sd3",), indirect=True)  # the same code for all
def test_a_negative_prompt_that_is_too_long_warns_too(family: Family, tmp_path: Path) -> None:
    negative = "red background on background green background"
    settings = (f"model.embedding_cache={tmp_path}", f"model.negative_prompt={negative}")
    settings += ("model.max_sequence_length=6",) if family.kind.cuts else ()
    with pytest.warns(UserWarning, match=r"longer than the \d+ tokens that .*: 1 of 2;"):
        load_policy(family.config(*settings), CPU, ["a red circle"])


# --------------------------------------------------------------------------------------- weights in and out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in ("klein", "z_image") else pytest.mark.slow)
        for name in FAMILIES
        if name != "flux"  # needs the full size
    ],
    indirect=True,
)
@torch.no_grad()
def test_the_authors_names_are_read_back_and_by_diffusers_where_a_card_says_so(family: Family, tmp_path: Path) -> None:
    """In the original release the projections of an attention may be one weight."""
    tuned = family.policy(*LORA)
    kind = type(tuned)
    randomize_adapters(tuned)
    layers = trained_updates(tuned.module, trained_state(tuned))
    write_lora(tmp_path / LORA_FILE, layers, kind, "kohya")
    back = read_lora(tuned.module, tmp_path, "file", kind)
    assert back.keys() == layers.keys()
    for name, update in layers.items():
        assert torch.allclose(back[name].scaled_up @ back[name].down, update.scaled_up @ update.down, atol=1e-5), name
    pipeline = family.pipeline()
    try:
        pipeline.load_lora_weights(tmp_path)
    except Exception:  # with names that it does not know diffusers can fail in any way
        loaded = False
    else:
        loaded = bool(getattr(getattr(pipeline, family.part), "peft_config", None))
    assert ("diffusers" in kind.lora_readers("kohya")) == loaded
    if loaded:
        parts = getattr(pipeline, family.part), tuned.vae, tuned.scheduler, tuned.settings
        other = kind(*parts, folder=tuned.folder, cache=tuned.cache)
        inputs = family.latents(2), torch.tensor([0.901, 0.201]), tuned.encode(PROMPTS[:2])
        assert torch.allclose(other.predict(*inputs), tuned.predict(*inputs), atol=1e-3)
        assert not torch.allclose(family.policy().predict(*inputs), tuned.predict(*inputs), atol=1e-1)


SAVED = (("flux", "lora"), ("flux3", "lora"), ("klein", "full"), ("sd", "lora"), ("sd3", "full"))
"""Written before every landing; FLUX.3's pipeline is a modular one."""


@pytest.mark.parametrize(
    ("family", "finetune"),
    [
        pytest.param(name, finetune, marks=() if (name, finetune) in SAVED else pytest.mark.slow)
        for name in FAMILIES
        for finetune in ("full", "lora")
    ],
    indirect=["family"],
)
def test_saved_weights_make_the_same_policy_and_the_same_pipeline(
    family: Family, tmp_path: Path, finetune: str
) -> None:
    config = family.config(*LORA, f"model.finetune={finetune}")
    tuned = load_policy(config, CPU)
    if finetune == "lora":
        randomize_adapters(tuned)
    else:
        with torch.no_grad():
            for p in tuned.module.parameters():
                p.mul_(1.1)
    tuned.save_weights(tmp_path / "weights", trained_state(tuned))
    again = load_policy(config, CPU)
    inputs = family.latents(2), torch.tensor([0.901, 0.201]), tuned.encode(PROMPTS[:2])
    start, expected = again.predict(*inputs), tuned.predict(*inputs)
    assert not torch.allclose(start, expected, atol=1e-2)
    load_trained_weights(again.module, config, tmp_path / "weights")
    assert torch.equal(again.predict(*inputs), expected)
    save_pipeline(config.model, tmp_path / "weights", tmp_path / "exported")
    exported = load_policy(tiny_config(tmp_path / "exported", *family.run), CPU)
    assert torch.allclose(exported.predict(*inputs), expected, atol=1e-4)
    # What the files are to diffusers.
    latents = family.latents(2)
    images = tuned.decode(roll_out(tuned, PROMPTS[:2], latents, deterministic(tuned, family)))
    pipelines = {"exported": family.pipeline(tmp_path / "exported"), "weights": family.pipeline()}
    if finetune == "lora":
        assert [path.name for path in (tmp_path / "weights").iterdir()] == ["pytorch_lora_weights.safetensors"]
        pipelines["weights"].load_lora_weights(tmp_path / "weights")
    else:
        network = type(getattr(pipelines["weights"], family.part))
        trained = network.from_pretrained(tmp_path / "weights", subfolder=family.part)
        type(tuned).replace_part(pipelines["weights"], family.part, trained)
    for name, pipeline in pipelines.items():
        theirs = family.images(pipeline, latents, list(PROMPTS[:2]), 3.0)
        assert torch.allclose(images, theirs, atol=5e-4), (name, (images - theirs).abs().max())


@pytest.mark.parametrize("family", ("sd3",), indirect=True)  # the same code for all
def test_a_large_network_is_written_in_parts(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pipeline_policy.save_torch_state_dict

    def save(*given: Any, **options: Any) -> None:
        whole(*given, **(options | {"max_shard_size": "50KB"}))

    monkeypatch.setattr(pipeline_policy, "save_torch_state_dict", save)
    policy = family.policy()
    with torch.no_grad():
        for p in policy.module.parameters():
            p.mul_(1.1)
    policy.save_weights(tmp_path, trained_state(policy))
    folder = tmp_path / family.part
    assert len(list(folder.glob("diffusion_pytorch_model-0000*-of-0000*.safetensors"))) > 1
    assert (folder / "diffusion_pytorch_model.safetensors.index.json").is_file()
    expected = policy.module.state_dict()
    again = family.policy()
    load_trained_weights(again.module, family.config(), tmp_path)
    theirs = type(policy.network).from_pretrained(tmp_path, subfolder=family.part)
    for state in (again.module.state_dict(), theirs.state_dict()):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], value) for name, value in expected.items())


@first_families
def test_the_reference_of_adapters_is_the_start(family: Family) -> None:
    start, tuned = family.policy(), family.policy(*LORA)
    randomize_adapters(tuned)
    inputs = family.latents(2), torch.tensor([0.901, 0.201]), start.encode(PROMPTS[:2])
    expected = start.predict(*inputs)
    assert not torch.allclose(tuned.predict(*inputs), expected, atol=1e-2)
    with tuned.as_reference(), torch.no_grad():
        assert torch.allclose(tuned.predict(*inputs), expected, atol=1e-6)
    with only_adapter(tuned.module, None):
        assert torch.allclose(tuned.predict(*inputs), expected, atol=1e-6)


def test_lora_goes_where_the_family_says(family: Family) -> None:
    policy = family.policy(*LORA)
    adapted = {name.removesuffix(".lora_A") for name, _ in policy.module.named_modules() if name.endswith(".lora_A")}
    assert {next(t for t in policy.lora_targets if name.endswith(f".{t}")) for name in adapted} == set(
        policy.lora_targets
    )
    assert all(("lora_" in name) == p.requires_grad for name, p in policy.module.named_parameters())


@pytest.mark.parametrize("family", ("klein", "sd"), indirect=True)
def test_lora_weights_start_a_run(family: Family, tmp_path: Path) -> None:
    tuned = family.policy(*LORA)
    randomize_adapters(tuned)
    tuned.save_weights(tmp_path, trained_state(tuned))
    inputs = family.latents(2), torch.tensor([0.901, 0.201]), tuned.encode(PROMPTS[:2])
    again = family.policy(*LORA, f"model.lora.init={tmp_path}")
    assert torch.equal(again.predict(*inputs), tuned.predict(*inputs))
    latents = family.latents(2)
    images = tuned.decode(roll_out(tuned, PROMPTS[:2], latents, deterministic(tuned, family)))
    for other in ("model.lora.alpha=6", "model.lora.rank=6", "model.lora.rank=2"):  # the strength is that of the file
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            differing = family.policy(*LORA, f"model.lora.init={tmp_path}", other)
        assert torch.allclose(differing.predict(*inputs), tuned.predict(*inputs), atol=1e-5)
        said = [str(one.message) for one in told if "model.lora.init" in str(one.message)]
        rank = other.partition("rank=")[2]
        assert [f"model.lora.rank={rank}" in line for line in said] == ([True] if rank else [])
        differing.save_weights(tmp_path / other, trained_state(differing))
        pipeline = family.pipeline()
        pipeline.load_lora_weights(tmp_path / other)  # and comes out as it went in
        theirs = family.images(pipeline, latents, list(PROMPTS[:2]), 3.0)
        assert torch.allclose(theirs, images, atol=5e-4)


# --------------------------------------------------------------------------------------------- bad input


@first_families
@pytest.mark.parametrize(("key", "size"), [("height", 18), ("width", 23), ("height", 1)])
def test_an_image_size_that_cannot_be_is_refused(family: Family, key: str, size: int) -> None:
    unit = 4 if family.is_flow else 2
    if size % unit == 0:
        load_policy(family.config(f"model.{key}={size}"), CPU)
        return
    below = max(size // unit, 1) * unit
    sizes = f"nearest sizes: {below} and {below + unit}"
    with pytest.raises(UserError, match=rf"^model\.{key}: {size} is not a multiple of {unit} \(VAE factor 2.*{sizes}"):
        load_policy(family.config(f"model.{key}={size}"), CPU)


@first_families
@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("flash3000", r"unknown backend 'flash3000'; diffusers offers .*native"),
        ("xformers", r"xformers cannot be used here: "),
        ("flash", r"flash (does not serve a \w+; allowed are native, .*_native_math, xformers|cannot be used here: )"),
        ("_native_cudnn", r"_native_cudnn cannot be used here: "),  # installed, but not for a CPU
    ],
)
def test_attention_that_cannot_work_is_refused_before_the_run(family: Family, backend: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.attention: {reason}") as caught:
        family.policy(f"model.attention={backend}")
    assert "\n" not in str(caught.value)


@first_families
def test_native_attention_serves(policy: Any) -> None:
    before = {type(m.processor) for m in policy.module.modules() if hasattr(m, "processor")}
    choose_attention(policy.module, "native")
    assert {type(m.processor) for m in policy.module.modules() if hasattr(m, "processor")} == before


@first_families
def test_a_sampler_of_the_other_kind_is_refused(family: Family, policy: Any) -> None:
    name, reason = ("ddim", "is a flow model") if family.is_flow else ("flow", "is a diffusion model")
    settings = family.config(f"sampler.name={name}").sampler
    with pytest.raises(UserError, match=rf"sampler\.name: .*{reason}; allowed: "):
        build_transitions(settings, policy.schedule(4))


@pytest.mark.parametrize("family", ("sd3",), indirect=True)  # the same code for all
def test_a_pipeline_without_its_network_is_refused(family: Family, tmp_path: Path) -> None:
    index = {"_class_name": type(family.pipeline()).__name__, "_diffusers_version": "0.42.1"}
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
    missing = f"names no {family.part}, which a {index['_class_name']} needs$"
    with pytest.raises(UserError, match=rf"^model\.path: .*model_index\.json {missing}"):
        load_policy(tiny_config(tmp_path / "pipeline", *family.run), CPU)
