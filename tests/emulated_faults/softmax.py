"""Faults of softmax.cu, and of what it shares with every kernel of rows: team.h, array.h."""

from __future__ import annotations

from emulated_faults.fault import WRONG, Fault

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
        "array.h",
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
