"""matmul: csrc/ops/matmul.cc (rule), csrc/cpu/gemm.cc (loops), csrc/simd/gemm_kernel.cc."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from tilewright import _core
from tilewright.device import device_of
from tilewright.errors import UnsupportedError
from tilewright.interop import PLAIN
from tilewright.ops.activations import REFERENCES
from tilewright.packed import PackedMatrix
from tilewright.registry import Context, Cost, Op, Reference, converted, empty_in_order, op

ndarray = np.ndarray
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@op(grads=("a", "b", "bias", "residual"))
class matmul:
    """Matrix product with a fused epilogue.

        y = activation(alpha * (a @ b) + bias) + residual        rounded once

    Args:
        a: (..., M, K) float32, bfloat16 or float16, any strides; 1-D as in ``numpy.matmul``.
        b: (..., K, N), leading axes broadcast against a's; or ``tw.pack(b)``, through which a gets
            no gradient.
        bias: (N,), optional.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".
        residual: shaped like y, optional.
        alpha: a Python float.
        out: where to write y; may be ``residual`` itself, no other overlap.
        out_dtype: of y; by default that of a and b if they share one, else float32.

    Returns:
        y (..., M, N). Accumulation is float32 in one defined order: a row's bits depend on that row
        of a, on b and on the ISA level, never on M, the batch or the number of threads.

    Raises:
        ShapeError, DtypeError, UnsupportedError: naming the argument.

    Source: Goto & van de Geijn 2008 and BLIS (Van Zee & van de Geijn 2015) for the loops.
    """

    @staticmethod
    def call(
        self: Op,
        a: Any,
        b: Any,
        *,
        bias: Any = None,
        activation: str | None = None,
        residual: Any = None,
        alpha: float = 1.0,
        out: Any = None,
        out_dtype: Any = None,
    ) -> Any:
        if type(a) is ndarray and type(b) is ndarray and out_dtype is None:
            bare = bias is residual is out is None
            if bare or {type(bias), type(residual), type(out)} <= PLAIN:
                try:
                    y = _core.matmul(a, b, bias, activation, residual, alpha, out, None)
                except TypeError as error:
                    if type(error) is not TypeError:
                        raise
                    y = NotImplemented  # alpha is no number: Op words the error
                if y is not NotImplemented:
                    return y
        options = {"activation": activation, "alpha": alpha, "out": out, "out_dtype": out_dtype}
        return Op.__call__(self, a, b, bias=bias, residual=residual, **options)

    @staticmethod
    def forward(
        ctx: Context,
        a: Any,
        b: Any,
        *,
        bias: Any = None,
        activation: str | None = None,
        residual: Any = None,
        alpha: float = 1.0,
        out: Any = None,
        out_dtype: Any = None,
    ) -> Any:
        packed = isinstance(b, PackedMatrix)
        if packed and "a" in ctx.needs:
            raise UnsupportedError(
                "matmul: b must not be packed where a needs a gradient, because that is a product "
                "with b itself; pass the array, or call it under tw.no_grad()"
            )
        kept = getattr(residual, "dtype", None)
        if not ctx.needs or activation is None:
            ctx.save(a, b, bias, kept, None, activation, alpha)
            return _product(a, b, bias, activation, residual, alpha, out, out_dtype)
        # The activation's gradient reads what went into it: z = alpha * (a @ b) + bias is kept, in
        # float32, so that y is rounded once, as it is without the tape.
        z = _product(a, b, bias, None, None, alpha, None, np.float32)
        ctx.save(a, b, bias, kept, z, activation, alpha)
        dtype = out_dtype or _core.result_dtype(a, b)
        y = empty_in_order(z, dtype if residual is None else np.float32)
        _core.activation_forward(z, y, activation)
        if residual is not None:  # NumPy adds it, once the kernel has taken it: with K = 0
            none = np.empty((0, b.shape[1]), np.float32) if packed else _no_rows(b)
            _product(a[..., :0], none, residual=residual, out_dtype=np.float32)
            np.add(y, residual, out=y, dtype=np.float32)
        return converted(y, dtype)

    @staticmethod
    def backward(ctx: Context, dy: Any) -> tuple[Any, ...]:
        a, b, bias, residual_dtype, z, activation, alpha = ctx.saved
        dz = dy
        if z is not None:
            # bfloat16 factors get one more, which has float32's range: two products at its speed.
            both = _core.result_dtype(a, b)
            dz = empty_in_order(z, both if both == _BFLOAT16 else z.dtype)
            _core.activation_backward(z, dy, dz, activation)
        da = db = dbias = dresidual = None
        if {"a", "b"} & ctx.needs:
            # 1-D operands as the matrices they stand for
            a2, b2 = np.atleast_2d(a), b[:, None] if b.ndim == 1 else b
            batch = dz.shape[: dz.ndim - (a.ndim > 1) - (b.ndim > 1)]
            dz2 = dz.reshape(*batch, a2.shape[-2], b2.shape[-1])
        if "a" in ctx.needs:
            da = _gradient(dz2, b2.swapaxes(-1, -2), alpha, a2.shape, a.dtype).reshape(a.shape)
        if "b" in ctx.needs:
            left, right = a2, dz2
            if b2.ndim == 2:  # one tall product, instead of one for each batch and their sum
                left, right = as_rows(a2), as_rows(dz2)
            db = _gradient_of_b(left, right, alpha, b2).reshape(b.shape)
        if "bias" in ctx.needs:
            dbias = _core.empty_like(bias)
            _core.sum_rows(as_rows(dz[..., None] if len(b.shape) == 1 else dz), dbias)
        if "residual" in ctx.needs:
            dresidual = converted(dy, residual_dtype)
        return da, db, dbias, dresidual

    @staticmethod
    def reference(
        a: Any,
        b: Any,
        *,
        bias: Any = None,
        activation: str | None = None,
        residual: Any = None,
        alpha: float = 1.0,
        out_dtype: Any = None,
    ) -> Reference:
        y = alpha * np.matmul(a, b)
        magnitude = abs(alpha) * np.matmul(abs(a), abs(b))
        terms = a.shape[-1] + (alpha != 1.0)  # each step of the epilogue rounds once more
        if bias is not None:
            y, magnitude, terms = y + bias, magnitude + abs(bias), terms + 1
        if activation is not None:  # |activation'| < 1.13 for all four
            y = REFERENCES[activation](y)
            magnitude, terms = 1.13 * magnitude + abs(y), terms + 4
        if residual is not None:
            y, magnitude, terms = y + residual, magnitude + abs(residual), terms + 1
        return Reference(y, magnitude, max(1, terms))

    @staticmethod
    def cost(a: Any, b: Any, **_: Any) -> Cost:
        M, K, N = a.size // a.shape[-1], a.shape[-1], b.shape[-1]
        return Cost(2.0 * M * K * N, a.nbytes + b.nbytes + M * N * a.itemsize)

    rows = ("a", "residual")
    # Register tiles are 4 x 8, 6 x 16 and 14 x 32, blocks of K are 256 words, blocks of the output
    # 168 x 2048.
    cases = (
        *(f"{M},17,33" for M in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 29, 167, 168, 169)),
        *(f"5,17,{N}" for N in (1, 7, 8, 9, 15, 16, 17, 31, 32, 65, 2047, 2048, 2049)),
        *(f"5,{K},33" for K in (0, 1, 2, 3, 15, 16, 255, 256, 257, 512, 513, 1031)),
        *("1,1,1", "0,5,7", "5,7,0", "0,0,0", "2,300,40", "61,67,71", "173,259,97", "5,4100,2053"),
        *("7,19,35;a.T", "7,19,35;b.T", "15,257,33;a.T;b.T", "3,300,35;b.T", "7,19,35;offset"),
        *("7,19,35;a.neg;b.neg", "2,19,35;b.neg", "7,19,35;a.step;b.step"),
        *("5,6,7;a=3;b=3", "5,6,7;a=2,3", "5,6,7;b=2,3", "1,6,7;a=4;b=4", "5,6,7;a=2,1;b=3"),
        *("5,6,7;a=0;b=1", "4,300,9;a=2,3,1;b=2", "33,20,40;a=2,3;a.T", "7,19,35;residual"),
        *("19;a1;b1", "1,19,33;a1", "7,19,1;b1", "1,5,6;a1;b=3", "4,5,1;b1;a=3", "0;a1;b1"),
        *("1,0,3;a1", "7,19,35;alpha=0.3", "7,19,35;mixed", "7,19,35;float32", "7,19,35;bfloat16"),
        *("7,19,35;float16", "7,19,35;a.T;b.T;bias;gelu;float16"),
        *("7,19,35;bias", "1,6,7;a=2,3;bias", "7,19,35;alpha=-1.5;bias;residual", "1,9,5;a1;bias"),
        *("7,19,35;bias;relu", "5,6,7;a=3;b=1;residual;bias;relu", "7,19,35;mixed;bias;residual"),
        *("15,300,35;bias;gelu;residual;alpha=0.5", "7,19,35;gelu_tanh", "7,3,35;silu;bias"),
        *("5,0,33;bias;gelu", "7,19,35;silu;bfloat16", "7,5,1;b1;relu"),
    )

    @staticmethod
    def make(
        case: str, rng: np.random.Generator, dtype: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Read "M,K,N" and flags.

        a1 b1: 1-D. a=2,3: leading axes. a.T a.neg a.step offset: layouts. bias, residual, alpha=x,
        an activation: the epilogue. mixed: b and bias are float32. float32, bfloat16, float16:
        out_dtype.
        """
        shape, *flags = case.split(";")
        sizes = [int(n) for n in shape.split(",")]
        M, K, N = sizes if len(sizes) == 3 else (1, sizes[0], 1)
        lead: dict[str, tuple[int, ...]] = {"a": (), "b": ()}
        lead |= {f[0]: tuple(int(n) for n in f[2:].split(",")) for f in flags if f[1] == "="}

        def operand(name: str, matrix: tuple[int, ...], kind: Any) -> Any:
            full = (*lead[name], *matrix)
            if f"{name}.T" in flags:
                return normal(rng, (*full[:-2], full[-1], full[-2]), kind).swapaxes(-1, -2)
            if f"{name}.neg" in flags:
                return normal(rng, full, kind)[..., ::-1, ::-1]
            if f"{name}.step" in flags:
                return normal(rng, (*full[:-1], 3 * full[-1]), kind)[..., 1::3]
            if "offset" in flags:
                return normal(rng, (full[0] + 1, full[1] + 3), kind)[1:, 1:-2]
            return normal(rng, full, kind)

        right = np.dtype(np.float32) if "mixed" in flags else dtype
        a = operand("a", (K,) if "a1" in flags else (M, K), dtype)
        b = operand("b", (K,) if "b1" in flags else (K, N), right)
        options: dict[str, Any] = {}
        if "bias" in flags:
            options["bias"] = normal(rng, (N,), right)
        if "residual" in flags:
            leading = np.broadcast_shapes(lead["a"], lead["b"])
            options["residual"] = normal(rng, (*leading, M, N), dtype)
        for flag in flags:
            if flag in REFERENCES:
                options["activation"] = flag
            if flag in ("float32", "bfloat16", "float16"):
                options["out_dtype"] = np.dtype(getattr(ml_dtypes, flag, flag))
            if flag.startswith("alpha="):
                options["alpha"] = float(flag[6:])
        return (a, b), options


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return standard normal numbers, rounded to dtype."""
    return rng.standard_normal(shape, np.float32).astype(dtype)


def _product(
    a: Any,
    b: Any,
    bias: Any = None,
    activation: str | None = None,
    residual: Any = None,
    alpha: float = 1.0,
    out: Any = None,
    out_dtype: Any = None,
) -> Any:
    """Call the kernel; 1-D operands as in ``numpy.matmul``."""
    row, column = getattr(a, "ndim", 2) == 1, getattr(b, "ndim", 2) == 1
    if not (row or column):
        return _core.matmul(a, b, bias, activation, residual, alpha, out, out_dtype)

    def as_matrix(v: Any) -> Any:
        """Give something shaped like y the axes that y lacks."""
        if not (isinstance(v, ndarray) or device_of(v)) or v.ndim < 1 - column:
            return v
        v = v[..., None] if column else v
        return v[..., None, :] if row else v

    y = _core.matmul(
        a[None] if row else a,
        b[:, None] if column else b,
        bias,
        activation,
        as_matrix(residual),
        alpha,
        as_matrix(out),
        out_dtype,
    )
    if out is not None:
        return out
    y = y[..., 0] if column else y
    return y.reshape(()) if row and column else y[..., 0, :] if row else y


def as_rows(x: Any) -> Any:
    """Merge the leading axes of a stack of matrices into one tall matrix."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _no_rows(b: Any) -> Any:
    """Return b with K = 0."""
    return b[:0] if b.ndim == 1 else b[..., :0, :]


def _gradient_of_b(a: Any, dz: Any, alpha: float, b: Any) -> Any:
    """Multiply a^T @ dz, in b's memory order: a transposed (out, in) weight gets (out, in)."""
    if abs(b.strides[-2]) < abs(b.strides[-1]):
        shape = (*b.shape[:-2], b.shape[-1], b.shape[-2])
        return _gradient(dz.swapaxes(-1, -2), a, alpha, shape, b.dtype).swapaxes(-1, -2)
    return _gradient(a.swapaxes(-1, -2), dz, alpha, b.shape, b.dtype)


def _gradient(left: Any, right: Any, alpha: float, shape: tuple[int, ...], dtype: Any) -> Any:
    """Multiply, and sum over the axes along which ``shape`` was broadcast; rounded once."""
    batch = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    broadcast = batch != shape[:-2]
    g = _product(left, right, alpha=alpha, out_dtype=np.float32 if broadcast else dtype)
    if not broadcast:
        return g
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return g.sum(axis=stretched, keepdims=True).astype(dtype, copy=False)
