"""Differentiable NumPy arithmetic: the rules behind Tensor's operators and methods.

    broadcasting   the gradient of an operand is summed over the axes along which it was repeated
    dtypes         operands promote among the floats alone (an int array never widens a float32 to
                   float64); sums of bfloat16 and float16 run in float32

These are the small parts of a model; what takes time has kernels of its own in ops/.
"""

from __future__ import annotations

import builtins
import functools
from typing import Any

import numpy as np

from tilewright import _core
from tilewright.device import Device, as_array, device_of, is_array, moved
from tilewright.errors import ShapeError
from tilewright.recording import current
from tilewright.registry import Context, Op, converted, rule
from tilewright.tensor import check_dtype, is_float

# Operands ------------------------------------------------------------------------------------


def _operands(op: str, a: Any, b: Any) -> tuple[Any, Any]:
    """Both sides as arrays or Python numbers that NumPy promotes as we promise."""
    a, b = _operand(op, "a", a), _operand(op, "b", b)
    return _beside(a, b), _beside(b, a)


def _beside(x: Any, other: Any) -> Any:
    """An integer operand as a float where the other one is an array of floats."""
    if not is_array(other) or not is_float(other.dtype):
        return x
    if is_array(x):
        return x if is_float(x.dtype) else x.astype(other.dtype)
    return float(x)


def _operand(op: str, arg: str, x: Any) -> Any:
    if is_array(x):
        check_dtype(op, arg, x)
        return x
    if isinstance(x, np.generic):  # np.sqrt(64) is a float64 that must not widen the result
        return x.item()
    return x if isinstance(x, int | float) else np.asarray(x, np.float32)


def _no_float64(x: Any) -> Any:
    """Integers divided, or beside a Python float, are float32 here."""
    return x.astype(np.float32) if x.dtype == np.float64 else x


def _settle(y: Any, a: Any, b: Any) -> Any:
    """The result in the dtype of its operands: NumPy makes float32 of a bfloat16 and a number."""
    dtypes = {x.dtype for x in (a, b) if is_array(x)}
    if len(dtypes) == 1 and is_float(dtype := dtypes.pop()):
        return y.astype(dtype, copy=False)
    return _no_float64(y)


def _promoted(*xs: Any) -> tuple[Any, ...]:
    """Different floats in the dtype that they make together: NumPy has none for two of 16 bits."""
    dtypes = {x.dtype for x in xs if is_array(x)}
    if len(dtypes) < 2 or not all(is_float(dtype) for dtype in dtypes):
        return xs
    dtype = _core.result_dtype(*xs)
    return tuple(x.astype(dtype) if is_array(x) else x for x in xs)


class _Like:
    """Shape and dtype of an operand: what its gradient must have."""

    __slots__ = ("dtype", "shape")

    def __init__(self, x: Any) -> None:
        self.shape = x.shape if is_array(x) else ()
        self.dtype = x.dtype if is_array(x) else None

    def fit(self, grad: Any) -> Any:
        if grad.shape != self.shape:
            ahead = grad.ndim - len(self.shape)
            ones = (i + ahead for i, n in enumerate(self.shape) if n == 1)
            axes = (*range(ahead), *(i for i in ones if grad.shape[i] != 1))
            grad = np.sum(grad, axis=axes, dtype=_sum_dtype(grad), keepdims=True)
            grad = grad.reshape(self.shape)
        return grad.astype(self.dtype, copy=False)


def _sum_dtype(x: Any) -> Any:
    return np.float32 if is_float(x.dtype) else None


def _alike(a: Any, b: Any) -> bool:
    return bool(a.shape == b.shape and a.dtype == b.dtype and is_float(a.dtype))


# Devices --------------------------------------------------------------------------------------


@rule(grads=("x",))
class move:
    """The same elements in the memory of a device, or of the CPU (None)."""

    @staticmethod
    def forward(ctx: Context, x: Any, device: Device | None) -> Any:
        ctx.save(device_of(x))
        return moved(x, device)

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        (came_from,) = ctx.saved
        return moved(dy, came_from)


# Operators -----------------------------------------------------------------------------------


@rule(grads=("a", "b"))
class add:
    """a + b."""

    @staticmethod
    def forward(ctx: Context, a: Any, b: Any) -> Any:
        a, b = _operands("add", a, b)
        ctx.save(_Like(a), _Like(b))
        if current() is not None and is_array(a) and is_array(b) and _alike(a, b):
            y = _core.empty_like(a)
            _core.sum(a, b, y)  # the same bits, and a program has a place for it
            return y
        return _settle(np.add(a, b), a, b)

    @staticmethod
    def backward(ctx: Context, dy: Any) -> tuple[Any, ...]:
        a, b = ctx.saved
        return a.fit(dy) if "a" in ctx.needs else None, b.fit(dy) if "b" in ctx.needs else None


@rule(grads=("a", "b"))
class subtract:
    """a - b."""

    @staticmethod
    def forward(ctx: Context, a: Any, b: Any) -> Any:
        a, b = _operands("subtract", a, b)
        ctx.save(_Like(a), _Like(b))
        return _settle(np.subtract(a, b), a, b)

    @staticmethod
    def backward(ctx: Context, dy: Any) -> tuple[Any, ...]:
        a, b = ctx.saved
        return a.fit(dy) if "a" in ctx.needs else None, b.fit(-dy) if "b" in ctx.needs else None


@rule(grads=("a", "b"))
class multiply:
    """a * b."""

    @staticmethod
    def forward(ctx: Context, a: Any, b: Any) -> Any:
        a, b = _operands("multiply", a, b)
        ctx.save(a, b)
        return _settle(np.multiply(a, b), a, b)

    @staticmethod
    def backward(ctx: Context, dy: Any) -> tuple[Any, ...]:
        a, b = ctx.saved
        da = _Like(a).fit(dy * b) if "a" in ctx.needs else None
        db = _Like(b).fit(dy * a) if "b" in ctx.needs else None
        return da, db


@rule(grads=("a", "b"))
class divide:
    """a / b."""

    @staticmethod
    def forward(ctx: Context, a: Any, b: Any) -> Any:
        a, b = _operands("divide", a, b)
        ctx.save(a, b)
        return _settle(np.true_divide(a, b), a, b)

    @staticmethod
    def backward(ctx: Context, dy: Any) -> tuple[Any, ...]:
        a, b = ctx.saved
        da = dy / b
        db = _Like(b).fit(-(da * a / b)) if "b" in ctx.needs else None
        return _Like(a).fit(da) if "a" in ctx.needs else None, db


@rule(grads=("a", "b"))
class power:
    """a ** b. Where a is 0, the gradient of b is 0."""

    @staticmethod
    def forward(ctx: Context, a: Any, b: Any) -> Any:
        a, b = _operands("power", a, b)
        y = _settle(np.power(a, b), a, b)
        ctx.save(a, b, y)
        return y

    @staticmethod
    def backward(ctx: Context, dy: Any) -> tuple[Any, ...]:
        a, b, y = ctx.saved
        da = db = None
        if "a" in ctx.needs:
            # b = 0 makes the factor 0 whatever a is; 0 * (0 ** -1) would be NaN
            slope = np.where(np.equal(b, 0), 0, b * np.power(a, np.where(np.equal(b, 0), 1, b - 1)))
            da = _Like(a).fit(dy * slope.astype(dy.dtype, copy=False))
        if "b" in ctx.needs:
            log = np.log(np.where(np.equal(a, 0), 1, a))
            db = _Like(b).fit(dy * y * log.astype(dy.dtype, copy=False))
        return da, db


@rule(grads=("x",))
class negative:
    """-x."""

    @staticmethod
    def forward(ctx: Context, x: Any) -> Any:
        return np.negative(x)

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        return -dy


@rule(grads=("x",))
class exp:
    """E to the power of x."""

    @staticmethod
    def forward(ctx: Context, x: Any) -> Any:
        y = _no_float64(np.exp(x))
        ctx.save(y)
        return y

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        return dy * ctx.saved[0]


@rule(grads=("x",))
class log:
    """Natural logarithm of x."""

    @staticmethod
    def forward(ctx: Context, x: Any) -> Any:
        ctx.save(x)
        return _no_float64(np.log(x))

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        return dy / ctx.saved[0]


@rule(grads=("x",))
class sqrt:
    """Square root of x."""

    @staticmethod
    def forward(ctx: Context, x: Any) -> Any:
        y = _no_float64(np.sqrt(x))
        ctx.save(y)
        return y

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        return (dy / (2 * ctx.saved[0])).astype(dy.dtype, copy=False)


@rule(grads=("a", "b"))
class where:
    """a where the condition holds, else b; all three broadcast."""

    @staticmethod
    def forward(ctx: Context, condition: Any, a: Any, b: Any) -> Any:
        a, b = _operands("where", a, b)
        ctx.save(as_array(condition), _Like(a), _Like(b))
        return _settle(np.where(condition, *_promoted(a, b)), a, b)

    @staticmethod
    def backward(ctx: Context, dy: Any) -> tuple[Any, ...]:
        condition, a, b = ctx.saved
        nothing = dy.dtype.type(0)
        da = a.fit(np.where(condition, dy, nothing)) if "a" in ctx.needs else None
        db = b.fit(np.where(condition, nothing, dy)) if "b" in ctx.needs else None
        return da, db


# Reductions ----------------------------------------------------------------------------------


def _expand(reduced: Any, shape: tuple[int, ...], axis: Any, keepdims: bool) -> Any:
    """A reduced array as a view of the shape before the reduction."""
    if not keepdims and axis is not None:
        reduced = np.expand_dims(reduced, axis)
    return np.broadcast_to(reduced, shape)


@rule(grads=("x",))
class sum:
    """Sum over ``axis``: one, a tuple of them, or None for all."""

    @staticmethod
    def forward(ctx: Context, x: Any, axis: Any = None, keepdims: bool = False) -> Any:
        ctx.save(x.shape, axis, keepdims)
        y = np.sum(x, axis=axis, dtype=_sum_dtype(x), keepdims=keepdims)
        return y.astype(x.dtype, copy=False) if is_float(x.dtype) else y

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        return _expand(dy, *ctx.saved)


@rule(grads=("x",))
class mean:
    """Mean over ``axis``: one, a tuple of them, or None for all."""

    @staticmethod
    def forward(ctx: Context, x: Any, axis: Any = None, keepdims: bool = False) -> Any:
        y = np.mean(x, axis=axis, dtype=np.float32, keepdims=keepdims)
        ctx.save(x.shape, axis, keepdims, builtins.max(1, y.size) / builtins.max(1, x.size))
        return y.astype(x.dtype, copy=False) if is_float(x.dtype) else y

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        shape, axis, keepdims, share = ctx.saved
        return _expand((dy * share).astype(dy.dtype, copy=False), shape, axis, keepdims)


@rule(grads=("x",))
class max:
    """Maximum over ``axis``: one, a tuple of them, or None for all; ties share the gradient."""

    @staticmethod
    def forward(ctx: Context, x: Any, axis: Any = None, keepdims: bool = False) -> Any:
        y = np.max(x, axis=axis, keepdims=keepdims)
        ctx.save(x, as_array(y), axis, keepdims)
        return y

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        x, y, axis, keepdims = ctx.saved
        hit = x == _expand(y, x.shape, axis, keepdims)
        ties = np.sum(hit, axis=axis, keepdims=True).astype(np.float32)
        spread = _expand(dy, x.shape, axis, keepdims)
        return np.where(hit, spread / ties, 0).astype(x.dtype, copy=False)


# Shape ---------------------------------------------------------------------------------------


@rule(grads=("x",))
class reshape:
    """The same elements in another shape."""

    views = True

    @staticmethod
    def forward(ctx: Context, x: Any, shape: tuple[int, ...]) -> Any:
        ctx.save(x.shape)
        try:
            return x.reshape(shape)
        except ValueError:
            raise ShapeError(
                f"reshape: shape must hold the {x.size} elements of x {x.shape}, got {shape}"
            ) from None

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        return dy.reshape(ctx.saved[0])


@rule(grads=("x",))
class broadcast_to:
    """A read-only view that repeats x along new axes and those of extent 1."""

    views = True

    @staticmethod
    def forward(ctx: Context, x: Any, shape: tuple[int, ...]) -> Any:
        ctx.save(_Like(x))
        try:
            return np.broadcast_to(x, shape)
        except ValueError:
            raise ShapeError(
                f"broadcast_to: shape must be one that x {x.shape} broadcasts to, got {shape}"
            ) from None

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        return ctx.saved[0].fit(dy)


@rule(grads=("x",))
class permute:
    """The axes in another order."""

    views = True

    @staticmethod
    def forward(ctx: Context, x: Any, axes: tuple[int, ...]) -> Any:
        try:
            y = x.transpose(axes)
        except ValueError:
            raise ShapeError(
                f"permute: axes must name each of the {x.ndim} axes of x {x.shape} once, got {axes}"
            ) from None
        ctx.save(axes)
        return y

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        return dy.transpose(np.argsort([axis % dy.ndim for axis in ctx.saved[0]]))


@rule(grads=("x",))
class transpose:
    """Two axes swapped."""

    views = True

    @staticmethod
    def forward(ctx: Context, x: Any, axis0: int, axis1: int) -> Any:
        ctx.save(axis0, axis1)
        return x.swapaxes(axis0, axis1)

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        return dy.swapaxes(*ctx.saved)


@rule(grads=("x",))
class getitem:
    """x[index], indexed as a NumPy array: slices are views, arrays of ids or bools are copies."""

    views = True

    @staticmethod
    def forward(ctx: Context, x: Any, index: Any) -> Any:
        ctx.save(x.shape, x.dtype, index)
        return x[index]

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        shape, dtype, index = ctx.saved
        parts = index if type(index) is tuple else (index,)
        if all(isinstance(part, int | slice | None | type(...)) for part in parts):
            dx = np.zeros_like(dy, dtype, "C", shape=shape)
            dx[index] = dy
            return dx
        dx = np.zeros_like(
            dy, np.float32, "C", shape=shape
        )  # an id may come often: added in float32, rounded once
        np.add.at(dx, index, dy.astype(np.float32, copy=False))
        return dx.astype(dtype, copy=False)


@rule(grads=("x",))
class split:
    """Views of ``size`` entries along an axis; the last may be shorter."""

    views = True

    @staticmethod
    def forward(ctx: Context, x: Any, size: int, axis: int = 0) -> tuple[Any, ...]:
        if size < 1:
            raise ShapeError(f"split: size must be at least 1, got {size}")
        parts = tuple(np.split(x, range(size, x.shape[axis], size), axis=axis))
        ctx.save(tuple(part.shape for part in parts), x.dtype, axis)
        return parts

    @staticmethod
    def backward(ctx: Context, *dys: Any) -> Any:
        shapes, dtype, axis = ctx.saved
        like = next(dy for dy in dys if dy is not None)
        parts = [
            np.zeros_like(like, dtype, "C", shape=s) if dy is None else dy
            for dy, s in zip(dys, shapes, strict=True)
        ]
        return np.concatenate(parts, axis=axis)


@functools.cache
def _join(count: int) -> Op:
    """The rule that concatenates ``count`` arrays."""

    class concatenate:
        @staticmethod
        def forward(ctx: Context, *xs: Any, axis: int) -> Any:
            ctx.save([x.dtype for x in xs], np.cumsum([x.shape[axis] for x in xs[:-1]]), axis)
            return np.concatenate(_promoted(*xs), axis=axis)

        @staticmethod
        def backward(ctx: Context, dy: Any) -> tuple[Any, ...]:
            dtypes, ends, axis = ctx.saved
            parts = np.split(dy, ends, axis=axis)
            return tuple(p.astype(d, copy=False) for p, d in zip(parts, dtypes, strict=True))

    return rule(grads=tuple(f"x{i}" for i in range(count)))(concatenate)


def concatenate(tensors: Any, axis: int = 0) -> Any:
    """Join along an axis that exists."""
    return _join(len(tensors))(*tensors, axis=axis)


def stack(tensors: Any, axis: int = 0) -> Any:
    """Join along a new axis."""
    ndim = len(tensors[0].shape) + 1
    at = (slice(None),) * (axis % ndim) + (None,)
    expand: Any = getitem  # an Op: the decorator hides that from a type checker
    return concatenate([expand(t, at) for t in tensors], axis=axis)


@rule(grads=("x",))
class astype:
    """The elements in another dtype."""

    @staticmethod
    def forward(ctx: Context, x: Any, dtype: Any) -> Any:
        ctx.save(x.dtype)
        y = converted(x, dtype)
        check_dtype("to", "dtype", y)
        return y

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        return converted(dy, ctx.saved[0])
