"""Compile every kernel variant ahead of time, without a GPU, and print the resources and instructions that it takes.

python -m pcpo_kernels.report            a table
python -m pcpo_kernels.report --json     the same for a script
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

from pcpo_kernels.disassembly import Issued, disassemble, issued, machine_code

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
COUNTED = "sm_90"
"""The target whose instructions are counted."""


class Compiled(NamedTuple):
    """A compiled variant's resources, its elements per thread and block, and its assembly (PTX or AMDGCN).

    ``issued`` is counted by :func:`compile_all`, on :data:`COUNTED`.
    """

    kernel: str
    variant: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    uses_f64: bool
    elements: float
    assembly: str
    code: bytes = b""
    issued: Issued | None = None


def compile_variant(variant: Any, target: str) -> Compiled:
    """Compile one :class:`pcpo_kernels.variant.Variant` for one of :data:`TARGETS`.

    Raises:
        ValueError: unknown target.
    """
    import triton
    from triton.compiler import ASTSource
    from triton.runtime import driver

    source = ASTSource(
        fn=variant.function,
        signature=variant.signature,
        constexprs=variant.constants,
        attrs={(position,): [["tt.divisibility", 16]] for position in variant.aligned},
    )
    options = {"num_warps": variant.warps, "enable_fp_fusion": False}
    before = driver._active
    driver.set_active(_Driver(gpu_target(target)))  # which a kernel asks for its target
    try:
        compiled = triton.compile(source, target=gpu_target(target), options=options)
    finally:
        driver._active = before
    amd = target.startswith("gfx")
    read = amd_resources if amd else nvidia_resources
    registers, spill_bytes, uses_f64, assembly = read(compiled.asm)
    return Compiled(
        variant.kernel, variant.name, target, registers, spill_bytes, compiled.metadata.shared, uses_f64,
        variant.block / ((64 if amd else 32) * variant.warps), assembly,
        machine_code(compiled.asm["cubin"]) if target == COUNTED else b"",
    )  # fmt: skip


class _Driver(NamedTuple):
    """As much of a Triton driver as kernels ask for."""

    target: Any

    def get_current_target(self) -> Any:
        return self.target


def gpu_target(name: str) -> Any:
    """Triton's ``GPUTarget`` for a target name."""
    from triton.backends.compiler import GPUTarget

    if name not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {name!r}")
    return (
        GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    )


def nvidia_resources(asm: Any) -> tuple[int, int, bool, str]:
    """Registers and stack bytes per thread from the cubin (read by Triton's cuobjdump); float64 use from the PTX."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump did not report registers: {usage!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local, ".f64" in asm["ptx"], asm["ptx"]


def amd_resources(asm: Any) -> tuple[int, int, bool, str]:
    """Vector registers and scratch bytes per lane from the assembly's metadata.

    Scalars spilled to lanes of vector registers (``sgpr_spill_count``) use no memory and are not counted.
    """
    text: str = asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        if found is None:
            raise RuntimeError(f"the assembly does not contain .{name}")
        return int(found[1])

    spilled = 4 * number("vgpr_spill_count")
    uses_f64 = re.search(r"^\s*v_\w*_f64", text, re.MULTILINE) is not None
    return number("vgpr_count"), max(spilled, number("private_segment_fixed_size")), uses_f64, text


def bulk_accesses(compiled: Compiled) -> dict[str, dict[int, int]]:
    """Number of global memory loads (to registers or shared memory) and stores per thread, by width in bytes.

    Widths up to 8 bytes include scalars of the row vectors.
    """
    counts: dict[str, dict[int, int]] = {"load": {}, "store": {}}
    if compiled.target.startswith("gfx"):
        sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "byte": 1, "ubyte": 1}
        pattern = r"\b(?:global|buffer|flat)_(load|store)_(?:short_)?(\w+)"
        pairs = [(way, sizes.get(kind.split("_")[0], 4)) for way, kind in re.findall(pattern, compiled.assembly)]
    else:
        pattern = r"\b(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfus](\d+)\b"
        found = re.findall(pattern, compiled.assembly)
        pairs = [("load" if way == "ld" else "store", int(count or 1) * int(bits) // 8) for way, count, bits in found]
        copies = re.findall(r"\bcp\.async\.\w+\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+)", compiled.assembly)
        pairs += [("load", int(size, 16)) for size in copies]
    for way, size in pairs:
        counts[way][size] = counts[way].get(size, 0) + 1
    return counts


def pairs(targets: Iterable[str], thin: bool) -> list[tuple[Any, str]]:
    """All (variant, target) pairs to compile.

    With ``thin`` every kernel is compiled for sm_90 alone, with bf16 in its plain forms ("bf16-key").
    """
    from pcpo_kernels.variant import all_variants

    chosen = [one for one in all_variants() if not thin or "-" not in one.name.removeprefix("bf16-")]
    return [(variant, target) for variant in chosen for target in targets if not thin or target == "sm_90"]


def _compile_all(targets: Iterable[str], thin: bool, share: int, shares: int) -> list[Compiled]:
    results = [compile_variant(*pair) for pair in pairs(targets, thin)[share::shares]]
    codes = [result.code for result in results if result.code]
    counts = map(issued, disassemble(codes, COUNTED) if codes else ())
    return [result._replace(code=b"", issued=next(counts) if result.code else None) for result in results]


@functools.cache
def compile_all(
    targets: tuple[str, ...] = TARGETS, processes: int | None = None, *, thin: bool = False
) -> tuple[Compiled, ...]:
    """Compile every variant for every target (see :func:`pairs` for ``thin``) on all cores; sorted."""
    if processes is None:
        processes = len(os.sched_getaffinity(0))
    if processes == 1:
        parts = [_compile_all(targets, thin, 0, 1)]
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(_compile_all, targets, thin, share, processes) for share in range(processes)]
            parts = [future.result() for future in futures]
    return tuple(sorted((result for part in parts for result in part), key=lambda result: result[:3]))


def rows(results: Iterable[Compiled]) -> list[dict[str, Any]]:
    """The records of the JSON report."""
    import triton

    names = ("kernel", "variant", "target", "registers", "spill_bytes", "shared_bytes", "uses_f64", "elements")
    return [
        {name: getattr(result, name) for name in names}
        | (result.issued or Issued(*[None] * len(Issued._fields)))._asdict()  # type: ignore[arg-type]
        | {"triton": triton.__version__}
        for result in results
    ]


def table(records: list[dict[str, Any]]) -> str:
    """One line per variant: registers per target, spills and float64 use marked; instructions per element on sm_90."""
    targets = [target for target in TARGETS if any(record["target"] == target for record in records)]
    lines = [
        f"registers per thread, triton {records[0]['triton']}; ! spills, D uses float64; "
        "instructions per element, and barriers, on sm_90"
    ]
    heads = [*targets, "shared", "issued", "barriers"]
    lines.append(f"{'kernel':24}{'variant':34}" + "".join(f"{head:>10}" for head in heads))
    grouped: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for record in records:
        grouped.setdefault((record["kernel"], record["variant"]), {})[record["target"]] = record
    for (kernel, variant), by_target in grouped.items():
        cells = []
        for target in targets:
            record = by_target[target]
            mark = "!" * (record["spill_bytes"] > 0) + "D" * record["uses_f64"]
            cells.append(f"{str(record['registers']) + mark:>10}")
        shared = max(record["shared_bytes"] for record in by_target.values())
        cells.append(f"{shared:>10}")
        if "sm_90" in by_target:
            record = by_target["sm_90"]
            cells.append(f"{record['instructions'] / record['elements']:>10.1f}{record['barriers']:>10}")
        lines.append(f"{kernel:24}{variant:34}" + "".join(cells))
    return "\n".join(lines)


def as_json(records: list[dict[str, Any]]) -> str:
    """A JSON list with one record per line, which gives readable diffs."""
    return "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]"


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status is 1 if a variant spills registers or uses float64."""
    parser = argparse.ArgumentParser(
        prog="python -m pcpo_kernels.report",
        description="Compile every kernel variant ahead of time, without a GPU: registers, spills, shared memory, "
        "instructions.",
        epilog="example: python -m pcpo_kernels.report --json --target sm_90",
    )
    parser.add_argument("--json", action="store_true", help="a JSON list, one object per variant and target")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; may be repeated")
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("error: unset TRITON_INTERPRET: interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    records = rows(compile_all(tuple(chosen.target or TARGETS)))
    print(as_json(records) if chosen.json else table(records))
    return int(any(record["spill_bytes"] > 0 or record["uses_f64"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
