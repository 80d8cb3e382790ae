"""Faults of quantize.cu."""

from __future__ import annotations

from emulated_faults.fault import BOUNDS, WRONG, Fault

QUANTIZE = {"source": "quantize.cu", "test": "[quantize", "tests": ("forward",)}
DEQUANTIZE = {"source": "quantize.cu", "test": "dequantize", "tests": ("forward",)}
NONFINITE = {"source": "quantize.cu", "test": "[quantize", "tests": ("nonfinite",)}
INTEGERS = "Arrays are not equal"

FAULTS = [
    Fault(
        "the first nibble spills into the second",
        "quantize.cu",
        "(q & 15) << 4 * which",
        "q << 4 * which",
        INTEGERS,
        **QUANTIZE,
    ),
    Fault(
        "no bound for the second half of the last byte",
        "quantize.cu",
        "if (!e.inside) break;",
        "",
        BOUNDS,
        **QUANTIZE,
    ),
    Fault(
        "no barrier before the ranges of warps are read",
        "quantize.cu",
        "  __syncthreads();\n",
        "",
        "race",
        **QUANTIZE,
    ),
    Fault(
        "every group has the range of the first",
        "quantize.cu",
        "index += line % groups * group;",
        "",
        INTEGERS,
        **QUANTIZE,
    ),
    Fault(
        "the first nibble loses its sign",
        "quantize.cu",
        "static_cast<std::int8_t>(byte << 4) >> 4",
        "byte & 15",
        WRONG,
        **DEQUANTIZE,
    ),
    Fault(
        "a maximum passes over NaN",
        "elements.h",
        "return a > b || a != a ? a : b;",
        "return a > b ? a : b;",
        "differ",
        **NONFINITE,
    ),
]
