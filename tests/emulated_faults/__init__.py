"""Faults for test_emulated_faults.py to plant in copies of the CUDA kernels, and what must show.

A kernel's author adds a row to the kernel's family for each mistake that its tests should catch.
"""

from __future__ import annotations

from emulated_faults import softmax

FAMILIES = (softmax,)
FAULTS = [fault for family in FAMILIES for fault in family.FAULTS]
