"""Faults for test_emulated_faults.py to plant in copies of the CUDA kernels, and what must show.

A kernel's author adds a row to the kernel's family for each mistake that its tests should catch.
"""

from __future__ import annotations

from emulated_faults import (
    attention,
    elementwise,
    int8,
    kvcache,
    matmul,
    optim,
    quantize,
    rows,
    softmax,
)

FAMILIES = (matmul, int8, attention, kvcache, softmax, rows, elementwise, optim, quantize)
FAULTS = [fault for family in FAMILIES for fault in family.FAULTS]
