"""Settings without an effect are refused, wherever they are set; what a run has written of itself always loads."""

import re
from pathlib import Path
from typing import Any

import pytest

from pcpo_fast.config.dotted_keys import flattened
from pcpo_fast.config.loading import dump_config, load_config
from pcpo_fast.config.schema import Config
from pcpo_fast.config.unused_settings import RULES
from pcpo_fast.config.yaml_text import dump_yaml
from pcpo_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def refusal(path: Path | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


START = ("model.finetune=lora", "model.lora.init=/nowhere/style.safetensors")
RECOMPUTED = "model.gradient_checkpointing true or selective"
# One member of each rule: the setting alone, what makes it count, and the words for that.
IN_VAIN: list[tuple[str, tuple[str, ...], str]] = [
    ("model.lora.init=/nowhere/style.safetensors", ("model.finetune=lora",), "model.finetune=lora"),
    ("model.lora.rank=8", ("model.finetune=lora",), "model.finetune=lora"),
    ("model.negative_prompt=bad hands #ugly", ("model.cfg_scale=2",), "a model.cfg_scale other than 1"),
    ("model.checkpointed_share=0.5", ("model.gradient_checkpointing=true",), RECOMPUTED),
    ("model.checkpointed_share=null", ("model.gradient_checkpointing=selective",), RECOMPUTED),
    ("sampler.grid=scheduler", ("sampler.name=flow",), "sampler.name dance, flow or cps"),
    ("sampler.shift=2", ("sampler.name=cps",), "sampler.name dance, flow or cps"),
    ("window.start=1", ("window.size=2",), "window.size above 0"),
    ("window.schedule=random", ("window.size=2",), "window.size above 0"),
    ("credit.divergence_threshold=1e-4", ("credit.objective=divergence_mask",), "credit.objective=divergence_mask"),
    ("credit.kl=published", ("credit.kl_coefficient=0.1",), "credit.kl_coefficient above 0"),
    ("credit.kl_reference=start", (*START, "credit.kl_coefficient=0.1"), "credit.kl_coefficient above 0"),
    ("credit.normalize_scale=true", ("credit.rule=fair_clip",), "credit.rule grpo_guard or fair_clip"),
    ("advantage.buffer_size=20", ("advantage.normalization=running",), "advantage.normalization=running"),
    ("advantage.scored_steps=2", ("advantage.steps=baseline",), "advantage.steps baseline or gain"),
    ("advantage.control=permuted", ("advantage.steps=gain",), "advantage.steps baseline or gain"),
    (
        "advantage.min_spread=0.5",
        ("advantage.scale=others",),
        "advantage.steps baseline or gain, or advantage.scale others or earlier",
    ),
    ("advantage.gain_lambda=0.5", ("advantage.steps=gain",), "advantage.steps=gain"),
    (
        "advantage.gain_lambda_rise=0.25",
        ("advantage.steps=gain",),
        "advantage.steps=gain, a gain_lambda below 1, held-out prompts and evaluation.every above 0",
    ),
    ("train.max_log_ratio=0.1", ("train.inner_epochs=2",), "train.inner_epochs above 1"),
]


@pytest.mark.parametrize(("setting", "needed", "condition"), IN_VAIN)
def test_a_setting_without_an_effect_is_refused_and_taken_where_it_has_one(
    setting: str, needed: tuple[str, ...], condition: str
) -> None:
    base = ("sampler.name=ddim",) if setting.startswith("sampler.") else ()
    key = setting.partition("=")[0]
    expected = f"command line ({setting}): {key} only takes effect with {condition}: remove it"
    assert refusal(None, *base, setting) == expected
    assert load_config(None, (*base, *needed, setting)) != load_config(None, (*base, *needed))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("sampler.name=flow", "sampler.grid=scheduler", "sampler.shift=2"), "sampler.shift .* sampler.grid=shifted"),
        (
            ("advantage.steps=baseline", "advantage.gain_lambda=0.5"),
            "advantage.gain_lambda .* advantage.steps=gain",
        ),
        (
            ("advantage.steps=gain", "advantage.gain_lambda=1", "advantage.gain_lambda_rise=0.5"),
            "advantage.gain_lambda_rise .* a gain_lambda below 1",
        ),
        (
            ("advantage.steps=gain", "evaluation.every=0", "advantage.gain_lambda_rise=0.5"),
            "advantage.gain_lambda_rise .* evaluation.every above 0",
        ),
        (
            ("advantage.steps=gain", "advantage.audit_images=2"),
            "advantage.audit_images .* advantage.audit_every above 0",
        ),
        (
            ("window.size=2", "window.schedule=fixed", "window.wrap=false"),
            r"window\.wrap .* window\.schedule=progressive",
        ),
        (("window.size=2", "window.schedule=fixed", "window.interval=3"), "window.interval .* progressive or random"),
        (
            ("credit.kl_coefficient=0.1", "credit.kl_reference=start"),
            r"credit\.kl_reference .* with model\.lora\.init:",
        ),
        (("rollout.candidate_weights=full",), "candidate_weights .* rollout.candidates"),
        (
            ("advantage.normalization=global", "rollout.images_per_prompt=1", "rollout.share_first_steps=true"),
            "rollout.share_first_steps .* rollout.images_per_prompt above 1",
        ),
        (("window.size=2", "window.decay_after=3"), "window.decay_after .* window.decay above 0"),
        (("credit.steps=[0, 1]", "credit.train_last_step=true"), "train_last_step .* credit.steps=null"),
        (("credit.rule=native", "credit.normalize_over=trained"), "credit.normalize_over .* pcpo_ratio"),
        (
            ("advantage.normalization=running", "advantage.unbiased=true"),
            "advantage.unbiased only takes effect with an advantage.normalization other than running",
        ),
        (("prompts.heldout=null", "evaluation.every=3"), "evaluation.every .* held-out prompts"),
        (("credit.objective=divergence_mask", "credit.clip_range=0.1"), "clip_range .* credit.objective hinge or clip"),
        (("evaluation.every=0", "checkpoint.keep_best=2"), "keep_best .* evaluation.every and checkpoint.every"),
        (("model.path=.", "model.revision=main"), "model.revision .* hub id"),
        (("prompts.train=a.txt", "prompts.heldout=b.txt", "prompts.column=c"), "prompts.column .* columns or keys"),
        (
            ("rewards=[{name: a}, {name: b, evaluation_only: true, clip: [0, 1]}]",),
            r"rewards\.1\.clip only takes .*only=false",
        ),
        (
            ("rewards=[{name: a}, {name: b, evaluation_only: true, weight: 2}]",),
            r"rewards\.1\.weight only takes .*only=false",
        ),
    ],
)
def test_conditions_that_lie_among_other_settings(overrides: tuple[str, ...], expected: str) -> None:
    assert re.search(expected, refusal(None, *overrides))


def test_every_rule_has_a_test() -> None:
    tried = [setting.partition("=")[0] for setting, _, _ in IN_VAIN]
    tried += ["window.wrap", "window.interval", "window.decay_after", "credit.train_last_step", "credit.normalize_over"]
    tried += [
        "advantage.audit_images",
        "advantage.unbiased",
        "credit.clip_range",
        "evaluation.every",
        "checkpoint.keep_best",
        "model.revision",
        "prompts.column",
        "rollout.candidate_weights",
        "rollout.share_first_steps",
    ]
    assert [rule for rule in RULES if not any(rule.concerns(key) for key in tried)] == []
    known = dict(flattened(Config().model_dump(mode="json")))
    for rule in RULES:
        assert all(key in known or any(name.startswith(f"{key}.") for name in known) for key in rule.keys)
        assert rule.switch is None or rule.switch in known


def test_all_of_them_are_named_in_one_sentence_with_their_places(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  lora:\n    rank: 8\n    alpha: 16\nwindow: {start: 2}\n")
    message = refusal(file, "credit.kl=published")
    assert message == (
        f"{file} line 3: model.lora.rank and model.lora.alpha (line 4) only take effect with model.finetune=lora; "
        "window.start (line 5) only takes effect with window.size above 0; credit.kl only takes effect with "
        "credit.kl_coefficient above 0: remove them"
    )


def test_a_shipped_configuration_made_full_names_the_keys_to_drop() -> None:
    file = ROOT / "configs" / "flux_dev_pcpo_lora.yaml"
    message = refusal(file, "model.finetune=full")
    assert message.endswith("only take effect with model.finetune=lora: remove them")
    assert "model.lora.rank and model.lora.alpha (line" in message


def test_what_the_command_line_turns_off_takes_the_details_of_the_file_along() -> None:
    for name, switch in (
        ("tiny_flux", "prompts.heldout=null"),
        ("flux_dev_mixgrpo", "window.size=0"),
        ("sd35_medium_flow_grpo", "credit.kl_coefficient=0"),
        ("flux_dev_pcpo_lora", "model.gradient_checkpointing=false"),
    ):
        load_config(ROOT / "configs" / f"{name}.yaml", (switch,))
    refusal(ROOT / "configs" / "tiny_flux.yaml", "prompts.heldout=null", "evaluation.prompts=3")


def test_values_that_change_nothing_are_no_mistake(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {lora: {rank: 32}, negative_prompt: ''}\nalgorithm: grpo_guard\ncredit: {kl: published}\n")
    assert load_config(file).credit.kl == "published"  # as the preset has it, though its KL is off


def test_a_runs_own_file_always_loads(tmp_path: Path) -> None:
    """It was written by this version, or by one that took what has no effect."""
    config = Config.model_validate(
        {"model": {"lora": {"rank": 8}, "negative_prompt": "x", "guidance": 2.0}, "window": {"start": 3}}
    )
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    again = load_config(file)
    assert again == config and not again.model.model_fields_set
    assert "model.lora.alpha only takes effect" in refusal(file, "model.lora.alpha=3")
    older: dict[str, Any] = config.model_dump(mode="json")  # of a version without these
    del older["scoring"], older["distributed"], older["model"]["checkpointed_share"], older["window"]
    file.write_text(dump_yaml(older))
    assert load_config(file).model.lora.rank == 8
