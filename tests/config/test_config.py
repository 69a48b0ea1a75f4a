"""Configuration: where values come from, and what a user hears about a mistake."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

from pcpo_fast.config import docs
from pcpo_fast.config.loading import dump_config, load_config
from pcpo_fast.config.presets import PRESETS
from pcpo_fast.config.schema import Config, ModelConfig
from pcpo_fast.config.yaml_text import dump_yaml, parse_value
from pcpo_fast.errors import UserError
from pcpo_fast.method.samplers import build_credit, build_transitions
from pcpo_fast.method.schedules import DiffusionSchedule, FlowSchedule, Schedule
from pcpo_fast.method.step_tables import RunTables
from pcpo_fast.method.transitions import ddim_timesteps, shifted_times, stable_diffusion_alphas
from pcpo_fast.policies.pipeline_policy import DTYPES
from pcpo_fast.rollout.epoch_plan import pairs_per_update

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
FLUX = ("flux_dev_pcpo", "flux_dev_pcpo_lora", "flux_dev_dancegrpo")
PUBLISHED = [path.stem for path in SHIPPED if not path.stem.startswith("tiny")]
SD35 = "stabilityai/stable-diffusion-3.5-medium"
KLEIN = "black-forest-labs/FLUX.2-klein-base-9B"


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def complaint(folder: Path, text: str | bytes, *overrides: str) -> str:
    """What the user hears, with the file's path shortened to its name."""
    path = write(folder, text)
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), path.name)


# Where values come from


def test_defaults_alone_are_a_valid_run() -> None:
    assert load_config(None).model_dump() == load_config(None, ["algorithm=pcpo"]).model_dump()
    assert load_config(None).credit.rule == "proportionate"


def test_the_command_line_wins_over_the_file_the_preset_and_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "algorithm: flow_grpo\nsampler:\n  steps: 7\n  noise: 0.5\n")
    config = load_config(path, ["sampler.noise=0.4", "sampler.noise=0.6"])
    assert config.sampler.name == "flow"  # the preset over the default
    assert config.sampler.steps == 7  # the file over the preset
    assert config.sampler.noise == 0.6  # the command line over the file, the last one first
    assert config.sampler.final_step == "default"
    assert config.credit.kl_coefficient == PRESETS["flow_grpo"]["credit"]["kl_coefficient"]


def test_a_preset_named_on_the_command_line_keeps_the_values_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "algorithm: pcpo\ncredit: {clip_range: 0.5}\n")
    config = load_config(path, ["algorithm=dancegrpo"])
    assert (config.credit.rule, config.credit.objective, config.credit.clip_range) == ("native", "clip", 0.5)


def test_loading_does_not_change_the_presets_or_the_defaults(tmp_path: Path) -> None:
    before = dump_yaml(PRESETS)
    load_config(None, ["rewards.0.weight=3", "sampler.steps=9", "model.lora={rank: 1}", "model.finetune=lora"])
    assert dump_yaml(PRESETS) == before
    assert load_config(None).rewards[0].weight == 1.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E+3", 1e3),
        ("-2e-1", -0.2),
        (".5", 0.5),
        ("-.5", -0.5),
        ("5", 5),
        ("-0", 0),
        ("0x1F", 31),
        ("1e", "1e"),
        # octal, sexagesimal, binary and underscores of YAML 1.1: 83, 90, 90.5, 7, 100.5, 3 there
        *((text, text) for text in ("0123", "-0123", "08", "1:30", "1:30.5", "0_7", "1_00.5", "1_0e1", "0b11")),
    ],
)
def test_numbers_are_written_in_plain_digits_or_with_an_exponent(text: str, value: Any) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_scientific_notation_in_file_and_override(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer:\n  lr: 1e-4\n  eps: 2E-9\n")
    config = load_config(path, ["optimizer.weight_decay=3e-2"])
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.weight_decay) == (1e-4, 2e-9, 3e-2)


def test_a_section_without_keys_is_left_at_its_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "algorithm: dancegrpo\ncredit:\n  # rule: native\nmodel:\n  lora:\nlogging:\n  wandb:\n")
    assert load_config(path) == load_config(None, ["algorithm=dancegrpo"])


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing\n")) == load_config(None)


def test_positions_in_lists(tmp_path: Path) -> None:
    path = write(tmp_path, "rewards:\n- name: jpeg_compressibility\n- {name: caption_match, options: {a: 1}}\n")
    config = load_config(path, ["rewards.0.weight=-1", "rewards.1.options.b=[x, y]", "rewards.1.evaluation_only=true"])
    assert config.rewards[0].weight == -1.0
    assert config.rewards[1].options == {"a": 1, "b": ["x", "y"]}
    assert config.rewards[1].evaluation_only
    # Of the default list where the file has none.
    assert load_config(None, ["rewards.0.weight=2"]).rewards[0].name == "caption_match"


def test_a_mapping_on_the_command_line_is_laid_over_the_section(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {height: 64, width: 64}\n")
    config = load_config(path, ["model={height: 128}", "logging.wandb={project: x}", "logging.wandb.name=y"])
    assert (config.model.height, config.model.width) == (128, 64)
    assert config.logging.wandb == {"project": "x", "name": "y"}


def test_an_override_may_hold_equals_signs_and_be_quoted() -> None:
    assert load_config(None, ["output_dir=a=b"]).output_dir == "a=b"
    assert load_config(None, ['output_dir="2024"']).output_dir == "2024"


@pytest.mark.parametrize(
    "text",
    ["bad hands #ugly", "#ugly", "low quality: bad", "photo, 50% off: now #1", "&a b", "! x", "- x", "a:", "don't #x"],
)
def test_a_text_on_the_command_line_stays_as_it_is(text: str) -> None:
    config = load_config(None, [f"model.negative_prompt={text}", "model.cfg_scale=2"])
    assert config.model.negative_prompt == text


@pytest.mark.parametrize("value", ["'a' # b", "[1, 2] # c", "{a: 1} # c"])
def test_nothing_follows_a_bracket_or_a_quote(value: str) -> None:
    with pytest.raises(UserError, match=r"unexpected text after it: '# .'"):
        load_config(None, [f"rewards.0.options.a={value}"])


def test_the_home_folder_wherever_a_path_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "output_dir: ~/run\nmodel: {path: ~/model, finetune: lora, lora: {init: ~/style}}\n")
    settings = ("prompts.train=~/p", "prompts.heldout=~/h", "deepspeed=~/ds.json", "model.embedding_cache=~/cache")
    config = load_config("~/run.yaml", settings)
    found = (config.output_dir, config.model.path, config.model.lora.init, config.model.embedding_cache)
    found += (config.prompts.train, config.prompts.heldout, config.deepspeed)
    assert found == tuple(str(tmp_path / name) for name in ("run", "model", "style", "cache", "p", "h", "ds.json"))
    assert load_config(None, ["prompts.train=a~b"]).prompts.train == "a~b"


# Writing and reading back


@pytest.mark.parametrize("algorithm", PRESETS)
def test_what_is_written_reads_back_equal(algorithm: str, tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            f"algorithm={algorithm}",
            "optimizer.lr=1.2345678901234567e-7",
            "model.path=owner/name",
            'model.revision="1e10"',  # a text that looks like a number: a commit may be called so
            'output_dir="runs/ünïcode: #1"',
            "rewards=[{name: 'm:f', options: {a: [1, 2.5, null, true, '3', {b: c}]}}]",
            "credit.steps=[0,2]",
            "logging.wandb={project: 'null'}",
        ],
    )
    path = write(tmp_path, dump_config(config))
    assert load_config(path) == config
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["revision"] == "1e10"


def test_every_value_is_written_out() -> None:
    def keys(value: Any) -> set[str]:
        return {f"{k}.{n}" for k, v in value.items() if isinstance(v, dict) for n in keys(v) | {""}} | set(value)

    assert keys(yaml.safe_load(dump_config(load_config(None)))) >= keys(Config().model_dump(mode="json"))


# Mistakes, each with its place


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # unknown keys, with the nearest one
        ("model:\n  path: x\n  hieght: 32\n", "run.yaml line 3: unknown key model.hieght, did you mean model.height?"),
        ("modle:\n  path: x\n", "run.yaml line 1: unknown key modle, did you mean model?"),
        ("seed: 1\nlr: 1e-4\n", "run.yaml line 2: unknown key lr, did you mean optimizer.lr?"),
        (
            "model:\n  lora: {ranks: 2}\n",
            "run.yaml line 2: unknown key model.lora.ranks, did you mean model.lora.rank?",
        ),
        (
            "rewards:\n- name: a\n- name: b\n  wieght: 1\n",
            "run.yaml line 4: unknown key rewards.1.wieght, did you mean rewards.1.weight?",
        ),
        ("checkpoint:\n  xyz: 1\n", "run.yaml line 2: unknown key checkpoint.xyz; checkpoint takes every, keep"),
        ("train.epochs: 3\n", "run.yaml line 1: unknown key train.epochs"),
        ("1: 2\n", "run.yaml line 1: 1: a key must be a string"),
        # wrong types
        ("train: {epochs: ten}\n", "run.yaml line 1: train.epochs: must be an integer, got 'ten'"),
        ("train: {epochs: 2.5}\n", "train.epochs: must be an integer, got 2.5"),
        (
            "seed: 0123\n",
            "run.yaml line 1: seed: must be an integer, got '0123'; digits alone, without a leading zero, colons "
            "or underscores",
        ),
        ("train: {epochs: 1:30}\n", "train.epochs: must be an integer, got '1:30'; digits alone"),
        ("optimizer: {lr: 1_0.5}\n", "optimizer.lr: must be a number, got '1_0.5'; digits alone"),
        ("credit: {steps: [0_1]}\n", "credit.steps.0: must be an integer, got '0_1'; digits alone"),
        ("train: {epochs: true}\n", "train.epochs: must be an integer, got true"),
        ("train: {epochs:}\n", "train.epochs: must be an integer, got null"),
        ("optimizer:\n  lr: fast\n", "run.yaml line 2: optimizer.lr: must be a number, got 'fast'"),
        ("optimizer: {lr: false}\n", "optimizer.lr: must be a number, got false"),
        ("logging: {tensorboard: 1}\n", "logging.tensorboard: must be true or false, got 1"),
        ("output_dir: 2024\n", "output_dir: must be a string, got 2024; put it in quotes"),
        ("deepspeed: {zero: 1}\n", "deepspeed: must be a string, got {'zero': 1}"),
        ("credit: {steps: 3}\n", "credit.steps: must be a list, got 3"),
        ("credit:\n  steps:\n  - 0\n  - x\n", "run.yaml line 4: credit.steps.1: must be an integer, got 'x'"),
        ("model: 3\n", "model: must be a section (keys with values), got 3"),
        (
            "rewards: caption_match\n",
            "rewards: must be a list, got 'caption_match'; a reward is written {name: NAME}, several [{name: NAME},",
        ),
        ("rewards: [caption_match]\n", "rewards.0: must be a section (keys with values), got 'caption_match'"),
        ("rewards:\n- name: a\n- weight: 2\n", "run.yaml line 3: rewards.1.name is missing"),
        ("rewards: [{name: a, options: {day: 2024-01-02}}]\n", "rewards.0.options.day: must be made of strings"),
        ("logging: {wandb: true}\n", "logging.wandb: must be a mapping (keys with values), got true"),
        # out of range
        ("seed: -1\n", "seed: must be at least 0, got -1"),
        ("seed: 9223372036854775808\n", "seed: must be below 9223372036854775808"),
        ("sampler:\n  steps: 1\n", "run.yaml line 2: sampler.steps: must be at least 2, got 1"),
        ("optimizer: {lr: 0}\n", "optimizer.lr: must be above 0"),
        ("optimizer: {lr: .inf}\n", "optimizer.lr: must be a finite number, got inf"),
        ("optimizer: {lr: .nan}\n", "optimizer.lr: must be a finite number, got nan"),
        ("optimizer: {betas: [0.9, 1]}\n", "optimizer.betas.1: must be below 1"),
        ("optimizer: {betas: [0.9]}\n", "optimizer.betas.1 is missing"),
        ("optimizer: {betas: [0.9, 0.9, 0.9]}\n", "optimizer.betas: must have at most 2 values"),
        ("credit: {fraction: 1.1}\n", "credit.fraction: must be at most 1"),
        ("model: {max_sequence_length: 513}\n", "model.max_sequence_length: must be at most 512"),
        ("model: {path: ''}\n", "model.path: must not be empty, got ''"),
        ("model: {lora: {targets: []}}\n", "model.lora.targets: must have at least 1 values, got []"),
        # choices
        (
            "credit: {rule: propotionate}\n",
            "credit.rule: must be one of native, proportionate, uniform, pcpo_ratio, tempflow, grpo_guard, fair_clip, "
            "cps_published, got 'propotionate', did you mean proportionate?",
        ),
        ("model: {dtype: fp16}\n", "model.dtype: must be one of float32, bfloat16, got 'fp16'"),
        (
            "model: {gradient_checkpointing: selectiv}\n",
            "run.yaml line 1: model.gradient_checkpointing: must be one of true, false, selective, got 'selectiv', did "
            "you mean selective?",
        ),
        (
            "algorithm: dance_grpo\n",
            f"run.yaml line 1: algorithm: must be one of {', '.join(PRESETS)}, got 'dance_grpo', "
            "did you mean dancegrpo?",
        ),
        ("algorithm: mix_grpo\n", "got 'mix_grpo', did you mean mixgrpo?"),
        ("algorithm: [pcpo]\n", f"algorithm: must be one of {', '.join(PRESETS)}, got ['pcpo']"),
        # values that do not go together
        ("rollout:\n  images_per_prompt: 1\n", "run.yaml line 2: rollout.images_per_prompt: group advantages compare"),
        (
            "train:\n  updates_per_epoch: 7\n",
            "run.yaml line 2: train.updates_per_epoch: 96 images per epoch (rollout.prompts_per_epoch x "
            "images_per_prompt) cannot be divided into 7 equal updates",
        ),
        ("optimizer: {weights: stochastic_rounding}\n", "stochastic_rounding needs model.dtype=bfloat16"),
        ("rewards: []\n", "rewards: at least one must have a weight other than 0"),
        ("rewards: [{name: a, evaluation_only: true}]\n", "rewards: at least one must have a weight other than 0"),
        ("rewards: [{name: a, weight: 0}]\n", "rewards: at least one must have a weight other than 0"),
        ("rewards: [{name: a}, {name: a}]\n", "rewards: a is listed twice"),
    ],
)
def test_a_wrong_value_is_named_with_file_line_key_and_what_is_allowed(
    text: str, expected: str, tmp_path: Path
) -> None:
    message = complaint(tmp_path, text)
    assert message.startswith("run.yaml")
    assert expected in message
    assert "more after this one" not in message


def test_further_mistakes_are_counted(tmp_path: Path) -> None:
    message = complaint(tmp_path, "seed: -1\ntrain: {epochs: x}\nmodle: 1\n")
    assert message.startswith("run.yaml line 1: seed: must be at least 0")
    assert message.endswith("(2 more after this one)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nmodel: {}\nseed: 2\n", "run.yaml line 3: seed is given twice (first on line 1)"),
        ("model:\n  path: a\n  path: b\n", "run.yaml line 3: path is given twice (first on line 2)"),
        ("rewards:\n- name: a\n  name: b\n", "run.yaml line 3: name is given twice (first on line 2)"),
        ("model: [1\n", "run.yaml line 2: not valid YAML"),
        ("seed: 1\n\tmodel: 1\n", "run.yaml line 2: not valid YAML"),
        ("a: 'open\n", "not valid YAML"),
        ("model: !!python/object:os.system {}\n", "run.yaml line 1: not valid YAML: could not determine a constructor"),
        ("? [a]\n: 1\n", "run.yaml line 1: not valid YAML: found unhashable key"),
        ("seed: 1\n---\nseed: 2\n", "not valid YAML"),
        ("output_dir: 2024-13-45\n", "run.yaml: not valid YAML: month must be in 1..12"),
        ("\x00", "run.yaml: not valid YAML: unacceptable character"),
        ("[" * 3000, "run.yaml: not valid YAML: brackets nested too deep"),
        ("- seed\n", "run.yaml line 1: a configuration must be a mapping of keys, got a list"),
        ("seed\n", "run.yaml line 1: a configuration must be a mapping of keys, got a str"),
        (b"seed: 1\noutput_dir: caf\xe9\n", "config file run.yaml line 2 is not UTF-8 text; save it as UTF-8"),
        ("model: &x\n  lora: *x\n", "model.lora"),
    ],
)
def test_a_file_that_is_no_configuration(text: str | bytes, expected: str, tmp_path: Path) -> None:
    assert expected in complaint(tmp_path, text)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config file .*none\.yaml does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a folder; name a YAML file in it"):
        load_config(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "file" / "run.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("epochs", "command line (epochs): an override must have the form key.subkey=value"),
        ("mine.yaml", "key.subkey=value; a configuration is given as --config mine.yaml"),
        ("flux_dev_pcpo", "key.subkey=value; a configuration is given as --config flux_dev_pcpo"),
        ("=3", "command line (=3): an override must have the form key.subkey=value"),
        ("train..epochs=3", "an override must have the form key.subkey=value"),
        ("--epochs=3", "an override must have the form key.subkey=value"),
        ("output_dir=[a", "command line (output_dir=[a): '[a' is not a valid YAML value"),
        ("model={height: 1, height: 2}", "height is given twice"),
        ("epochs=3", "command line (epochs=3): unknown key epochs, did you mean train.epochs?"),
        ("train.epochs=x", "command line (train.epochs=x): train.epochs: must be an integer, got 'x'"),
        ("train.epochs=", "command line (train.epochs=): train.epochs: must be an integer, got null"),
        ("model.path.x=1", "command line (model.path.x=1): model.path is a value, not a section"),
        ("output_dir.x=1", "command line (output_dir.x=1): output_dir: must be a string, got {'x': 1}"),
        ("rewards.1.weight=2", "command line (rewards.1.weight=2): rewards is a list of 1; positions count from 0"),
        ("rewards.x.weight=2", "rewards is a list of 1; positions count from 0"),
        ("rewards.0.weight=heavy", "command line (rewards.0.weight=heavy): rewards.0.weight: must be a number"),
        ("rewards=[{name: b, foo: 1}]", "command line (rewards=[{name: b, foo: 1}]): unknown key rewards.0.foo"),
        ("algorithm=ppo", "command line (algorithm=ppo): algorithm: must be one of"),
        ("rollout.images_per_prompt=1", "command line (rollout.images_per_prompt=1): rollout.images_per_prompt: group"),
    ],
)
def test_a_wrong_override_is_quoted(override: str, expected: str, tmp_path: Path) -> None:
    assert expected in complaint(tmp_path, "model: {path: a}\nrewards:\n- name: a\n  weight: 1\n", override)


@pytest.mark.parametrize(
    ("text", "overrides", "place"),
    [
        (
            "rollout:\n  prompts_per_epoch: 4\n",
            ("rollout.candidates=48", "advantage.steps=gain", "advantage.gain_lambda_rise=0.5"),
            "command line (rollout.candidates=48): rollout.candidates are chosen by",
        ),
        (
            "rollout:\n  candidates: 48\nadvantage:\n  steps: gain\n",
            ("advantage.gain_lambda_rise=0.5",),
            "command line (advantage.gain_lambda_rise=0.5): rollout.candidates are chosen by",
        ),
        ("rollout:\n  seed: 1\n", (), "run.yaml line 2: unknown key rollout.seed"),
        ("rollout:\n  candidates: 8\n", (), "run.yaml line 2: rollout.candidates: 8 leave nothing to choose"),
        (
            "rewards:\n- name: a\n",
            ("rewards.0.weight=0",),
            "command line (rewards.0.weight=0): rewards: at least one must have a weight",
        ),
    ],
)
def test_a_conflict_is_where_the_command_line_made_it(
    text: str, overrides: tuple[str, ...], place: str, tmp_path: Path
) -> None:
    assert place in complaint(tmp_path, text, *overrides)


# What is shipped


def schedule_of(config: Config) -> Schedule:
    """What the configured model says of its times."""
    if config.sampler.name == "ddim":
        return DiffusionSchedule(stable_diffusion_alphas(), ddim_timesteps(config.sampler.steps))
    return FlowSchedule(shifted_times(config.sampler.steps, 3.0))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configurations_are_valid_and_can_be_run(path: Path) -> None:
    config = load_config(path)
    tables = RunTables(config, schedule_of(config), torch.device("cpu"))
    ranks = 1 if path.name.startswith("tiny") else 8
    assert pairs_per_update(config, tables.trained_count, ranks) >= 1
    assert len(tables.at(0).steps) == tables.trained_count


def test_the_published_configurations_exist() -> None:
    assert {"tiny_flux.yaml", *(f"{name}.yaml" for name in FLUX)} <= {path.name for path in SHIPPED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_its_preset_and_more(name: str) -> None:
    """Nothing that the preset names may silently differ in the file: a difference is a deviation, to be listed here."""
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    preset = load_config(None, [f"algorithm={config.algorithm}"])
    different = {
        f"{section}.{key}"
        for section, values in PRESETS[config.algorithm].items()
        for key in values
        if getattr(getattr(config, section), key) != getattr(getattr(preset, section), key)
    }
    deviations = {
        "sd15": {"advantage.buffer_size"},
        "flux2_klein_base_pcpo_stepwise": {"sampler.steps", "sampler.noise"},
        "flux2": {"advantage.normalization", "credit.kl_coefficient", "sampler.steps"},
    }
    assert different == deviations.get(name, deviations.get(name.partition("_")[0], set()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_value_has_its_source_behind_it(name: str) -> None:
    lines = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    start = lines.index("sampler:")
    values = [line for line in lines[start:] if re.match(r"\s+\w+: \S", line)]
    assert len(values) > 20
    assert [line for line in values if "#" not in line] == []
    used = set(re.findall(r"# (\[\S\])", "\n".join(lines)))
    explained = set(re.findall(r"^#   (\[\S\]) ", "\n".join(lines), re.MULTILINE))
    assert used == explained, "every mark is used and explained"


@pytest.mark.parametrize(
    ("name", "model", "images", "sampler", "lr", "scale"),
    [
        ("sd15_ddpo", "stable-diffusion-v1-5/stable-diffusion-v1-5", (256, 1, 2), ("ddim", 50, 1.0), 3e-4, 5.0),
        ("sd15_pcpo", "stable-diffusion-v1-5/stable-diffusion-v1-5", (256, 1, 2), ("ddim", 50, 1.0), 3e-4, 5.0),
        ("sd14_dancegrpo", "CompVis/stable-diffusion-v1-4", (32, 16, 2), ("ddim", 50, 1.0), 1e-5, 5.0),
        ("sd14_pcpo", "CompVis/stable-diffusion-v1-4", (32, 16, 2), ("ddim", 50, 1.0), 1e-5, 5.0),
        ("sd35_medium_flow_grpo", SD35, (48, 24, 2), ("flow", 10, 0.7), 3e-4, 4.5),
        ("sd35_medium_pcpo", SD35, (48, 24, 2), ("flow", 10, 0.7), 3e-4, 4.5),
        ("sd35_medium_grpo_guard", SD35, (48, 24, 2), ("flow", 10, 0.7), 1e-4, 4.5),
        ("sd35_medium_flow_grpo_fast", SD35, (48, 24, 2), ("cps", 10, 0.8), 3e-4, 1.0),
        ("flux2_klein_base_flow_grpo", KLEIN, (48, 16, 2), ("flow", 8, 0.7), 3e-4, 4.0),
        ("flux2_klein_base_pcpo", KLEIN, (48, 16, 2), ("flow", 8, 0.7), 3e-4, 4.0),
        ("flux_dev_mixgrpo", "black-forest-labs/FLUX.1-dev", (32, 12, 4), ("flow", 25, 0.7), 1e-5, 1.0),
    ],
)
def test_numbers_of_the_other_published_runs(
    name: str, model: str, images: tuple[int, int, int], sampler: tuple[str, int, float], lr: float, scale: float
) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert (config.model.path, config.model.cfg_scale) == (model, scale)
    rollout = config.rollout
    assert (rollout.prompts_per_epoch, rollout.images_per_prompt, config.train.updates_per_epoch) == images
    assert (config.sampler.name, config.sampler.steps, config.sampler.noise) == sampler
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.weight_decay) == (lr, (0.9, 0.999), 1e-4)
    assert (config.optimizer.max_grad_norm, config.advantage.clip, config.train.inner_epochs) == (1.0, 5.0, 1)
    if name.endswith("pcpo") and config.sampler.name == "ddim":
        assert (config.sampler.variance, config.sampler.weight, config.credit.rule) == ("reshaped", 4.5, "uniform")


@pytest.mark.parametrize("name", FLUX)
def test_published_numbers(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert (config.model.path, config.model.dtype) == ("black-forest-labs/FLUX.1-dev", "bfloat16")
    assert (config.model.height, config.model.width, config.model.guidance) == (720, 720, 3.5)
    assert config.model.gradient_checkpointing
    sampler = config.sampler
    assert (sampler.name, sampler.steps, sampler.noise, sampler.shift, sampler.grid) == (
        "dance",
        16,
        0.3,
        3.0,
        "shifted",
    )
    assert (config.rollout.images_per_prompt, config.rollout.prompts_per_epoch % 2) == (12, 0)
    assert config.rollout.same_initial_noise
    assert (config.train.updates_per_epoch, config.train.inner_epochs) == (2, 1)
    assert (config.credit.clip_range, config.credit.fraction, config.credit.kl_coefficient) == (1e-4, 0.6, 0.0)
    assert not config.credit.train_last_step
    assert (config.advantage.normalization, config.advantage.clip) == ("group", 5.0)
    assert config.advantage.unbiased
    assert (config.optimizer.betas, config.optimizer.weight_decay) == ((0.9, 0.999), 1e-4)
    assert config.optimizer.max_grad_norm == 1.0
    lora = name.endswith("lora")
    assert (config.model.finetune, config.optimizer.lr) == (("lora", 3e-4) if lora else ("full", 1e-5))
    if lora:
        assert (config.model.lora.rank, config.model.lora.alpha) == (128, 256.0)
    method = ("native", "clip") if name.endswith("dancegrpo") else ("proportionate", "hinge")
    assert (config.credit.rule, config.credit.objective) == method
    assert build_credit(config, build_transitions(sampler)).zeta == pytest.approx(13.343190914766362, rel=1e-12)


def test_the_demo_is_the_shipped_pipeline() -> None:
    config = load_config(ROOT / "configs" / "tiny_flux.yaml")
    for path in (config.model.path, config.prompts.train, config.prompts.heldout):
        assert path is not None
        assert (ROOT / path).exists()
    assert config.output_dir == "runs/demo"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str) -> None:
    config = load_config(None, [f"algorithm={name}"])
    for section, values in PRESETS[name].items():
        assert getattr(config, section).model_dump().items() >= values.items()


def test_dtypes_are_those_of_the_code() -> None:
    assert get_args(ModelConfig.model_fields["dtype"].annotation) == tuple(DTYPES)


def test_values_cannot_be_changed_after_loading() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(None).train.epochs = 3  # type: ignore[misc]


# The document


def test_the_reference_document_is_up_to_date() -> None:
    committed = (ROOT / docs.DOCUMENT).read_text(encoding="utf-8")
    assert committed == docs.render(), f"run: {docs.COMMAND}"


def test_the_reference_document_has_every_key_with_a_description() -> None:
    text = docs.render()

    def check(model: Any, above: str) -> None:
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                check(field.annotation, f"{above}{name}.")
            else:
                row = next(line for line in text.splitlines() if line.startswith(f"| `{above}{name}` |"))
                assert field.description, f"{above}{name} has no description"
                assert field.description in row

    check(Config, "")


def test_the_document_is_written_where_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / docs.ALGORITHMS).write_text("before\n\n| `sampler.name` | |\n|---|---|\n| old | |\n\nafter\n")
    docs.main()
    assert (tmp_path / docs.DOCUMENT).read_text(encoding="utf-8") == docs.render()
    table = (tmp_path / docs.ALGORITHMS).read_text(encoding="utf-8")
    assert "| `dance` | DanceGRPO [3] |" in table and "| old |" not in table and table.endswith("\n\nafter\n")
