"""What a user may get wrong: one sentence on stderr, exit code 2, no traceback, and before anything large is loaded."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import Output, call, write_config
from tiny_pipeline import PROMPTS

import pcpo_fast.rollout.epoch_scoring
import pcpo_fast.training.trainer
from pcpo_fast.config.loading import load_config
from pcpo_fast.errors import UserError
from pcpo_fast.training.run_inputs import RunInputs

Capture = pytest.CaptureFixture[str]


def refused(capsys: Capture, *arguments: str | Path) -> str:
    """The sentence that a refused command says."""
    answer = call(capsys, *arguments)
    return sentence(answer)


def sentence(answer: Output) -> str:
    assert answer.code == 2, answer
    lines = answer.err.splitlines()
    assert len(lines) == 1, answer.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in answer.err + answer.out
    return lines[0].removeprefix("error: ")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A mistake that can be seen without the model must be reported without it, and without DeepSpeed."""

    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(pcpo_fast.training.trainer, "load_policy", load)
    monkeypatch.setattr(pcpo_fast.training.trainer, "start_distributed", load)
    yield


@pytest.fixture
def config(tmp_path: Path, pipeline_folder: Path) -> Path:
    """A configuration that works; the tests spoil it."""
    return write_config(tmp_path, pipeline_folder)


# Keys and values


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.hieght=32", "unknown key model.hieght, did you mean model.height?"),
        ("trian={epochs: 1}", "unknown key trian, did you mean train?"),
        ("epochs=3", "unknown key epochs, did you mean train.epochs?"),
        ("train.epochs=many", "train.epochs: must be an integer, got 'many'"),
        ("train.epochs=-1", "train.epochs: must be at least 0, got -1"),
        ("optimizer.lr=0", "optimizer.lr: must be above 0"),
        ("sampler.steps=1", "sampler.steps: must be at least 2, got 1"),
        ("credit.rule=fair", "credit.rule: must be one of native, proportionate"),
        ("algorithm=ppo", "algorithm: must be one of pcpo, "),
        (
            "rollout.images_per_prompt=1",
            "group advantages compare the images of a prompt, so must be at least 2, got 1",
        ),
        (
            "train.updates_per_epoch=3",
            "8 images per epoch (rollout.prompts_per_epoch x images_per_prompt) cannot be divided",
        ),
        (
            "train.micro_batch_size=5",
            "train.micro_batch_size: 5 does not divide the 12 (image, step) pairs that each rank trains in an update; "
            "allowed: auto, 1, 2, 3, 4, 6, 12",
        ),
        ("credit.steps=[9]", "credit.steps: there is no step 9"),
        ("credit.steps=[3]", "credit.steps: step 3 cannot be trained"),
        ("credit.steps=[]", "credit.steps: no steps are left to train"),
        ("credit.train_last_step=true", "credit.train_last_step: the last step of sampler dance"),
        ("sampler={name: cps, noise: 2}", "sampler: "),
        ("deepspeed=nowhere.json", "deepspeed: nowhere.json does not exist"),
        ("deepspeed=zero2", "deepspeed: zero2 does not exist, did you mean ds_configs/zero2.json?"),
        ("prompts.train=nowhere.txt", "prompt file nowhere.txt does not exist"),
        ("prompts.heldout=nowhere.txt", "prompt file nowhere.txt does not exist"),
        ("logging.wandb={api_key: x}", "wandb: unknown option 'api_key'"),
        ("logging.wandb={projct: x}", "wandb: unknown option 'projct', did you mean project? (allowed: project,"),
        ("logging.wandb={mode: fast}", "wandb: mode is 'fast' (allowed: online, offline, disabled)"),
        ("rewards=[{name: beauty}]", "unknown reward 'beauty'"),
        ("rewards=[{name: caption_mach}]", "did you mean caption_match?"),
        ("rewards=[{name: 'no_such_module:f'}]", "there is no module no_such_module"),
        ("rewards=[{name: 'tiny_pipeline:rednes'}]", "has no rednes, did you mean redness?"),
        ("rewards=[{name: 'tiny_pipeline:PROMPTS'}]", "is not callable but of type tuple"),
        ("rewards=[{name: 'tiny_pipeline:redness', options: {a: 1}}]", "does not take the options {'a': 1}"),
    ],
)
def test_settings(setting: str, words: str, config: Path, no_model: None, capsys: Capture) -> None:
    assert words in refused(capsys, "train", "--config", config, setting)
    assert not (config.parent / "run").exists()


def test_ranks_that_do_not_divide_the_images(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    words = r"an update has 4 images \(2 prompts x 4 images / 2 updates\), which cannot be divided equally over 3 ranks"
    with pytest.raises(UserError, match=words):
        RunInputs.load(load_config(config))


def test_config_file_with_line(config: Path, no_model: None, capsys: Capture) -> None:
    config.write_text("seed: 0\ntrain:\n  epoch: 3\n")
    assert (
        refused(capsys, "train", "--config", config)
        == f"{config} line 3: unknown key train.epoch, did you mean train.epochs?"
    )
    config.write_bytes(b"seed: \xff\n")
    assert (
        refused(capsys, "train", "--config", config)
        == f"config file {config} line 1 is not UTF-8 text; save it as UTF-8"
    )
    missing = config.with_name("none.yaml")
    assert refused(capsys, "train", "--config", missing) == f"config file {missing} does not exist"


def test_a_dry_run_refuses_what_it_would_not_do(config: Path, capsys: Capture) -> None:
    for option in (["--resume", "never"], ["--verify"], ["--profile"], ["--profile-epoch", "0"]):
        words = f"--dry-run trains in a temporary folder, so it cannot be combined with {option[0]}"
        assert words in refused(capsys, "train", "--config", config, "--dry-run", *option)


# Prompts


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "is empty; it needs at least one prompt"),
        ("blank.txt", b" \n\n", "is empty; it needs at least one prompt"),
        ("latin.txt", b"a red circle\ncaf\xe9\n", "line 2 is not UTF-8 text"),
        ("empty.jsonl", b"\n", "is empty; it needs at least one prompt"),
        ("broken.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"\n', "line 3: not valid JSON"),
        ("key.jsonl", b'{"prompt": "a"}\n{"promt": "b"}\n', 'line 2: the key "prompt" (or "text", or "caption") is'),
        ("number.jsonl", b'{"prompt": 3}\n', 'line 1: "prompt" must be a non-empty string, got a number'),
    ],
)
@pytest.mark.parametrize("key", ["train", "heldout"])
def test_prompt_files(
    key: str, name: str, content: bytes, words: str, config: Path, no_model: None, capsys: Capture
) -> None:
    path = config.with_name(name)
    path.write_bytes(content)
    message = refused(capsys, "train", "--config", config, f"prompts.{key}={path}")
    assert str(path) in message
    assert words in message


def test_a_long_prompt_is_cut_with_one_warning(tmp_path: Path, pipeline_folder: Path, capsys: Capture) -> None:
    config = write_config(tmp_path, pipeline_folder, train__epochs=2, model__embedding_cache=str(tmp_path / "cache"))
    long = " ".join(["a", "red"] * 10 + ["circle"])
    (tmp_path / "train.txt").write_text(f"{long}\n{long} on a background\na blue circle\n")
    answer = call(capsys, "train", "--config", config)
    assert answer.code == 0, answer.err
    lines = answer.err.splitlines()
    assert [line.split(" tokens that ")[1].split()[0] for line in lines] == ["T5", "CLIP"]
    assert lines[0].startswith("warning: prompts longer than the 12 tokens that T5")
    assert "model.max_sequence_length" in lines[0]
    assert lines[0].count("circle") == 1  # what is cut is said, of the first prompt only
    again = call(capsys, "train", "--config", config, "--resume", "auto", f"output_dir={tmp_path / 'again'}")
    assert (again.code, again.err) == (0, answer.err)  # encoded already, and said all the same: once in each run


# Models


@pytest.fixture
def spoiled(tmp_path: Path, pipeline_folder: Path) -> Path:
    """A copy of the pipeline to spoil."""
    return Path(shutil.copytree(pipeline_folder, tmp_path / "model"))


def spoil_index(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "is neither a folder nor a hub id of the form owner/name"),
        (lambda folder: (folder / "model_index.json").unlink(), "is not a diffusers pipeline: it holds no"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "is not valid JSON"),
        (
            lambda folder: spoil_index(folder, _class_name="PixArtAlphaPipeline"),
            "is a PixArtAlphaPipeline; allowed are FluxPipeline, Flux2KleinPipeline, ",
        ),
        (
            lambda folder: spoil_index(folder, _class_name="StableDiffusion3Pipeline"),
            "says that transformer is a FluxTransformer2DModel; it must be a SD3Transformer2DModel",
        ),
        (
            lambda folder: (folder / "text_encoder_2" / "model.safetensors").write_bytes(b"no"),
            "text_encoder_2/model.safetensors is truncated or not a safetensors file",
        ),
    ],
)
def test_a_folder_that_is_not_the_pipeline_it_says(spoil: Any, words: str, spoiled: Path, capsys: Capture) -> None:
    spoil(spoiled)
    config = write_config(spoiled.parent, spoiled, model__embedding_cache=str(spoiled.parent / "cache"))
    message = refused(capsys, "train", "--config", config)
    assert words in message
    assert str(spoiled) in message
    assert not (spoiled.parent / "run").exists()


def test_a_sampler_of_another_kind_of_model(config: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before gigabytes of weights are read and prompts encoded."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("pcpo_fast.policies.pipeline_policy.PipelinePolicy.load", load)
    message = refused(capsys, "train", "--config", config, "sampler.name=ddim", "credit.rule=uniform")
    assert message.startswith("sampler.name: ddim is for diffusion models")
    assert message.endswith("this model is a flow model; allowed: dance, flow, cps")


def hub_error(kind: str) -> Exception:
    """One of the hub's errors, without the HTTP response that it is made from."""
    from huggingface_hub import errors

    kind_of_error = getattr(errors, kind)
    error = kind_of_error.__new__(kind_of_error, "the hub said no")
    assert isinstance(error, Exception)
    return error


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", "is gated: accept its license on its page, then run `hf auth login`"),
        ("RepositoryNotFoundError", "the hub has no model some/model that you may read: check the spelling"),
        ("RevisionNotFoundError", "model.revision: the hub model some/model has no revision 'v9'"),
    ],
)
def test_hub_models_that_cannot_be_had(
    kind: str, words: str, config: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise hub_error(kind)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    message = refused(capsys, "train", "--config", config, "model.path=some/model", "model.revision=v9")
    assert words in message
    assert "some/model" in message


def test_a_hub_model_without_a_network(config: Path, capsys: Capture) -> None:
    message = refused(capsys, "train", "--config", config, "model.path=nobody/no-such-model-for-tests")
    assert "is neither in the local cache nor can the hub be reached" in message


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            "model.height=17",
            "model.height: 17 is not a multiple of 4 (VAE factor 2, packed 2 x 2); nearest sizes: 16 and 20",
        ),
        ("model.width=2", "model.width: 2 is not a multiple of 4"),
        ("model.attention=fast", "model.attention: unknown backend 'fast'"),
        ("model={finetune: lora, lora: {targets: [attn.q]}}", "model.lora.targets: attn.q matches no linear layer"),
        (
            "model={finetune: lora, lora: {init: nowhere}}",
            "model.lora.init: nowhere is neither a .safetensors file nor a folder",
        ),
    ],
)
def test_settings_that_only_the_model_can_judge(setting: str, words: str, config: Path, capsys: Capture) -> None:
    assert words in refused(capsys, "train", "--config", config, setting)
    assert not (config.parent / "run").exists()


# Rewards


REWARDS = """
import torch
def shape(images, prompts, metadata): return torch.zeros(len(images), 2)
def few(images, prompts, metadata): return [0.0]
def nothing(images, prompts, metadata): return None
def words(images, prompts, metadata): return ["good"] * len(images)
def nan(images, prompts, metadata): return [float("nan") if "square" in prompt else 1.0 for prompt in prompts]
def raises(images, prompts, metadata):
    if any("square" in prompt for prompt in prompts): raise RuntimeError("no squares\\nplease")
    return [0.0] * len(images)
def leaves(images, prompts, metadata): raise SystemExit(3)
def arguments(images): return [0.0]
class Broken:
    def __init__(self): raise OSError("no weights here")
class Late:
    calls = 0
    def __call__(self, images, prompts, metadata):
        Late.calls += 1
        return [0.0 if Late.calls < 3 else float("inf")] * len(images)
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shape", "reward bad_rewards:shape returned the shape (2, 2); expected 2 numbers, one for each image"),
        ("few", "reward bad_rewards:few returned the shape (1,); expected 2 numbers"),
        ("nothing", "returned a NoneType which is not a list of numbers"),
        ("words", "returned a list which is not a list of numbers"),
        ("nan", f"reward bad_rewards:nan returned nan for the prompt '{PROMPTS[3]}'"),
        (
            "raises",
            f"reward bad_rewards:raises failed on the prompt '{PROMPTS[3]}' (image 2 of 2): RuntimeError: no squares",
        ),
        ("leaves", "reward bad_rewards:leaves failed on the prompt"),
        ("arguments", "cannot be called with (images, prompts, metadata)"),
        ("Broken", "reward bad_rewards:Broken cannot be created: OSError: no weights here"),
        ("Late", "reward bad_rewards:Late returned inf for the prompt"),
    ],
)
def test_rewards(
    name: str, words: str, config: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "bad_rewards", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert words in refused(capsys, "train", "--config", config, f"rewards=[{{name: 'bad_rewards:{name}'}}]")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("logging.wandb={}", "wandb is not installed: run `pip install wandb`, or set logging.wandb=null"),
        ("logging.trackio={}", "trackio is not installed: run `pip install trackio`, or set logging.trackio=null"),
        ("logging.tensorboard=true", "tensorboard is not installed: run `pip install tensorboard`, or set"),
    ],
)
def test_a_logger_that_is_not_installed(
    setting: str, words: str, config: Path, no_model: None, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, setting.removeprefix("logging.").partition("=")[0], None)
    assert words in refused(capsys, "train", "--config", config, setting)


def test_a_package_that_a_logger_lacks_is_named(
    config: Path, no_model: None, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "trackio.py").write_text("import a_package_that_is_missing.part\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = refused(capsys, "train", "--config", config, "logging.trackio={}")
    assert "logging.trackio: a_package_that_is_missing is not installed: run `pip install a_package" in message
    assert "trackio: unknown option 'mode' (allowed" in refused(
        capsys, "train", "--config", config, "logging.trackio={mode: x}"
    )


# In the course of a run


def test_a_gradient_that_is_never_finite_ends_the_run(
    config: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = pcpo_fast.rollout.epoch_scoring.compose_advantages

    def spoiled(*arguments: Any, **settings: Any) -> torch.Tensor:
        return compute(*arguments, **settings) * float("nan")

    monkeypatch.setattr(pcpo_fast.rollout.epoch_scoring, "compose_advantages", spoiled)
    message = refused(capsys, "train", "--config", config, "train.max_skipped_updates=3", "train.epochs=9")
    assert "training stopped: the loss was not finite in 3 updates in a row (train.max_skipped_updates)" in message
    lines = [json.loads(line) for line in (config.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("policy/skipped_updates", 0) for line in lines if line["kind"] == "update") == 3


def test_too_little_gpu_memory_is_a_sentence(config: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def collect(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nMore about it.")

    monkeypatch.setattr(pcpo_fast.training.trainer, "collect_rollout", collect)
    message = refused(capsys, "train", "--config", config)
    assert message.startswith("the GPU ran out of memory: lower rollout.batch_size")
    assert message.endswith("(CUDA out of memory. Tried to allocate 3.00 GiB.)")


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_an_output_directory_that_cannot_be(name: str, config: Path, no_model: None, capsys: Capture) -> None:
    (config.parent / "file").touch()
    message = refused(capsys, "train", "--config", config, f"output_dir={config.parent / name}")
    assert message == f"output_dir: {config.parent / 'file'} is a file, not a folder"


def test_an_embedding_cache_that_cannot_be_written(config: Path, capsys: Capture) -> None:
    file = config.with_name("file")
    file.touch()
    message = refused(capsys, "train", "--config", config, f"model.embedding_cache={file}")
    assert message.startswith(f"model.embedding_cache: {file} cannot be written: ")
    assert not (config.parent / "run").exists()


def test_a_full_disk_is_a_sentence(config: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/checkpoints/x")

    monkeypatch.setattr(pcpo_fast.training.trainer, "save_checkpoint", save)
    assert refused(capsys, "train", "--config", config) == "run/checkpoints/x: No space left on device"


def test_a_directory_with_somebody_elses_config_is_not_touched(config: Path, no_model: None, capsys: Capture) -> None:
    folder = config.parent / "project"
    folder.mkdir()
    (folder / "config.yaml").write_text("name: my project\n")
    message = refused(capsys, "train", "--config", config, f"output_dir={folder}")
    assert "holds a run that cannot be resumed" in message and "unknown key name" in message
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_damaged_checkpoint(config: Path, capsys: Capture) -> None:
    checkpoint = config.parent / "damaged"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text('{"epoch": ')
    message = refused(capsys, "train", "--config", config, "--resume", checkpoint)
    assert "is not a checkpoint of this trainer" in message
