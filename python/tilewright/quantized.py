"""QuantizedArray: integers of 8 or 4 bits and the float32 numbers that give them meaning."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.device import as_array
from tilewright.errors import DtypeError, ShapeError, UnsupportedError

_BYTES = frozenset({np.dtype(np.int8), np.dtype(np.uint8)})


class QuantizedArray:
    """What ``tw.quantize`` returns: x ~ scale * q + offset.

    A scale (and an offset, where there are any) belongs to the whole array, to each index of
    ``axis``, or to each group of ``group_size`` neighbours along ``along``.

    Args:
        data: int8 or uint8. 4 bits: two integers a byte along ``along``, the first one in the lower
            nibble; the dtype says whether nibbles are signed.
        scale: float32: () for one; (n,) for one an index of ``axis``; with groups like the array,
            but as many along ``along`` as there are groups.
        axis: the channel axis that keeps a scale for each index, or None.
        bits: 8 or 4.
        group_size: None, or a positive number; the last group may be shorter. The array has two
            axes, ``axis`` and ``along``, or one, ``along``.
        offset: None (symmetric), or float32 like scale.
        shape: of the array that is represented; by default that of data (4 bits: with ``along``
            twice as long).
        along: the reduced axis; by default the last one that is not ``axis``.

    Raises:
        ShapeError, DtypeError, UnsupportedError: naming the argument.
    """

    __slots__ = ("along", "axis", "bits", "data", "group_size", "offset", "scale", "shape")

    def __init__(
        self,
        data: Any,
        scale: Any,
        axis: int | None = None,
        *,
        bits: int = 8,
        group_size: int | None = None,
        offset: Any = None,
        shape: tuple[int, ...] | None = None,
        along: int | None = None,
    ) -> None:
        if getattr(data, "dtype", None) not in _BYTES:
            got = getattr(data, "dtype", type(data).__name__)
            raise DtypeError(f"QuantizedArray: data must be an int8 or uint8 array, got {got}")
        check_bits("QuantizedArray", bits)
        self.axis, self.along = check_axes("QuantizedArray", "data", data.shape, axis, along, bits)
        check_groups("QuantizedArray", "data", data.shape, self.axis, group_size)
        self.data: Any = data
        self.bits, self.group_size = bits, group_size
        self.shape: tuple[int, ...] = self._shape(shape)
        self.scale: Any = self._floats("scale", scale)
        self.offset: Any = None if offset is None else self._floats("offset", offset)

    @classmethod
    def of(
        cls,
        data: Any,
        scale: Any,
        offset: Any,
        *,
        shape: tuple[int, ...],
        axis: int | None,
        along: int,
        bits: int,
        group_size: int | None,
    ) -> QuantizedArray:
        """Return one of parts that are known to fit: the constructor without its checks."""
        made = cls.__new__(cls)
        made.data, made.scale, made.offset, made.shape = data, scale, offset, shape
        made.axis, made.along, made.bits, made.group_size = axis, along, bits, group_size
        return made

    def _shape(self, given: tuple[int, ...] | None) -> tuple[int, ...]:
        """The logical shape, which the data bear out."""
        stored = tuple(self.data.shape)
        if self.bits == 8:
            want = [stored]
        else:
            before, after = stored[: self.along], stored[self.along + 1 :]
            count = 2 * stored[self.along]
            want = [(*before, n, *after) for n in (count, count - 1) if n >= 0]
        if given is None:
            return want[0]
        if tuple(given) not in want:
            raise ShapeError(
                f"QuantizedArray: shape must be {' or '.join(map(str, want))} to match data "
                f"{stored} of {self.bits} bits, got {tuple(given)}"
            )
        return tuple(int(n) for n in given)

    def _floats(self, name: str, value: Any) -> Any:
        value = as_array(value)
        if value.dtype != np.float32:
            raise DtypeError(f"QuantizedArray: {name} must be float32, got {value.dtype}")
        want = scale_shape(self.shape, self.axis, self.along, self.group_size)
        if value.shape != want:
            why = f"for groups of {self.group_size} along axis {self.along}"
            if self.group_size is None:
                one = self.axis is None
                why = "for one scale" if one else f"for one scale an index of axis {self.axis}"
            raise ShapeError(
                f"QuantizedArray: {name} must have shape {want} {why}, got {value.shape}"
            )
        return value

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of data, scales and offsets."""
        offsets = 0 if self.offset is None else self.offset.nbytes
        return int(self.data.nbytes + self.scale.nbytes + offsets)

    @property
    def T(self) -> QuantizedArray:
        """The axes reversed, as ``numpy.ndarray.T``; nothing is copied."""
        last = self.ndim - 1
        return QuantizedArray.of(
            self.data.T,
            self.scale.T,
            None if self.offset is None else self.offset.T,
            shape=self.shape[::-1],
            axis=None if self.axis is None else last - self.axis,
            along=last - self.along if self.along >= 0 else -1,
            bits=self.bits,
            group_size=self.group_size,
        )

    def integers(self) -> Any:
        """Return the integers one an element, int8 or uint8: data itself, or its nibbles."""
        return self.data if self.bits == 8 else unpack_nibbles(self.data, self.along, self.shape)

    def __repr__(self) -> str:
        scales = "one scale" if self.axis is None else f"a scale per index of axis {self.axis}"
        if self.group_size is not None:
            scales = f"a scale per {self.group_size} along axis {self.along}"
        kind = f"{'u' * (self.data.dtype == np.uint8)}int{self.bits}"
        offsets = "" if self.offset is None else ", with offsets"
        return f"<QuantizedArray {self.shape} {kind}, {scales}{offsets}>"


def check_bits(op: str, bits: Any) -> None:
    """Refuse other widths than 8 and 4."""
    if type(bits) is not int or bits not in (8, 4):
        raise UnsupportedError(f"{op}: bits must be 8 or 4, got {bits!r}")


def check_axes(
    op: str, name: str, shape: tuple[int, ...], axis: Any, along: Any, bits: int
) -> tuple[int | None, int]:
    """Return (axis, along) as non-negative numbers; along is -1 if there is no reduced axis."""
    ndim = len(shape)
    for which, value in (("axis", axis), ("along", along)):
        if value is not None and (type(value) is not int or not -ndim <= value < ndim):
            raise ShapeError(
                f"{op}: {which} must name one of the axes of {name} {shape}, got {value!r}"
            )
    axis = None if axis is None else axis % ndim
    if along is None:
        along = ndim - 2 if axis is not None and axis == ndim - 1 else ndim - 1
    else:
        along %= ndim
    if along == axis:
        raise ShapeError(f"{op}: along must be another axis than axis, got {along} for both")
    if along < 0 and bits == 4:
        raise ShapeError(
            f"{op}: {name} must have an axis beside axis to pack 4 bits along, got {shape}"
        )
    return axis, along


def check_groups(
    op: str, name: str, shape: tuple[int, ...], axis: int | None, group_size: Any
) -> None:
    """Groups run along the one axis that is not ``axis``."""
    if group_size is None:
        return
    if type(group_size) is not int or group_size < 1:
        raise ShapeError(f"{op}: group_size must be a positive integer, got {group_size!r}")
    if len(shape) != (1 if axis is None else 2):
        raise UnsupportedError(
            f"{op}: group_size needs {name} of two axes and axis, or of one axis without it; "
            f"got {name} {shape}, axis {axis}"
        )


def scale_shape(
    shape: tuple[int, ...], axis: int | None, along: int, group_size: int | None
) -> tuple[int, ...]:
    """Return the shape of the scales of an array of this shape."""
    if group_size is None:
        return () if axis is None else (shape[axis],)
    groups = -(-shape[along] // group_size)
    return tuple(groups if d == along else n for d, n in enumerate(shape))


def packed_shape(shape: tuple[int, ...], along: int, bits: int) -> tuple[int, ...]:
    """Return the shape of the data: 4 bits are two a byte along ``along``."""
    if bits == 8:
        return shape
    return (*shape[:along], -(-shape[along] // 2), *shape[along + 1 :])


def unpack_nibbles(data: Any, along: int, shape: tuple[int, ...]) -> Any:
    """Return the numbers of 4 bits, two a byte along an axis, one an element of this shape."""
    packed = np.moveaxis(data, along, -1)
    out = np.empty_like(data, shape=shape)
    spread = np.moveaxis(out, along, -1)
    # to the left drops the other nibble, to the right copies the sign where there is one
    spread[..., ::2] = (packed << 4) >> 4
    spread[..., 1::2] = packed[..., : shape[along] // 2] >> 4
    return out
