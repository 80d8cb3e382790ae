"""The error classes; every message names the op, the argument, what is required and what came."""

from tilewright._core import DeviceError, DtypeError, ShapeError, UnsupportedError

ShapeError.__doc__ = "An argument's shape, strides or memory does not fit; a ValueError."
DtypeError.__doc__ = "An argument has a dtype or type that the op does not take; a TypeError."
DeviceError.__doc__ = "A device is absent or failed; a RuntimeError."
UnsupportedError.__doc__ = "A combination that has no kernel; a NotImplementedError."


class FormatError(ValueError):
    """A file that is not what it should be: truncated, hostile, or of another model."""


__all__ = ["DeviceError", "DtypeError", "FormatError", "ShapeError", "UnsupportedError"]
