"""pack: a constant right-hand side, brought into the kernels' layout once instead of per call."""

from __future__ import annotations

from typing import Any

from tilewright import _core
from tilewright.autograd import unwrap
from tilewright.errors import ShapeError, UnsupportedError
from tilewright.quantized import QuantizedArray

PackedMatrix = _core.PackedMatrix


def right_hand_side(op: str, name: str, b: QuantizedArray) -> tuple[Any, ...]:
    """Return (data, scale, offset, bits, K, group) of a right-hand side (K, N) for the kernels."""
    if b.ndim != 2:
        raise ShapeError(f"{op}: {name} must have 2 axes, (K, N), got shape {b.shape}")
    if b.axis == 0:
        raise UnsupportedError(
            f"{op}: {name} must have one scale, or scales for each column (axis 1), because a "
            "scale for each row of K can't be taken out of the sum; got axis 0. For weights "
            "(out, in) quantized with axis=0, pass q.T"
        )
    if b.bits == 4 and b.along != 0:
        raise UnsupportedError(
            f"{op}: {name} of 4 bits must be packed along K, its axis 0, got packed along axis "
            f"{b.along}; quantize (K, N) with axis=1, or (N, K) and pass q.T"
        )
    return (b.data, b.scale, b.offset, b.bits, b.shape[0], b.group_size or 0)


def pack(b: Any, *, prefer: str = "throughput") -> Any:
    """Pack a constant right-hand side for ``tw.matmul``, ``tw.int8_matmul`` or ``tw.qmatmul``.

    Args:
        b: (K, N) of a float dtype or int8, any strides; bfloat16 and float16 keep their 16 bits at
            every level, so that few rows read half of what float32 takes. Or a QuantizedArray as
            ``tw.qmatmul`` takes it, which keeps its 8 or 4 bits and serves both of qmatmul's
            ``compute``.
        prefer: "throughput" or "latency", which differ where b is float32 and the level has matrix
            units (``amx``). They multiply it several times faster than registers do; but few rows
            are bound by reading b, and take about twice as long. "latency" keeps to the float32
            kernel for any number of rows: for models that generate a token at a time. The layout
            is the same.

    Returns:
        A PackedMatrix (``shape``, ``dtype``, ``bits``, ``isa``, ``nbytes``), which keeps no
        reference to b. It belongs to the ISA level that was active: another level refuses it.

    Raises:
        ShapeError, DtypeError, UnsupportedError: naming the argument; also of b on a GPU, whose
            kernels read matrices as they are.
    """
    if prefer not in ("throughput", "latency"):
        raise UnsupportedError(f"pack: prefer must be 'throughput' or 'latency', got {prefer!r}")
    b = unwrap(b, "pack: b")
    if isinstance(b, QuantizedArray):
        return _core.pack_quantized(right_hand_side("pack", "b", b))
    return _core.pack(b, prefer == "latency")


__all__ = ["PackedMatrix", "pack"]
