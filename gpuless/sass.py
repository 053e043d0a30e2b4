"""Read SASS, the machine code of NVIDIA GPUs, as `cuobjdump` of the Triton wheel prints it.

An instruction reads `[@guard] OPCODE.MODIFIERS operands`; R are registers, UR registers that a warp
shares, P and UP predicates. What to look for:

    HMMA, HGMMA, UTC*MMA    tensor cores: of one warp (sm_80), a warpgroup (sm_90), a block (sm_100)
    UTMALDG, UTMASTG        tensor memory accelerator: a tile between global and shared memory
    LDGSTS                  global to shared memory past the registers (cp.async)
    LDG, STG                global memory; `.128` moves 16 bytes a lane, the widest up to sm_90
    LDL, STL                local memory, that is spilled registers
    MUFU.EX2                2^x, on a unit that takes 4 lanes a cycle
    BAR.SYNC                all warps of the block wait for each other

**Overlap.** On sm_90 an HGMMA is asynchronous: the four warps of a warpgroup hand it to the tensor
cores and go on. The one marked `gsb0` closes a group, and `WARPGROUP.DEPBAR.LE gsb0, N` waits until
at most N groups are unfinished. Flash attention has two products and a softmax per block of keys,
and is fast when the softmax is computed while a product runs. The textbook loop does not do that:

    HGMMA ... gsb0                   scores
    WARPGROUP.DEPBAR.LE gsb0, 0x0    wait, the tensor cores fall idle
    FMNMX, FFMA, MUFU.EX2 ...        softmax, with nothing in the background
    HGMMA ... gsb0                   output
    WARPGROUP.DEPBAR.LE gsb0, 0x0

With the product of the *next* scores asked for first, the wait moves below the softmax. `overlap`
gives the share of the softmax that lies between an HGMMA and the wait for it.

A product of one block is several HGMMA in a row, of which only the last should carry `gsb0`. Where
each of them does, and is waited for, ptxas could not allot the registers (its warning C7511, which
Triton does not show) and has *serialized* them: the tensor cores drain after each.
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


class Resources(NamedTuple):
    registers: int  # per thread
    stack: int  # bytes of local memory per thread; in a Triton kernel these are spilled registers


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
        """The instructions of each loop, from the target of a backward branch up to the branch.

        Jumps that come back from code set apart behind EXIT (retries of a barrier) are no loops.
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
    def serialized(self) -> bool:
        """Whether every wgmma, of more than one, is a group by itself."""
        wgmma = [i for i in self.instructions if _is_wgmma(i)]
        return len(wgmma) > 1 and all(map(_closes_group, wgmma))

    @cached_property
    def overlap(self) -> float | None:
        """Share of the softmax issued while a wgmma of the same warpgroup is in flight, 0 to 1.

        The softmax is what an innermost loop that holds both HGMMA and MUFU.EX2 issues besides
        HGMMA, in issue cycles: 8 for a MUFU, 1 for any other. The least over such loops; None where
        there is none. Branches within the loop are read straight through.
        """
        tensor = [loop for loop in self.loops if any(map(_is_wgmma, loop))]
        innermost = [loop for loop in tensor if not any(_within(other, loop) for other in tensor)]
        exponential = [
            loop for loop in innermost if any(i.opcode.startswith("MUFU.EX2") for i in loop)
        ]
        return min(map(_overlap, exponential), default=None)


@lru_cache
def resources(cubin: bytes) -> Resources:
    """What a thread of the kernel needs."""
    out = _cuobjdump("--dump-resource-usage", cubin)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", out).groups()
    return Resources(int(registers), int(stack))


def disassemble(cubin: bytes) -> Program:
    return Program(_cuobjdump("-sass", cubin))


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _is_wgmma(instruction: Instruction) -> bool:
    return instruction.opcode.startswith("HGMMA")


def _closes_group(wgmma: Instruction) -> bool:
    return "gsb0" in wgmma.operands


def _within(inner: list[Instruction], outer: list[Instruction]) -> bool:
    return inner is not outer and outer[0] <= inner[0] and inner[-1] <= outer[-1]


def _overlap(loop: list[Instruction]) -> float:
    groups, open_group = 0, False
    for _ in range(2):  # the second time around begins with what the first left in flight
        cycles = covered = 0
        for instruction in loop:
            if _is_wgmma(instruction):
                open_group = not _closes_group(instruction)
                groups += not open_group
                continue
            if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
                groups = min(groups, int(instruction.operands.split(",")[-1], 16))
            cost = 8 if instruction.opcode.startswith("MUFU") else 1
            cycles += cost
            covered += cost if groups or open_group else 0
    return covered / cycles
