"""Reading SASS, on snippets short enough to count by hand."""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from gpuless.sass import Program


def program(*lines: str) -> Program:
    """As cuobjdump prints it: address, instruction, its encoding in two words."""
    text = "\n\tcode for sm_90a\n\t\tFunction : _kernel\n"
    text += '\t.headerflags\t@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90"\n'
    for number, line in enumerate(lines):
        text += f"        /*{16 * number:04x}*/  {line:>50} ;   /* 0x00000a00ff017b82 */\n"
        text += f"{'':70}/* 0x000fe40000000800 */\n"
    return Program(text)


SCORES = "HGMMA.64x128x16.F32.BF16 R88, gdesc[UR8], RZ, !UPT"
LAST_SCORES = "HGMMA.64x128x16.F32.BF16 R88, gdesc[UR8], R88, gsb0"
OUTPUT = "HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR16].tnspB, R24, gsb0"
EX2 = "MUFU.EX2 R4, R5"
ADD = "FADD R4, R4, R5"


def wait(groups: int) -> str:
    return f"WARPGROUP.DEPBAR.LE gsb0, {groups:#x}"


def test_instructions():
    code = program("@!P0 LDG.E.128 R4, desc[UR6][R2.64+0x100]", SCORES, "NOP")
    assert code.instructions == [
        (0x00, "!P0", "LDG.E.128", "R4, desc[UR6][R2.64+0x100]"),
        (0x10, "", "HGMMA.64x128x16.F32.BF16", "R88, gdesc[UR8], RZ, !UPT"),
        (0x20, "", "NOP", ""),
    ]
    far = Program("        /*20000*/   BRA 0x20000;  /* 0x0 */")  # past 64 KB, without a space
    assert far.instructions == [(0x20000, "", "BRA", "0x20000")]


def test_counts():
    counts = program(
        "LDG.E.128.CONSTANT R4, desc[UR6][R2.64]",
        "LDG.E.ENL2.256 R4, R8, desc[UR6][R2.64]",
        "LDG.E.U16 R4, desc[UR6][R2.64]",
        "LDGSTS.E.BYPASS.128 [R9], desc[UR6][R2.64]",
        "@P0 STL.64 [R1+0x10], R4",
        SCORES,
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "UTCHMMA gdesc[UR4], gdesc[UR28], tmem[UR8], tmem[UR60], idesc[UR61], UPT",
        "UTCQMMA gdesc[UR4], gdesc[UR28], tmem[UR8], tmem[UR60], idesc[UR61], UPT",
        "UTCBAR [UR4], URZ",
    ).counts
    assert (counts["LDG"], counts["LDG.128"], counts["LDGSTS.128"]) == (3, 2, 1)
    assert (counts["STL"], counts["HGMMA"], counts["HMMA"], counts["UTCMMA"]) == (1, 1, 1, 2)
    assert counts["HGMMA.128"] == 0


def test_loops_are_conditional_branches_back_before_exit():
    code = program(
        "MOV R0, R1",  # 00
        "IADD3 R0, R0, 0x1, RZ",  # 10: a loop of two exits from one head
        "@P1 BRA 0x10",  # 20
        "@!P0 BRA 0x70",  # 30: forwards
        "BRA.U UP0, 0x10",  # 40: the guard may be an operand
        "EXIT",  # 50
        "BRA 0x60",  # 60: the trap behind the end
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], RZ",  # 70: waits apart from the loop ...
        "@!P0 BRA 0x70",  # 80
        "@P0 BRA 0x40",  # 90: ... and comes back
    )
    spans = [(loop[0].address, loop[-1].address) for loop in code.loops]
    assert spans == [(0x10, 0x40), (0x70, 0x80)]


LOOPS = {  # body of a loop, and the share of its softmax that runs under a wgmma
    # All exponentials come after the wait: what is covered is one add between two HGMMA.
    "textbook": ([SCORES, ADD, LAST_SCORES, wait(0), EX2, EX2, OUTPUT, wait(0)], 1 / 20),
    # The next scores run under the exponentials; the output product, under the loop's end. Of 20
    # cycles are covered 16 of MUFU, the last add and the branch.
    "pipelined": ([SCORES, LAST_SCORES, EX2, EX2, wait(0), ADD, OUTPUT, ADD], 18 / 20),
    # A group left in flight at the end covers what begins the next iteration.
    "around the back edge": ([EX2, wait(0), ADD, OUTPUT], 9 / 11),
    "one group left in flight": ([OUTPUT, LAST_SCORES, wait(1), EX2, wait(0), ADD], 9 / 12),
    "none left in flight": ([OUTPUT, LAST_SCORES, wait(0), EX2, wait(0), ADD], 0),
}


@pytest.mark.parametrize("kind", LOOPS)
def test_overlap(kind):
    body, share = LOOPS[kind]
    assert program(*body, "@P0 BRA 0x0", "EXIT").overlap == pytest.approx(share)


def test_overlap_is_the_least_of_the_innermost_loops_with_exponentials():
    products_only = [SCORES, LAST_SCORES, wait(0), "@P0 BRA 0x10"]  # 10 .. 40
    good = [LAST_SCORES, EX2, wait(0), "@P1 BRA 0x50"]  # 50 .. 80
    bad = [LAST_SCORES, wait(0), EX2, "@P2 BRA 0x90"]  # 90 .. c0
    code = program(ADD, *products_only, *good, *bad, "@P3 BRA 0x0", "EXIT")
    assert len(code.loops) == 4 and code.overlap == 0
    code = program(ADD, *products_only, *good, ADD, ADD, "@P3 BRA 0x0", "EXIT")
    assert code.overlap == pytest.approx(8 / 10)  # the outer loop does not count
    assert program(ADD, *products_only, "EXIT").overlap is None
    no_wgmma = program("HMMA.16816.F32.BF16 R4, R8, R12, R4", EX2, "@P0 BRA 0x0", "EXIT")
    assert no_wgmma.overlap is None


def test_serialized():
    assert program(LAST_SCORES, wait(0), LAST_SCORES, wait(0), "EXIT").serialized
    assert not program(SCORES, LAST_SCORES, wait(0), LAST_SCORES, wait(0), "EXIT").serialized
    assert not program(LAST_SCORES, wait(0), "EXIT").serialized  # a product of one instruction
    assert not program("HMMA.16816.F32.BF16 R4, R8, R12, R4", "EXIT").serialized
