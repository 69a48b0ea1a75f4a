"""Registration: opcheck, torch.compile, CUDA graphs, no host synchronisation, launches."""

import pytest
import torch
from cases import KEY_FIRST, NOISES, make_case
from judging import gradients, require_grad, run
from pcpo_kernels import NoiseKey, dispatch, guidance, philox_normal, policy_loss, sample_step
from pcpo_kernels.launch import plan_for


def loss_arguments(case):
    noise = {"tensor": (case.z, None), "key": (None, None), "endpoints": case.ends[:2]}[case.noise]
    key = case.key if case.noise == "key" else (None, None)
    transition = case.ends[2:] if case.noise == "endpoints" else (None,) * 3
    return (
        *(case.output, case.old_output, *noise, case.reference, case.unconditional, *key, *transition),
        *(case.guidance_scale, case.linear, case.quadratic, case.scale, case.advantage),
        *(case.divergence, case.kl, case.clip_range, 0, True),
    )  # fmt: skip


@pytest.mark.parametrize("noise", KEY_FIRST)
@pytest.mark.parametrize("rich", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "kl-cfg"])
def test_opcheck_policy_loss(device, noise, rich) -> None:
    import pcpo_kernels.ops.policy_loss.triton  # noqa: F401

    case = make_case(3, (6, 5), noise=noise, with_reference=rich, with_guidance=rich).cast(torch.float32).to(device)
    if rich:  # as guided training hands it over: the gradients are in the halves' dtype
        case = case.cast(torch.float16, "output", "unconditional")
    case.output.requires_grad_()
    if case.unconditional is not None:
        case.unconditional.requires_grad_()
    torch.library.opcheck(torch.ops.pcpo_kernels.policy_loss.default, loss_arguments(case))


def test_opcheck_the_others(device) -> None:
    import pcpo_kernels.ops.guidance.triton
    import pcpo_kernels.ops.sample_step.triton  # noqa: F401

    ops = torch.ops.pcpo_kernels
    x, f = (torch.randn(3, 10, device=device) for _ in range(2))
    a, b, std = (torch.rand(3, device=device) for _ in range(3))
    key = torch.arange(3, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    torch.library.opcheck(ops.sample_step.default, (x, f, None, *key, a, b, std, True))
    torch.library.opcheck(ops.sample_step.default, (x, f, x, None, None, a, b, std, False))
    torch.library.opcheck(ops.philox_normal.default, (*key, 10))
    torch.library.opcheck(ops.guidance.default, (x.requires_grad_(), f.requires_grad_(), a, torch.float32))


@pytest.mark.parametrize("noise", KEY_FIRST)
def test_compiles_in_one_graph(device, compiled, noise) -> None:
    case = make_case(3, (6, 5), noise=noise, with_reference=True, with_guidance=True).cast(torch.float32).to(device)
    _, expected = run(case)

    @compiled
    def loss(output, unconditional):
        result = replace_run(case, output * 1.0, unconditional * 1.0)
        return result.loss * 3, result.log_ratio

    def replace_run(case, output, unconditional):
        positional, keywords = case.arguments()
        return policy_loss(output, *positional[1:], **(keywords | {"unconditional": unconditional}))

    inputs = [case.output.detach().requires_grad_(), case.unconditional.detach().requires_grad_()]
    value, log_ratio = loss(*inputs)
    assert torch.equal(log_ratio, case.run().log_ratio)
    for got, want in zip(torch.autograd.grad(value, inputs), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_rollout_compiles_in_one_graph(device, compiled) -> None:
    x, f, r = (torch.randn(3, 10, device=device) for _ in range(3))
    rows = [torch.rand(3, device=device) for _ in range(4)]
    key = torch.arange(3, device=device), torch.zeros(3, dtype=torch.int64, device=device)

    def step(x, f, r, rows, seed, offset):
        output = guidance(r, f, rows[3])
        noise = philox_normal(seed, offset, 10)
        return sample_step(x, output, *rows[:3], NoiseKey(seed, offset)).next_latents + noise

    torch.testing.assert_close(compiled(step)(x, f, r, rows, *key), step(x, f, r, rows, *key))


def test_dispatch(device, monkeypatch) -> None:
    x = torch.zeros(2, 3, device=device)
    assert dispatch.backend_for(x) == "triton"
    assert dispatch.backend_for(x.double()) == "reference"
    monkeypatch.setenv("PCPO_KERNELS", "reference")
    assert dispatch.backend_for(x) == "reference"
    monkeypatch.delenv("PCPO_KERNELS")
    assert dispatch.backend_for(x) == ("triton" if x.is_cuda else "reference")


def test_plan() -> None:
    for elements in (1, 3, 128, 129, 512, 16384, 129_600, 262_144, 1 << 22, 1 << 28, (1 << 31) - 1):
        plan = plan_for(elements)
        span = plan.BLOCK * plan.ITERATIONS
        assert plan.chunks(elements) <= 65535  # as many programs as a grid may have along its second axis
        assert (plan.chunks(elements) - 1) * span < elements <= plan.chunks(elements) * span


def gpu_case(rows=4, shape=(1024, 64), *, guided=False, **settings):
    """Outputs in bf16; guided as training does it, with both halves in bf16, the rest in fp32, and a reference."""
    settings |= {"with_reference": True, "with_guidance": True} if guided else {}
    case = make_case(rows, shape, **settings).cast(torch.float32)
    low = ("output", "unconditional") if guided else ("output", "old_output", "reference")
    return require_grad(case.cast(torch.bfloat16, *low).to("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_two_launches_and_no_synchronisation(noise, detached, guided) -> None:
    case = gpu_case(noise=noise, detached=detached, guided=guided)
    gradients(case.run().loss, case)
    torch.use_deterministic_algorithms(False)
    incoming = torch.ones((), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            gradients(case.run().loss, case, incoming)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 2, kernels


@pytest.mark.gpu
@pytest.mark.parametrize("guided", [False, True])
def test_cuda_graph(guided) -> None:
    """Captured once, replayed with other numbers in the same memory: seeds, scales and the incoming gradient too."""
    case = gpu_case(noise="key", with_reference=True, guided=guided)
    incoming = torch.ones((), device="cuda")

    def both():
        result = case.run()
        return result.log_ratio, *gradients(result.loss, case, incoming)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for step in range(3):
        with torch.no_grad():
            case.output.add_(0.01 * torch.randn_like(case.output))
            case.key.seed.add_(step)
            if guided:
                case.guidance_scale.add_(0.5)
            incoming.mul_(2)
        graph.replay()
        eager = both()
        assert all(torch.equal(one, other) for one, other in zip(captured, eager, strict=True))


@pytest.mark.gpu
def test_streams_do_not_disturb_each_other() -> None:
    case = gpu_case(8, (4096, 64), noise="key")
    expected = case.run().log_ratio
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(case.run().log_ratio)
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.gpu
def test_more_than_two_billion_elements() -> None:
    """int64 addressing: the last rows lie beyond 2^31 elements."""
    rows, elements = 33, 1 << 26
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    output = torch.zeros(rows, elements, dtype=torch.bfloat16, device="cuda")
    old = torch.zeros_like(output)
    output[-1, -1000:] = 1.0
    column = torch.ones(rows, device="cuda")
    key = NoiseKey(torch.arange(rows, device="cuda"), torch.zeros(rows, dtype=torch.int64, device="cuda"))
    result = policy_loss(output, old, key, column, column, column, column, clip_range=1.0, reduction="sum")
    z = philox_normal(key.seed[-1:], torch.tensor([elements - 1000], device="cuda"), 1000)
    torch.testing.assert_close(result.log_ratio[-1], z.sum() - 1000, rtol=1e-5, atol=1e-3)
    assert torch.equal(result.log_ratio[:-1], torch.zeros(rows - 1, device="cuda"))
