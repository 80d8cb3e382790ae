"""Faults of int8_mma.cu and qgemm_decode.cu."""

from __future__ import annotations

from emulated_faults.fault import BOUNDS, WRONG, Fault

INTEGERS = "Arrays are not equal"
EXACT = {
    "source": "int8_mma.cu",
    "test": "matches_reference and int8_matmul[13",
    "tests": ("forward",),
}
GROUPED = {
    "source": "int8_mma.cu",
    "test": "matches_reference and [qmatmul[15 and 513",
    "tests": ("forward",),
}
FEW = "few_rows_by_quantized"
DECODE = {"source": "qgemm_decode.cu", "test": f"{FEW} and 288 and 16-True", "tests": ("emulated",)}

FAULTS = [
    Fault(
        "fragments of two columns of b change places",
        "int8_mma.cu",
        "b[j][0] = two[0], b[j][1] = two[1], b[j + 1][0] = two[2]",
        "b[j][0] = two[0], b[j][1] = two[2], b[j + 1][0] = two[1]",
        INTEGERS,
        **EXACT,
    ),
    Fault(
        "no bound for the columns of a row's last four",
        "int8_mma.cu",
        "if (column + e < p.N) to[e * place.out.col] = x[e];",
        "to[e * place.out.col] = x[e];",
        BOUNDS,
        **EXACT,
    ),
    Fault(
        "a warp stores its sums before they are complete",
        "product.h",
        "    __syncwarp();\n#pragma unroll 1",
        "#pragma unroll 1",
        "race",
        **EXACT,
    ),
    Fault(
        "integers of a group stay for the next one",
        "int8_mma.cu",
        "              integers[i][j][r] = 0;\n",
        "",
        WRONG,
        **GROUPED,
    ),
    Fault(
        "a step runs into the next group",
        "int8_mma.cu",
        "end = min(begin + q.group, q.p.K)",
        "end = q.p.K",
        WRONG,
        **GROUPED,
    ),
    Fault(
        "halves of a lane's weights change places",
        "qgemm_decode.cu",
        "low = chosen(own, got, of_first), high = chosen(own, of_second, got)",
        "high = chosen(own, got, of_first), low = chosen(own, of_second, got)",
        FEW,
        **DECODE,
    ),
    Fault(
        "a is read while other lanes still write it",
        "qgemm_decode.cu",
        "      __syncwarp();\n      // 3.",
        "      // 3.",
        "race",
        **DECODE,
    ),
    Fault(
        "chains are added before all of them are there",
        "qgemm_decode.cu",
        "    __syncthreads();\n    if (of_sum < kRows",
        "    if (of_sum < kRows",
        "race",
        **DECODE,
    ),
    Fault(
        "no bound for the lanes of the last columns",
        "qgemm_decode.cu",
        "min(place.column + lane / 2, p.N - 1)",
        "place.column + lane / 2",
        BOUNDS,
        **DECODE,
    ),
]
