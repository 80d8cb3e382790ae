"""Faults for test_emulated_faults.py to plant in copies of the CUDA kernels, and what must show.

A kernel's author adds a row for each mistake that its tests should catch. ``test`` chooses among
the generic tests, as pytest's -k does; ``shows`` is the finding that the checked emulator must
report, or ``WRONG`` where every access is legal and only the numbers can tell.
"""

from __future__ import annotations

from typing import NamedTuple

WRONG = "elements are out of bounds; worst at"  # what tests/harness.py says of numbers


class Fault(NamedTuple):
    """``text`` in ``file`` replaced by ``wrong``, ``source`` compiled again; all in csrc/cuda."""

    name: str
    file: str
    text: str
    wrong: str
    shows: str
    source: str
    test: str


SOFTMAX = {"source": "softmax.cu", "test": "softmax"}
FAULTS = [
    Fault(
        "the last elements of a row left out of its sum",
        "softmax.cu",
        "c < C; c += Team::kThreads) {\n    sum += expf",
        "c < C - C % 2; c += Team::kThreads) {\n    sum += expf",
        WRONG,
        **SOFTMAX,
    ),
    Fault(
        "no bound for warps without a row",
        "softmax.cu",
        "if (r >= rows) return;\n  const std::int64_t from",
        "if (r >= rows + Team::kRows) return;\n  const std::int64_t from",
        "race",
        **SOFTMAX,
    ),
    Fault(
        "a row's elements are taken as neighbours",
        "softmax.cu",
        "const float z = x.load<Element>(from + c * x.step)",
        "const float z = x.load<Element>(from + c)",
        WRONG,
        **SOFTMAX,
    ),
    Fault(
        "the gradient of the logarithm subtracts y",
        "softmax.cu",
        "fmaf(-expf(p), sum, d)",
        "fmaf(-p, sum, d)",
        "gradient",
        **SOFTMAX,
    ),
    Fault(
        "no barrier before partial sums are read",
        "team.h",
        "      __syncthreads();\n",
        "",
        "race",
        **SOFTMAX,
    ),
    Fault(
        "the next partial sums overwrite what others still read",
        "team.h",
        "partial[turn_ ^= 1]",
        "partial[0]",
        "race",
        **SOFTMAX,
    ),
    Fault(
        "a barrier that only the warp's first lane reaches",
        "team.h",
        "partial[threadIdx.x / 32] = x;\n      __syncthreads();",
        "partial[threadIdx.x / 32] = x, __syncthreads();",
        "barrier divergence",
        **SOFTMAX,
    ),
    Fault(
        "half of a warp left out of its sum",
        "team.h",
        "d = 16; d; d /= 2) x += __shfl",
        "d = 8; d; d /= 2) x += __shfl",
        WRONG,
        **SOFTMAX,
    ),
    Fault(
        "a lane missing from the mask of a shuffle",
        "team.h",
        "kAllLanes = 0xffffffffu",
        "kAllLanes = 0x7fffffffu",
        "which does not take part",
        **SOFTMAX,
    ),
    Fault(
        "bfloat16 results truncated",
        "array.h",
        "__float2bfloat16_rn(x)",
        "__float2bfloat16_rz(x)",
        WRONG,
        **SOFTMAX,
    ),
]
