"""Implicit reward guidance: the composition itself, fine-tunes that share a model, and ``sample`` with its scales."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import call
from PIL import Image
from tiny_pipeline import PROMPTS, tiny_config
from tiny_pipelines import SD3_RUN, SD_RUN
from torch import Tensor, nn

from pcpo_fast.config.loading import dump_config, load_config
from pcpo_fast.config.schema import Config
from pcpo_fast.errors import UserError
from pcpo_fast.guidance import scale_sweep
from pcpo_fast.guidance.guided_runs import guided_policies, read_runs
from pcpo_fast.guidance.reward_guidance import RewardGuided
from pcpo_fast.guidance.scale_sweep import shown_rows, sweep_scales
from pcpo_fast.method.samplers import deterministic_transitions
from pcpo_fast.method.schedules import Schedule
from pcpo_fast.method.step_tables import StepTable
from pcpo_fast.policies import Conditioning, Policy, PolicyOutput
from pcpo_fast.policies import fine_tunes as fine_tunes_module
from pcpo_fast.policies.families import load_policy, load_trained_weights
from pcpo_fast.policies.lora import only_adapter
from pcpo_fast.rollout.generation import generate
from pcpo_fast.runs.input_record import write_record

Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")
FULL = ("model.finetune=full",)
LORA = ("model.finetune=lora", "model.lora.rank=2", "model.lora.alpha=6")
OTHER_LORA = ("model.finetune=lora", "model.lora.rank=3", "model.lora.alpha=2", "model.lora.targets=[to_q, to_v]")


# The composition.


class Toy(Policy):
    """A linear model that counts its forwards."""

    family = "toy"

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(nn.Linear(6, 6).to(dtype))
        self.forwards = 0

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (6,)

    def prepare_prompts(self, prompts: Sequence[str]) -> None: ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return {"shift": torch.arange(len(prompts), dtype=self.dtype)[:, None]}

    def predict_halves(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> PolicyOutput:
        self.forwards += 1
        return PolicyOutput(self.forward_module(latents.to(self.dtype)) * times[:, None].to(self.dtype), None)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.reshape(-1, 3, 1, 2).float().sigmoid()

    def schedule(self, steps: int) -> Schedule:
        raise NotImplementedError

    def save_weights(self, folder: Path, state: Mapping[str, Tensor]) -> None: ...


def toy_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Conditioning]:
    return torch.randn(4, 6, dtype=dtype), torch.rand(4, dtype=dtype), {}


SCALES = [(0.0,), (1.0,), (0.3,), (1.7,), (-0.4,), (3.0,), (0.7, 0.5), (0.5, 0.5), (2.0, -1.0), (0.2, -0.3, 1.4)]


@pytest.mark.parametrize("scales", SCALES)
@torch.no_grad()
def test_the_composition_in_float64(scales: tuple[float, ...]) -> None:
    base, tuned = Toy(), [Toy() for _ in scales]
    inputs = toy_inputs()
    guided = RewardGuided(base, [(toy.predict, scale) for toy, scale in zip(tuned, scales, strict=True)])
    output = guided.predict(*inputs)

    def apply(toy: Toy) -> np.ndarray:
        layer: Any = toy.module
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        return (inputs[0].numpy() @ weight.T + bias) * inputs[1].numpy()[:, None]

    expected = apply(base) * (1 - sum(scales)) + sum(s * apply(toy) for toy, s in zip(tuned, scales, strict=True))
    size = np.abs(apply(base)).max() + sum(
        np.abs(apply(toy)).max() * abs(s) for toy, s in zip(tuned, scales, strict=True)
    )
    assert output.dtype == torch.float64
    np.testing.assert_allclose(output.numpy(), expected, rtol=0, atol=16 * np.finfo(np.float64).eps * size)


@pytest.mark.parametrize(
    ("scales", "forwards"),
    [
        ((0.0, 0.0), (1, 0, 0)),
        ((1.0, 0.0), (0, 1, 0)),
        ((0.0, 1.0), (0, 0, 1)),
        ((0.5, 0.0), (1, 1, 0)),
        ((0.7, 0.5), (1, 1, 1)),
        ((0.5, 0.5), (0, 1, 1)),
        ((2.0, -1.0), (0, 1, 1)),
    ],
)
def test_only_what_counts_is_run(scales: tuple[float, float], forwards: tuple[int, int, int]) -> None:
    toys = [Toy() for _ in range(3)]
    guided = RewardGuided(toys[0], [(toy.predict, scale) for toy, scale in zip(toys[1:], scales, strict=True)])
    inputs = toy_inputs()
    output = guided.predict(*inputs)
    assert tuple(toy.forwards for toy in toys) == forwards
    if 1 in scales or not any(scales):
        alone = toys[forwards.index(1)]
        assert torch.equal(output, alone.predict(*inputs))


@torch.no_grad()
def test_narrow_outputs_are_composed_in_float32() -> None:
    base, tuned = Toy(torch.bfloat16), Toy(torch.bfloat16)
    inputs = toy_inputs(torch.float32)
    first, second = base.predict(*inputs), tuned.predict(*inputs)
    output = RewardGuided(base, [(tuned.predict, 0.3)]).predict(*inputs)
    assert first.dtype == torch.bfloat16 and output.dtype == torch.float32
    expected = first.double() + 0.3 * (second.double() - first.double())
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        output.double(), expected, rtol=0, atol=4 * eps * float(first.abs().max() + second.abs().max())
    )
    assert torch.equal(RewardGuided(base, [(tuned.predict, 1.0)]).predict(*inputs), second)


def test_the_rest_of_the_policy_is_the_one_that_is_wrapped() -> None:
    base, tuned = Toy(), Toy()
    guided = RewardGuided(base, [(tuned.predict, 2.0)])
    inputs = toy_inputs()
    assert (guided.latent_shape, guided.device, guided.dtype) == ((6,), CPU, torch.float64)
    assert torch.equal(guided.encode(["a", "b"])["shift"], base.encode(["a", "b"])["shift"])
    assert torch.equal(guided.decode(inputs[0]), base.decode(inputs[0]))
    composed = guided.predict(*inputs)
    with guided.as_reference():
        assert torch.equal(guided.predict(*inputs), base.predict(*inputs))
    assert torch.equal(guided.predict(*inputs), composed)
    with pytest.raises(ValueError, match="no weights of its own"):
        guided.save_weights(Path("x"), {})


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_is_finite(scale: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        RewardGuided(Toy(), [(Toy().predict, scale)])


@torch.no_grad()
def test_against_the_kept_copy_of_the_start() -> None:
    policy = Toy()
    policy.reference_module = copy.deepcopy(policy.module)
    inputs = toy_inputs()
    start = policy.predict(*inputs)
    nn.init.normal_(policy.module.weight)  # type: ignore[arg-type]
    now = policy.predict(*inputs)
    assert torch.equal(RewardGuided.of(policy, 0.0).predict(*inputs), start)
    assert torch.equal(RewardGuided.of(policy, 1.0).predict(*inputs), now)
    half = RewardGuided.of(policy, 0.5).predict(*inputs)
    torch.testing.assert_close(half, (start + now) / 2, rtol=0, atol=8e-16 * float(start.abs().max() + now.abs().max()))


# Runs. They are made without training: what counts is that their weights differ from the base model's.


@torch.enable_grad()
def make_run(folder: Path, pipeline: Path, *overrides: str, seed: int = 1) -> Path:
    """A run directory with an export of random changes to the model."""
    config = tiny_config(pipeline, *overrides, f"output_dir={folder}")
    policy = load_policy(config, CPU)
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.module.parameters():
        if parameter.requires_grad:
            lora = config.model.finetune == "lora"
            change = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.data = 0.3 * change if lora else parameter.data + 0.03 * change
    policy.save_weights(folder / "export", policy.module.state_dict())
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return folder


@torch.enable_grad()
def plain_policy(run: Path | Config) -> Policy:
    """The run's model loaded by itself, without any of what is tested; of a configuration, the base model."""
    if isinstance(run, Config):
        return load_policy(run.model_copy(update={"model": run.model.model_copy(update={"finetune": "full"})}), CPU)
    config = load_config(run / "config.yaml")
    policy = load_policy(config, CPU)
    load_trained_weights(policy.module, config, run / "export")
    return policy


def inputs_of(policy: Policy) -> tuple[Tensor, Tensor, Conditioning]:
    return torch.randn(2, *policy.latent_shape), torch.tensor([0.9, 0.25]), policy.encode(PROMPTS[:2])


def images_of(policy: Policy, config: Config) -> Tensor:
    table = StepTable.of(deterministic_transitions(config.sampler, policy.schedule(config.sampler.steps)), CPU)
    return generate(policy, list(PROMPTS[:2]), 2, table, 3, 3)


CASES = {
    "flux-full": ("pipeline_folder", (), FULL),
    "flux-lora": ("pipeline_folder", (), LORA),
    "sd3-cfg-full": ("sd3_folder", SD3_RUN, FULL),
    "sd3-cfg-lora": ("sd3_folder", SD3_RUN, LORA),
    "sd-cfg-lora": ("sd_folder", SD_RUN, LORA),
}


@pytest.mark.parametrize(("pipeline", "family", "kind"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_one_run_from_base_to_beyond(
    pipeline: str, family: tuple[str, ...], kind: tuple[str, ...], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", request.getfixturevalue(pipeline), *family, *kind)
    runs = read_runs([run])
    config = runs[0].config
    base, tuned = plain_policy(config), plain_policy(run)
    expected_base, expected_tuned = images_of(base, config), images_of(tuned, config)
    assert (expected_base - expected_tuned).abs().max() > 0.02
    together = guided_policies(runs, [[0.0], [1.0], [0.6], [-0.5], [1.8]], CPU, list(PROMPTS))
    assert torch.equal(images_of(together[0], config), expected_base)
    assert torch.equal(images_of(together[1], config), expected_tuned)
    for scale, expected in ((0.0, expected_base), (1.0, expected_tuned)):  # alone, as most often
        (alone,) = guided_policies(runs, [[scale]], CPU)
        assert torch.equal(images_of(alone, config), expected)
    inputs = inputs_of(base)
    reference, output = (policy.predict(*inputs).double() for policy in (base, tuned))
    size = float(reference.abs().max() + output.abs().max())
    for policy in together[2:]:
        (scale,) = policy.scales
        expected = reference + scale * (output - reference)
        atol = 8 * torch.finfo(torch.float32).eps * size
        torch.testing.assert_close(policy.predict(*inputs).double(), expected, rtol=0, atol=atol)


@torch.no_grad()
def test_bfloat16_lora_is_the_tuned_model_bit_for_bit(pipeline_folder: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pipeline_folder, *LORA, "model.dtype=bfloat16")
    (guided,) = guided_policies(read_runs([run]), [[1.0]], CPU)
    tuned = plain_policy(run)
    inputs = inputs_of(tuned)
    assert guided.predict(*inputs).dtype == torch.bfloat16
    assert torch.equal(guided.predict(*inputs), tuned.predict(*inputs))


@pytest.mark.parametrize(
    "kinds",
    [
        (LORA, OTHER_LORA),
        (LORA, FULL),
        (FULL, OTHER_LORA, FULL),
    ],
    ids=["two-loras", "lora-full", "full-lora-full"],
)
@torch.no_grad()
def test_several_runs_in_one_memory(kinds: tuple[tuple[str, ...], ...], pipeline_folder: Path, tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / f"run{number}", pipeline_folder, *kind, seed=number) for number, kind in enumerate(kinds)
    ]
    runs = read_runs(folders)
    base, tuned = plain_policy(runs[0].config), [plain_policy(folder) for folder in folders]
    inputs = inputs_of(base)
    settings = [[0.7, 0.5, -0.2], [0.25, 0.75, 0.0], [0.0] * 3, *torch.eye(3).tolist()]
    settings = [scales[: len(kinds)] for scales in settings][: 3 + len(kinds)]
    together = guided_policies(runs, settings, CPU)
    assert len({id(policy.policy) for policy in together}) == 1
    reference = base.predict(*inputs)
    outputs = [policy.predict(*inputs) for policy in tuned]
    for scales, policy in zip(settings[:2], together[:2], strict=True):
        expected = reference.double()
        for scale, output in zip(scales, outputs, strict=True):
            expected = expected + scale * (output.double() - reference.double())
        size = float(reference.abs().max() + sum(output.abs().max() for output in outputs))
        atol = 8 * torch.finfo(torch.float32).eps * size
        torch.testing.assert_close(policy.predict(*inputs).double(), expected, rtol=0, atol=atol)
    for policy, expected in zip(together[2:], [reference, *outputs], strict=True):
        assert torch.equal(policy.predict(*inputs), expected)
    # Whatever was asked last, the shared model rests as the base model.
    assert torch.equal(together[0].policy.predict(*inputs), reference)
    with together[0].as_reference():
        assert torch.equal(together[0].predict(*inputs), reference)


@torch.no_grad()
def test_two_full_runs_that_need_no_base_model(pipeline_folder: Path, tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"run{seed}", pipeline_folder, seed=seed) for seed in (1, 2)]
    tuned = [plain_policy(folder) for folder in folders]
    inputs = inputs_of(tuned[0])
    first, second = (policy.predict(*inputs) for policy in tuned)
    mixed, alone = guided_policies(read_runs(folders), [[0.25, 0.75], [1.0, 0.0]], CPU)
    atol = 8 * torch.finfo(torch.float32).eps * float(first.abs().max() + second.abs().max())
    torch.testing.assert_close(mixed.predict(*inputs), 0.25 * first + 0.75 * second, rtol=0, atol=atol)
    assert torch.equal(alone.predict(*inputs), first)


@torch.no_grad()
def test_switching_leaves_adapters_as_they_were(pipeline_folder: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pipeline_folder, *LORA)
    tuned = plain_policy(run)
    inputs = inputs_of(tuned)
    before = tuned.predict(*inputs)
    grads = [parameter.requires_grad for parameter in tuned.module.parameters()]
    guided = RewardGuided.of(tuned, 0.5)
    base = plain_policy(load_config(run / "config.yaml")).predict(*inputs)
    atol = 8 * torch.finfo(torch.float32).eps * float(before.abs().max() + base.abs().max())
    torch.testing.assert_close(guided.predict(*inputs), (before + base) / 2, rtol=0, atol=atol)
    assert torch.equal(tuned.predict(*inputs), before)
    with tuned.as_reference(), only_adapter(tuned.module, "default"):
        assert torch.equal(tuned.predict(*inputs), before)
    with tuned.as_reference():
        with only_adapter(tuned.module, "default"):
            pass
        assert torch.equal(tuned.predict(*inputs), base)
    assert grads == [parameter.requires_grad for parameter in tuned.module.parameters()]
    with pytest.raises(ValueError, match="has no adapter 'run_1'"), only_adapter(tuned.module, "run_1"):
        pass


def test_nothing_is_loaded_that_no_scale_needs(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make_run(tmp_path / f"run{n}", pipeline_folder, *kind, seed=n) for n, kind in enumerate(((), LORA))]
    runs = read_runs(folders)
    models: list[Any] = []
    loaded: list[Path] = []

    def counted(function: Callable[..., Any], calls: list[Any], place: int) -> Callable[..., Any]:
        return lambda *arguments: (calls.append(arguments[place]), function(*arguments))[1]

    monkeypatch.setattr(fine_tunes_module, "load_policy", counted(load_policy, models, 0))
    monkeypatch.setattr(fine_tunes_module, "load_trained_weights", counted(load_trained_weights, loaded, 2))
    networks = []
    for settings in ([[0.0, 0.0]], [[1.0, 0.0]], [[0.5, 0.0]], [[0.0, 0.5]], [[0.5, 0.5]], [[0.0, 0.0], [1.0, 0.0]]):
        models.clear(), loaded.clear()
        guided_policies(runs, settings, CPU)
        networks.append((len(models), [folder.parent.name for folder in loaded]))
    assert networks == [
        (1, []),
        (1, ["run0"]),
        (2, ["run0"]),
        (1, ["run1"]),
        (2, ["run0", "run1"]),
        (2, ["run0"]),
    ]


def test_settings_need_a_scale_for_each_run(pipeline_folder: Path, tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "run", pipeline_folder)])
    for scales in ([1.0, 0.5], [float("nan")]):
        with pytest.raises(ValueError, match="expected 1 finite scale,"):
            guided_policies(runs, [scales], CPU)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("model.dtype=bfloat16", "model.dtype is 'float32' in"),
        ("model.cfg_scale=2.0", "model.cfg_scale is 1.0 in"),
        ("model.guidance=1.5", "model.guidance is 3.5 in"),
        ("model.height=32", "model.height is 16 in"),
        ("model.path=other/pipeline", "model.path is '"),
    ],
)
def test_runs_of_different_base_models_are_refused(
    change: str, key: str, pipeline_folder: Path, tmp_path: Path
) -> None:
    for name, overrides in (("a", ()), ("b", (change,))):
        (tmp_path / name / "export").mkdir(parents=True)
        config = tiny_config(pipeline_folder, "sampler.steps=5", *overrides)
        (tmp_path / name / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        read_runs([tmp_path / "a", tmp_path / "b"])
    assert f"--run: composed runs must share one base model, but {key}" in str(refused.value)
    assert str(tmp_path / "b") in str(refused.value)
    both = read_runs([tmp_path / "a", tmp_path / "b"], [change])  # a setting holds for all
    assert both[0].config.model == both[1].config.model


def test_runs_whose_base_model_changed_between_them_are_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        (folder / "export").mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_config(tiny_config(pipeline_folder)), encoding="utf-8")
        files = {"unet/model.safetensors": folder.name}
        write_record(folder, {"model.path": {"path": str(pipeline_folder), "files": files}}, 0)
    with pytest.raises(UserError, match=r"one base model, but the content of model.path \(.* changed between"):
        read_runs(folders)
    assert len(read_runs(folders, [f"model.path={pipeline_folder}"])) == 2
    (folders[1] / "inputs.json").unlink()  # a run from before there was a record
    assert len(read_runs(folders)) == 2


def test_a_base_model_may_be_spelled_in_two_ways(pipeline_folder: Path, tmp_path: Path) -> None:
    for name, path in (("a", pipeline_folder), ("b", pipeline_folder.parent / "." / "x" / ".." / pipeline_folder.name)):
        (tmp_path / name / "export").mkdir(parents=True)
        config = tiny_config(pipeline_folder, f"model.path={path}", f"sampler.steps={7 if name == 'b' else 6}")
        (tmp_path / name / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (pipeline_folder.parent / "x").mkdir(exist_ok=True)
    assert [run.config.sampler.steps for run in read_runs([tmp_path / "a", tmp_path / "b"])] == [6, 7]


# The command line.


@pytest.mark.parametrize(
    ("text", "scales"),
    [
        ("0,0.25,0.5,...,1.5", [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]),
        ("0, 0.1, ..., 0.5", [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        ("1,0.5,...,-1", [1, 0.5, 0, -0.5, -1]),
        ("1.5", [1.5]),
        ("0,1,3", [0, 1, 3]),
        ("0,1,...,2", [0, 1, 2]),
    ],
)
def test_scales_of_a_sweep(text: str, scales: list[float]) -> None:
    assert sweep_scales(text) == scales


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' in '' is not a finite number"),
        ("0,x", "'x' in '0,x' is not a finite number; example: 0,0.25,...,1.5"),
        ("0,nan", "'nan' in"),
        ("0,1e999", "'1e999' in"),
        ("0,...,1", "the dots need at least two numbers before them and one after"),
        ("0,1,...", "the dots need at least two numbers"),
        ("0,1,...,2,3", "the dots need at least two numbers"),
        ("0,0.2,...,0.5", "steps of 0.2 do not lead from 0.2 to 0.5"),
        ("0,1,...,-3", "steps of 1 do not lead from 1 to -3"),
        ("1,1,...,3", "steps of 0 do not lead"),
        ("0,1,0", "repeats a scale"),
        ("0,1,...,1000000000", "has more than 64 scales"),
    ],
)
def test_what_is_no_sweep(text: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        sweep_scales(text)
    assert str(refused.value).startswith("--sweep: ") and words in str(refused.value)


def test_rows_of_a_large_sweep_show_every_prompt_first() -> None:
    assert shown_rows(3, 4) == list(range(12))
    assert shown_rows(32, 4) == list(range(0, 96, 4))
    assert shown_rows(10, 4)[:12] == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 1, 5]


def test_a_large_sweep_keeps_images_captions_and_scores_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, Any] = {}

    def table(cells: list[Tensor], **others: Any) -> Image.Image:
        shown.update(others, cells=cells)
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(scale_sweep, "image_table", table)
    captions = [f"caption {prompt}" for prompt in range(10) for _ in range(3)]
    images = (torch.arange(30.0) / 64)[:, None, None, None].expand(30, 3, 2, 2)
    columns = [
        scale_sweep.ScaleResult(scale, images + scale, {"number": torch.arange(30.0) + scale}) for scale in (0.0, 0.5)
    ]
    scale_sweep.sweep_picture(columns, captions, 3)
    plot = scale_sweep.write_reward_plot(columns, scale_sweep.sweep_numbers(columns, 3), 30, tmp_path / "sweep.png")
    assert plot == tmp_path / "sweep_reward.png" and plot.is_file()
    order = [prompt * 3 + image for image in range(3) for prompt in range(10)][:24]
    assert shown["title"] == "24 of 30 images"
    assert shown["columns"] == ["λ = 0 (base)", "λ = 0.5"]
    assert shown["rows"] == [captions[image] for image in order]
    assert shown["scores"] == [[float(image) for image in order], [image + 0.5 for image in order]]
    for cells, scale in zip(shown["cells"], (0.0, 0.5), strict=True):
        assert (cells[:, 0, 0, 0] - scale).mul(64).round().int().tolist() == order


@pytest.fixture(scope="module")
def lora_run(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "lora", pipeline_folder, *LORA)


@pytest.fixture(scope="module")
def full_run(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "full", pipeline_folder, seed=2)


def picture(file: str | Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def test_sample_with_scales(
    lora_run: Path, full_run: Path, pipeline_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    def sample(name: str, *arguments: str | Path) -> np.ndarray:
        places = ("--output", tmp_path / "grid.png", "--folder", tmp_path / name)
        answer = call(capsys, "sample", *arguments, "--prompt", PROMPTS[0], "--count", "1", "--json", *places)
        assert answer.code == 0, answer.err
        said.append(json.loads(answer.out)["guidance_scale_reward"])
        return picture(tmp_path / name / "00000.png")

    said: list[Any] = []
    scale = "--guidance-scale-reward"
    base = sample("base", "--config", lora_run / "config.yaml")
    tuned = sample("tuned", "--run", lora_run)
    assert (sample("zero", "--run", lora_run, scale, "0") == base).all()
    assert (sample("one", "--run", lora_run, scale, "1") == tuned).all()
    beyond = sample("beyond", "--run", lora_run, scale, "-1.5")
    assert np.abs(beyond - base).max() > 2 and np.abs(beyond - tuned).max() > 2
    both = sample("both", "--run", lora_run, "--run", full_run, scale, "0.7", scale, "0.5")
    assert (sample("first", "--run", lora_run, "--run", full_run, scale, "1", scale, "0") == tuned).all()
    swapped = sample("swapped", "--run", full_run, "--run", lora_run, scale, "0.5", scale, "0.7")
    assert np.abs(both - swapped).max() <= 1  # the same sum in another order
    assert np.abs(both - sample("equal", "--run", lora_run, "--run", full_run, scale, "0.7")).max() > 2
    assert said == [[], [1.0], [0.0], [1.0], [-1.5], [0.7, 0.5], [1.0, 0.0], [0.5, 0.7], [0.7, 0.7]]


def test_a_sweep(lora_run: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ("sample", "--run", lora_run, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--count", "2")
    output, folder = tmp_path / "new" / "sweep.png", tmp_path / "single"
    rewards = ("--reward", "tiny_pipeline:redness", "--reward", "jpeg_compressibility")
    sweep = ("--sweep", "0,0.5,...,1.5")
    answer = call(capsys, *arguments, *rewards, *sweep, "--json", "--output", output, "--folder", folder)
    assert (answer.code, answer.err) == (0, "")
    result = json.loads(answer.out)
    assert result["runs"] == [str(lora_run)]
    assert result["plot"] == str(tmp_path / "new" / "sweep_reward.png")
    assert (result["output"], result["prompts"], result["seed"]) == (str(output), list(PROMPTS[:2]), 0)
    with Image.open(result["plot"]) as plot:
        assert plot.width > 800
    assert [entry["guidance_scale_reward"] for entry in result["sweep"]] == [0, 0.5, 1, 1.5]
    for entry in result["sweep"]:
        red = entry["rewards"]["tiny_pipeline:redness"]
        assert len(red["scores"]) == len(entry["images"]) == 4 and entry["diversity"] > 0
        assert red["low"] < red["mean"] < red["high"]
        assert red["mean"] == pytest.approx(np.mean(red["scores"]))
        assert red["std"] == pytest.approx(np.std(red["scores"], ddof=1))
        pixels = picture(entry["images"][3]) / 255
        assert red["scores"][3] == pytest.approx(pixels[..., 0].mean() - pixels[..., 1:].mean(), abs=2e-3)
    # The picture: a row for each image, a column for each scale, each image where it belongs.
    sheet = picture(output)
    factor = 6  # of 16 x 24 pixels
    width, height, line = 24 * factor, 16 * factor, (sheet.shape[0] - 16 - 4 - 16 - 4 * 16 * factor - 3 * 10) // 5
    assert sheet.shape[1] == 16 + 132 + 10 + 4 * width + 3 * 10 + 16
    for column, entry in enumerate(result["sweep"]):
        for row, file in enumerate(entry["images"]):
            x, y = 16 + 132 + 10 + column * (width + 10), 16 + line + 4 + row * (height + 10 + line)
            shown = sheet[y : y + height, x : x + width]
            assert (shown == picture(file).repeat(factor, 0).repeat(factor, 1)).all()
    # Scales 0 and 1 are the commands without a sweep.
    for scale, source in (("scale_0", ("--config", lora_run / "config.yaml")), ("scale_1", ("--run", lora_run))):
        plain = ("--output", tmp_path / "plain.png", "--folder", tmp_path / "plain")
        assert call(capsys, "sample", *source, *arguments[3:], *plain).code == 0
        for number in range(4):
            assert (
                picture(tmp_path / "plain" / f"{number:05d}.png") == picture(folder / scale / f"{number:05d}.png")
            ).all()


def test_a_sweep_of_two_runs_and_what_it_says(lora_run: Path, full_run: Path, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "sweep.png"
    arguments = ("--run", lora_run, "--run", full_run, "--prompt", PROMPTS[0], "--count", "1", "--output", output)
    answer = call(capsys, "sample", *arguments, "--sweep=-0.5,0.5", "--reward", "tiny_pipeline:redness")
    lines = answer.out.splitlines()
    assert (answer.code, answer.err) == (0, "")
    assert [line.partition(" mean ")[0] for line in lines[:2]] == [
        "scale -0.5: tiny_pipeline:redness",
        "scale 0.5: tiny_pipeline:redness",
    ]
    assert lines[2:] == [f"Images: {output}", f"Rewards: {tmp_path / 'sweep_reward.png'}"]
    single = ("--guidance-scale-reward", "0.5", "--folder", tmp_path / "half")
    assert call(capsys, "sample", *arguments, *single).code == 0
    answer = call(capsys, "sample", *arguments, "--sweep", "0.5", "--folder", tmp_path / "sweep")
    assert answer.out == f"Images: {output}\n"
    assert (picture(tmp_path / "half" / "00000.png") == picture(tmp_path / "sweep" / "scale_0.5" / "00000.png")).all()


SCALE = "--guidance-scale-reward"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((SCALE, "0.5"), "--guidance-scale-reward: needs a trained run to scale; give one with --run RUN"),
        (("--sweep", "0,1"), "--sweep: needs a trained run to scale; give one with --run RUN"),
        (("--config", "x.yaml", SCALE, "0.5"), "give one with --run RUN"),
        (("--run", "{lora}", "--run", "{full}"), "--guidance-scale-reward: 2 runs need one scale each, or one for all"),
        (
            ("--run", "{lora}", SCALE, "1", SCALE, "2"),
            "--guidance-scale-reward: 2 scales for 1 run; give one per --run",
        ),
        (("--run", "{lora}", *("--run", "{full}") * 2, SCALE, "1", SCALE, "2"), "2 scales for 3 runs"),
        (("--run", "{lora}", SCALE, "nan"), "--guidance-scale-reward: must be a finite number, got nan"),
        (("--run", "{lora}", SCALE, "x"), "argument --guidance-scale-reward: invalid float value: 'x'"),
        (
            ("--run", "{lora}", SCALE, "1", "--sweep", "0,1"),
            "--sweep: not allowed with argument --guidance-scale-reward",
        ),
        (("--run", "{lora}", "--config", "x"), "--config: not allowed with argument --run"),
        (("--run", "{lora}", "--sweep", "0,0"), "--sweep: '0,0' repeats a scale"),
        (("--run", "{lora}", "--run", "{lora}/export", SCALE, "1"), "export is not a run directory"),
    ],
)
def test_refused(arguments: tuple[str, ...], words: str, lora_run: Path, full_run: Path, capsys: Capture) -> None:
    named = [argument.format(lora=lora_run, full=full_run) for argument in arguments]
    answer = call(capsys, "sample", "--prompt", "a", *named)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1
    assert words in answer.err


def test_weights_that_are_not_the_runs_are_refused(
    lora_run: Path, full_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((lora_run / "config.yaml").read_text())
    (tmp_path / "run" / "export").symlink_to(full_run / "export")
    answer = call(capsys, "sample", "--prompt", "a", "--run", lora_run, "--run", tmp_path / "run", SCALE, "0.5")
    assert answer.code == 2 and "pytorch_lora_weights.safetensors" in answer.err and answer.err.count("\n") == 1
