"""The kernels' own tests: on a GPU as they are, without one in Triton's interpreter (``TRITON_INTERPRET=1``).

``tests/kernels/test_interpreter.py`` runs this folder in the interpreter, in a process of its own.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pcpo_kernels.dispatch import interpreter_lacks, interpreting, triton_installed

INTERPRETED = interpreting()
LACKING = ""
if not triton_installed():
    LACKING = "triton is not installed"
elif INTERPRETED:
    LACKING = interpreter_lacks()
elif not torch.cuda.is_available():
    LACKING = "no GPU, and not in Triton's interpreter: tests/kernels/test_interpreter.py runs this file there"


class SkippedModule(pytest.Module):
    """A test file that this machine cannot run: one skip with the reason, instead of one per test."""

    def collect(self) -> Iterable[pytest.Item]:
        pytest.skip(LACKING, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return SkippedModule.from_parent(parent, path=module_path) if LACKING else None


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(params=["opaque"] if INTERPRETED else ["opaque", "visible"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[..., Any]]:
    """torch.compile into a single graph, with opaque ops, and on a GPU with those that Inductor sees, too."""
    if request.param == "visible":
        from pcpo_kernels import operators

        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
        monkeypatch.setattr(operators, "_SEEN", True)
    torch._dynamo.reset()
    return partial(torch.compile, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the kernels: on a GPU for what is there, as ever; what a test makes on the CPU is the reference's."""
    if INTERPRETED:
        monkeypatch.setenv("PCPO_KERNELS", "triton")
    else:
        monkeypatch.delenv("PCPO_KERNELS", raising=False)


@pytest.fixture(autouse=True)
def unwritten_is_nan() -> Iterator[None]:
    """Fresh memory holds NaN, so that an element which no program writes shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.isnan(torch.empty(3)).all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
