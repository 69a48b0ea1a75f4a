"""Makes ``cases`` importable from this folder and the one below, and the benchmarks' baseline beside it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture
def shown_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """Launches, noted instead of done, of kernels that torch.compile is shown."""
    import torch
    from pcpo_kernels import operators
    from stub_driver import stubbed

    monkeypatch.setattr(operators, "_SEEN", True)
    noted: list = []
    with stubbed(noted):
        yield noted
    torch._dynamo.reset()
