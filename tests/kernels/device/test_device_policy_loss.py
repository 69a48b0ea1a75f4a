"""policy_loss in Triton against the float64 reference."""

import itertools
from dataclasses import replace
from typing import get_args

import pytest
import torch
from cases import KEY_FIRST, NOISES, make_case
from covering import every_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from judging import check_against_judge, edge_distance, on_policy, on_reference, run
from pcpo_kernels import Endpoints
from pcpo_kernels.launch import Plan
from pcpo_kernels.ops.policy_loss import triton as triton_policy_loss
from pcpo_kernels.types import Objective

from pcpo_fast.method.credit import RULES, credit_table
from pcpo_fast.method.transitions import dance_sde, shifted_times

LOW = [torch.float16, torch.bfloat16]


@every_pair(
    objective=["hinge", "clip"],
    noise=NOISES,
    with_reference=[False, True],
    with_guidance=[False, True],
    detached=[False, True],
)
def test_every_form(device, objective, noise, with_reference, with_guidance, detached) -> None:
    case = make_case(
        3,
        (50, 7),
        noise=noise,
        detached=detached,
        with_reference=with_reference,
        with_guidance=with_guidance,
        objective=objective,
        clip_range=2e-4,
    )
    result = check_against_judge(case.cast(torch.float32), device)
    if not detached:
        assert 0 < int(result.clipped.sum()) < 3, "the case should have clipped and unclipped rows"
    else:
        assert torch.equal(result.log_ratio, torch.zeros_like(result.log_ratio))


@pytest.mark.parametrize("rich", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "kl-cfg"])
@pytest.mark.parametrize("noise", KEY_FIRST)
def test_divergence_mask(device, noise, rich) -> None:
    """Rows far and near, moving away and back; of those beyond the threshold only the ones that move away are masked.

    The credit's quadratic column is another one than the divergence's, and a step may have none.
    """
    case = make_case(8, (50, 7), noise=noise, with_reference=rich, with_guidance=rich, objective="divergence_mask")
    case.quadratic = case.quadratic * torch.tensor([0.0, 0.3, 1.0, 2.0, 0.0, 0.3, 1.0, 2.0])
    exact, _ = on_reference(case)
    near, far = exact.divergence.sort().values[3:5]
    case.clip_range = (near + far).item() / 2
    directions = exact.log_ratio.sign() * torch.tensor([1, -1, 1, -1, 1, -1, 1, -1])
    case.advantage = case.advantage.abs() * directions
    result = check_against_judge(case.cast(torch.float32), device)
    beyond = exact.divergence > case.clip_range
    assert result.clipped.tolist() == [bool(one) and row % 2 == 0 for row, one in enumerate(beyond)]
    assert 0 < int(result.clipped.sum()) < 4, "rows beyond the threshold should be of both kinds"


@every_pair(dtype=LOW, noise=NOISES, reduction=["mean", "sum"])
def test_low_precision(device, dtype, noise, reduction) -> None:
    case = make_case(
        2, (64, 16), noise=noise, with_reference=True, with_guidance=True, reduction=reduction, clip_range=1e-3
    )
    low = ("output", "old_output", "reference", "unconditional")
    check_against_judge(case.cast(torch.float32).cast(dtype, *low), device)


def test_mixed_dtypes(device) -> None:
    case = make_case(3, (40,), with_reference=True, with_guidance=True, clip_range=1e-3).cast(torch.float32)
    case = case.cast(torch.bfloat16, "output", "z").cast(torch.float16, "old_output", "unconditional")
    case = case.cast(torch.float64, "linear", "advantage", "reference")
    check_against_judge(case, device)


@pytest.mark.parametrize(
    ("rows", "elements"),
    [
        *((1, 1), (1, 2), (3, 1), (2, 127), (2, 128), (3, 2047), (2, 2048), (2, 2049), (1, 4097), (17, 8)),
        pytest.param(1, 300_001, marks=pytest.mark.slow),
    ],
)
def test_sizes(device, rows, elements) -> None:
    """The longest row is in 147 pieces, more than the 128 that are added at once."""
    case = make_case(rows, (elements,), noise="endpoints", with_reference=True, clip_range=1e-3)
    check_against_judge(case.cast(torch.float32), device)


def test_sizes_with_a_key(device) -> None:
    """The second of two rows of 4098 elements starts inside a Philox block of four; of 4100 elements it does not."""
    for elements in (4098, 4100):
        case = make_case(2, (elements,), noise="key", clip_range=1e-3)
        check_against_judge(case.cast(torch.float32), device)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    rows=st.integers(1, 4),
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    noise=st.sampled_from(NOISES),
    objective=st.sampled_from(get_args(Objective)),
    reduction=st.sampled_from(["mean", "sum"]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 2**16),
)
def test_random_shapes(device, rows, shape, noise, objective, reduction, flags, seed) -> None:
    case = make_case(
        rows,
        tuple(shape),
        noise=noise,
        detached=flags[0],
        with_reference=flags[1],
        with_guidance=flags[2],
        objective=objective,
        reduction=reduction,
        seed=seed,
        clip_range=1e-3,
    )
    check_against_judge(case.cast(torch.float32), device)


@pytest.mark.parametrize(
    ("rule", "objective"),
    [
        pytest.param(rule, objective, marks=() if rule in ("native", "proportionate", "uniform") else pytest.mark.slow)
        for rule, objective in zip(RULES, itertools.cycle(("hinge", "clip")), strict=False)
    ],
)
def test_credit_rules(device, rule, objective) -> None:
    """Every published rule on the Dance SDE, a row for each step; the last one is not trained, its columns are 0."""
    transitions = dance_sde(shifted_times(6, 3.0), 0.3)
    table = credit_table(transitions, rule, range(5))
    case = make_case(6, (90,), noise="endpoints", with_reference=True, objective=objective, clip_range=1e-4)
    x, _, *_ = case.ends
    a, b, std = (column[:, None] for column in (transitions.a, transitions.b, transitions.std))
    following = a * x + b * case.old_output + std * case.z
    case.ends = Endpoints(x, following, transitions.a, transitions.b, transitions.std)
    case.linear, case.quadratic, case.scale, case.kl = table.linear, table.quadratic, table.scale, 0.04 * table.kl
    result = check_against_judge(case.cast(torch.float32), device)
    assert (result.log_ratio != 0).tolist() == [True] * 5 + [False]


@every_pair(dtype=[*LOW, torch.float32], with_guidance=[False, True], noise=NOISES)
def test_exactly_zero_on_policy(device, dtype, with_guidance, noise) -> None:
    case = make_case(2, (33, 5), noise=noise, with_guidance=with_guidance).cast(torch.float32)
    case = on_policy(case.cast(dtype, "output", "unconditional").to(device))
    result, gradient = run(case)
    assert torch.equal(result.log_ratio, torch.zeros_like(result.log_ratio))
    assert torch.equal(result.taylor_error, torch.zeros_like(result.taylor_error))
    assert not result.clipped.any()
    assert all(bool(part.abs().sum() > 0) for part in gradient)


def test_clip_mask_is_exact_away_from_the_edge(device) -> None:
    """Many rows at clip ranges of 1e-4 and 1e-5, ratios of the same size."""
    for clip_range in (1e-4, 1e-5):
        case = make_case(20, (256,), difference=30 * clip_range, clip_range=clip_range).cast(torch.float32)
        exact, _ = on_reference(case.cast(torch.float64))
        got = case.to(device).run()  # no gradient: the mask is the forward's
        away = edge_distance(case, exact) > 1e-3 * clip_range
        assert int(away.sum()) > 15
        assert 2 < int(exact.clipped.sum()) < 18
        assert torch.equal(got.clipped.cpu()[away], exact.clipped[away])


def test_same_bits_every_time_and_in_any_batch(device) -> None:
    case = make_case(5, (3000,), noise="key", with_reference=True).cast(torch.float32).to(device)
    first, second = case.run(), case.run()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    part = {name: value[2:4] for name, value in vars(case).items() if isinstance(value, torch.Tensor)}
    part["key"], part["ends"] = (type(p)(*(v[2:4] for v in p)) for p in (case.key, case.ends))
    alone = replace(case, **part).run()
    for name in ("log_ratio", "taylor_error", "kl"):
        assert torch.equal(getattr(alone, name), getattr(first, name)[2:4])


def test_strides(device) -> None:
    """Rows far apart (a slice of a trajectory) are read in place, anything else is copied; results are the same."""
    case = make_case(4, (6, 5), noise="endpoints", with_reference=True, with_guidance=True).cast(torch.float32)
    case = case.to(device)
    expected, expected_gradients = run(case)

    def apart(value: torch.Tensor) -> torch.Tensor:
        wide = torch.full((value.shape[0], 3, *value.shape[1:]), torch.nan, device=device)
        wide[:, 1] = value
        return wide[:, 1]

    def turned(value: torch.Tensor) -> torch.Tensor:
        return value.transpose(0, -1).contiguous().transpose(0, -1)

    for change in (apart, turned):
        fields = {name: change(value) for name, value in vars(case).items() if isinstance(value, torch.Tensor)}
        other = replace(case, ends=Endpoints(*(change(part) for part in case.ends)), **fields)
        result, gradients = run(other)
        assert torch.equal(result.log_ratio, expected.log_ratio)
        assert all(torch.equal(one, other) for one, other in zip(gradients, expected_gradients, strict=True))


def test_gradient_with_stride_zero_and_loss_scale(device) -> None:
    case = make_case(3, (20,)).cast(torch.float32).to(device)
    _, (expected,) = run(case)
    output = case.output.detach().requires_grad_()
    (replace(case, output=output).run().loss.expand(4).sum() * 65536).backward()
    torch.testing.assert_close(output.grad, expected * (4 * 65536 / 3), rtol=1e-6, atol=0)


def test_only_one_half_wants_a_gradient(device) -> None:
    case = make_case(3, (20,), with_guidance=True).cast(torch.float32).to(device)
    _, (conditional, unconditional) = run(case)
    for name, expected in (("output", conditional), ("unconditional", unconditional)):
        tensor = getattr(case, name).detach().requires_grad_()
        (got,) = torch.autograd.grad(3 * replace(case, **{name: tensor}).run().loss, [tensor])
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_no_gradient_wanted(device) -> None:
    case = make_case(3, (20,)).cast(torch.float32).to(device)
    result = case.run()
    assert not result.loss.requires_grad
    with torch.no_grad():
        case.output.requires_grad_()
        assert not case.run().loss.requires_grad
    result = case.run()
    assert [value.requires_grad for value in result[:4]] == [True, False, False, False]


def test_empty(device) -> None:
    for rows, shape in ((0, (5,)), (3, (0,))):
        case = make_case(rows, shape, with_reference=True).cast(torch.float32).to(device)
        result, (gradient,) = run(case)
        assert not torch.isnan(result.loss)
        assert result.log_ratio.shape == (rows,)
        assert gradient.shape == (rows, *shape)
    assert make_case(0, (5,)).cast(torch.float32).to(device).run().loss.item() == 0.0


@pytest.mark.parametrize("objective", get_args(Objective))
def test_no_nan_from_overflow(device, objective) -> None:
    case = make_case(3, (8,), objective=objective, clip_range=0.1).cast(torch.float32)
    case.old_output, case.output, case.z = torch.zeros(3, 8), torch.full((3, 8), 200.0), torch.ones(3, 8)
    case.linear, case.quadratic, case.advantage = torch.ones(3), torch.zeros(3), torch.tensor([1.0, 0.0, 2.0])
    result, (gradient,) = run(case.to(device))
    assert result.log_ratio.tolist() == [200.0] * 3
    assert result.clipped.tolist() == [True, False, True]
    assert result.taylor_error.tolist() == [1.0] * 3
    assert torch.isfinite(result.loss)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_nan_is_not_hidden(device) -> None:
    case = make_case(2, (8,)).cast(torch.float32)
    case.output[1, 3] = torch.nan
    result, (gradient,) = run(case.to(device))
    assert torch.isnan(result.loss)
    assert torch.isfinite(result.log_ratio[0])
    assert torch.isnan(gradient[1]).any()


def test_gradient_by_finite_differences(device) -> None:
    """The op's own forward against its own backward, in float32 with steps that float32 resolves."""
    for objective in ("hinge", "clip"):
        case = make_case(
            2, (5,), objective=objective, clip_range=10.0, with_reference=True, reduction="sum", difference=1
        )
        case = case.cast(torch.float32).to(device)
        _, (gradient,) = run(case)
        for row, element in ((0, 0), (1, 3), (1, 4)):
            step = torch.zeros_like(case.output)
            step[row, element] = 0.01
            up, down = (replace(case, output=case.output + sign * step).run().loss.double() for sign in (1, -1))
            numeric = 3 * (up - down).item() / 0.02
            assert numeric == pytest.approx(
                gradient[row, element].item(), rel=2e-3, abs=1e-3 * gradient.abs().max().item()
            )


@pytest.mark.parametrize(
    ("plan", "elements"), [pytest.param(Plan(128, 3), 1000, marks=pytest.mark.slow), (Plan(256, 2), 512)]
)
@pytest.mark.parametrize("noise", ["key", "endpoints"])
def test_other_ways_to_cut_rows(device, monkeypatch, plan, elements, noise) -> None:
    """Several blocks per program, as very long rows are cut."""
    monkeypatch.setattr(triton_policy_loss, "plan_for", lambda _: plan)
    case = make_case(2, (elements,), noise=noise, with_reference=True, with_guidance=True, clip_range=1e-3)
    check_against_judge(case.cast(torch.float32), device)
