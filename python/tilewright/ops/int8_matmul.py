"""int8_matmul: csrc/ops/qgemm.cc (rule) · csrc/cpu/gemm.cc (loops) · csrc/simd/qgemm_kernel.cc."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright import _core
from tilewright.registry import Context, Cost, Reference, op


@op()
class int8_matmul:
    """Matrix product of integers, exact.

        y = a @ b                                     in int32, modulo 2^32 as NumPy's int32

    Args:
        a: (..., M, K) int8 or uint8, any strides.
        b: (..., K, N) int8, any strides, leading axes broadcast against a's; or ``tw.pack(b)`` of
            an int8 array or a QuantizedArray (whose integers are used, without their scales).
        out: int32, where to write y; no overlap with a or b.

    Returns:
        y (..., M, N) int32: the same integers on every ISA level.

    Raises:
        ShapeError, DtypeError, UnsupportedError: naming the argument.
    """

    rows = ("a",)

    @staticmethod
    def forward(ctx: Context, a: Any, b: Any, *, out: Any = None) -> Any:
        return _core.int8_matmul(a, b, out)

    @staticmethod
    def reference(a: Any, b: Any) -> Reference:
        y = np.matmul(a.astype(np.float64), b.astype(np.float64))
        return Reference(y, np.zeros_like(y), 1)

    @staticmethod
    def cost(a: Any, b: Any, **_: Any) -> Cost:
        M, K, N = a.size // a.shape[-1], a.shape[-1], b.shape[-1]
        return Cost(2.0 * M * K * N, a.nbytes + b.nbytes + 4 * M * N)

    # M,K,N, or a batch before them; signed or unsigned a
    cases = (
        "1,1,1;s",
        "5,3,7;u",
        "13,64,31;s",
        "15,65,33;u",
        "28,257,65;s",
        "3,2,9,17,33;s",
        "0,4,5;s",
        "4,0,5;u",
        "64,513,96;s",
    )

    @staticmethod
    def make(case: str, rng: Any, dtype: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shape, kind = case.split(";")
        *batch, M, K, N = (int(n) for n in shape.split(","))
        low, high, a_type = (-128, 128, np.int8) if kind == "s" else (0, 256, np.uint8)
        a = rng.integers(low, high, (*batch, M, K)).astype(a_type)
        b = rng.integers(-128, 128, (*batch[1:], K, N)).astype(np.int8)
        return (a, b), {}
