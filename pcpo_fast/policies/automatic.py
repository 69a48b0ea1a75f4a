"""``model.attention: auto`` and ``model.compile: auto``: settled before the model is loaded, by trying and timing."""

from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_dispatch import attention_backend as library_backend

from pcpo_fast.config.loading import load_config
from pcpo_fast.config.schema import AUTO, Config
from pcpo_fast.distributed.collectives import gather_objects, rank, shared_errors
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.policies.attention import check_backend
from pcpo_fast.policies.compile_trial import cause_of
from pcpo_fast.policies.weight_files import read_json

if TYPE_CHECKING:
    from pcpo_fast.policies.pipeline_policy import PipelinePolicy

BACKENDS = ("native", "_native_cudnn")
"""Attention backends that come with PyTorch and are fast for images; without a dispatcher they serve, too."""
REPEATS, WARM_UP = 10, 3
PATCH = 16
"""Pixels along a token's side in the transformers that are trained here."""
HEADS = 24


def is_automatic(config: Config) -> bool:
    """Whether attention or compilation is left to be settled."""
    return AUTO in (config.model.attention, config.model.compile)


def as_begun(config: Config, folder: Path, *, partitioned: bool = False) -> Config:
    """The run with its automatic values as the run in a folder was begun; unchanged where it has none.

    With partitioned weights (ZeRO-3) compilation is left to :func:`settle`, which rules it out.
    """
    keys = ("attention",) if partitioned else ("attention", "compile")
    try:
        earlier = load_config(folder / "config.yaml").model
    except UserError:
        return config
    update = {key: getattr(earlier, key) for key in keys if getattr(config.model, key) == AUTO}
    return config.model_copy(update={"model": config.model.model_copy(update=update)})


def settle(
    config: Config, folder: Path, family: "type[PipelinePolicy]", device: torch.device, *, partitioned: bool
) -> tuple[Config, str]:
    """The run with its automatic attention and compilation settled, on all ranks alike. Collective.

    On a CPU attention is ``native`` and nothing is compiled. On a GPU the fastest of :data:`BACKENDS` is taken, forward
    and backward at the run's image size, for rollout and update alike, and blocks are compiled where ``torch.compile``
    works; in training the blocks themselves are asked again (:mod:`pcpo_fast.policies.compile_trial`). Values that are
    not ``auto`` stay, and fail later if they cannot be.

    Args:
        config: the run.
        folder: its pipeline.
        family: of the pipeline.
        device: where it runs.
        partitioned: whether weights are partitioned (ZeRO-3), which rules compilation out.

    Returns:
        The run, and one line that says what was chosen and why; empty if nothing was automatic.
    """
    if not is_automatic(config):
        return config, ""
    found: tuple[dict[str, object], str] | None = None
    with shared_errors():
        if rank() == 0:
            found = _settle(config, folder, family, device, partitioned)
    chosen = gather_objects(found)[0]
    assert chosen is not None
    return config.model_copy(update={"model": config.model.model_copy(update=chosen[0])}), chosen[1]


def _settle(
    config: Config, folder: Path, family: "type[PipelinePolicy]", device: torch.device, partitioned: bool
) -> tuple[dict[str, object], str]:
    model = config.model
    update: dict[str, object] = {}
    lines = []
    if model.attention == AUTO:
        name, why = "native", "on a CPU"
        if device.type == "cuda":
            head_dim = family.head_dim(read_json(folder / family.trained_part / "config.json")) or 64
            tokens = model.height * model.width // PATCH**2 + model.max_sequence_length
            dtype = getattr(torch, model.dtype)
            name, why = _fastest(device, head_dim, tokens, dtype, family.masks_prompts)
        update["attention"] = name
        lines.append(f"model.attention={name} ({why})")
    if model.compile == AUTO:
        reason = "ZeRO stage 3" if partitioned else compile_problem(device)
        update["compile"] = reason is None
        lines.append("model.compile=true" if reason is None else f"model.compile=false ({reason})")
    return update, ", ".join(lines)


def _fastest(device: torch.device, head_dim: int, tokens: int, dtype: torch.dtype, masked: bool) -> tuple[str, str]:
    """The backend that takes the least time forward and backward; as text all times, and what is unusable and why."""
    times, refused = {}, list[str]()
    for name in BACKENDS:
        try:
            check_backend(name, device, head_dim, needs_backward=True, dtype=dtype, masked=masked)
            times[name] = attention_seconds(name, device, head_dim, tokens, dtype, masked)
        except (UserError, RuntimeError) as error:  # native always works; the other is only worth having where it does
            if name == "native":
                raise
            if isinstance(error, UserError):
                refused.append(str(error).removeprefix("model.attention: "))
            else:
                refused.append(f"{name} cannot be used here: {reason_of(error)}")
    shown = [f"{name} {1e3 * seconds:.2f} ms" for name, seconds in times.items()]
    return min(times, key=lambda name: times[name]), ", ".join([*shown, *refused])


@torch.inference_mode(False)
@torch.enable_grad()
def attention_seconds(
    name: str, device: torch.device, head_dim: int, tokens: int, dtype: torch.dtype, masked: bool
) -> float:
    """Median seconds of one attention, forward and backward, of one image on a GPU."""
    new = partial(torch.randn, 1, tokens, HEADS, head_dim, device=device, dtype=dtype)
    states = [new().requires_grad_() for _ in range(3)]
    gradient = new()
    mask = torch.ones(1, 1, 1, tokens, device=device, dtype=torch.bool) if masked else None
    seconds = []
    with library_backend(name):
        for number in range(WARM_UP + REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = dispatch_attention_fn(*states, attn_mask=mask, backend=AttentionBackendName(name))
            torch.autograd.grad(result, states, gradient)
            end.record()
            end.synchronize()
            if number >= WARM_UP:
                seconds.append(begin.elapsed_time(end) / 1e3)
    return median(seconds)


def compile_problem(device: torch.device) -> str | None:
    """Why ``torch.compile`` is not worth or not able to be used on a device, without a model; None where it works."""
    if device.type != "cuda":
        return "on a CPU"
    values = torch.ones(8, device=device, requires_grad=True)
    try:
        torch.compile(lambda x: (x * x + 1).sum(), fullgraph=True)(values).backward()
    except Exception as error:  # whatever the compiler, Triton or a missing C compiler says
        return f"torch.compile does not work here: {reason_of(cause_of(error))}"
    return None
