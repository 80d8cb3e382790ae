"""Faults of layernorm.cu, cross_entropy.cu, embedding.cu and sum_rows.cu."""

from __future__ import annotations

from emulated_faults.fault import BOUNDS, WRONG, Fault

NORM = {"source": "layernorm.cu", "test": "layernorm", "tests": ("forward",)}
NORM_SLOPE = {"source": "layernorm.cu", "test": "layernorm", "tests": ("backward",)}
RMS_SLOPE = {"source": "layernorm.cu", "test": "rmsnorm", "tests": ("backward",)}
LOSS = {"source": "cross_entropy.cu", "test": "cross_entropy", "tests": ("forward",)}
LOSS_SLOPE = {"source": "cross_entropy.cu", "test": "cross_entropy", "tests": ("backward",)}
BAD_TARGET = {"source": "cross_entropy.cu", "test": "bad_target", "tests": ("emulated",)}
BAD_ID = {"source": "embedding.cu", "test": "bad_id", "tests": ("emulated",)}
TABLE = {"source": "embedding.cu", "test": "embedding", "tests": ("backward",)}
ORDER = {"source": "embedding.cu", "test": "order and embedding", "tests": ("emulated",)}
SUMS = {"source": "sum_rows.cu", "test": "rows_are_summed", "tests": ("emulated",)}
FAULTS = [
    Fault(
        "squares of what is not centred",
        "layernorm.cu",
        "const float d = s.template load<Element>(from + c * s.step) - mean;",
        "const float d = s.template load<Element>(from + c * s.step);",
        WRONG,
        **NORM,
    ),
    Fault(
        "the gradient lacks the part of the deviation",
        "layernorm.cu",
        "fmaf(xhat_of(c), -c2, g) * rstd",
        "g * rstd",
        WRONG,
        **NORM_SLOPE,
    ),
    Fault(
        "no bound for the last rows of a column",
        "layernorm.cu",
        "end = min(p.rows, start + kSumHeight)",
        "end = start + kSumHeight",
        BOUNDS,
        **NORM_SLOPE,
    ),
    Fault(
        "rmsnorm's gradient is centred",
        "layernorm.cu",
        "c1 = p.mean ? team.sum(c1) / static_cast<float>(p.C) : 0.0f;",
        "c1 = team.sum(c1) / static_cast<float>(p.C);",
        WRONG,
        **RMS_SLOPE,
    ),
    Fault(
        "a sum is not rescaled when the maximum grows",
        "cross_entropy.cu",
        "    sum *= expf(top - base);\n",
        "",
        WRONG,
        **LOSS,
    ),
    Fault(
        "threads add sums of different maxima",
        "cross_entropy.cu",
        "team.sum(sum * expf(own_top - base_of(top)))",
        "team.sum(sum)",
        WRONG,
        **LOSS,
    ),
    Fault(
        "no bound for the last classes",
        "cross_entropy.cu",
        "at < C ? x.load<Element>(from + at * x.step) : -INFINITY",
        "x.load<Element>(from + at * x.step)",
        BOUNDS,
        **LOSS,
    ),
    Fault(
        "an ignored class counts",
        "cross_entropy.cu",
        "names(id, C) && id != ignored",
        "names(id, C)",
        WRONG,
        **LOSS,
    ),
    Fault(
        "the gradient passes over the target",
        "cross_entropy.cu",
        "    if (c == id) q += own;\n",
        "",
        WRONG,
        **LOSS_SLOPE,
    ),
    Fault(
        "a mean's gradient is not scaled",
        "cross_entropy.cu",
        "(scale ? *scale : 1.0f) * dloss",
        "dloss",
        WRONG,
        **LOSS_SLOPE,
    ),
    Fault(
        "a target that is no class is read",
        "cross_entropy.cu",
        "names(id, C) && id != ignored",
        "id != ignored",
        "host memory",
        **BAD_TARGET,
    ),
    Fault(
        "an id that names no row is read",
        "embedding.cu",
        "found = names(id, V)",
        "found = true",
        BOUNDS,
        **BAD_ID,
    ),
    Fault(
        "no barrier before the sums of stretches are replaced",
        "embedding.cu",
        "sum[t - d] : 0;\n    __syncthreads();",
        "sum[t - d] : 0;",
        "race",
        **TABLE,
    ),
    Fault(
        "occurrences are counted without atomics",
        "embedding.cu",
        "atomicAdd(&counts[id], 1);",
        "++counts[id];",
        "race",
        **TABLE,
    ),
    Fault(
        "places are added as they came",
        "embedding.cu",
        "sorted[rank] = own",
        "sorted[k] = own",
        "test_the_order_of_threads",
        **ORDER,
    ),
    Fault(
        "no bound for the last rows",
        "sum_rows.cu",
        "min(rows, (block + 1) * kSumHeight)",
        "(block + 1) * kSumHeight",
        BOUNDS,
        **SUMS,
    ),
    Fault(
        "no bound for threads without a column",
        "sum_rows.cu",
        "if (i >= blocks * C) return;",
        "if (i > blocks * C) return;",
        "race",
        **SUMS,
    ),
    Fault(
        "sums of two blocks are not added",
        "sum_rows.cu",
        "if (blocks <= 1) return",
        "if (blocks <= 2) return",
        "test_rows_are_summed",
        **SUMS,
    ),
]
