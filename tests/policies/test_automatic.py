"""Automatic attention and compilation: what is chosen on a CPU and, with its answers played, on a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipeline import tiny_config

import pcpo_fast.policies.automatic as automatic
from pcpo_fast.config.loading import dump_config
from pcpo_fast.errors import UserError
from pcpo_fast.policies.automatic import as_begun, attention_seconds, compile_problem, settle
from pcpo_fast.policies.families import find_family

BOTH = ("model.attention=auto", "model.compile=auto")
GPU = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a GPU would answer; None: the backend cannot be used."""
    answers: dict[str, Any] = {"native": 2e-3, "_native_cudnn": 1e-3, "compile": None, "asked": []}

    def check(name: str, device: torch.device, head_dim: int, **options: Any) -> None:
        assert device == GPU and options == {"needs_backward": True, "dtype": torch.float32, "masked": False}
        if answers[name] is None:
            raise UserError(f"model.attention: {name} cannot be used here: it is old")

    def seconds(name: str, device: torch.device, *shape: Any) -> float:
        answers["asked"].append((name, *shape))
        return float(answers[name])

    monkeypatch.setattr(automatic, "check_backend", check)
    monkeypatch.setattr(automatic, "attention_seconds", seconds)
    monkeypatch.setattr(automatic, "compile_problem", lambda device: answers["compile"])
    return answers


def settled(folder: Path, device: torch.device, *overrides: str, partitioned: bool = False) -> tuple[Any, Any, str]:
    config = tiny_config(folder, *overrides)
    found, line = settle(config, *find_family(config.model), device, partitioned=partitioned)
    assert found.model_copy(update={"model": config.model}) == config
    return found.model.attention, found.model.compile, line


def test_a_cpu_uses_neither(pipeline_folder: Path) -> None:
    expected = "model.attention=native (on a CPU), model.compile=false (on a CPU)"
    assert settled(pipeline_folder, torch.device("cpu"), *BOTH) == ("native", False, expected)


def test_a_gpu_takes_the_fastest_and_compiles(pipeline_folder: Path, gpu: dict[str, Any]) -> None:
    line = "model.attention=_native_cudnn (native 2.00 ms, _native_cudnn 1.00 ms), model.compile=true"
    assert settled(pipeline_folder, GPU, *BOTH) == ("_native_cudnn", True, line)
    config = tiny_config(pipeline_folder)
    tokens = config.model.height * config.model.width // 256 + config.model.max_sequence_length
    head_dim = find_family(config.model)[1].head_dim({"attention_head_dim": 8})
    assert head_dim == 8
    assert [(name, count) for name, _, count, _, _ in gpu["asked"]] == [("native", tokens), ("_native_cudnn", tokens)]
    gpu["native"] = 5e-4
    assert settled(pipeline_folder, GPU, *BOTH)[0] == "native"


def test_what_does_not_work_is_passed_over_and_said(
    pipeline_folder: Path, gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu |= {"_native_cudnn": None, "compile": "torch.compile does not work here: no C compiler"}
    attention, compiled, line = settled(pipeline_folder, GPU, *BOTH)
    assert (attention, compiled) == ("native", False)
    why = "torch.compile does not work here: no C compiler"
    refused = "_native_cudnn cannot be used here: it is old"
    assert line == f"model.attention=native (native 2.00 ms, {refused}), model.compile=false ({why})"

    def fails(name: str, *_: Any) -> float:
        if name == "_native_cudnn":
            raise RuntimeError("no plan found")
        return 2e-3

    gpu["_native_cudnn"] = 1e-3
    monkeypatch.setattr(automatic, "attention_seconds", fails)
    assert (
        "native 2.00 ms, _native_cudnn cannot be used here: no plan found)" in settled(pipeline_folder, GPU, *BOTH)[2]
    )
    gpu["native"] = None
    with pytest.raises(UserError, match="native cannot be used here"):
        settled(pipeline_folder, GPU, *BOTH)


def test_partitioned_weights_are_not_compiled(pipeline_folder: Path, gpu: dict[str, Any]) -> None:
    assert settled(pipeline_folder, GPU, *BOTH, partitioned=True)[1:] == (
        False,
        "model.attention=_native_cudnn (native 2.00 ms, _native_cudnn 1.00 ms), model.compile=false (ZeRO stage 3)",
    )


def test_values_that_are_given_stay(pipeline_folder: Path, gpu: dict[str, Any]) -> None:
    given = ("model.attention=_native_flash", "model.compile=true")
    assert settled(pipeline_folder, GPU, *given) == ("_native_flash", True, "")
    assert settled(pipeline_folder, GPU, given[0], BOTH[1]) == ("_native_flash", True, "model.compile=true")
    assert not gpu["asked"]


def test_a_resumed_run_keeps_what_it_began_with(pipeline_folder: Path, tmp_path: Path) -> None:
    asked = tiny_config(pipeline_folder, *BOTH)
    assert as_begun(asked, tmp_path) == asked
    begun = tiny_config(pipeline_folder, "model.attention=_native_math", "model.compile=true")
    (tmp_path / "config.yaml").write_text(dump_config(begun))
    assert as_begun(asked, tmp_path).model == begun.model
    assert as_begun(asked, tmp_path, partitioned=True).model.compile == "auto"
    explicit = tiny_config(pipeline_folder, "model.attention=native", BOTH[1])
    assert as_begun(explicit, tmp_path).model.attention == "native" and as_begun(explicit, tmp_path).model.compile


def test_a_compiler_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compile_problem(torch.device("cpu")) == "on a CPU"

    class Fake:
        type = "cuda"

    def broken(function: Any, **options: Any) -> Any:
        raise RuntimeError("Failed to find C compiler\nmore")

    monkeypatch.setattr(torch, "ones", lambda *shape, device, **options: torch.zeros(8, requires_grad=True))
    monkeypatch.setattr(torch, "compile", broken)
    assert compile_problem(Fake()) == "torch.compile does not work here: Failed to find C compiler"  # type: ignore[arg-type]
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    assert compile_problem(Fake()) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("masked", [False, True])
def test_timing_runs_forward_and_backward(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    events: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            events.append(self)

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: "Event") -> float:
            return float(events.index(end))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    with torch.no_grad():
        seconds = attention_seconds("native", torch.device("cpu"), 8, 5, torch.float32, masked)
    ends = [2 * number + 1 for number in range(automatic.WARM_UP, automatic.WARM_UP + automatic.REPEATS)]
    assert seconds == pytest.approx(sum(ends) / len(ends) / 1e3) and len(events) == 2 * (3 + 10)
