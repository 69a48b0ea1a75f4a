"""Every kernel variant compiled for every target on this machine, GPU or not, and held against the committed table."""

import json
import math
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import make_case
from pcpo_kernels.dispatch import interpreting, triton_installed

if not triton_installed():
    pytest.skip("triton is not installed", allow_module_level=True)
if interpreting():
    pytest.skip("TRITON_INTERPRET is set: kernels of the interpreter cannot be compiled", allow_module_level=True)

import triton
from pcpo_kernels import report
from pcpo_kernels.disassembly import Issued, issued
from pcpo_kernels.ops.policy_loss import triton as loss_op
from pcpo_kernels.ops.policy_loss.inputs import LossInputs
from pcpo_kernels.ops.policy_loss.variants import policy_loss_variants
from pcpo_kernels.ops.sample_step import triton as step_op
from pcpo_kernels.report import TARGETS, bulk_accesses, compile_all, compile_variant
from pcpo_kernels.variant import SIZES, all_variants, build
from triton.runtime import driver

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "kernels" / f"triton-{triton.__version__}.json"
DOCUMENTED = TABLE.parent / "triton-3.7.1.json"  # the version that docs/kernels.md shows
VARIANTS = {(variant.kernel, variant.name): variant for variant in all_variants()}


@pytest.fixture(scope="module", params=["thin", pytest.param("full", marks=pytest.mark.slow)])
def compiled(request):
    """Every kernel on sm_90; with the slow tests every variant on all targets."""
    return compile_all(thin=request.param == "thin")


def test_all_compile(compiled) -> None:
    done = {result[:3] for result in compiled}
    assert {kernel for kernel, _, _ in done} == {kernel for kernel, _ in VARIANTS}
    thin, full = (
        {(one.kernel, one.name, target) for one, target in report.pairs(TARGETS, few)} for few in (True, False)
    )
    assert done in (thin, full) and full == {(*name, target) for name in VARIANTS for target in TARGETS}


def test_names_are_unique() -> None:
    assert len(VARIANTS) == sum(1 for _ in all_variants())


def test_committed_table_is_complete() -> None:
    """Also where it is not compiled here: a record for every variant and target, no spills or float64, and counts."""
    committed = json.loads(DOCUMENTED.read_text())
    keys = [tuple(list(record.values())[:3]) for record in committed]
    assert keys == sorted((*name, target) for name in VARIANTS for target in TARGETS)
    assert not any(record["spill_bytes"] or record["uses_f64"] for record in committed)
    assert all((record["instructions"] is None) == (record["target"] != report.COUNTED) for record in committed)


class Sm90:
    """As much of a Triton driver as it takes to find out what a launch would compile."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return report.gpu_target("sm_90")


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[str]]:
    """For a kernel, the keys of what its launches from here on would compile; nothing is compiled or launched."""

    def record(kernel: Any) -> list[str]:
        keys: list[str] = []
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
        monkeypatch.setattr(kernel, "_do_compile", lambda key, *_: keys.append(key))
        return keys

    monkeypatch.setattr(driver, "_active", Sm90())
    return record


def test_settings_make_no_variant(compilations) -> None:
    """Clip range, objective, reduction and batch size are arguments at run time: one compiled kernel for all."""
    keys = compilations(loss_op.policy_loss_forward_kernel)

    def call(noise: str, *settings: Any, rows: int = 3) -> None:
        case = make_case(rows, (512,), noise=noise).cast(torch.float32)
        (output, old, z, *columns), _ = case.arguments()
        loss_op.policy_loss(LossInputs(output, old, z, *columns, *settings, None, None, None, None, None))

    for clip_range in (1e-4, 0.2, 0, 1, 16, math.inf):
        call("key", clip_range, "hinge", "mean")
    for threshold in (1e-5, 0.2):
        call("key", threshold, "divergence_mask", "mean")
    call("key", 0.2, "clip", "mean")
    call("key", 0.2, "clip", "sum", rows=16)
    assert len(keys) == 10
    assert len(set(keys)) == 1
    call("endpoints", 0.2, "clip", "mean")
    assert len(set(keys)) == 2


def test_reduction_of_a_step_makes_no_variant(compilations) -> None:
    keys = compilations(step_op.sample_step_kernel)
    case = make_case(3, (512,)).cast(torch.float32)
    x, _, a, b, std = case.ends
    for reduction in ("mean", "sum"):
        step_op.sample_step(x, case.output, a, b, std, case.key, reduction)
    assert len(keys) == 2
    assert len(set(keys)) == 1


def test_no_spills(compiled) -> None:
    """But for one with Triton 3.6.0 and 3.9.0."""
    spills = triton.__version__ in ("3.6.0", "3.9.0")
    known = [("adaptive_norm_backward", "bf16-residual-norm-6144")] if spills else []
    assert [result[:5] for result in compiled if result.spill_bytes and result[:2] not in known] == []


MOST_ISSUED = {
    "policy_loss_forward": (53.0, 5 if triton.__version__ == "3.9.0" else 4),
    "policy_loss_backward": (50.5, 0),
}
"""Instructions per element on sm_90 of the loss with noise from a key, and barriers; no kernel calls a subroutine."""


def test_instructions_per_element(compiled) -> None:
    found = {}
    for result in compiled:
        if result.target == report.COUNTED:
            assert result.issued.calls == 0, result[:3]
            if result.kernel in MOST_ISSUED and result.variant == "bf16-key":
                found[result.kernel] = result.issued.instructions / result.elements, result.issued.barriers
    assert found.keys() == MOST_ISSUED.keys()
    for kernel, (most, barriers) in MOST_ISSUED.items():
        assert found[kernel][0] <= most and found[kernel][1] <= barriers, (kernel, found[kernel])


LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR8][R2.64] ;
        /*0020*/                   BSSY B0, 0x70 ;
        /*0030*/               @P1 BRA 0x60 ;
        /*0040*/                   CALL.REL.NOINC 0xf0 ;
        /*0050*/                   BRA 0x70 ;
        /*0060*/                   IMAD.WIDE.U32 R6, R4, 0x4, R2 ;
        /*0070*/                   BSYNC B0 ;
        /*0080*/               @P4 BRA P5, 0x30 ;
        /*0090*/                   STG.E.128 desc[UR8][R6.64], R4 ;
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00b0*/               @P0 EXIT ;
        /*00c0*/                   IADD3 R1, R1, 0x1, RZ ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   BRA 0xe0 ;
        /*00f0*/                   MUFU.RSQ R3, R2 ;
        /*0100*/                   RET.REL.NODEC R6 0x0 ;
"""


def test_instructions_are_counted_along_the_shortest_path() -> None:
    """By hand: around the call, once through the loop, and out at the first EXIT; LDC ... BRA, IMAD ... EXIT."""
    code = [(int(line[10:14], 16), line.split("*/")[1].strip(" ;")) for line in LISTING.strip("\n").splitlines()]
    assert issued(code) == Issued(instructions=10, half_rate=1, barriers=1, branches=2, calls=1)
    # An access in the arm with the call leads through it.
    code[5] = code[5][0], "LDG.E.128 R8, desc[UR8][R2.64]"
    assert issued(code) == Issued(instructions=12, half_rate=1, barriers=1, branches=2, calls=1)


def test_no_float64(compiled) -> None:
    assert [result[:3] for result in compiled if result.uses_f64] == []


def test_clip_range_may_come_as_float64() -> None:
    """As Inductor passes it: rounded at once, as the host does elsewhere, and used in float32."""
    first = next(one for one in VARIANTS.values() if one.kernel == "policy_loss_forward")
    result = compile_variant(first._replace(signature=first.signature | {"clip_range": "fp64"}), "sm_90")
    used = [line.split()[0] for line in result.assembly.splitlines() if "f64" in line]
    assert used == [".param", "cvt.rn.f32.f64"]


def test_occupancy(compiled) -> None:
    """At least 16 warps fit on an NVIDIA multiprocessor (65536 registers); 12 where a thread takes 24 channels."""
    for result in compiled:
        if not result.target.startswith("gfx"):
            parts = VARIANTS[result.kernel, result.variant].constants.get("PARTS", 1)
            assert result.registers <= (128 if parts == 1 else 168), result[:4]


def test_16_byte_accesses(compiled) -> None:
    """Every bulk byte moves in 16-byte accesses, and is read or written once: none narrower, none twice."""
    for result in compiled:
        variant = VARIANTS[result.kernel, result.variant]
        lanes = 64 if result.target.startswith("gfx") else 32
        counts = bulk_accesses(result)
        if lanes * variant.warps * 8 > variant.block // variant.constants.get("PARTS", 1):
            continue  # wide wavefronts over short rows: not enough elements for each lane
        # Tokens that are on their way before the loop are fetched by further instructions, those of a row are not; on
        # AMD the last tokens are worked on after the loop.
        stages = variant.constants.get("STAGES", 1)
        given = sum(variant.signature.get(name, "")[:1] == "*" for name in ("gate", "shift", "scale"))
        rows = given * variant.block * SIZES[variant.name.split("-")[0]] if stages > 1 else 0
        for way, expected in (("load", variant.loaded_bytes), ("store", variant.stored_bytes)):
            moved = counts[way].get(16, 0) * 16 * lanes * variant.warps
            allowed = {expected, expected * variant.constants.get("ITERATIONS", 1)}  # the compiler may unroll the loop
            if way == "load":
                allowed.add(stages * (expected - rows) + rows)
            elif lanes == 64:
                allowed.add(stages * expected)
            assert moved in allowed, (result[:3], way, counts)


def test_narrow_accesses_are_noticed() -> None:
    """The check above can fail: without alignment the same kernel is compiled to narrower accesses."""
    variant = policy_loss_variants("bf16", "endpoints")[1]
    crooked = compile_variant(variant._replace(aligned=()), "sm_90")
    assert 16 not in bulk_accesses(crooked)["load"]


def test_float64_is_noticed() -> None:
    variant = policy_loss_variants("bf16", "endpoints")[1]
    wrong = variant._replace(signature=variant.signature | {"gradient": "*fp64"})
    assert compile_variant(wrong, "sm_90").uses_f64
    assert compile_variant(wrong, "gfx942").uses_f64


def test_committed_table(compiled) -> None:
    if not TABLE.is_file():
        pytest.skip(f"no table for triton {triton.__version__}: python -m pcpo_kernels.report --json > {TABLE.name}")
    done = {result[:3] for result in compiled}
    committed = [row for row in json.loads(TABLE.read_text()) if tuple(list(row.values())[:3]) in done]
    assert report.rows(compiled) == committed, (
        f"python -m pcpo_kernels.report --json > {TABLE}, and review the difference"
    )


def test_there_is_a_table() -> None:
    assert any(TABLE.parent.glob("triton-*.json"))


def test_table_is_printed() -> None:
    records = json.loads(DOCUMENTED.read_text())
    assert len(report.table(records).splitlines()) == 2 + len(VARIANTS)
    record = records[0]
    assert list(record) == [
        "kernel", "variant", "target", "registers", "spill_bytes", "shared_bytes", "uses_f64", "elements",
        "instructions", "half_rate", "barriers", "branches", "calls", "triton",
    ]  # fmt: skip
    assert json.loads(report.as_json([record])) == [record]


def test_unknown_pointers_and_targets_are_refused() -> None:
    variant = policy_loss_variants("bf16", "key")[1]
    with pytest.raises(ValueError, match="no parameter nonsense"):
        build(variant.function, "x", {"nonsense": "fp32"}, {}, {}, 100)
    with pytest.raises(ValueError, match="target must be one of sm_80"):
        compile_variant(variant, "sm_70")


@pytest.mark.slow
def test_command_line_refuses_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pcpo_kernels.report"],
        env={"TRITON_INTERPRET": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unset TRITON_INTERPRET")


def test_documented_registers() -> None:
    """The tables in docs/kernels.md and docs/block_kernels.md are taken from the committed one."""
    text = "\n".join((TABLE.parents[3] / "docs" / f"{page}.md").read_text() for page in ("kernels", "block_kernels"))
    written = re.findall(r"^\| `(\w+)` \| ([\w-]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert len(written) >= 10
    committed = {tuple(list(record.values())[:3]): record["registers"] for record in json.loads(DOCUMENTED.read_text())}
    for kernel, variant, *registers in written:
        assert [committed[kernel, variant, target] for target in TARGETS] == list(map(int, registers)), (
            kernel,
            variant,
        )
    assert f"all {len(VARIANTS)} variants" in " ".join(text.split())


def test_documented_instructions() -> None:
    """The table of counts in docs/kernels.md is taken from the committed one."""
    text = (TABLE.parents[3] / "docs" / "kernels.md").read_text()
    written = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert [kernel for kernel, *_ in written] == ["policy_loss_forward", "policy_loss_backward", "sample_step"]
    rows = json.loads(DOCUMENTED.read_text())
    of = {row["kernel"]: row for row in rows if (row["variant"], row["target"]) == ("bf16-key", report.COUNTED)}
    for kernel, issued_there, slow, barriers, calls in written:
        row = of[kernel]
        assert f"{row['instructions'] / row['elements']:.1f}" == issued_there
        assert f"{row['half_rate'] / row['elements']:.1f}" == slow
        assert (row["barriers"], row["calls"]) == (int(barriers), int(calls))


TRAFFIC = {
    "noise made in the kernel (`NoiseKey`)": "bf16-key",
    "noise from the endpoints": "bf16-endpoints",
    "on-policy (`old_output=None`, endpoints)": "bf16-detached",
    "noise as an fp32 tensor": "bf16-tensor",
    "with an unconditional half, key": "bf16-key-cfg",
    "with an unconditional half, endpoints": "bf16-endpoints-cfg",
    "with an unconditional half, on-policy": "bf16-detached-cfg",
}


def bytes_per_element(name: str) -> tuple[int, int, int]:
    """Read forward, read backward and written, by the variants whose compiled code is counted above."""
    forward, backward = (VARIANTS[f"policy_loss_{way}", name] for way in ("forward", "backward"))
    counts = forward.loaded_bytes, backward.loaded_bytes, backward.stored_bytes
    assert forward.stored_bytes == 0
    return tuple(count // forward.constants["BLOCK"] for count in counts)


def test_documented_traffic() -> None:
    """The table of memory traffic in docs/kernels.md: forms of the loss, and what a reference output adds to each."""
    text = (TABLE.parents[3] / "docs" / "kernels.md").read_text()
    written = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| (\d+) \| \*\*(\d+)\*\* \|$", text, re.MULTILINE)
    assert [form for form, *_ in written] == list(TRAFFIC)
    for form, *cells in written:
        counts = bytes_per_element(TRAFFIC[form])
        assert [int(cell.split()[-1]) for cell in cells] == [*counts, sum(counts)], form
    added = re.findall(r"^\| with .*reference output \| \+ (\d).*: (\d)\) \| \+ (\d) \| \| \|$", text, re.MULTILINE)
    assert len(added) == 2
    for numbers, extras in zip(added, ("", "-cfg"), strict=True):
        more, alone, backward = map(int, numbers)
        for noise in ("key", "endpoints", "detached"):
            plain = bytes_per_element(f"bf16-{noise}{extras}")
            rich = bytes_per_element(f"bf16-{noise}{extras.replace('-cfg', '')}-kl{extras}")
            assert rich[0] - plain[0] == (alone if noise == "detached" else more)
            assert (rich[1] - plain[1], rich[2] - plain[2]) == (backward, 0)


def test_documented_block_traffic() -> None:
    """The table of passes in docs/block_kernels.md, against the variants whose compiled code is counted above."""
    text = (TABLE.parents[3] / "docs" / "block_kernels.md").read_text()
    written = re.findall(r"^\| `(\w+)`(?:, [a-z ]+)? \| (\d) \(\d+\) \| (\d) \| (\d) \|$", text, re.MULTILINE)
    rows = {"gate", "shift", "scale", "partials"}  # of an image or a program, not of its tokens

    def passes(kernel: str, name: str) -> int:
        variant = VARIANTS[kernel, name]
        tokens = ("source", "branch", "hidden", "normed", "x", "result", "incoming", "gradient")
        names = (*tokens, "grad_hidden", "grad_normed", "grad_source", "grad_branch")
        given = [parameter for parameter, kind in variant.signature.items() if kind == "*bf16"]
        assert set(given) <= {*names, *rows, "weight"}
        return sum(parameter in names for parameter in given)

    kinds = {"modulated_norm": "norm", "gated_residual": "residual", "gated_residual_norm": "residual-norm"}
    assert [op for op, *_ in written] == [*kinds, "norm_rope", "swiglu"]
    halves = [VARIANTS[f"swiglu_{way}", "bf16"] for way in ("forward", "backward")]
    moved = [(half.loaded_bytes + half.stored_bytes) // (SIZES["bf16"] * half.block) for half in halves]
    assert list(map(int, written.pop()[1:])) == [moved[0], moved[1], moved[1]]
    for op, *counts in written:
        kernel, name = ("adaptive_norm", f"bf16-{kinds[op]}") if op in kinds else ("norm_rope", "bf16")
        found = [passes(f"{kernel}_forward", name)]
        found += [passes(f"{kernel}_backward", name + frozen) for frozen in ("-frozen", "")]
        assert found == list(map(int, counts)), op
