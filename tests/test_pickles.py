"""Nothing that a user may have downloaded is unpickled: a file that would run code runs none, and is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipeline import tiny_config
from tiny_runs import LORA

from pcpo_fast.errors import UserError
from pcpo_fast.policies.families import load_policy, load_trained_weights
from pcpo_fast.policies.saving import save_pipeline

CPU = torch.device("cpu")


class Intruder:
    """Unpickled, it touches a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """What an intruder would leave; the test shows first that one that is let in does."""
    file = tmp_path / "proof"
    torch.save(Intruder(file), tmp_path / "let-in.pt")
    torch.load(tmp_path / "let-in.pt", weights_only=False)
    assert file.exists()
    return tmp_path / "intruder-was-here"


def put_pickle(file: Path, trace: Path) -> None:
    """A file of pickled weights with an intruder among them, in the place of the safetensors next to it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for weights in file.parent.glob("*.safetensors"):
        weights.unlink()
    torch.save({"weight": torch.zeros(1), "extra": Intruder(trace)}, file)


@pytest.mark.parametrize(
    "file",
    ["transformer/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"],
)
def test_a_pipeline_of_pickles_is_refused(own_pipeline: Path, trace: Path, file: str) -> None:
    put_pickle(own_pipeline / file, trace)
    with pytest.raises(UserError) as caught:
        load_policy(tiny_config(own_pipeline, f"model.embedding_cache={trace.parent / 'cache'}"), CPU, ["a red circle"])
    assert "\n" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("overrides", "file"),
    [((), "transformer/diffusion_pytorch_model.bin"), (LORA, "pytorch_lora_weights.bin")],
    ids=["full", "lora"],
)
def test_trained_weights_in_a_pickle_are_refused(
    pipeline_folder: Path, tmp_path: Path, trace: Path, overrides: tuple[str, ...], file: str
) -> None:
    config = tiny_config(pipeline_folder, *overrides)
    policy = load_policy(config, CPU)
    weights = tmp_path / "weights"
    policy.save_weights(weights, {n: p.detach() for n, p in policy.module.named_parameters() if p.requires_grad})
    put_pickle(weights / file, trace)
    with pytest.raises(UserError, match="cannot be read as weights of"):
        save_pipeline(config.model, weights, tmp_path / "pipeline")
    with pytest.raises(UserError):
        load_trained_weights(policy.module, config, weights)
    assert not trace.exists() and not (tmp_path / "pipeline").exists()
