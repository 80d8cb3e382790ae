"""The op registry: one Python file per op, one list that tests, benches and docs walk.

An op is a class of static functions under ``@op``; ``ops/layernorm.py`` is one to start with:

- ``forward(ctx, x, ..., *, out=None)`` takes NumPy arrays and returns one array or a tuple, namely
  ``out`` where it is given: ``outs_for`` reads a tuple, overlaps were refused before. With
  ``ctx.needs`` (the names of the inputs whose gradient will be asked for) it may ``ctx.save(...)``
  what the backward pass reads.
- ``backward(ctx, dy)`` gets the gradient of each output (``None`` where an output was not used) and
  returns one gradient per name in ``grads``, ``None`` for a name that is not in ``ctx.needs``.
- ``reference(x, ...)`` is the op's definition in float64 NumPy. It returns a ``Reference`` (or a
  tuple of them, one per output), which says what the error bound of the tests scales with.
- ``tangent_size(d, x, ...)`` is optional: where the derivative of the first output along d, a
  direction of x or residual, may be far smaller than its terms, what their errors scale with.
- ``cost(x, ...)`` counts floating-point operations and bytes moved at least, for the benches.
- ``cases`` name the shapes that tests and benches run; ``make(case, rng, dtype)`` turns one into
  (args, kwargs).
- ``bench`` is optional: the cases that the bench times, else the largest of ``cases``.
- ``straight_through(case)`` is optional: whether the reference rounds its inputs there, so that the
  gradient passes straight through and is not the derivative of the reference.
- ``call(op, ...)`` is optional: the whole of ``op(...)`` for plain arrays, where every tenth of a
  microsecond counts.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tilewright import _core
from tilewright.autograd import NO_TAPE, Context, apply
from tilewright.device import is_array
from tilewright.errors import DtypeError, ShapeError
from tilewright.interop import FLOATS, PLAIN


class Cost(NamedTuple):
    """What a call costs at least: operations (float or integer), bytes of memory traffic."""

    flops: float
    bytes: float


class Reference(NamedTuple):
    """An op's exact result, and the scale of the rounding errors that a float32 kernel may make.

    ``magnitude`` is the sum of the absolute values of the terms of each element, ``terms`` their
    number. The bound is 2 * sqrt(terms) * u * magnitude + u_out * |value| (tests/tolerance.py).
    """

    value: Any
    magnitude: Any
    terms: int


class Op:
    """A registered op: a call runs ``forward`` on arrays.

    Tensors are recorded on the tape, arrays of other libraries are read where they are: the answer
    is of the arguments' kind.
    """

    def __init__(self, definition: type, grads: tuple[str, ...]) -> None:
        self.__name__ = self.__qualname__ = self.name = definition.__name__
        self.__doc__ = definition.__doc__
        self.__module__ = definition.__module__
        self.definition = definition
        self.grads = grads
        self.views = bool(getattr(definition, "views", False))  # outputs may share x's memory
        self.forward: Callable[..., Any] = definition.forward  # type: ignore[attr-defined]
        self.backward: Callable[..., Any] | None = getattr(definition, "backward", None)
        self.reference: Callable[..., Any] | None = getattr(definition, "reference", None)
        self.cost: Callable[..., Cost] | None = getattr(definition, "cost", None)
        self.make: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] | None
        self.make = getattr(definition, "make", None)
        self.cases: tuple[str, ...] = tuple(getattr(definition, "cases", ()))
        signature = inspect.signature(self.forward)
        parameters = list(signature.parameters.values())[1:]  # without ctx
        self.params = tuple(p.name for p in parameters)
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            self.params = grads  # forward(ctx, *arrays): the caller names them
        self.__signature__ = signature.replace(parameters=parameters)
        self.annotations = {p.name: str(p.annotation) for p in parameters}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for value in args:
            if type(value) not in PLAIN:
                return apply(self, args, kwargs)
        for value in kwargs.values():
            if type(value) not in PLAIN:
                return apply(self, args, kwargs)
        if kwargs and kwargs.get("out") is not None:
            self.check_out(kwargs["out"], args, kwargs)
        try:
            return self.forward(NO_TAPE, *args, **kwargs)
        except TypeError as error:
            self.check_numbers(error, args, kwargs)
            raise

    def check_out(self, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Refuse an ``out`` that shares memory with an input or with another ``out``.

        ``out is residual``, exactly the same array, is the one exception: that works in place.

        Raises:
            ShapeError: naming the two.
        """
        inputs = dict(zip(self.params, args, strict=False)) | kwargs
        given = [(n, a) for n, v in inputs.items() if n != "out" for a in arrays_in(v)]
        many = out if type(out) is tuple else ()
        parts = [(f"out[{i}]", o) for i, o in enumerate(many)]
        for name, array in parts or [("out", a) for a in arrays_in(out)]:
            for other, value in given:
                shared = _core.overlap(array, value)
                if shared == _SAME and other == "residual":
                    continue
                if shared:
                    but = " unless it is exactly the same array" if other == "residual" else ""
                    raise ShapeError(
                        f"{self.name}: {name} must not share memory with {other}{but}, got overlap"
                    )
            given.append((name, array))

    def check_numbers(self, error: TypeError, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Once ``forward`` has failed: refuse a number, flag or name that is none, by its name.

        The annotations of ``forward`` say what each argument is, where it is no array.

        Raises:
            DtypeError: naming the argument.
        """
        if type(error) is not TypeError:  # a DtypeError names it already
            return
        for name, value in (dict(zip(self.params, args, strict=False)) | kwargs).items():
            kinds = self.annotations.get(name, "Any").split(" | ")
            unknown = [kind for kind in kinds if kind not in _KINDS]
            if unknown or any(_KINDS[kind][1](value) for kind in kinds):
                continue
            wanted = " or ".join(_KINDS[kind][0] for kind in kinds)
            got = type(value).__name__
            raise DtypeError(f"{self.name}: {name} must be {wanted}, got {got}") from error

    def __reduce__(self) -> str:
        return self.name  # a module-level name, as a function is: copies are the op itself

    def __repr__(self) -> str:
        return f"<tilewright op {self.name}{self.__signature__}>"


OPS: dict[str, Op] = {}


def op(*, grads: tuple[str, ...] = ()) -> Callable[[type], Op]:
    """Register a class of static functions as an op; ``grads`` names the differentiable inputs."""

    def register(definition: type) -> Op:
        kind: type[Op] = Op
        if call := getattr(definition, "call", None):
            kind = type("Op", (Op,), {"__call__": call, "__doc__": Op.__doc__})
        made = kind(definition, grads)
        OPS[made.name] = made
        return made

    return register


def rule(*, grads: tuple[str, ...]) -> Callable[[type], Op]:
    """Make a class of static functions differentiable, unregistered: NumPy does its arithmetic.

    ``views = True`` in the class says that the outputs may share the memory of the first argument.
    """
    return lambda definition: Op(definition, grads)


# What the annotation of an argument that is no array means: in words, and as a test.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "float": ("a number", lambda v: isinstance(v, numbers.Real)),
    "int": ("an int", lambda v: hasattr(v, "__index__")),
    "bool": ("a bool", lambda v: isinstance(v, bool | np.bool_)),
    "str": ("a str", lambda v: isinstance(v, str)),
    "None": ("None", lambda v: v is None),
}

_SAME = 2  # what _core.overlap says of one array given twice


def arrays_in(value: Any) -> Iterator[Any]:
    """The arrays that an argument is made of: itself, or the attributes of a QuantizedArray."""
    if isinstance(value, np.ndarray):
        yield value
    else:
        for name in getattr(type(value), "__slots__", ()):
            if isinstance(array := getattr(value, name, None), np.ndarray):
                yield array


def outs_for(op: str, out: Any, *results: str) -> tuple[Any, ...]:
    """The arrays that ``out`` gives for several results: None, for all or one, is a fresh array.

    Raises:
        DtypeError: out is no tuple. ShapeError: it is one of another length.
    """
    if out is None:
        return (None,) * len(results)
    wanted = f"{op}: out must be a tuple of {len(results)} arrays, ({', '.join(results)})"
    if type(out) is not tuple:
        raise DtypeError(f"{wanted}, got {type(out).__name__}")
    if len(out) != len(results):
        raise ShapeError(f"{wanted}, got {len(out)}")
    return out


def empty_in_order(like: Any, dtype: Any, shape: tuple[int, ...] | None = None) -> Any:
    """Return a fresh array with the order of axes of ``like``, an array, and by default its shape.

    A transposed view stays one, and is read and written along memory.
    """
    shape = like.shape if shape is None else shape
    if like.flags.c_contiguous:
        return _core.empty(shape, dtype)
    order = sorted(range(like.ndim), key=lambda d: -abs(like.strides[d]))
    made = _core.empty(tuple(shape[d] for d in order), dtype)
    return made if order == sorted(order) else made.transpose(np.argsort(order))


def converted(x: Any, dtype: Any) -> Any:
    """Return x in a float dtype, each element rounded once; x itself where it has the dtype.

    NumPy takes several ns an element to and from bfloat16. The kernel for copies converts, and a
    program has a place for it.
    """
    dtype = np.dtype(dtype)
    if x.dtype == dtype:
        return x
    if not is_array(x) or not {x.dtype, dtype} <= FLOATS or x.ndim == 0:
        return x.astype(dtype)
    y = empty_in_order(x, dtype)
    _core.sum(x, None, y)
    return y


def empty_for(out: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return ``out`` where the caller gave one, else a fresh array."""
    return _core.empty(shape, dtype) if out is None else out


def rows_of(x: Any) -> int:
    """How many rows the last axis of x makes: statistics that a backward pass will read.

    None in what is no array or has no axes: the kernel's own check words the error.
    """
    shape = getattr(x, "shape", ())
    return int(x.size // shape[-1]) if shape and shape[-1] else 0


__all__ = [
    "NO_TAPE",
    "OPS",
    "Context",
    "Cost",
    "Op",
    "Reference",
    "converted",
    "empty_for",
    "empty_in_order",
    "op",
    "outs_for",
    "rows_of",
    "rule",
]
