"""What compiled kernels issue on an NVIDIA GPU: instructions, counted in the disassembly along a program's path."""

import re
import struct
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Instruction = tuple[int, str]
"""Address and text."""

HALF_RATE = frozenset(
    (
        "F2F", "F2FP", "F2I", "FMNMX", "FSEL", "FSETP", "I2F", "I2FP", "IABS", "IADD3", "IMAD", "IMNMX", "ISETP",
        "LEA", "LOP3", "MUFU", "PRMT", "SEL", "SHF", "SHL", "VIADD", "VIMNMX",
    )
)  # fmt: skip
"""Arithmetic at half the rate of float32's, or less, in NVIDIA's table of throughputs for compute capability 9.0."""

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_PARTS = re.compile(r"(@!?U?P\w+\s+)?([A-Z]\w*)\S*\s*(.*)")
_BULK = re.compile(r"\b(?:LDG|STG)\S*\.128")


class Issued(NamedTuple):
    """What a thread issues on the shortest path through a kernel that makes all of its 16-byte accesses.

    So a loop runs once, and a program that is not its row's last leaves early.

    Attributes:
        instructions: all, predicated ones too.
        half_rate: those of :data:`HALF_RATE` among them.
        barriers: of the whole program.
        branches: that may be taken.
        calls: of subroutines, anywhere in the kernel.
    """

    instructions: int
    half_rate: int
    barriers: int
    branches: int
    calls: int


def machine_code(cubin: bytes) -> bytes:
    """The code section of a cubin, which is a 64-bit ELF file with one kernel."""
    (start,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, start + index * size) for index in range(count)]
    found = [one for one in sections if cubin.startswith(b".text.", sections[names][4] + one[0])]
    ((_, _, _, _, begin, length),) = found
    return cubin[begin : begin + length]


def disassemble(codes: Sequence[bytes], target: str) -> list[list[Instruction]]:
    """The instructions of each of several codes for one target, such as ``sm_90``.

    Triton's ``nvdisasm`` needs a second to start and little for a kernel, so it is called once for all.
    """
    from triton import knobs

    number = target.removeprefix("sm_")
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        kind = f"SM{number}" + "a" * (int(number) >= 90)
        command = [knobs.nvidia.nvdisasm.path, "--no-dataflow", "--binary", kind, file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions = [(int(address, 16), text) for address, text in _LINE.findall(listing)]
    if len(instructions) * 16 != sum(map(len, codes)):
        raise RuntimeError("nvdisasm did not disassemble every instruction")
    results, begin = [], 0
    for code in codes:
        results.append(instructions[begin : begin + len(code) // 16])
        begin += len(code) // 16
    return results


def issued(code: Sequence[Instruction]) -> Issued:
    """Count a kernel's instructions; see :class:`Issued`."""
    places = {address: place for place, (address, _) in enumerate(code)}
    parts = [_split(text) for _, text in code]
    following = [_following(place, parts[place], places) for place in range(len(code))]
    ends = frozenset(place for place, (_, name, *_) in enumerate(parts) if name == "EXIT")
    path = [0]
    for place, (_, text) in enumerate(code):
        if _BULK.search(text):  # one of another arm of a branch is passed over
            path += _shortest(following, path[-1], frozenset((place,)))
    path += _shortest(following, path[-1], ends)
    names = [parts[place][1] for place in path]
    return Issued(
        len(path),
        sum(name in HALF_RATE for name in names),
        names.count("BAR"),
        sum(len(following[place]) > 1 for place in path if parts[place][1] != "EXIT"),
        sum(name == "CALL" for _, name, *_ in parts),
    )


def _split(text: str) -> tuple[str, str, str]:
    """Predicate, mnemonic without its modifiers, and operands of an instruction."""
    found = _PARTS.match(text)
    if found is None:
        raise RuntimeError(f"not an instruction: {text!r}")
    predicate, name, operands = found.groups(default="")
    return predicate, name, operands


def _following(place: int, parts: tuple[str, str, str], places: dict[int, int]) -> tuple[int, ...]:
    """Where a program may go from an instruction; past a call, and nowhere from a subroutine's end."""
    predicate, name, operands = parts
    if name == "RET" or (name == "EXIT" and not predicate):
        return ()
    if name == "BRA":
        *conditions, address = operands.split(", ")
        to = places[int(address, 16)]
        return (place + 1, to) if predicate or conditions else (to,)
    return (place + 1,) if place + 1 < len(places) else ()


def _shortest(following: Sequence[Iterable[int]], start: int, ends: frozenset[int]) -> list[int]:
    """The places after ``start`` on the shortest way to one of ``ends``; none where there is no way."""
    before = {start: start}
    left = deque([start])
    while left:
        here = left.popleft()
        for place in following[here]:
            if place in before:
                continue
            before[place] = here
            left.append(place)
            if place in ends:
                way = [place]
                while before[way[-1]] != start:
                    way.append(before[way[-1]])
                return way[::-1]
    return []
