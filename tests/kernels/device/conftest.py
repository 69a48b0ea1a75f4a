"""The kernels' own tests: on a GPU as they are, without one in Triton's interpreter (``TRITON_INTERPRET=1``).

``tests/kernels/test_interpreter.py`` runs this folder in the interpreter, in a process of its own.
"""

from collections.abc import Iterator

import pytest
import torch
from pcpo_kernels.dispatch import interpreting, triton_installed

INTERPRETED = interpreting()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if "kernels/device/" in item.nodeid]
    reason = ""
    if not triton_installed():
        reason = "triton is not installed"
    elif not INTERPRETED and not torch.cuda.is_available():
        reason = "no GPU, and not in Triton's interpreter (tests/kernels/test_interpreter.py runs this folder there)"
    for item in here:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif INTERPRETED and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU; this is the interpreter"))


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the kernels, never the reference by accident."""
    monkeypatch.setenv("PCPO_KERNELS", "triton")


@pytest.fixture(autouse=True)
def unwritten_is_nan() -> Iterator[None]:
    """Fresh memory holds NaN, so that an element which no program writes shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.isnan(torch.empty(3)).all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
