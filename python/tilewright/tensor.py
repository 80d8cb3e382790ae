"""What a Tensor can do: ``tw.tensor``, and the operators and methods of autograd's Tensor class.

The methods are thin: each calls a rule of arithmetic.py, where the arithmetic and its gradient are,
or reads an attribute of the array.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

import tilewright
from tilewright.device import as_array, device_of, is_device_name, moved, named, running_on
from tilewright.errors import DtypeError
from tilewright.interop import capsule_of
from tilewright.recording import current, refuse

if TYPE_CHECKING:
    from tilewright.autograd import Node, Tensor


# Rules and ops are made from Tensor, so that they can't be imported here: they are looked up when
# they are called. Any, because they are made by a decorator that mypy can't see through.
_tw: Any = tilewright


_READ = "return the Tensor from the step and read it outside"


class Operators:
    """Operators and methods of Tensor, over its array ``data`` and the tape."""

    __slots__ = ()
    __array_ufunc__ = None  # np_array * tensor asks the Tensor first
    __hash__ = object.__hash__  # by identity, although == compares elements

    if TYPE_CHECKING:
        data: Any
        grad: Any
        requires_grad: bool
        _node: Node | None
        _writes: list[int]

    # What it is -------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent of each axis."""
        return self.data.shape

    @property
    def dtype(self) -> Any:
        """The array's dtype."""
        return self.data.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.data.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.data.size

    @property
    def device(self) -> str:
        """Where the array is: "cpu", or the name of a device."""
        device = device_of(self.data)
        return "cpu" if device is None else device.name

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Tensor]:
        """The entries along the first axis, as views on the tape."""
        return (self[i] for i in range(len(self.data)))

    def __repr__(self) -> str:
        body = np.array2string(self._host(), prefix="tensor(", separator=", ", threshold=100)
        tail = ", requires_grad=True" if self.requires_grad else ""
        return f"tensor({body}, dtype={self.data.dtype}{tail})"

    # Leaving the tape -------------------------------------------------------------------------

    def numpy(self) -> Any:
        """The array itself, without a copy; after writing to it, call ``mark_written``.

        Of a Tensor on a device: a copy of its array.
        """
        return self._host()

    def _host(self) -> Any:
        refuse("reading a value", _READ)
        device = device_of(self.data)
        return self.data if device is None else device.get(self.data)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        refuse("reading a value", _READ)
        if dtype is not None and np.dtype(dtype) != self.data.dtype:
            if copy is False:
                raise ValueError(f"a Tensor of {self.data.dtype} can't be {dtype} without a copy")
            return self.data.astype(dtype)
        return self.data.copy() if copy else self.data

    def __dlpack__(self, **options: Any) -> Any:
        if device_of(self.data) is not None:
            return self.data.__dlpack__(**options)
        return capsule_of(self.data, **options)

    def __dlpack_device__(self) -> tuple[int, int]:
        if device_of(self.data) is not None:
            return self.data.__dlpack_device__()
        return 1, 0

    def item(self) -> Any:
        """The only element, as a Python number."""
        refuse("reading a value", _READ)
        return self.data.item()

    def __bool__(self) -> bool:
        refuse("reading a value", _READ)
        return bool(self.data)

    def __float__(self) -> float:
        refuse("reading a value", _READ)
        return float(self.data)

    def __int__(self) -> int:
        refuse("reading a value", _READ)
        return int(self.data)

    def detach(self) -> Tensor:
        """A Tensor of the same array that the tape does not know."""
        shared = _tw.Tensor(self.data)
        shared._writes = self._writes
        return shared

    # The tape ---------------------------------------------------------------------------------

    def backward(self, gradient: Any = None) -> None:
        """Add d(self)/d(leaf) to ``leaf.grad`` of every leaf; see ``autograd.backward``."""
        _tw.autograd.backward(self, gradient)

    def mark_written(self) -> None:
        """Note that ``data`` was written in place: the tape and packed weights rely on it."""
        self._writes[0] += 1
        if (noted := current()) is not None:
            noted.writes(self)  # type: ignore[arg-type]

    @property
    def _version(self) -> int:
        return self._writes[0]

    def __setitem__(self, index: Any, value: Any) -> None:
        refuse("writing in place", "use an op with out=, or do it outside of the step")
        on_tape = self.requires_grad or getattr(value, "requires_grad", False)
        if on_tape and _tw.autograd.grad_enabled():
            raise RuntimeError(
                "tensor: writing in place can't be recorded on the tape; write under no_grad(), or "
                "build a new tensor with where() or concatenate()"
            )
        self.data[_arrays(index)] = _tw.autograd.unwrap(value, "tensor: value")
        self.mark_written()

    # Arithmetic -------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Tensor:
        return _tw.arithmetic.add(self, other)

    def __radd__(self, other: Any) -> Tensor:
        return _tw.arithmetic.add(other, self)

    def __sub__(self, other: Any) -> Tensor:
        return _tw.arithmetic.subtract(self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return _tw.arithmetic.subtract(other, self)

    def __mul__(self, other: Any) -> Tensor:
        return _tw.arithmetic.multiply(self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return _tw.arithmetic.multiply(other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return _tw.arithmetic.divide(self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return _tw.arithmetic.divide(other, self)

    def __pow__(self, other: Any) -> Tensor:
        return _tw.arithmetic.power(self, other)

    def __rpow__(self, other: Any) -> Tensor:
        return _tw.arithmetic.power(other, self)

    def __neg__(self) -> Tensor:
        return _tw.arithmetic.negative(self)

    def __matmul__(self, other: Any) -> Tensor:
        return _tw.matmul(self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return _tw.matmul(other, self)

    def exp(self) -> Tensor:
        """E to the power of each element."""
        return _tw.arithmetic.exp(self)

    def log(self) -> Tensor:
        """Natural logarithm of each element."""
        return _tw.arithmetic.log(self)

    def sqrt(self) -> Tensor:
        """Square root of each element."""
        return _tw.arithmetic.sqrt(self)

    # Comparison: Tensors of bool, never on the tape --------------------------------------------

    def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
        return _compare(operator.eq, self, other)

    def __ne__(self, other: object) -> Tensor:  # type: ignore[override]
        return _compare(operator.ne, self, other)

    def __lt__(self, other: Any) -> Tensor:
        return _compare(operator.lt, self, other)

    def __le__(self, other: Any) -> Tensor:
        return _compare(operator.le, self, other)

    def __gt__(self, other: Any) -> Tensor:
        return _compare(operator.gt, self, other)

    def __ge__(self, other: Any) -> Tensor:
        return _compare(operator.ge, self, other)

    # Reductions -------------------------------------------------------------------------------

    def sum(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        """Sum over an axis, several, or all."""
        return _tw.arithmetic.sum(self, axis=axis, keepdims=keepdims)

    def mean(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        """Mean over an axis, several, or all."""
        return _tw.arithmetic.mean(self, axis=axis, keepdims=keepdims)

    def max(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        """Maximum over an axis, several, or all; equal maxima share the gradient."""
        return _tw.arithmetic.max(self, axis=axis, keepdims=keepdims)

    # Shape ------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Tensor:
        kept = self.requires_grad and _tw.autograd.grad_enabled()
        return _tw.arithmetic.getitem(self, _arrays(index, copied=kept))

    def reshape(self, *shape: Any) -> Tensor:
        """The same elements in another shape; one extent may be -1. A view where possible."""
        return _tw.arithmetic.reshape(self, _flat(shape))

    def broadcast_to(self, *shape: Any) -> Tensor:
        """A view that repeats the elements along new axes and those of extent 1."""
        return _tw.arithmetic.broadcast_to(self, _flat(shape))

    def permute(self, *axes: Any) -> Tensor:
        """A view with its axes in the given order."""
        return _tw.arithmetic.permute(self, _flat(axes))

    def transpose(self, axis0: int, axis1: int) -> Tensor:
        """A view with two axes swapped."""
        return _tw.arithmetic.transpose(self, axis0, axis1)

    @property
    def T(self) -> Tensor:
        """A view with the order of the axes reversed."""
        return _tw.arithmetic.permute(self, tuple(reversed(range(self.data.ndim))))

    def split(self, size: int, axis: int = 0) -> tuple[Tensor, ...]:
        """Views of ``size`` entries each along an axis; the last may be shorter."""
        return _tw.arithmetic.split(self, size, axis=axis)

    def to(self, target: Any) -> Tensor:
        """The elements in another dtype or on a device; the tensor itself where nothing changes.

        Args:
            target: a dtype or its name; "cpu" or the name of another device.

        Raises:
            DtypeError: no Tensor has the dtype. DeviceError: there is no such device.
        """
        if is_device_name(target):
            device = named("to", target)
            if device is device_of(self.data):
                return self  # type: ignore[return-value]
            return _tw.arithmetic.move(self, device)
        dtype = np.dtype(target)
        if np.dtype(dtype) == self.data.dtype:
            return self  # type: ignore[return-value]
        if not is_float(np.dtype(dtype)):  # integers have no gradient
            converted = self.data.astype(dtype)
            check_dtype("to", "dtype", converted)
            return _tw.Tensor(converted)
        return _tw.arithmetic.astype(self, dtype)


def tensor(
    x: Any, *, dtype: Any = None, device: str | None = None, requires_grad: bool = False
) -> Tensor:
    """Make a Tensor of a copy of ``x``.

    Args:
        x: an array of any library with ``__dlpack__``, a Tensor, or numbers in lists; Python's
            floats become float32.
        dtype: convert to it.
        device: where to: "cpu" or the name of another device; by default where x is.
        requires_grad: collect a gradient in ``.grad``.

    Raises:
        DtypeError: x is a float64 array, and no dtype is given. DeviceError: there is no such
            device.
    """
    target = named("tensor", device)
    x = _tw.autograd.unwrap(x, "tensor: x")
    here = device_of(x)
    with running_on(here, "tensor"):  # the copy is there
        array = np.array(x, dtype=dtype) if here is None else x.astype(dtype or x.dtype)
    if array.dtype == np.float64 and dtype is None and not hasattr(x, "dtype"):
        array = array.astype(np.float32)
    check_dtype("tensor", "x", array)
    if requires_grad and not is_float(array.dtype):
        raise DtypeError(f"tensor: x must be floating to require a gradient, got {array.dtype}")
    return _tw.Tensor(array if device is None else moved(array, target), requires_grad)


def is_float(dtype: Any) -> bool:
    """Whether gradients exist for the dtype; ml_dtypes' floats are of NumPy's kind V."""
    return dtype.kind == "f" or dtype.name in ("bfloat16", "float16")


def check_dtype(op: str, arg: str, array: Any) -> None:
    """Refuse the dtypes that no Tensor has."""
    dtype = array.dtype
    if dtype.kind == "f" and dtype.itemsize > 4:  # longdouble is not called so everywhere
        raise DtypeError(f"{op}: {arg} must not be {dtype.name}; use x.astype(np.float32)")
    if dtype.kind not in "fiub" and not is_float(dtype):
        raise DtypeError(f"{op}: {arg} must hold numbers, got {dtype}")
    if not dtype.isnative:
        raise DtypeError(
            f"{op}: {arg} must have this machine's byte order, got {dtype}; "
            f"use x.astype(np.{dtype.name})"
        )


def _compare(compare: Callable[[Any, Any], Any], a: Any, b: Any) -> Tensor:
    b = _tw.autograd.unwrap(b, "tensor: the other side of a comparison")
    return _tw.Tensor(as_array(compare(a.data, b)))


def _arrays(index: Any, copied: bool = False) -> Any:
    """An index whose Tensors are arrays; copied if what it holds may be written to meanwhile."""
    if type(index) is tuple:
        return tuple(_arrays(i, copied) for i in index)
    if isinstance(index, Operators):
        index = index.data
    return copy.deepcopy(index) if copied and isinstance(index, np.ndarray | list) else index


def _flat(sizes: tuple[Any, ...]) -> tuple[SupportsIndex, ...]:
    """Both f(2, 3) and f((2, 3))."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
