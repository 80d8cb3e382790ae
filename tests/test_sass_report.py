"""What bench/sass_report.py reads from a disassembly, and how many blocks it says a GPU holds."""

from __future__ import annotations

import pathlib
import runpy
import subprocess
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
report = types.SimpleNamespace(**runpy.run_path(str(ROOT / "bench/sass_report.py")))

SECTION = """
\t.section\t.text._ZN5tools23_GLOBAL__N__4f_2_k_cu_06kernelEv,"ax",@progbits
\t.sectioninfo\t@"SHI_REGISTERS=40"
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDS R2, [R1] ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   STL [R1], R4 ;
        /*0060*/                   EXIT ;
"""


def test_a_disassembly_is_read(monkeypatch):
    printed = types.SimpleNamespace(stdout=SECTION)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: printed)
    ((name, code),) = report.disassembled("nvdisasm", "k.cubin").items()
    assert name == "_ZN5toolsA6kernelEv"
    assert (code.registers, code.mix["STL"]) == (40, 1)
    assert code.loop == {"HMMA": 1, "BRA": 1}  # the innermost


@pytest.mark.parametrize(
    ("registers", "kib", "threads", "blocks"),
    [
        (32, 0, 32, (32, 32)),  # no processor holds more
        (32, 0, 1024, (2, 2)),  # threads
        (120, 24, 256, (2, 2)),  # registers, in quarters
        (255, 48, 128, (2, 2)),
        (40, 82, 128, (1, 2)),  # shared memory
    ],
)
def test_blocks_that_a_processor_holds(registers, kib, threads, blocks):
    found = [report.occupancy(p, registers, kib << 10, threads) for p in ("sm_80", "sm_90")]
    assert tuple(found) == blocks


def test_the_main_loop_is_what_half_the_depth_lacks():
    def counters(mma, *wavefronts):
        return {"mma": mma, "sites": [{"wavefronts": n} for n in wavefronts]}

    whole, half = counters(64, 96, 30), counters(32, 48, 30)  # 30 at the end, of both
    assert report.in_the_loop(whole, half) == 0.75
