"""Instructions that compute, each on the whole block."""

from __future__ import annotations

import numpy as np

from ptx.parser import TYPES, instruction

INTEGER = r"[su](?:16|32|64)"
F64 = np.dtype(np.float64)


def _operation(pattern, function):
    """``function`` of the sources, all of the instruction's type."""

    @instruction(pattern)
    def run(b, i):
        b.write(i.operands[0], function(*(b.read(o, i.type) for o in i.operands[1:])))


def _divide(a, b):
    """Quotients cut toward zero; by zero, all bits are set."""
    floor = np.floor_divide(a, b)
    inexact = (floor * b != a) & ((a < 0) != (b < 0))
    quotient = (floor + inexact).astype(a.dtype)
    quotient[b == 0] = -1 if a.dtype.kind == "i" else ~a.dtype.type(0)
    return quotient


def _fused(a, b, c):
    """In float64, where a product is exact; the sum may round once more than one that is fused."""
    return a.astype(F64) * b.astype(F64) + c.astype(F64)


def _round_down(exact):
    rounded = exact.astype(np.float32)
    return np.where(rounded > exact, np.nextafter(rounded, np.float32(-np.inf)), rounded)


_operation(rf"add\.(?:{INTEGER}|rn\.f32)", np.add)
_operation(rf"sub\.(?:{INTEGER}|rn\.f32)", np.subtract)
_operation(rf"mul\.(?:lo\.{INTEGER}|rn\.f32)", np.multiply)
_operation(rf"mad\.lo\.{INTEGER}", lambda a, b, c: a * b + c)
_operation(rf"div\.{INTEGER}", _divide)
_operation(rf"rem\.{INTEGER}", lambda a, b: a - _divide(a, b) * b)
_operation(r"div\.rn\.f32", np.divide)
_operation(r"rcp\.rn\.f32", np.reciprocal)
_operation(rf"min\.(?:{INTEGER}|f32)", np.fmin)
_operation(rf"max\.(?:{INTEGER}|f32)", np.fmax)
_operation(r"abs\.(?:s32|s64|f32)", np.abs)
_operation(r"neg\.(?:s32|s64|f32)", np.negative)
_operation(r"copysign\.f32", lambda sign, size: np.copysign(size, sign))
_operation(r"fma\.rn\.f32", lambda a, b, c: _fused(a, b, c).astype(np.float32))
_operation(r"fma\.rm\.f32", lambda a, b, c: _round_down(_fused(a, b, c)))
_operation(r"and\.(?:b16|b32|b64|pred)", np.bitwise_and)
_operation(r"or\.(?:b16|b32|b64|pred)", np.bitwise_or)
_operation(r"xor\.(?:b16|b32|b64|pred)", np.bitwise_xor)
_operation(r"not\.(?:b16|b32|b64|pred)", np.invert)


def _flushed(x):
    """Without denormal numbers."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


_operation(r"ex2\.approx\.ftz\.f32", lambda x: _flushed(np.exp2(_flushed(x))))
_operation(r"rcp\.approx\.ftz\.f32", lambda x: _flushed(np.reciprocal(_flushed(x))))


@instruction(r"mul\.wide\.[su](?:16|32)")
def _mul_wide(b, i):
    wide = np.dtype(f"{i.type.kind}{2 * i.type.itemsize}")
    x, y = (b.read(o, i.type).astype(wide) for o in i.operands[1:])
    b.write(i.operands[0], x * y)


@instruction(r"mul\.hi\.u32")
def _mul_hi(b, i):
    x, y = (b.read(o, i.type).astype(np.uint64) for o in i.operands[1:])
    b.write(i.operands[0], (x * y >> np.uint64(32)).astype(np.uint32))


@instruction(r"(?:shl\.b|shr\.[us])(?:16|32|64)")
def _shift(b, i):
    """Past the last bit nothing is left, or the sign."""
    x, by = b.read(i.operands[1], i.type), b.read(i.operands[2], TYPES["u32"])
    bits = 8 * i.type.itemsize
    most = np.minimum(by, bits - 1).astype(x.dtype)
    value = np.left_shift(x, most) if i.opcode[:3] == "shl" else np.right_shift(x, most)
    if x.dtype.kind == "u":
        value[by >= bits] = 0
    b.write(i.operands[0], value)


@instruction(r"bfi\.b32")
def _bfi(b, i):
    source, into, start, length = (
        b.read(o, TYPES["u32"]).astype(np.uint64) for o in i.operands[1:]
    )
    field = ((np.uint64(1) << length) - np.uint64(1)) << start
    b.write(i.operands[0], (into & ~field | source << start & field).astype(np.uint32))


@instruction(r"prmt\.b32")
def _prmt(b, i):
    """Bytes of both sources, picked by a nibble each; a nibble's high bit would spread a sign."""
    low, high, pick = (b.read(o, TYPES["u32"]).astype(np.uint64) for o in i.operands[1:])
    both, made = low | high << np.uint64(32), np.zeros(b.threads, np.uint64)
    for n in range(4):
        nibble = pick >> np.uint64(4 * n) & np.uint64(15)
        byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        sign = (byte >> np.uint64(7)) * np.uint64(0xFF)
        made |= np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * n)
    b.write(i.operands[0], made.astype(np.uint32))


COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@instruction(r"setp\.(?:eq|ne|lt|le|gt|ge)(?:\.[bsu](?:16|32|64)|u?\.f32)")
def _setp(b, i):
    relation = i.opcode.split(".")[1]
    x, y = b.read(i.operands[1], i.type), b.read(i.operands[2], i.type)
    holds = COMPARE[relation[:2]](x, y)
    if i.type.kind == "f":  # NaN: true of the relations that end in u, false of all others
        unordered = np.isnan(x) | np.isnan(y)
        holds = holds | unordered if relation[2:] else holds & ~unordered
    b.write(i.operands[0], holds)


@instruction(r"selp\.(?:[bu](?:16|32|64)|f32)")
def _selp(b, i):
    yes, no = b.read(i.operands[1], i.type), b.read(i.operands[2], i.type)
    b.write(i.operands[0], np.where(b.read(i.operands[3], TYPES["pred"]), yes, no))
