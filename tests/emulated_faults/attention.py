"""Faults of attention_forward.cu and attention_backward.cu, and of what they share."""

from __future__ import annotations

from emulated_faults.fault import BOUNDS, WRONG, Fault

# Tails of rows, keys and dimensions; K and V take more than one tile.
FORWARD = {"source": "attention_forward.cu", "tests": ("forward",)}
BACKWARD = {"source": "attention_backward.cu", "tests": ("backward",)}
CASE = "matches_reference and [attention[1 and 97 and bfloat16"
SLOPE = "matches_differences and [attention[2 and 33 and 31 and causal and bfloat16"

FAULTS = [
    Fault(
        "V is read before all of it has arrived",
        "attention_forward.cu",
        "    arrived();\n    if (tile + 1 < last) load(shared.k",
        "    gpu::cp_async_wait<0>();\n    if (tile + 1 < last) load(shared.k",
        "race",
        test=CASE,
        **FORWARD,
    ),
    Fault(
        "K is not waited for",
        "attention_forward.cu",
        "    gpu::cp_async_wait<0>();\n    __syncthreads();\n  };",
        "    __syncthreads();\n  };",
        "cp.async",
        test=CASE,
        **FORWARD,
    ),
    Fault(
        "keys beyond the last one are loaded",
        "attention_forward.cu",
        "return key < length ? of_x(key) : kNowhere;",
        "return of_x(key);",
        BOUNDS,
        test=CASE,
        **FORWARD,
    ),
    Fault(
        "a row's maximum is that of half a quad",
        "attention_forward.cu",
        "  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));",
        "  return x;",
        WRONG,
        test=CASE,
        **FORWARD,
    ),
    Fault(
        "V's fragments change places",
        "attention_products.h",
        "gpu::ldmatrix_transposed(b, B.chunk(k * 16 + lane % 16, n + lane / 16));",
        "gpu::ldmatrix_transposed(b, B.chunk(k * 16 + lane % 16, n + 1 - lane / 16));",
        WRONG,
        test=CASE,
        **FORWARD,
    ),
    Fault(
        "chunks are joined without rescaling those before",
        "attention_forward.cu",
        "return fmaf(a, before, b * chunk);",
        "return fmaf(a, 1.0f, b * chunk);",
        WRONG,
        test="matches_reference and [attention[1 and 1025 and 65 and float32",
        **FORWARD,
    ),
    Fault(
        "no barrier before a stage is refilled",
        "attention_backward.cu",
        "      }\n    }\n    __syncthreads();\n  }\n  gpu::cp_async_wait<0>();",
        "      }\n    }\n  }\n  gpu::cp_async_wait<0>();",
        "race",
        test="matches_differences and [attention[1 and 19 and 511 and bfloat16",
        **BACKWARD,
    ),
    Fault(
        "keys beyond the last one get gradients",
        "attention_backward.cu",
        "[&](int line) { return keys.at(to, line, s.keys); }",
        "[&](int line) { return keys.at(to, line, s.keys + 64); }",
        BOUNDS,
        test=SLOPE,
        **BACKWARD,
    ),
    Fault(
        "delta is left out",
        "attention_backward.cu",
        "dP[n][e] - sums.delta[Place<S::kTurned>(n, e).row]",
        "dP[n][e]",
        "gradient",
        test=SLOPE,
        **BACKWARD,
    ),
]
