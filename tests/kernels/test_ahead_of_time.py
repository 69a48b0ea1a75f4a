"""Every kernel variant compiled for every target on this machine, GPU or not, and held against the committed table."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pcpo_kernels.dispatch import interpreting, triton_installed

if not triton_installed():
    pytest.skip("triton is not installed", allow_module_level=True)
if interpreting():
    pytest.skip("TRITON_INTERPRET is set: kernels of the interpreter cannot be compiled", allow_module_level=True)

import triton
from pcpo_kernels import report
from pcpo_kernels.report import TARGETS, bulk_accesses, compile_all, compile_variant
from pcpo_kernels.variants import all_variants, build, policy_loss_variants

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "kernels" / f"triton-{triton.__version__}.json"
DOCUMENTED = TABLE.parent / "triton-3.7.1.json"  # the version that docs/kernels.md shows
VARIANTS = {(variant.kernel, variant.name): variant for variant in all_variants()}


@pytest.fixture(scope="module")
def compiled():
    return compile_all()


def test_names_are_unique_and_all_compile(compiled) -> None:
    assert len(VARIANTS) == sum(1 for _ in all_variants())
    assert {result[:3] for result in compiled} == {(*name, target) for name in VARIANTS for target in TARGETS}


def test_no_spills(compiled) -> None:
    assert [result[:5] for result in compiled if result.spill_bytes] == []


def test_no_float64(compiled) -> None:
    assert [result[:3] for result in compiled if result.uses_f64] == []


def test_occupancy(compiled) -> None:
    """At least four programs of four warps fit on an NVIDIA multiprocessor (65536 registers)."""
    assert [result[:4] for result in compiled if not result.target.startswith("gfx") and result.registers > 128] == []


def test_16_byte_accesses(compiled) -> None:
    """Every bulk byte moves in 16-byte accesses, and is read or written once: none narrower, none twice."""
    for result in compiled:
        variant = VARIANTS[result.kernel, result.variant]
        lanes = 64 if result.target.startswith("gfx") else 32
        counts = bulk_accesses(result)
        if lanes * variant.warps * 8 > variant.constants["BLOCK"]:
            continue  # a wide wavefront over the short rows of the demonstration: not enough elements for each lane
        for way, expected in (("load", variant.loaded_bytes), ("store", variant.stored_bytes)):
            moved = counts[way].get(16, 0) * 16 * lanes * variant.warps
            allowed = {expected, expected * variant.constants["ITERATIONS"]}  # the compiler may unroll the loop
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
    committed = json.loads(TABLE.read_text())
    assert report.rows(compiled) == committed, (
        f"python -m pcpo_kernels.report --json > {TABLE}, and review the difference"
    )


def test_there_is_a_table() -> None:
    assert any(TABLE.parent.glob("triton-*.json"))


def test_table_is_printed(compiled) -> None:
    text = report.table(report.rows(compiled))
    assert len(text.splitlines()) == 2 + len(VARIANTS)
    record = report.rows(compiled)[0]
    assert list(record) == [
        "kernel", "variant", "target", "registers", "spill_bytes", "shared_bytes", "uses_f64", "triton",
    ]  # fmt: skip
    assert json.loads(report.as_json([record])) == [record]


def test_unknown_pointers_and_targets_are_refused() -> None:
    variant = policy_loss_variants("bf16", "key")[1]
    with pytest.raises(ValueError, match="no parameter nonsense"):
        build(variant.function, "x", {"nonsense": "fp32"}, {}, {}, 100)
    with pytest.raises(ValueError, match="target must be one of sm_80"):
        compile_variant(variant, "sm_70")


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
    """The table in docs/kernels.md is taken from the committed one."""
    text = (TABLE.parents[3] / "docs" / "kernels.md").read_text()
    written = re.findall(r"^\| `(\w+)` \| ([\w-]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert len(written) >= 10
    committed = {tuple(list(record.values())[:3]): record["registers"] for record in json.loads(DOCUMENTED.read_text())}
    for kernel, variant, *registers in written:
        assert [committed[kernel, variant, target] for target in TARGETS] == list(map(int, registers)), (
            kernel,
            variant,
        )
    assert f"all {len(VARIANTS)} variants" in " ".join(text.split())
