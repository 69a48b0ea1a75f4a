"""The reference path of policy_loss against the formulas, torch.distributions and autograd."""

import math
from dataclasses import replace

import pytest
import torch
from cases import NOISES, LossCase, autograd_loss, make_case
from covering import every_pair
from pcpo_kernels import Endpoints, NoiseKey, guidance, policy_loss, sample_step
from torch import Tensor
from torch.distributions import Normal

OBJECTIVES = ("hinge", "clip", "divergence_mask")
REDUCTIONS = ("mean", "sum")
LOW = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def on_the_reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCPO_KERNELS", "reference")


def gradients(loss: Tensor, case: LossCase) -> list[Tensor]:
    inputs = [case.output] + ([] if case.unconditional is None else [case.unconditional])
    return list(torch.autograd.grad(loss, inputs))


def require_grad(case: LossCase) -> LossCase:
    case.output = case.output.detach().requires_grad_()
    if case.unconditional is not None:
        case.unconditional = case.unconditional.detach().requires_grad_()
    return case


@every_pair(
    objective=OBJECTIVES,
    reduction=REDUCTIONS,
    noise=NOISES,
    with_reference=[False, True],
    with_guidance=[False, True],
    detached=[False, True],
)
def test_agrees_with_autograd(objective, reduction, noise, with_reference, with_guidance, detached) -> None:
    case = require_grad(
        make_case(
            8,
            noise=noise,
            detached=detached,
            with_reference=with_reference,
            with_guidance=with_guidance,
            objective=objective,
            reduction=reduction,
            clip_range=0.001 if reduction == "mean" else 0.02,
        )
    )
    result = case.run()
    loss, log_ratio, clipped = autograd_loss(case)
    torch.testing.assert_close(result.loss, loss)
    torch.testing.assert_close(result.log_ratio, log_ratio, rtol=1e-9, atol=1e-12)
    assert torch.equal(result.clipped, clipped)
    if not detached:
        assert 0 < int(clipped.sum()) < 8, "the case should have clipped and unclipped rows"
    for got, expected in zip(gradients(result.loss, case), gradients(loss, case), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13)


@every_pair(objective=OBJECTIVES, reduction=REDUCTIONS, with_reference=[False, True], with_guidance=[False, True])
def test_gradcheck(objective, reduction, with_reference, with_guidance) -> None:
    case = require_grad(
        make_case(
            3,
            (2, 3),
            with_reference=with_reference,
            with_guidance=with_guidance,
            objective=objective,
            reduction=reduction,
            clip_range=0.05,
        )
    )
    inputs = [case.output] + ([case.unconditional] if with_guidance else [])

    def loss(output: Tensor, unconditional: Tensor | None = None) -> Tensor:
        return 3.0 * replace(case, output=output, unconditional=unconditional).run().loss

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("noise", NOISES)
def test_log_ratio_is_the_difference_of_log_probabilities(noise) -> None:
    case = make_case(6, (4, 5), noise=noise, reduction="sum")
    x, following, a, b, std = case.ends

    def column(values: Tensor) -> Tensor:
        return values[:, None, None]

    def log_prob(output: Tensor) -> Tensor:
        step = Normal(column(a) * x + column(b) * output, column(std))
        return step.log_prob(following).sum((1, 2))

    assert case.old_output is not None
    expected = log_prob(case.output) - log_prob(case.old_output)
    torch.testing.assert_close(case.run().log_ratio, expected, rtol=1e-9, atol=1e-9)


@every_pair(dtype=[*LOW, torch.float32, torch.float64], noise=NOISES, with_guidance=[False, True])
def test_exactly_zero_on_policy(dtype, noise, with_guidance) -> None:
    case = make_case(4, (33,), noise=noise, with_guidance=with_guidance).cast(dtype, "output", "unconditional")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    case.old_output = case.output
    if case.unconditional is not None and case.guidance_scale is not None:
        case.old_output = guidance(case.unconditional, case.output, case.guidance_scale, dtype=wide)
    result = case.run()
    assert torch.equal(result.log_ratio, torch.zeros(4, dtype=wide))
    assert torch.equal(result.taylor_error, torch.zeros(4, dtype=wide))
    assert not result.clipped.any()


def test_on_policy_gradient_is_that_of_the_log_probability() -> None:
    """Without clipping, hinge and clip have the same gradient on-policy: -A times the score, times the credit."""
    for objective in OBJECTIVES:
        case = require_grad(make_case(4, (9,), noise="endpoints", detached=True, objective=objective))
        (gradient,) = torch.autograd.grad(case.run().loss, [case.output])
        weight = -case.scale * case.advantage * case.linear / (4 * 9)
        torch.testing.assert_close(gradient, weight[:, None] * case.z, rtol=1e-9, atol=1e-12)


def test_rows_are_independent() -> None:
    """Rows of different steps in one call give what each gives alone."""
    case = require_grad(make_case(4, (11,), with_reference=True, with_guidance=True, noise="endpoints"))
    result = case.run()
    together = gradients(result.loss, case)
    total = 0.0
    for row in range(4):
        rows = slice(row, row + 1)
        fields = {name: value[rows].detach() for name, value in vars(case).items() if isinstance(value, Tensor)}
        fields["key"], fields["ends"] = (type(p)(*(v[rows] for v in p)) for p in (case.key, case.ends))
        alone = require_grad(replace(case, **fields))
        single = alone.run()
        total += single.loss.item() / 4
        assert single.log_ratio.item() == pytest.approx(result.log_ratio[row].item(), rel=1e-12)
        for got, expected in zip(gradients(single.loss, alone), together, strict=True):
            torch.testing.assert_close(got[0] / 4, expected[row])
    assert result.loss.item() == pytest.approx(total)


def test_empty_batch_and_empty_rows() -> None:
    for rows, shape in ((0, (5,)), (3, (0,))):
        case = require_grad(make_case(rows, shape, with_reference=True))
        result = case.run()
        assert result.log_ratio.shape == (rows,)
        assert not torch.isnan(result.loss)
        (gradient,) = torch.autograd.grad(result.loss, [case.output])
        assert gradient.shape == case.output.shape
    case = make_case(0, (5,))
    assert case.run().loss.item() == 0.0
    step = sample_step(case.ends.latents, case.output, *case.ends[2:], case.z)
    assert step.next_latents.shape == (0, 5)


def test_non_contiguous_inputs() -> None:
    case = require_grad(make_case(4, (6, 5), with_reference=True, with_guidance=True, noise="endpoints"))
    result = case.run()
    expected = gradients(result.loss, case)

    def turned(value: Tensor) -> Tensor:
        return value.detach().transpose(0, -1).contiguous().transpose(0, -1)

    def spread(value: Tensor) -> Tensor:
        wide = torch.full((*value.shape, 2), torch.nan, dtype=value.dtype)
        wide[..., 0] = value.detach()
        return wide[..., 0]

    for change in (turned, spread):
        fields = {name: change(value) for name, value in vars(case).items() if isinstance(value, Tensor)}
        other = require_grad(replace(case, ends=Endpoints(*(change(part) for part in case.ends)), **fields))
        again = other.run()
        torch.testing.assert_close(again.loss, result.loss)
        for got, want in zip(gradients(again.loss, other), expected, strict=True):
            torch.testing.assert_close(got, want)
    # A gradient with stride 0, as .sum().backward() hands over.
    case.output.grad = None
    case.run().loss.expand(3).sum().backward()
    torch.testing.assert_close(case.output.grad, 3 * expected[0])


@every_pair(dtype=[*LOW, torch.float32, torch.float64], objective=OBJECTIVES, noise=NOISES)
def test_precision_by_dtype(dtype, objective, noise) -> None:
    """The error against float64 is at most twice plain PyTorch's own on the same rounded inputs, plus one rounding."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    case = make_case(6, (40, 16), noise=noise, with_reference=True, objective=objective, clip_range=0.01)
    case = case.cast(torch.float32 if dtype != torch.float64 else dtype).cast(
        dtype, "output", "old_output", "reference"
    )
    judge = require_grad(case.cast(torch.float64))
    plain = require_grad(case.cast(wide))
    judged, plain_loss = autograd_loss(judge), autograd_loss(plain)
    case = require_grad(case)
    result = case.run()
    assert result.loss.dtype == result.log_ratio.dtype == wide
    # In float64 the judge computes in the same dtype: its own error is unknown, not 0.
    epsilon = torch.finfo(wide).eps * (16 if dtype == torch.float64 else 1)

    def check(got: Tensor, own: Tensor, exact: Tensor, rounding: float) -> None:
        error = (got.double() - exact).abs().max().item()
        allowed = 2 * (own.double() - exact).abs().max().item() + rounding * exact.abs().max().item()
        assert error <= allowed, (error, allowed)

    for got, own, exact in zip((result.loss, result.log_ratio), plain_loss[:2], judged[:2], strict=True):
        check(got.detach(), own.detach(), exact.detach(), 4 * epsilon)
    assert torch.equal(result.clipped, judged[2])
    (gradient,) = gradients(result.loss, case)
    assert gradient.dtype == dtype
    check(
        gradient,
        gradients(plain_loss[0], plain)[0],
        gradients(judged[0], judge)[0],
        max(epsilon, torch.finfo(dtype).eps),
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_nan_from_overflow(objective) -> None:
    """A ratio that overflows is clipped, never NaN; without advantage it counts 0."""
    case = make_case(3, (8,), objective=objective, clip_range=0.1)
    case.old_output = torch.zeros_like(case.output)
    case.output = torch.full_like(case.output, 200.0)
    case.z = torch.ones_like(case.z)
    case = case.cast(torch.float32)
    case.output.requires_grad_()
    case.quadratic = torch.zeros(3)
    case.linear = torch.full((3,), 1.0)
    case.advantage = torch.tensor([1.0, 0.0, 2.0])
    result = case.run()
    assert result.log_ratio.tolist() == [200.0, 200.0, 200.0]
    assert result.clipped.tolist() == [True, False, True]
    assert result.taylor_error.tolist() == [1.0, 1.0, 1.0]
    assert torch.isfinite(result.loss)
    (gradient,) = torch.autograd.grad(result.loss, [case.output])
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_nan_is_not_hidden() -> None:
    case = make_case(2, (8,))
    case.output[1, 3] = torch.nan
    result = require_grad(case).run()
    assert torch.isnan(result.loss)
    assert torch.isfinite(result.log_ratio[0])


def test_taylor_error() -> None:
    """Against 50 digits' worth of series, from ratios that differ from 1 by 1e-8 up to 1e3 in float32."""
    exact = torch.tensor([-30.0, -3.0, -0.2, -0.09, -1e-3, -1e-8, 0.0, 1e-8, 1e-4, 0.05, 0.11, 1.0, 7.0])
    case = make_case(13, (1,)).cast(torch.float32)
    case.linear, case.quadratic = torch.ones(13), torch.zeros(13)
    case.old_output, case.output, case.z = torch.zeros(13, 1), exact[:, None], torch.ones(13, 1)
    got = case.run().taylor_error.double()

    def error(value: float) -> float:
        if value == 0:
            return 0.0
        terms = math.fsum(value**k / math.factorial(k) for k in range(2, 140))
        return abs(terms / math.expm1(value))

    expected = torch.tensor([error(value) for value in exact.double().tolist()], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=3e-6, atol=0)


def test_sampled_noise_is_recovered_by_the_loss() -> None:
    """What sample_step does with a key, policy_loss takes back from the key or from the endpoints, in float32."""
    case = make_case(4, (50,), detached=False).cast(torch.float32)
    x, _, a, b, std = case.ends
    assert case.old_output is not None
    step = sample_step(x, case.old_output, a, b, std, case.key)
    case.ends = Endpoints(x, step.next_latents, a, b, std)
    from_key, from_ends = (replace(case, noise=noise).run().log_ratio for noise in ("key", "endpoints"))
    torch.testing.assert_close(from_key, from_ends, rtol=0, atol=2e-6)


def broken(case: LossCase, **fields: object) -> LossCase:
    return replace(case, **fields)


def test_errors_of_policy_loss() -> None:
    case = make_case(3, (4,), with_reference=True, with_guidance=True)
    wrong_rows = torch.ones(2, dtype=torch.float64)
    integers = torch.ones(3, 4, dtype=torch.int64)
    key = case.key
    bad: list[tuple[type[Exception], str, dict[str, object]]] = [
        (TypeError, "output must be float16, bfloat16, float32 or float64", {"output": integers}),
        (TypeError, "old_output must be", {"old_output": integers}),
        (TypeError, "advantage must be float16", {"advantage": torch.ones(3, dtype=torch.int64)}),
        (
            TypeError,
            "noise.seed must be int64",
            {"noise": "key", "key": NoiseKey(key.seed.to(torch.int32), key.offset)},
        ),
        (
            ValueError,
            "noise.offset must hold one value per row",
            {"noise": "key", "key": NoiseKey(key.seed, key.offset[:2])},
        ),
        (ValueError, "at least two axes", {"output": torch.ones(3)}),
        (
            ValueError,
            r"old_output must have the output's shape \(3, 4\), got \(3, 5\)",
            {"old_output": torch.ones(3, 5)},
        ),
        (ValueError, r"scale must hold one value per row, shape \(3,\), got \(2,\)", {"scale": wrong_rows}),
        (ValueError, "noise is on meta but the output is on cpu", {"z": case.z.to("meta")}),
        (ValueError, "kl is on meta", {"kl": torch.ones(3, device="meta")}),
        (
            ValueError,
            "noise.next_latents",
            {"noise": "endpoints", "ends": case.ends._replace(next_latents=torch.ones(3, 5))},
        ),
        (ValueError, "noise.std", {"noise": "endpoints", "ends": case.ends._replace(std=wrong_rows)}),
        (TypeError, "noise must be a tensor, got NoneType", {"z": None}),
        (TypeError, "output must be a tensor, got float", {"output": 1.0}),
        (TypeError, "scale must be a tensor, got float", {"scale": 1.0}),
        (TypeError, "guidance_scale must be a tensor, got float", {"guidance_scale": 4.5}),
        (TypeError, "noise.seed must be a tensor, got int", {"noise": "key", "key": NoiseKey(7, key.offset)}),
        (ValueError, "reference and kl go together", {"kl": None}),
        (ValueError, "unconditional and guidance_scale go together", {"unconditional": None}),
        (ValueError, "objective must be one of hinge, clip, divergence_mask, got 'ppo'", {"objective": "ppo"}),
        (ValueError, "reduction must be one of mean, sum", {"reduction": "max"}),
        (ValueError, "clip_range must not be negative", {"clip_range": -0.1}),
        (ValueError, "clip_range must not be negative", {"clip_range": math.nan}),
    ]
    for kind, message, fields in bad:
        with pytest.raises(kind, match=message):
            broken(case, **fields).run()


def test_double_backward_is_refused() -> None:
    case = require_grad(make_case(2, (3,)))
    (gradient,) = torch.autograd.grad(case.run().loss, [case.output], create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_unknown_backend(monkeypatch) -> None:
    monkeypatch.setenv("PCPO_KERNELS", "cuda")
    with pytest.raises(ValueError, match="PCPO_KERNELS must be triton or reference, got 'cuda'"):
        make_case(2, (3,)).run()


def test_only_differentiable_where_said() -> None:
    case = require_grad(make_case(2, (3,)))
    result = case.run()
    assert result.loss.requires_grad
    assert not any(value.requires_grad for value in result[1:4] if value is not None)
    assert policy_loss(*case.arguments()[0], clip_range=0.1).kl is None


def test_compiles_in_one_graph() -> None:
    case = require_grad(make_case(3, (5,), noise="key", with_reference=True, with_guidance=True))
    positional, keywords = case.arguments()

    def loss(output: Tensor) -> tuple[Tensor, Tensor]:
        result = policy_loss(output, *positional[1:], **keywords)
        return result.loss, result.log_ratio

    value, log_ratio = torch.compile(loss, fullgraph=True, backend="aot_eager")(case.output)
    expected, expected_ratio = loss(case.output)
    torch.testing.assert_close(log_ratio, expected_ratio)
    gradients = [torch.autograd.grad(v, [case.output])[0] for v in (value, expected)]
    torch.testing.assert_close(*gradients)
