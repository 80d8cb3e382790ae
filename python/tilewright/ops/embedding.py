"""embedding: csrc/ops/embedding.cc (rule) · csrc/cpu/embedding.cc (rows by id)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright import _core
from tilewright.registry import Context, Cost, Reference, op


@op(grads=("table",))
class embedding:
    """Rows of a table by id: y[...] = table[ids[...]].

    Args:
        ids: (...) int32 or int64, any strides, each in [0, V).
        table: (V, C) float32, bfloat16 or float16, any strides.
        out: where to write y; no overlap with an input.

    Returns:
        y (..., C) in table's dtype. The gradient of a row is the sum over its places, in ascending
        order, accumulated in float32: the same for any number of threads.

    Raises:
        ShapeError: an id is negative or too large; the message names it. DtypeError.
    """

    rows = ("ids",)
    cases = (
        "1;1,1", "7;5,3", "2,3;10,17", "40;3,33", "3,5;100,64", "0;4,4", "2;5,0", "300;50,70",
        "2,3;10,17;int32", "9;6,24;strided",
    )  # fmt: skip

    @staticmethod
    def forward(ctx: Context, ids: Any, table: Any, *, out: Any = None) -> Any:
        y = out
        if y is None:
            shape = (*getattr(ids, "shape", ()), *getattr(table, "shape", (0, 0))[1:])
            y = _core.empty(shape, getattr(table, "dtype", np.float32))
        _core.embedding_forward(ids, table, y)
        ctx.save(ids, table)
        return y

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        ids, table = ctx.saved
        dtable = _core.empty(table.shape, table.dtype)
        _core.embedding_backward(ids, dy, dtable)
        return dtable

    @staticmethod
    def reference(ids: Any, table: Any) -> Reference:
        y = table[ids]
        return Reference(y, abs(y), max(1, ids.size))

    @staticmethod
    def cost(ids: Any, table: Any, **_: Any) -> Cost:
        C = table.shape[1]
        return Cost(0, ids.nbytes + 2 * ids.size * C * table.itemsize)

    @staticmethod
    def make(case: str, rng: np.random.Generator, dtype: Any) -> tuple[Any, dict[str, Any]]:
        """Build a case: the shape of ids, of the table, then a flag: int32, strided."""
        ids_shape, table_shape, flag = [*case.split(";"), ""][:3]
        V, C = (int(n) for n in table_shape.split(","))
        shape = tuple(int(n) for n in ids_shape.split(","))
        ids = rng.integers(0, V, shape, np.int32 if flag == "int32" else np.int64)
        table = rng.standard_normal((V, C)).astype(dtype)
        if flag == "strided":
            ids = np.repeat(ids, 2)[::-2]
            table = np.asfortranarray(table)[::-1]
        return (ids, table), {}
