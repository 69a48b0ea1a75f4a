"""Compilation that ``auto`` chose, on a CPU that is taken for a GPU: the blocks decide, and a run never ends by it."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_pipeline import PROMPTS, tiny_config
from tiny_runs import CPU, LORA
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed

from pcpo_fast.config.loading import load_config
from pcpo_fast.config.schema import RolloutConfig
from pcpo_fast.errors import UserError
from pcpo_fast.policies import Policy, automatic
from pcpo_fast.policies.compile_trial import Forwards, batch_sizes, keep_compiled
from pcpo_fast.policies.families import keep_reference, load_policy
from pcpo_fast.policies.speed import COMPILE_OPTIONS
from pcpo_fast.training import trainer
from pcpo_fast.training.trainer import train

SMALL = ("train.epochs=1", "checkpoint.every=0", "prompts.heldout=null")
graphs: list[Any] = []


def works(graph: Any, examples: Any) -> Any:
    graphs.append(graph)
    return graph.forward


def fails(graph: Any, examples: Any) -> Any:
    raise RuntimeError("out of resource: shared memory\nmore")


def lacks_memory(graph: Any, examples: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


REASON = "the blocks cannot run compiled here: out of resource: shared memory"


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Sets the back end of the compiler, after forgetting what was compiled; ``auto`` takes this CPU for a GPU."""
    monkeypatch.setattr(automatic, "compile_problem", lambda device: None)

    def choose(backend: Any) -> None:
        torch._dynamo.reset()
        graphs.clear()
        monkeypatch.setitem(COMPILE_OPTIONS, "backend", backend)

    return choose


def compiled(policy: Policy) -> set[bool]:
    """Whether blocks of the network and of the reference are."""
    networks = [network for network in (policy.module, policy.reference_module) if network is not None]
    return {b._compiled_call_impl is not None for network in networks for b in policy.compiled_blocks(network)}


@pytest.mark.parametrize(("backend", "finetune"), [(works, "lora"), (fails, "full")])
def test_a_trial_leaves_nothing_behind(pipeline_folder: Path, use: Any, backend: Any, finetune: str) -> None:
    use(backend)
    config = tiny_config(
        pipeline_folder, *LORA, f"model.finetune={finetune}", "model.compile=true", "credit.kl_coefficient=0.1"
    )
    policy = load_policy(config, CPU, PROMPTS)
    keep_reference(policy, config, CPU)
    policy.module.register_forward_pre_hook(lambda *_: torch.manual_seed(1) and None)  # as dropout moves the state
    settings = RolloutConfig(merge_lora=finetune == "lora")
    before, random = {name: p.clone() for name, p in policy.module.state_dict().items()}, torch.get_rng_state()
    forwards = Forwards(sampled={4}, candidates=(), evaluated={2}, compared={3}, trained=3)
    reason = keep_compiled(policy, settings, policy.encode(PROMPTS[:2]), policy.encode(PROMPTS[2:3]), forwards)
    assert reason == (None if backend is works else REASON)
    assert compiled(policy) == {backend is works}
    assert torch.get_rng_state().equal(random) and policy.module.training and policy.forward_module is policy.module
    assert (policy.work.forwards, policy.work.trained) == (0, 0)
    assert all(p.grad is None for p in policy.module.parameters())
    assert all(value.equal(before[name]) for name, value in policy.module.state_dict().items())

    known = len(graphs)
    assert known == (8 if backend is works else 0), "two kinds of blocks, in three sizes and with gradients"
    latents, times = torch.randn(4, *policy.latent_shape), torch.rand(4)
    with torch.no_grad(), policy.sampling(settings):
        policy.predict(latents, times, policy.encode(PROMPTS))
    with torch.no_grad():
        policy.predict(latents[:2], times[:2], policy.encode(PROMPTS[:2]))
        policy.predict(latents[:3], times[:3], policy.encode(PROMPTS[:3]))
    policy.predict(latents[:3], times[:3], policy.encode(PROMPTS[:3])).sum().backward()
    assert len(graphs) == known, "the trial has compiled what a run needs"


def test_a_lack_of_memory_is_told_as_one(pipeline_folder: Path, use: Any) -> None:
    use(lacks_memory)
    policy = load_policy(tiny_config(pipeline_folder, "model.compile=true"), CPU, PROMPTS)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        keep_compiled(policy, RolloutConfig(), policy.encode(PROMPTS[:2]), {}, Forwards({4}, (), (), (), 3))


def losses(run: Path) -> list[Any]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: line[name] for name in line if name.startswith(("policy/", "reward/"))} for line in lines]


@pytest.mark.usefixtures("process_group")
def test_a_run_goes_on_as_without_compilation_and_a_resumed_one_too(
    pipeline_folder: Path, tmp_path: Path, use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(aot_autograd(fw_compiler=works, bw_compiler=fails))
    given = (*LORA, *SMALL, "model.gradient_checkpointing=selective")
    shown = io.StringIO()
    auto = tiny_config(pipeline_folder, *given, "model.compile=auto", f"output_dir={tmp_path / 'auto'}")
    train(auto, console=Console(file=shown, width=300))
    assert shown.getvalue().count(f"Chosen instead: model.compile=false ({REASON})") == 1
    assert load_config(tmp_path / "auto" / "config.yaml").model.compile is False
    plain = tiny_config(pipeline_folder, *given, "model.compile=false", f"output_dir={tmp_path / 'plain'}")
    train(plain, console=Console(quiet=True))
    assert losses(tmp_path / "auto") == losses(tmp_path / "plain") and len(losses(tmp_path / "auto")) == 3

    monkeypatch.setattr(trainer, "keep_compiled", lambda *_: pytest.fail("a resumed run asks again"))
    train(auto.model_copy(update={"train": auto.train.model_copy(update={"epochs": 2})}), console=Console(quiet=True))
    assert load_config(tmp_path / "auto" / "config.yaml").model.compile is False


@pytest.mark.usefixtures("process_group")
def test_blocks_that_run_stay_compiled_and_nothing_is_compiled_after_the_trial(
    pipeline_folder: Path, tmp_path: Path, use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last batch of a rollout is smaller, and so are those of an evaluation, which has fewer rows than either."""
    counts, tried = [], []

    def noted(*arguments: Any) -> str | None:
        reason = keep_compiled(*arguments)
        tried.append(len(graphs))
        return reason

    monkeypatch.setattr(trainer, "keep_compiled", noted)
    batches = ("rollout.batch_size=5", "evaluation.images_per_prompt=2", "evaluation.batch_size=2")
    for setting in ("auto", "true"):
        use(works)
        given = (*SMALL[:2], *batches, f"model.compile={setting}", f"output_dir={tmp_path / setting}")
        train(tiny_config(pipeline_folder, *given), console=Console(quiet=True))
        counts.append(len(graphs))
        assert load_config(tmp_path / setting / "config.yaml").model.compile is True
    assert tried == counts[:1] and counts[0] == counts[1]
    assert [batch_sizes(rows, 4) for rows in (8, 9, 3, 0)] == [{4}, {4, 1}, {3}, set()]
    assert losses(tmp_path / "auto") == losses(tmp_path / "true")


@pytest.mark.usefixtures("process_group")
def test_compilation_that_was_asked_for_is_an_error_where_it_fails(
    pipeline_folder: Path, tmp_path: Path, use: Any
) -> None:
    use(fails)
    config = tiny_config(pipeline_folder, *SMALL, "model.compile=true", f"output_dir={tmp_path / 'run'}")
    with pytest.raises(BackendCompilerFailed, match="shared memory"):
        train(config, console=Console(quiet=True))
    use(lacks_memory)
    auto = tiny_config(pipeline_folder, *SMALL, "model.compile=auto", f"output_dir={tmp_path / 'auto'}")
    with pytest.raises(UserError, match=r"^the GPU ran out of memory"):
        train(auto, console=Console(quiet=True))
