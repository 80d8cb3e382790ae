"""qmatmul: csrc/ops/qgemm.cc (rule) · csrc/cpu/gemm.cc (loops) · csrc/simd/qgemm_kernel.cc."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from tilewright import _core
from tilewright.device import device_of, running_on
from tilewright.errors import DtypeError, UnsupportedError
from tilewright.ops.activations import REFERENCES
from tilewright.ops.dequantize import dequantize
from tilewright.ops.matmul import as_rows, matmul
from tilewright.ops.quantize import quantize
from tilewright.packed import PackedMatrix, right_hand_side
from tilewright.quantized import QuantizedArray
from tilewright.registry import NO_TAPE, Context, Cost, Op, Reference, op

# what the decorator makes of a class, which a type checker does not see
DEQUANTIZE, MATMUL = cast(Op, dequantize), cast(Op, matmul)


@op(grads=("a", "bias", "residual"))
class qmatmul:
    """Matrix product with weights of 8 or 4 bits and a fused epilogue.

        compute="int8"      qa, sa = quantize(a) row by row, on the fly
                            y = activation(fma(float(qa @ qb), sa * sb, bias)) + residual
          more than one group, offsets, or unsigned weights:
                            s = sum over groups g, ascending, each step an fma, of
                                float(qa_g @ qb_g) * sb_g + float(sum of qa_g) * ob_g
                            y = activation(fma(sa, s, fma(oa, sum of b, bias))) + residual
        compute="float"     y = matmul(a, dequantize(qb), ...): weight-only. Bit for bit that of the
                            float32 kernel, which ``pack(dequantize(qb), prefer="latency")`` takes
                            for any size

    Args:
        a: (..., M, K) float32, bfloat16 or float16, any strides; or a QuantizedArray with one scale
            or one for each row (its axis -2), with or without offsets.
        qb: a QuantizedArray (K, N) with one scale, one for each column, or groups along K; for
            weights (out, in) quantized with axis=0 pass ``q.T``. Or ``tw.pack`` of it, which
            spares packing it on every call.
        bias: (N,), optional.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".
        residual: shaped like y, optional.
        compute: "int8" or "float"; by default "float" where qb has 4 bits and a is floats. "float"
            reads a byte or half a byte a weight: few rows stream them through registers, for more
            they are dequantized block by block in cache. A quantized a is dequantized first.
            "int8" takes groups of even size.
        out: where to write y; may be ``residual`` itself, no other overlap.

    Returns:
        y (..., M, N) in a's dtype (float32 for a quantized a), rounded once. By integers the sums
        within a group are exact, and up to the activation the bits are the same on every ISA level.
        A row's bits depend on that row of a and on qb alone. A row with a NaN or an infinity is NaN
        by integers.

    Gradients: of a, bias and residual. qb is constant; that of a is dz @ dequantize(qb)^T, for
    "int8" as if a had not been rounded (straight through: Bengio et al. 2013).

    Raises:
        ShapeError, DtypeError, UnsupportedError: naming the argument.
    """

    rows = ("a", "residual")

    @staticmethod
    def forward(
        ctx: Context,
        a: Any,
        qb: Any,
        *,
        bias: Any = None,
        activation: str | None = None,
        residual: Any = None,
        compute: str | None = None,
        out: Any = None,
    ) -> Any:
        packed = isinstance(qb, PackedMatrix)
        if not packed and not isinstance(qb, QuantizedArray):
            raise DtypeError(
                f"qmatmul: qb must be a QuantizedArray or tw.pack of one, got {type(qb).__name__}"
            )
        if compute not in (None, "int8", "float"):
            raise UnsupportedError(f"qmatmul: compute must be 'int8' or 'float', got {compute!r}")
        quantized = isinstance(a, QuantizedArray)
        floats = compute == "float" or (compute is None and qb.bits == 4 and not quantized)
        left, scale, offset = _left_hand_side(a, floats) if quantized else (a, None, None)
        right = qb if packed else right_hand_side("qmatmul", "qb", qb)

        def product(bias: Any, activation: str | None, residual: Any, out: Any) -> Any:
            with running_on(
                device_of(left), "qmatmul"
            ):  # the caller has not looked into a quantized a
                return _core.qmatmul(
                    left, scale, offset, right, bias, activation, residual, floats, out
                )

        kept = [getattr(value, "dtype", None) for value in (a, bias, residual)]
        if not ctx.needs or activation is None:
            ctx.save(qb, kept, None, activation)
            return product(bias, activation, residual, out)
        # what went into the activation is kept in float32, so that y is rounded once
        known = isinstance(left, np.ndarray) or device_of(left)  # else product() raises
        rows = left.shape[:-1] if known else ()
        z = product(bias, None, None, _core.empty((*rows, qb.shape[1]), np.float32))
        ctx.save(qb, kept, z, activation)
        y = _core.empty_like(z)
        _core.activation_forward(z, y, activation)
        if residual is not None:  # NumPy adds it, once the kernel has taken it: with K = 0
            nothing = _core.empty((*rows, 0), np.float32), None, None, _no_weights(qb.shape[1])
            _core.qmatmul(*nothing, None, None, residual, True, None)
            np.add(y, residual, out=y, dtype=np.float32)
        return y.astype(_core.result_dtype(left), copy=False)  # float32 for a quantized a

    @staticmethod
    def backward(ctx: Context, dy: Any) -> tuple[Any, ...]:
        qb, (a_type, bias_type, residual_type), z, activation = ctx.saved
        dz = dy
        if z is not None:
            dz = _core.empty_like(z)
            _core.activation_backward(z, dy.astype(z.dtype, copy=False), dz, activation)
        da = dbias = None
        if "a" in ctx.needs:
            weights = DEQUANTIZE.forward(NO_TAPE, qb)
            da = MATMUL.forward(NO_TAPE, dz, weights.T, out_dtype=a_type)
        if "bias" in ctx.needs:
            dbias = _core.empty(dz.shape[-1:], bias_type)
            _core.sum_rows(as_rows(dz), dbias)
        asked = "residual" in ctx.needs
        return da, dbias, dy.astype(residual_type, copy=False) if asked else None

    @staticmethod
    def reference(
        a: Any,
        qb: Any,
        *,
        bias: Any = None,
        activation: str | None = None,
        residual: Any = None,
        compute: str | None = None,
    ) -> Reference:
        w = dequantize.reference(qb)
        options = {"bias": bias, "activation": activation, "residual": residual}
        if compute == "float" or (compute is None and qb.bits == 4):
            y = matmul.reference(a, w.value, **options)
            return Reference(y.value, 2 * y.magnitude, y.terms)  # the weights are rounded too
        a = _rows_through_int8(a)
        # Sums of integers are exact. What is rounded is their conversion, the scales, an fma or two
        # a group; offsets are terms of their own.
        groups = 1 if qb.group_size is None else -(-qb.shape[0] // qb.group_size)
        y = matmul.reference(a, w.value, **options)
        larger = matmul.reference(abs(a), w.magnitude, **options).magnitude
        return Reference(y.value, 2 * larger, groups if qb.offset is None else 2 * groups)

    @staticmethod
    def cost(a: Any, qb: Any, **_: Any) -> Cost:
        M, K, N = a.size // a.shape[-1], a.shape[-1], qb.shape[-1]
        return Cost(2.0 * M * K * N, a.nbytes + qb.nbytes + M * N * a.itemsize)

    # M,K,N (or a batch before them), then flags: b bias, r residual, t one scale, f weight-only,
    # i by integers, 4 bits, o offsets, g groups, or an activation's name
    cases = (
        "1,1,1",
        "1,17,33;b",
        "5,64,31;t",
        "15,65,33;b;r",
        "29,257,66;b;gelu",
        "2,3,40,48;r;silu",
        "4,0,5;b",
        "0,8,5",
        "5,7,0;b;gelu",
        "7,96,40;b;relu;f",
        "64,513,96;b;gelu_tanh",
        "3,65,33;f;r",
        "1,300,35;4",
        "6,301,40;4;g32;b;r;silu",
        "9,96,33;f;o;g31",
        "17,257,65;4;o;g64;b",
        "2,3,40,48;i;o;r",
        "5,66,33;i;g8;b;gelu",
        "15,513,40;i;4;o;g32",
        "3,1100,9;i;o",
        "4,0,5;4;b",
    )

    @staticmethod
    def straight_through(case: str) -> bool:
        """Whether a is rounded on the way: the gradient is not that of the reference."""
        flags = case.split(";")[1:]
        return "i" in flags or not {"f", "4"} & set(flags)

    @staticmethod
    def make(case: str, rng: Any, dtype: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shape, *flags = case.split(";")
        *lead, K, N = (int(n) for n in shape.split(","))
        a = rng.standard_normal((*lead, K)).astype(dtype)
        weights = rng.standard_normal((N, K)).astype(np.float32)
        groups = [int(f[1:]) for f in flags if f[0] == "g" and f[1:].isdigit()]
        q = quantize.forward(
            NO_TAPE,
            weights,
            bits=4 if "4" in flags else 8,
            axis=None if "t" in flags else 0,
            group_size=groups[0] if groups else None,
            symmetric="o" not in flags,
        )
        kwargs: dict[str, Any] = {}
        for flag in flags:
            if flag == "b":
                kwargs["bias"] = rng.standard_normal(N).astype(np.float32)
            elif flag == "r":
                kwargs["residual"] = rng.standard_normal((*lead, N)).astype(dtype)
            elif flag in COMPUTE:
                kwargs["compute"] = COMPUTE[flag]
            elif flag in REFERENCES:
                kwargs["activation"] = flag
        return (a, q.T), kwargs


COMPUTE = {"f": "float", "i": "int8"}


def _left_hand_side(a: QuantizedArray, floats: bool) -> tuple[Any, Any, Any]:
    """Return (integers, scales, offsets) of a quantized a; its floats where those are asked for."""
    if floats:
        return DEQUANTIZE.forward(NO_TAPE, a), None, None
    if a.axis not in (None, a.ndim - 2) or a.group_size is not None:
        raise UnsupportedError(
            "qmatmul: a must have one scale, or one for each row (its axis -2), because a scale "
            f"along K can't be taken out of the sum; got {a!r}"
        )
    return a.integers(), a.scale, a.offset


def _no_weights(columns: int) -> tuple[Any, ...]:
    """Return a right-hand side of K = 0, as the kernels take it."""
    q = QuantizedArray(_core.empty((0, columns), np.int8), _core.empty((), np.float32))
    return right_hand_side("qmatmul", "qb", q)


def _rows_through_int8(a: Any) -> Any:
    """Return a as its rows look after int8, by the float32 formula that defines quantization."""
    x = a.astype(np.float32)
    amax = np.max(abs(x), axis=-1, keepdims=True, initial=0)
    scale = amax / np.float32(127)
    scale[scale == 0] = 1
    return np.clip(np.rint(x / scale), -127, 127).astype(np.float64) * scale.astype(np.float64)
