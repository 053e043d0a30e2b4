"""Read SASS, the machine code of NVIDIA GPUs, as `cuobjdump` of the Triton wheel prints it.

An instruction reads `[@guard] OPCODE.MODIFIERS operands`. The ones that matter here:

    HMMA, HGMMA, UTC*MMA    tensor cores: of one warp (sm_80), a warpgroup (sm_90), a block (sm_100)
    UTMALDG, UTMAREDG       tensor memory accelerator: load a tile, or add one to global memory
    LDG, STG                global memory; `.128` moves 16 bytes a lane, the widest up to sm_90
    LDL, STL                local memory, that is spilled registers
    MUFU.EX2                2^x, on a unit that takes 4 lanes a cycle

**Overlap.** On sm_90 an HGMMA is asynchronous: the four warps of a warpgroup hand it to the tensor
cores and go on. The one marked `gsb0` closes a group, and `WARPGROUP.DEPBAR.LE gsb0, N` waits until
at most N groups are unfinished. Flash attention has two products and a softmax per block of keys,
and is fast when the softmax is computed while a product runs. The textbook loop does not do that:

    HGMMA ... gsb0                   scores
    WARPGROUP.DEPBAR.LE gsb0, 0x0    wait, the tensor cores fall idle
    FMNMX, FFMA, MUFU.EX2 ...        softmax, with nothing in the background
    HGMMA ... gsb0                   output
    WARPGROUP.DEPBAR.LE gsb0, 0x0

If the product of the *next* scores is issued first, the wait moves below the softmax.

A product of one block is several HGMMA in a row, of which only the last should carry `gsb0`. Where
each of them does, ptxas could not allot the registers (its warning C7511, which Triton does not
show) and has *serialized* them: the tensor cores drain after each.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import triton

_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/ \s* (?:@(!?U?P\w+) \s+)? ([A-Z][\w.]*) ([^;]*) ;", re.VERBOSE
)


class Instruction(NamedTuple):
    address: int
    guard: str  # predicate under which it runs, "" if it always does
    opcode: str  # with modifiers: "LDG.E.128"
    operands: str

    @property
    def is_wgmma(self) -> bool:
        return self.opcode.startswith("HGMMA")

    @property
    def closes_group(self) -> bool:
        return self.is_wgmma and "gsb0" in self.operands


@dataclass(frozen=True)
class Program:
    """A disassembled kernel."""

    text: str

    @cached_property
    def instructions(self) -> list[Instruction]:
        return [
            Instruction(int(address, 16), guard, opcode, operands.strip())
            for address, guard, opcode, operands in _INSTRUCTION.findall(self.text)
        ]

    @cached_property
    def counts(self) -> Counter[str]:
        """Instructions by opcode without modifiers; those of 128 bits and more again as "LDG.128".

        The several tcgen05 products (UTCHMMA, UTCQMMA, ...) count as "UTCMMA".
        """
        counts: Counter[str] = Counter()
        for instruction in self.instructions:
            name, *modifiers = instruction.opcode.split(".")
            name = re.sub(r"^UTC\w*MMA$", "UTCMMA", name)
            counts[name] += 1
            if "128" in modifiers or "256" in modifiers:
                counts[name + ".128"] += 1
        return counts

    @cached_property
    def loops(self) -> list[list[Instruction]]:
        """The instructions of each loop, from the target of a backward branch to the branch.

        A jump back from code set apart behind EXIT (the retries of a barrier) is no loop.
        """
        furthest: dict[int, int] = {}
        for address, guard, opcode, operands in self.instructions:
            conditional = guard or opcode.startswith("BRA.U")
            if opcode.split(".")[0] == "BRA" and conditional:
                target = int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16)
                if target <= address:
                    furthest[target] = address
        bodies = [
            [i for i in self.instructions if start <= i.address <= end]
            for start, end in furthest.items()
        ]
        return [body for body in bodies if not any(i.opcode == "EXIT" for i in body)]

    @cached_property
    def local_in_loops(self) -> int:
        """Accesses to local memory that run again and again: those inside a loop, or all of them in
        a kernel without one, whose body each program runs once on few elements."""
        inside = {i for loop in self.loops for i in loop} if self.loops else self.instructions
        return sum(i.opcode.split(".")[0] in ("LDL", "STL") for i in inside)

    @cached_property
    def serialized(self) -> bool:
        """Whether every wgmma, of more than one, is a group by itself."""
        wgmma = [i for i in self.instructions if i.is_wgmma]
        return len(wgmma) > 1 and all(i.closes_group for i in wgmma)

    @cached_property
    def overlap(self) -> float | None:
        """Share of the softmax issued while a wgmma of the same warpgroup is in flight, 0 to 1.

        The softmax is what an innermost loop with both HGMMA and MUFU.EX2 issues besides HGMMA, in
        issue cycles: 8 for a MUFU, 1 for any other. The least over such loops, or None without one.
        Branches within the loop are read straight through.
        """
        tensor = [loop for loop in self.loops if any(i.is_wgmma for i in loop)]
        innermost = [
            loop for loop in tensor
            if not any(o is not loop and loop[0] <= o[0] and o[-1] <= loop[-1] for o in tensor)
        ]  # fmt: skip
        softmax = [x for x in innermost if any(i.opcode.startswith("MUFU.EX2") for i in x)]
        return min(map(_overlap, softmax), default=None)


def _overlap(loop: list[Instruction]) -> float:
    groups, open_group = 0, False
    for _ in range(2):  # the second time around begins with what the first left in flight
        cycles = covered = 0
        for instruction in loop:
            if instruction.is_wgmma:
                open_group = not instruction.closes_group
                groups += not open_group
                continue
            if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
                groups = min(groups, int(instruction.operands.split(",")[-1], 16))
            cost = 8 if instruction.opcode.startswith("MUFU") else 1
            cycles += cost
            covered += cost if groups or open_group else 0
    return covered / cycles


@lru_cache
def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) per thread. Local memory of ours is spilled registers."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump("--dump-resource-usage", cubin))
    return int(found[1]), int(found[2])


def disassemble(cubin: bytes) -> Program:
    return Program(_cuobjdump("-sass", cubin))


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
