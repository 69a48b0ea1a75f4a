"""Settings of every test: few threads, no network, seeds that a failure prints, GPU tests skipped with a reason."""

import os

# Before anything imports the libraries that read these. Tests of tiny tensors are slower with more threads, and a
# test that reaches for the network fails here as it would on an air-gapped machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import random
import sys
import zlib
from collections.abc import Generator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import hypothesis
import numpy as np
import pytest
import torch
from longest_first import longest_first
from tiny_pipeline import own_pipeline, pipeline_folder, process_group  # noqa: F401 - fixtures
from tiny_pipelines import (  # noqa: F401 - fixtures
    flux2_dev_folder,
    flux3_folder,
    klein_folder,
    krea2_folder,
    qwen_image_folder,
    sd3_folder,
    sd_folder,
    sd_v_folder,
    z_image_folder,
)

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A shared machine may be slow for a moment: no deadline. Under CI the same examples every time.
hypothesis.settings.register_profile("pcpo", deadline=None, derandomize="CI" in os.environ, print_blob=True)
hypothesis.settings.load_profile("pcpo")

BASE_SEED = int(os.environ.get("PCPO_TEST_SEED", "0"))
_seed_of_item = pytest.StashKey[int]()


def pytest_report_header() -> str:
    return f"PCPO_TEST_SEED={BASE_SEED}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest_first(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and this machine has none that PyTorch can use"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed the global generators from the test's name: it sees the same numbers alone, in the suite, in any folder."""
    test = item.nodeid.partition("::")[2]
    seed = (BASE_SEED + zlib.crc32(f"tests/{item.path.name}::{test}".encode())) % 2**32
    item.stash[_seed_of_item] = seed
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and _seed_of_item in item.stash:
        report.sections.append(
            ("random seed", f"{item.stash[_seed_of_item]} (set PCPO_TEST_SEED={BASE_SEED} to see the same numbers)")
        )
    return report
