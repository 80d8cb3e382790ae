"""Faults of activation.cu, sum.cu, dropout.cu, rope.cu and mse.cu: a thread an element or a few."""

from __future__ import annotations

from emulated_faults.fault import BOUNDS, WRONG, Fault

RELU = {"source": "activation.cu", "test": "relu", "tests": ("forward",)}
GELU = {"source": "activation.cu", "test": "gelu", "tests": ("forward",)}
SLOPE = {"source": "activation.cu", "test": "gelu_tanh", "tests": ("backward",)}
DROPOUT = {"source": "dropout.cu", "test": "dropout", "tests": ("forward",)}
ROPE = {"source": "rope.cu", "test": "rope", "tests": ("forward",)}
ROPE_SLOPE = {"source": "rope.cu", "test": "rope", "tests": ("backward",)}
MSE = {"source": "mse.cu", "test": "mse", "tests": ("forward",)}
MSE_SLOPE = {"source": "mse.cu", "test": "mse", "tests": ("backward",)}
SUM = {"source": "sum.cu", "test": "sums_have", "tests": ("emulated",)}
FAULTS = [
    Fault(
        "a sum forgets its second operand's strides",
        "sum.cu",
        "b.load<Element>(b.offset(i))",
        "b.load<Element>(i)",
        "test_sums_have_the_bits_of_the_cpu",
        **SUM,
    ),
    Fault(
        "no bound for threads without an element",
        "activation.cu",
        "if (i >= n) return;\n  y.store",
        "if (i > n) return;\n  y.store",
        BOUNDS,
        **RELU,
    ),
    Fault(
        "an axis's stride is not used",
        "array.h",
        "return axes > 0 ? at + i * stride[0] : 0;",
        "return at + i;",
        WRONG,
        **RELU,
    ),
    Fault(
        "gelu's tail is taken on the wrong side",
        "activation.h",
        "return x > 0.0f ? x - tail",
        "return x > 0.0f ? tail",
        WRONG,
        **GELU,
    ),
    Fault(
        "the inner derivative of gelu_tanh lacks a factor",
        "activation.cu",
        "fmaf(x * x, 3 * 0.044715f, 1.0f)",
        "fmaf(x * x, 0.044715f, 1.0f)",
        WRONG,
        **SLOPE,
    ),
    Fault(
        "Philox with nine rounds",
        "philox.h",
        "round < 10",
        "round < 9",
        WRONG,
        **DROPOUT,
    ),
    Fault(
        "no bound for the last four elements",
        "dropout.cu",
        "i < min(n, first + kBlockWords)",
        "i < first + kBlockWords",
        BOUNDS,
        **DROPOUT,
    ),
    Fault(
        "what is kept is not scaled",
        "dropout.cu",
        "x.load<Element>(x.offset(i)) * rule.scale",
        "x.load<Element>(x.offset(i))",
        WRONG,
        **DROPOUT,
    ),
    Fault(
        "halves are rotated as if interleaved",
        "rope.cu",
        "first = p.interleaved ? 2 * j : j",
        "first = 2 * j",
        "race",
        **ROPE,
    ),
    Fault(
        "a batch reads the first one's tables",
        "rope.cu",
        "r / p.rows_per_table * p.T + r % p.T",
        "r % p.T",
        WRONG,
        **ROPE,
    ),
    Fault(
        "the rest of a row is not passed on",
        "rope.cu",
        "if (j >= p.half) return write(j + p.half, x(j + p.half));",
        "if (j >= p.half) return;",
        WRONG,
        **ROPE,
    ),
    Fault(
        "the inverse rotates forwards",
        "rope.cu",
        " * p.sign;",
        ";",
        WRONG,
        **ROPE_SLOPE,
    ),
    Fault(
        "no barrier before the sums of warps are read",
        "sums.h",
        "  __syncthreads();\n",
        "",
        "race",
        **MSE,
    ),
    Fault(
        "an operand is read as if it were contiguous",
        "mse.cu",
        "y.load<Element>(y.offset(i))",
        "y.load<Element>(i)",
        BOUNDS,
        **MSE,
    ),
    Fault(
        "the gradient of a mean is not scaled",
        "mse.cu",
        "scale * up * difference",
        "up * difference",
        WRONG,
        **MSE_SLOPE,
    ),
]
