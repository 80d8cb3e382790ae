"""Runs PTX as nvcc wrote it, on NumPy: one array element for each thread of a block.

The emulator runs what g++ made of a kernel; this runs what nvcc made of it, inline assembly
included. It knows the instructions that the project's tensor-core kernels compile to, and refuses
an entry with any other before its first block.

    parser.py       the text: entries, registers, operands
    memory.py       global memory with its bounds, shared memory with the marks of races
    machine.py      a block of threads: registers, divergence, barriers
    numbers.py      instructions that compute
    movement.py     instructions that load, store and convert
    warps.py        instructions of a warp: fragments, mma, shuffles; barriers; asynchronous copies
    programs.py     finds the entry of a launch of the emulator, and runs it in the kernel's place
"""

from ptx.machine import Finding
from ptx.parser import Unsupported
from ptx.programs import Programs

__all__ = ["Finding", "Programs", "Unsupported"]
