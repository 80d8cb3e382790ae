"""Faults of matmul_mma.cu and matmul_ffma.cu, of their tiles (tiles.h) and epilogue (product.h)."""

from __future__ import annotations

from emulated_faults.fault import BOUNDS, WRONG, Fault

# Rows, depth and columns end within a tile; K takes three stages.
CASE = "matches_reference and [matmul[61"
TENSOR = {"source": "matmul_mma.cu", "test": f"{CASE} and bfloat16", "tests": ("forward",)}
FFMA = {"source": "matmul_ffma.cu", "test": f"{CASE} and float32", "tests": ("forward",)}

FAULTS = [
    Fault(
        "no barrier between a stage's arrival and its use",
        "tiles.h",
        "    gpu::cp_async_wait<stages - 2>();\n    __syncthreads();\n",
        "    gpu::cp_async_wait<stages - 2>();\n",
        "race",
        **TENSOR,
    ),
    Fault(
        "a stage is used while it is on its way",
        "tiles.h",
        "gpu::cp_async_wait<stages - 2>();",
        "gpu::cp_async_wait<stages - 1>();",
        "cp.async",
        source="matmul_mma.cu",
        test="matches_reference and [matmul[5 and 256 and bfloat16",
        tests=("forward",),
    ),
    Fault(
        "halves of a fragment of a change places",
        "matmul_mma.cu",
        "tile.slot(line + lane % 16, 2 * step + lane / 16)",
        "tile.slot(line + lane % 16, 2 * step + 1 - lane / 16)",
        WRONG,
        **TENSOR,
    ),
    Fault(
        "slots are read without their swizzle",
        "matmul_mma.cu",
        "gpu::ldmatrix_transposed(r, tile.slot(16 * step + lane % 16, line / 8 + lane / 16));",
        "gpu::ldmatrix_transposed(r, tile.slots + (16 * step + lane % 16) * tile.kSlots + line / 8 "
        "+ lane / 16);",
        WRONG,
        **TENSOR,
    ),
    Fault(
        "no bound for the rows of the last tile",
        "product.h",
        "if (row0 + r >= p.M || column >= p.N) break;",
        "if (column >= p.N) break;",
        BOUNDS,
        **TENSOR,
    ),
    Fault(
        "the rest of K is dropped",
        "matmul_ffma.cu",
        "steps = (p.K + kDepth - 1) / kDepth;",
        "steps = p.K / kDepth;",
        WRONG,
        **FFMA,
    ),
    Fault(
        "a chain is not added at the end of K",
        "matmul_ffma.cu",
        "(step + 1) % (kChain / kDepth) != 0 && step + 1 != steps",
        "(step + 1) % (kChain / kDepth) != 0",
        WRONG,
        **FFMA,
    ),
    Fault(
        "a thread stores the rows of its neighbour",
        "matmul_ffma.cu",
        "&staged.row[lane / 8 * 4 + r]",
        "&staged.row[(lane / 8 ^ 1) * 4 + r]",
        WRONG,
        **FFMA,
    ),
]
