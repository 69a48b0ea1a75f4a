"""Host memory and disk space of a plan, as sums by hand; tests/engine/test_host_memory.py has DeepSpeed's part."""

import contextlib
import re
from pathlib import Path

import pytest
from cli_runs import call

from pcpo_fast.config.loading import load_config
from pcpo_fast.config.schema import Config
from pcpo_fast.engine.engine import deepspeed_config
from pcpo_fast.errors import UserError
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.disk import checkpoint_count, encoded_prompts, plan_disk, prompt_bytes
from pcpo_fast.planning.host import PROCESS, SUB_GROUP, optimizer_on_host, pinned, plan_host
from pcpo_fast.planning.models import find_architecture
from pcpo_fast.planning.run_plan import make_plan
from pcpo_fast.planning.states import SHIPPED, Zero, usual_stages
from pcpo_fast.policies.families import find_family

ROOT = Path(__file__).resolve().parents[2]
NETWORK, VAE, ENCODERS = 1_062_944, 237_123, 41_920 + 42_336  # parameters of tiny FLUX


def tiny(*overrides: str) -> Config:
    return load_config(ROOT / "configs/tiny_flux.yaml", [f"model.path={ROOT / 'assets/tiny-flux'}", *overrides])


def costs_of(config: Config) -> ModelCosts:
    return ModelCosts(find_architecture(config.model), config.model)


def test_page_locked_memory_comes_in_powers_of_two() -> None:
    assert [pinned(size) for size in (0, 1, 4096, 4097, 47.6e9)] == [0, 1, 4096, 8192, 2**36]


def test_weights_that_are_stored_as_they_are_used_are_mapped_from_their_files() -> None:
    """The judge is the system's list of what is mapped where."""
    config = tiny("model.dtype=float32")
    folder, family = find_family(config.model)
    for dtype in ("float32", "bfloat16"):
        settings = config.model.model_copy(update={"dtype": dtype})
        pipeline = family.load_pipeline(folder, settings, ("transformer", "vae", "text_encoder_2"))
        mapped = set()
        for name in ("transformer", "vae", "text_encoder_2"):
            place = next(getattr(pipeline, name).parameters()).data_ptr()
            for line in Path("/proc/self/maps").read_text().splitlines():
                first, last = (int(end, 16) for end in line.split()[0].split("-"))
                if first <= place < last and line.endswith(".safetensors"):
                    mapped.add(name)
        counted = costs_of(config.model_copy(update={"model": settings})).model.mapped_parts
        assert mapped == counted & {"transformer", "vae", "text_encoder_2"}
        assert len(mapped) == (3 if dtype == "float32" else 0)


def test_host_memory_of_eight_ranks_in_two_machines() -> None:
    """bf16 while the files are float32: four ranks of a machine hold a copy each."""
    config = tiny("model.dtype=bfloat16", "train.ema_decay=0.9")
    costs = costs_of(config)
    whole, ranks = 2 * NETWORK, 4
    plan = plan_host(config, costs, Zero(2, offload_optimizer=True), 8, nodes=2)
    assert plan.phases["encode prompts"] == ranks * (PROCESS + whole + 2 * VAE + 2 * ENCODERS)
    assert plan.phases["load"] == ranks * PROCESS
    share = NETWORK / 8  # master, gradient, new weights, moments, average
    standing = ranks * (PROCESS + share * (4 + 4 + 2 + 8 + 4))
    row = plan.parts["embeddings"]
    assert row == ranks * 32 * prompt_bytes(config, costs)  # the held-out prompts, of which there are more
    assert plan.phases["train"] == pytest.approx(standing + row)
    assert plan.phases["save"] == pytest.approx(standing + ranks * 4 * share + whole)  # the average, and the weights
    assert plan.phases["resume"] == pytest.approx(standing + ranks * whole)
    divided = plan_host(config, costs, Zero(3), 8, nodes=2)
    assert divided.phases["load"] == ranks * (PROCESS + whole)
    assert divided.phases["resume"] == pytest.approx(ranks * (PROCESS + 12 * share))


def test_what_stays_on_the_host_because_it_is_asked_to() -> None:
    lora = ("model.finetune=lora", "model.lora.rank=4", "model.lora.alpha=8")
    config = tiny("model.dtype=float32", "model.encode_on=cpu", "rollout.offload_optimizer=true")
    costs = costs_of(config)
    plan = plan_host(config, costs, Zero(1), 2)
    assert plan.parts["network"] == plan.parts["vae"] == 0  # mapped
    assert plan.parts["text encoders"] == 4 * ENCODERS  # once for both ranks, which read the same pages
    share = 4 * NETWORK / 2
    assert plan.parts["offloaded optimizer"] == 2 * 3 * pinned(share)  # master weights and both moments
    merging = tiny("rollout.merge_lora=true", *lora)
    adapted = [layer.base_layer.weight for layer in costs_of(merging).model.policy.module.modules()
               if hasattr(layer, "base_layer")]  # fmt: skip
    kept = plan_host(merging, costs_of(merging), Zero(1), 1).parts["unmerged weights"]
    assert kept == sum(pinned(4 * weight.numel()) for weight in adapted) > 0


def test_weights_in_host_memory_are_page_locked_one_by_one() -> None:
    config = tiny("model.dtype=bfloat16")
    costs = costs_of(config)
    sizes = [2 * -(-p.numel() // 2) for p in costs.model.policy.module.parameters()]  # of a rank's half
    weights = plan_host(config, costs, SHIPPED["zero3_offload"], 2).parts["offloaded weights"]
    assert weights == 2 * (sum(map(pinned, sizes)) + pinned(NETWORK))
    # A large model's gradients are in groups, and once more in one piece.
    offloaded, step = optimizer_on_host(config, SHIPPED["zero3_offload"], 2.5e9)
    groups = 2 * pinned(4 * SUB_GROUP) + pinned(2e9)
    assert (offloaded, step) == (2.5e9 * 12 + groups + pinned(1e10), 0)


def test_rewards_wait_for_their_first_images_in_host_memory() -> None:
    config = tiny("rewards=[{name: pickscore, options: {device: cpu}}, {name: hpsv2}]")
    plan = plan_host(config, costs_of(config), Zero(1), 1)
    gpu = plan.parts["reward models"] - (plan.phases["train"] - PROCESS - plan.parts["embeddings"])
    assert plan.phases["encode prompts"] - PROCESS == pytest.approx(plan.parts["reward models"])
    assert gpu == pytest.approx(3.94e9, rel=0.01) and plan.phases["train"] > PROCESS + 3.9e9


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("train.epochs=60", "checkpoint.every=10", "checkpoint.keep=2"), 3),
        (("train.epochs=60", "checkpoint.every=10", "checkpoint.keep=2", "checkpoint.keep_best=2"), 5),
        (("train.epochs=15", "checkpoint.every=10", "checkpoint.keep=2"), 2),
        (("train.epochs=60", "checkpoint.every=0"), 1),
    ],
)
def test_checkpoints_at_a_time(settings: tuple[str, ...], expected: int) -> None:
    assert checkpoint_count(tiny(*settings)) == expected


def test_disk_space_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    (tmp_path / "heldout.txt").write_text("one\nsix\n")
    files = (f"prompts.train={tmp_path / 'train.txt'}", f"prompts.heldout={tmp_path / 'heldout.txt'}")
    config = tiny("model.dtype=float32", "train.epochs=2", "rollout.prompts_per_epoch=2", "evaluation.prompts=2",
                  "evaluation.images_per_prompt=2", *files)  # fmt: skip
    costs = costs_of(config)
    prompts = encoded_prompts(config)
    assert prompts is not None and "six" in prompts and len(prompts) in (5, 6)  # four of five are trained on
    parts = plan_disk(config, costs, Zero(1))
    assert parts["encoded prompts"] == len(prompts) * prompt_bytes(config, costs)
    assert parts["export"] == 4 * NETWORK
    assert parts["checkpoints"] == NETWORK * (4 + 4 + 8 + 4)  # both epochs' last one: weights, state, other programs'
    shown = 4 * 3 * 320 * 320  # bytes of an evaluation's images
    assert parts["pictures"] == 2 * 4 * shown  # files and TensorBoard's; before, after, and the two side by side
    assert "encoded prompts" not in plan_disk(tiny("prompts.train=nowhere.txt"), costs, Zero(1))


def test_bf16_weights_without_a_master_copy_are_not_offloaded() -> None:
    """DeepSpeed refuses (tests/engine/test_ds_configs.py)."""
    config = tiny("model.dtype=bfloat16", "optimizer.weights=stochastic_rounding")
    assert not any(zero.offload_optimizer for zero in usual_stages(config).values())


LORA = ("model.finetune=lora",)


@pytest.mark.parametrize(
    ("settings", "whole"),
    [
        ((), False),
        (("model.compile=auto",), False),
        (("model.gradient_checkpointing=true",), False),
        (("rollout.candidates=32", "rollout.candidate_weights=full"), False),
        (("model.compile=true",), True),
        (("model.gradient_checkpointing=selective",), True),
        (("rollout.candidates=32",), True),
        ((*LORA, "rollout.merge_lora=true"), True),
        ((*LORA, "model.base_weights=nf4"), True),
    ],
)
def test_no_stage_is_planned_that_the_engine_refuses(settings: tuple[str, ...], whole: bool) -> None:
    config = tiny(*settings)
    accepted = set()
    for name in SHIPPED:
        with contextlib.suppress(UserError):
            deepspeed_config(config.model_copy(update={"deepspeed": f"ds_configs/{name}.json"}), 1)
            accepted.add(name)
    assert usual_stages(config).keys() == accepted
    assert ("zero3" in accepted) is not whole


SPACE = r"the run writes 0\.136 GB to disk, but 0\.001 are free"


@pytest.fixture
def missing(tmp_path: Path) -> Config:
    """LoRA on a folder without weights."""
    for file in (ROOT / "assets" / "tiny-flux").rglob("*.json"):
        copy = tmp_path / file.relative_to(ROOT / "assets" / "tiny-flux")
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    small = ("model.finetune=lora", "model.lora.rank=1", "rollout.prompts_per_epoch=1", "evaluation.prompts=1")
    return tiny(f"model.path={tmp_path}", "model.dtype=float32", *small)


def test_a_model_that_is_not_here_may_need_less_host_memory(missing: Config) -> None:
    """What dtype its files store is not known: with ``model.dtype`` they are mapped, and take nothing."""
    costs = costs_of(missing)
    plans = [plan_host(missing, costs, Zero(1), 1, mapped=parts) for parts in (None, costs.model.loaded_parts)]
    copied, mapped = (plan.phases["encode prompts"] for plan in plans)
    assert copied - mapped == 4 * (NETWORK + VAE + ENCODERS)
    assert plans[0].peak == copied > plans[1].peak


@pytest.mark.slow
def test_a_plan_of_a_model_that_is_not_here_says_what_may_be_enough(missing: Config) -> None:
    costs = costs_of(missing)
    plans = [plan_host(missing, costs, Zero(1), 1, mapped=parts) for parts in (None, costs.model.loaded_parts)]
    enough = (plans[0].peak + plans[1].peak) / 2e9 + 1.5
    advice = make_plan(missing, 1, 8, host_gb=enough)["recommendation"]
    said = (
        f"download the model, and plan again: {plans[1].peak / 1e9:.1f} GB are enough if its files store float32, with"
    )
    assert not advice["fits"] and advice["ways_out"][0].startswith(said)


@pytest.mark.slow
def test_machines_with_too_little_memory_or_disk() -> None:
    plan = make_plan(tiny(), 1, 8, host_gb=4, disk_gb=0.001)
    advice = plan["recommendation"]
    assert not advice["fits"] and re.fullmatch(rf"no settings .* 2\.5 GB are usable; and {SPACE}", advice["reason"])
    assert [way.partition(" ")[0] for way in advice["ways_out"]] == ["use", "lower", "set"]
    assert plan["disk_gb"]["fits"] is False and plan["host_gb"]["zero1"]["fits"] is False


@pytest.mark.slow
def test_what_is_printed_of_a_machine_with_too_little_memory_or_disk(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(SPACE, make_plan(tiny(), 1, 8, disk_gb=0.001)["recommendation"]["reason"])
    show = call(capsys, "plan", f"model.path={ROOT / 'assets/tiny-flux'}", "--gpu-memory", "8", "--host-memory", "4")
    assert show.code == 3 and "no settings that fit 1 x 8 GB fit the host: the smallest (" in show.out
    assert "need 3.0 GB of host memory in each machine" in show.out and "use machines with" in show.out
