"""Instructions of a warp, barriers, and asynchronous copies."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ptx.memory import Finding
from ptx.parser import TYPES, instruction

U32 = TYPES["u32"]
LANES = 32
LANE = np.arange(LANES)
GROUP, INNER = LANE // 4, LANE % 4  # as the ISA's figures call them


@instruction(r"bar\.sync|bar\.red\.or\.pred")
def _barrier(b, i):
    if 0 not in i.operands[:2]:
        raise Finding("only barrier 0 is known here")
    b.waiting |= b.mask


def _whole_warps(b, members):
    if not (b.active(b.read(members, U32)) == 0xFFFFFFFF).all():
        raise Finding("not all lanes are members")


@instruction(r"bar\.warp\.sync")
def _warp_barrier(b, i):
    _whole_warps(b, i.operands[0])


@instruction(r"shfl\.sync\.(?:bfly|idx)\.b32")
def _shuffle(b, i):
    to, source, by, bounds, members = i.operands
    _whole_warps(b, members)
    bounds = b.read(bounds, U32).astype(np.int64)
    lane = np.arange(b.threads) % LANES
    segment = bounds >> 8 & 31
    last = lane & segment | bounds & 31 & ~segment
    by = b.read(by, U32).astype(np.int64) & 31
    other = lane ^ by if "bfly" in i.opcode else lane & segment | by & ~segment
    inside = other <= last
    value = b.read(source, U32)[np.arange(b.threads) - lane + np.where(inside, other, lane)]
    value_to, inside_to = to if type(to) is tuple else (to, None)
    b.write(value_to, value)
    if inside_to is not None:
        b.write(inside_to, inside)


@instruction(r"vote\.sync\.any\.pred")
def _vote(b, i):
    _whole_warps(b, i.operands[2])
    votes = (b.read(i.operands[1], TYPES["pred"]) & b.mask).reshape(-1, LANES)
    b.write(i.operands[0], votes.any(1).repeat(LANES))


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x[124](?:\.trans)?\.shared\.b16")
def _ldmatrix(b, i):
    """Lane 8 n + r gives the address of row r of matrix n."""
    to, address = i.operands
    row_lanes = np.arange(b.threads) % LANES < 8 * len(to)
    at = b.read(address.base, U32).astype(np.int64) + address.offset
    rows = np.zeros((b.threads, 8), np.uint16)
    asked = b.mask & row_lanes
    if (at[asked] % 16).any():
        raise Finding("ldmatrix: a row's address is no multiple of 16")
    rows[asked] = b.memory["shared"].load(at[asked], TYPES["u16"], 8, b.warps[asked])
    rows = rows.reshape(-1, 4, 8, 8)
    if ".trans" in i.opcode:
        rows = rows.transpose(0, 1, 3, 2)
    for n, register in enumerate(to):
        pairs = rows[:, n].reshape(-1, 8, 4, 2)[:, GROUP, INNER]
        b.write(register, np.ascontiguousarray(pairs).view(np.uint32).reshape(b.threads))


class Shape(NamedTuple):
    """An mma of 16 x 8 sums: which element of the operands each place of a fragment has."""

    depth: int
    a: np.ndarray  # (16, depth): place in a lane-major fragment of the element
    b: np.ndarray  # (depth, 8)


def _shape(depth):
    each = depth // 8  # elements of a register
    lane, register, e = np.ix_(LANE, np.arange(4), np.arange(each))
    k = each * (lane % 4) + e
    a, b = np.zeros((16, depth), np.int64), np.zeros((depth, 8), np.int64)
    places = np.arange(LANES * 4 * each).reshape(LANES, 4, each)
    a[lane // 4 + 8 * (register % 2), k + depth // 2 * (register // 2)] = places
    two = register[:, :2]
    places = np.arange(LANES * 2 * each).reshape(LANES, 2, each)
    b[k + depth // 2 * two, np.broadcast_to(lane // 4, places.shape)] = places
    return Shape(depth, a, b)


SHAPES = {"m16n8k8": _shape(8), "m16n8k16": _shape(16), "m16n8k32": _shape(32)}
ELEMENTS = {
    "m16n8k8.tf32.tf32": (np.float32, np.float32),
    "m16n8k16.f16.f16": (TYPES["f16"],) * 2,
    "m16n8k16.bf16.bf16": (TYPES["bf16"],) * 2,
    **{f"m16n8k32.{a}.{b}": (TYPES[a], TYPES[b]) for a in ("s8", "u8") for b in ("s8", "u8")},
}


@instruction(
    r"mma\.sync\.aligned\.(?:m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32"
    r"|m16n8k16\.row\.col\.f32\.(?:f16\.f16|bf16\.bf16)\.f32"
    r"|m16n8k32\.row\.col\.s32\.[su]8\.[su]8\.s32)"
)
def _mma(b, i):
    parts = i.opcode.split(".")
    shape = SHAPES[parts[3]]
    types = ELEMENTS[".".join((parts[3], *parts[7:9]))]
    sums = TYPES[parts[6]]
    operands = []
    for registers, element, places in zip(i.operands[1:3], types, shape[1:], strict=True):
        words = np.stack([b.read(r, U32) for r in registers], 1)
        if parts[7] == "tf32":
            words &= 0xFFFFE000  # the unit does not look at the other bits
        values = words.view(element).reshape(b.threads // LANES, -1).astype(sums)
        operands.append(values[:, places])
    product = np.matmul(*operands)
    for n, (to, addend) in enumerate(zip(i.operands[0], i.operands[3], strict=True)):
        part = product[:, GROUP + 8 * (n // 2), 2 * INNER + n % 2].reshape(b.threads)
        b.write(to, b.read(addend, sums) + part)


# --- asynchronous copies: made when they are waited for, poison until then -----------------------


class Copy(NamedTuple):
    to: np.ndarray
    source: np.ndarray
    sizes: np.ndarray  # the rest of 16 bytes becomes zero
    warps: np.ndarray

    @property
    def size(self):
        return self.to.size


@instruction(r"cp\.async\.cg\.shared\.global")
def _copy(b, i):
    to, source = b.addresses(i.operands[0]), b.addresses(i.operands[1])
    size = i.operands[3] if len(i.operands) > 3 else 16
    sizes = b.active(b.read(size, TYPES["s32"])).copy()
    if i.operands[2] != 16 or (sizes < 0).any() or (sizes > 16).any():
        raise Finding("cp.async: 16 bytes, of which 0 to 16 are copied")
    if (source % 16).any():
        raise Finding("cp.async: a source that is no multiple of 16")
    warps = b.active(b.warps)
    b.memory["shared"].store(to, np.full((len(to), 4), 0xFFFFFFFF, np.uint32), warps)
    b.copies.append(Copy(to.copy(), source.copy(), sizes, warps.copy()))


def _whole_block(b):
    """Groups are counted for the block, not thread by thread."""
    if not (b.mask | b.done).all():
        raise Finding("only some threads commit or wait for copies, which is not known here")


@instruction(r"cp\.async\.commit_group")
def _commit(b, i):
    _whole_block(b)
    b.groups.append(b.copies)
    b.copies = []


@instruction(r"cp\.async\.wait_group")
def _wait(b, i):
    _whole_block(b)
    while len(b.groups) > i.operands[0]:
        for copy in b.groups.pop(0):
            data = np.zeros((copy.size, 16), np.uint8)
            memory = b.memory["global"]
            for size in np.unique(copy.sizes):
                pick = copy.sizes == size
                if size:
                    at = copy.source[pick]
                    memory.check(at, None, int(size))
                    data[pick, :size] = memory.bytes[(at - memory.base)[:, None] + np.arange(size)]
            b.memory["shared"].store(copy.to, data.view(np.uint32), copy.warps)
