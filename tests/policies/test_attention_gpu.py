"""Every attention backend that is installed against PyTorch's own scaled dot product, on a GPU.

Exact is the formula in float64; a backend may be as far from it as twice the scaled dot product in the same dtype.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed, and attention backends are its own")
pytest.importorskip("pydantic", reason="pydantic is not installed, and the checks of settings need it")

from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_dispatch import attention_backend as library_backend

from pcpo_fast.errors import UserError
from pcpo_fast.policies.attention import check_backend
from pcpo_fast.policies.attention_needs import NEEDS, lacking

pytestmark = pytest.mark.gpu
SHAPES = [(2, 640, 4, 128), (2, 333, 6, 64)]
"""(batch, tokens, heads, head size) as FLUX and Stable Diffusion 3 have them; 333 tokens fill no block."""
DTYPE = torch.bfloat16


def states(shape: tuple[int, ...]) -> list[Tensor]:
    """Queries, keys and values in bfloat16."""
    return [torch.randn(shape, device="cuda").to(DTYPE) for _ in range(3)]


def attend(name: str, given: list[Tensor]) -> Tensor:
    with library_backend(name):
        return dispatch_attention_fn(*given, backend=AttentionBackendName(name))


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax of scaled products, in float64, [B, S, H, D] as the backends have it."""
    q, k, v = (part.double().transpose(1, 2) for part in (query, key, value))
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def usable(name: str, head_dim: int, needs_backward: bool) -> None:
    """Skip with the reason where a backend is not installed or does not serve this GPU."""
    device = torch.device("cuda", 0)
    reason = lacking(name, device, head_dim, needs_backward, DTYPE)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    try:
        check_backend(name, device, head_dim, needs_backward, DTYPE)
    except UserError as error:
        # PyTorch's own depend on its build, those of the Hub on reaching it, the others on a package of theirs.
        if "package" in str(error) or name.startswith("_native") or name in ("native", "flex") or "hub" in name:
            pytest.skip(str(error))
        raise


def error(got: Tensor, truth: Tensor) -> float:
    return (got.double() - truth).abs().max().item()


def allowed(own: Tensor, truth: Tensor) -> float:
    """Twice the scaled dot product's error, plus a rounding of the largest value."""
    return 2 * error(own, truth) + torch.finfo(DTYPE).eps * truth.abs().max().item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NEEDS)
def test_forward(name: str, shape: tuple[int, ...]) -> None:
    usable(name, shape[-1], needs_backward=False)
    if name.startswith(("sage", "_sage")):
        pytest.skip(f"{name}: quantises queries and keys to 8 bits, which no tolerance of bfloat16 covers")
    given = states(shape)
    truth = exact(*given)
    with torch.no_grad():
        got, own = attend(name, given), attend("native", given)
    assert got.dtype == DTYPE and got.shape == shape
    assert error(got, truth) <= allowed(own, truth)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [name for name, needs in NEEDS.items() if needs.backward])
def test_backward(name: str, shape: tuple[int, ...]) -> None:
    usable(name, shape[-1], needs_backward=True)
    given, incoming = [part.requires_grad_() for part in states(shape)], torch.randn(shape, device="cuda").to(DTYPE)
    wide = [part.detach().double().requires_grad_() for part in given]
    truths = torch.autograd.grad(exact(*wide), wide, incoming.double())
    got, own = (torch.autograd.grad(attend(which, given), given, incoming) for which in (name, "native"))
    for mine, plain, truth in zip(got, own, truths, strict=True):
        assert error(mine, truth) <= allowed(plain, truth)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [name for name, needs in NEEDS.items() if needs.backward])
def test_rollout_against_update(name: str, shape: tuple[int, ...]) -> None:
    """Without gradients in a batch of four, and with them in batches of one: the same, or as near as bfloat16 is; and
    either of them as near to the scaled dot product, where one phase has another backend than the other."""
    usable(name, shape[-1], needs_backward=True)
    given = [torch.cat((part, part.flip(0))) for part in states(shape)]
    truth = exact(*given)
    with torch.no_grad():
        rollout, own = attend(name, given), attend("native", given)
    rows = [[part[row : row + 1].detach().requires_grad_() for part in given] for row in range(4)]
    update = torch.cat([attend(name, row) for row in rows]).detach()
    assert error(rollout, update.double()) <= allowed(own, truth)
    for phase in (rollout, update):
        assert error(phase, own.double()) <= error(own, truth) + allowed(own, truth)
