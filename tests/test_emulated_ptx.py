"""What nvcc made of the tensor-core kernels, inline assembly included: its PTX, interpreted (ptx/).

The host code launches as ever, on the emulator's memory, but each launch is run by nvcc's entry of
that kernel. Collected only where TILEWRIGHT_EMULATED names an emulated extension; skipped where
TILEWRIGHT_PTX, by default build/cuda/cuda, has no PTX of these sources.
"""

from __future__ import annotations

import os
import pathlib
import re

import numpy as np
import pytest

import emulated
import harness
import ptx
import slopes
import tilewright as tw
import tolerance
from ptx.memory import SharedMemory
from ptx.parser import SHARED_BASE
from tilewright import _core
from tilewright.autograd import NO_TAPE
from tilewright.registry import OPS

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = pathlib.Path(os.environ.get("TILEWRIGHT_PTX", ROOT / "build/cuda/cuda"))

pytestmark = pytest.mark.skipif(
    not any(FOLDER.rglob("*.ptx")), reason=f"{FOLDER} has no PTX: build the preset cuda first"
)

SOURCES = ("matmul_mma", "int8_mma", "attention_forward", "attention_backward")
F32, BF16, F16 = (harness.DTYPES[name] for name in ("float32", "bfloat16", "float16"))
# What TF32 adds to the error, relative to the sum of absolute products: csrc/cuda/matmul_mma.cu.
SPLIT_ERROR = {"highest": 0.0, "high": 2.0**-21, "medium": 2.0**-11}
KINDS = [(BF16, "highest"), (F16, "highest"), (F32, "medium"), (F32, "high")]


@pytest.fixture(scope="module")
def programs():
    return ptx.Programs(FOLDER, SOURCES)


@pytest.fixture
def run(programs):
    """Lets PTX run what the test launches; a function that takes other programs instead."""

    def use(programs):
        _core.emulator.set_runner(lambda launch: programs(_core.emulator.allocations(), launch))
        return programs

    programs.ran.clear()
    programs.blocks = None
    use(programs)
    yield use
    _core.emulator.set_runner(None)


def check(name, got, ref, case, precision):
    allowed = None
    if extra := SPLIT_ERROR[precision]:
        allowed = tolerance.bound(ref, got.dtype) + extra * ref.magnitude
    harness.check_output(name, got, ref, f"case={case} precision={precision}", allowed)


def forward(name, case, dtype, precision="highest"):
    """The result of a case, held to its reference."""
    with tw.options(precision=precision):
        found = harness.as_tuple(harness.call(OPS[name], harness.inputs(name, case, dtype)))
    for got, ref in zip(found, harness.reference(name, case, dtype), strict=True):
        check(name, got, ref, case, precision)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
@pytest.mark.parametrize("layout", ["", ";a.T", ";b.T", ";a.T;b.T"])
@pytest.mark.parametrize("rows", [8, 40])  # flat tiles, medium tiles
def test_matmul(run, programs, kind, layout, rows):
    forward("matmul", f"{rows},72,48{layout}", *kind)
    assert len(programs.ran) == 1


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
@pytest.mark.parametrize("layout", ["", ";a.T", ";b.T", ";a.T;b.T"])
def test_matmul_by_large_tiles(run, programs, kind, layout):
    """The last block of those that make the host choose these tiles; what others write is NaN."""
    dtype, precision = kind
    case = f"128,72,{128 * 64}{layout}"
    programs.blocks = [63]
    with tw.options(precision=precision):
        got = harness.call(OPS["matmul"], harness.inputs("matmul", case, dtype))
    (ref,) = harness.reference("matmul", case, dtype)
    written = ~np.isnan(got)
    assert written.sum() == 128 * 128
    check("matmul", np.where(written, got, ref.value.astype(dtype)), ref, case, precision)


@pytest.mark.parametrize("case", ["5,72,40;s", "5,72,40;u", "33,150,50;s", "33,150,50;u"])
def test_int8_matmul(run, programs, case):
    forward("int8_matmul", case, F32)
    assert len(programs.ran) == 1


@pytest.mark.parametrize("rows", [5, 33])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("left", ["floats", "unsigned", "unsigned without offset"])
def test_quantized_product(run, programs, rng, rows, bits, group_size, symmetric, left):
    """Its bits are the CPU's."""
    x, w = (rng.standard_normal(shape).astype(F32) for shape in ((rows, 80), (80, 40)))
    a = x if left == "floats" else tw.quantize(x, axis=0, symmetric=False)
    if "without" in left:
        a = tw.QuantizedArray(a.data, a.scale, a.axis)
    b = tw.quantize(w, bits=bits, axis=1, group_size=group_size, symmetric=symmetric)
    got = tw.qmatmul(on_device(a), on_device(b), compute="int8")
    assert len(programs.ran) == 1
    want = tw.qmatmul.definition.forward(NO_TAPE, a, b, compute="int8")
    assert harness.same_bits(got.get(), want)


def on_device(x):
    """Also a QuantizedArray."""
    if type(x) is not tw.QuantizedArray:
        return emulated.to_device(x)
    data, scale = emulated.to_device(x.data), emulated.to_device(x.scale)
    offset = None if x.offset is None else emulated.to_device(x.offset)
    return tw.QuantizedArray(
        data, scale, x.axis, bits=x.bits, group_size=x.group_size, offset=offset
    )


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("dims", [64, 128, 256])
@pytest.mark.parametrize("rows", [5, 20])  # blocks for few rows, for many
def test_attention(run, programs, dtype, dims, rows):
    forward("attention", f"1,2,1,{rows},40,{dims};causal;lse", dtype)
    assert len(programs.ran) == 1


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("dims", [64, 128, 256])
def test_gradients_of_attention(run, programs, dtype, dims):
    name, case = "attention", f"1,2,1,20,40,{dims};causal"
    op, arguments = OPS[name], harness.inputs(name, case, dtype)
    needs = slopes.differentiable(op, arguments)
    found = slopes.gradients(op, arguments, needs, slopes.output_gradients(name, case, dtype))
    for which in needs:
        s = slopes.slope(name, case, dtype, which)
        where = f"d{which} dtype={dtype} case={case}"
        slopes.check(name, found[which], arguments[which], s, dtype, where)
    assert sum("attention_gradient" in kernel for kernel in programs.ran) == 3


def test_every_kernel_has_run(request, programs):
    if request.config.getoption("keyword"):
        pytest.skip("only of the whole file")
    kernels = {name for name, text in programs.texts.items() if "mma.sync" in text}
    assert kernels - programs.used == set()


# --- a test of these tests: slips in the PTX, as they could stand in cuda/gpu/ptx.h --------------

WRONG = "elements are out of bounds; worst at"
ZEROS = ", ".join(["0f00000000"] * 4)
COMMITTED_BY_ONE = "setp.eq.u32 %p1, %tid.x, 0; @%p1 cp.async.commit_group"
# What, the text as a pattern, what stands there instead, and what must show.
SLIPS = [
    ("two registers of a swapped", r"(mma\.[^{]*\{[^}]*\}, \{)(%\w+), (%\w+)", r"\1\3, \2", WRONG),
    ("a and b of another type", r"bf16\.bf16", "f16.f16", WRONG),
    ("the sums start anew", r"(mma\..*, )\{[^}]*\};", rf"\1{{{ZEROS}}};", WRONG),
    ("ldmatrix does not transpose", r"\.trans", "", WRONG),
    ("ldmatrix reads a slot too far", r"(ldmatrix.*\[%\w+)\]", r"\1+16]", "race"),
    ("ldmatrix is not aligned", r"(ldmatrix.*\[%\w+)\]", r"\1+4]", "no multiple of 16"),
    ("a stage is not waited for", r"cp\.async\.wait_group \d;", "", "ends before a cp.async"),
    ("one group too many is left", r"wait_group 1;", "wait_group 2;", "race"),
    ("one thread commits for all", "cp.async.commit_group", COMMITTED_BY_ONE, "only some threads"),
    ("the rest of a copy is not zero", r"(cp\.async\.cg.* 16), %\w+;", r"\1;", "out of bounds"),
    ("an instruction that is not known", r"ldmatrix", "movmatrix", "instruction movmatrix"),
]  # fmt: skip


@pytest.fixture
def wrong_numbers(monkeypatch):
    """They don't go into the table of errors."""
    monkeypatch.setattr(harness, "worst", {})


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip[0])
def test_slip_is_seen(run, wrong_numbers, slip):
    _, text, wrong, shows = slip

    def change(entry):
        changed, times = re.subn(text, wrong, entry)
        assert times, f"nothing matches {text} now: where does the slip go?"
        return changed

    run(ptx.Programs(FOLDER, SOURCES, change))
    with pytest.raises((ptx.Finding, ptx.Unsupported, pytest.fail.Exception), match=shows):
        forward("matmul", "40,136,48", BF16)


@pytest.mark.parametrize("slip", [("s8.s8", "s8.u8"), ("s8.s8", "u8.s8")], ids="->".join)
def test_slip_of_integers_is_seen(run, slip):
    run(ptx.Programs(FOLDER, SOURCES, lambda entry: entry.replace(*slip)))
    with pytest.raises(AssertionError, match="Mismatched elements"):
        forward("int8_matmul", "5,72,40;s", F32)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("name", "case", "dtype"), [("matmul", "40,136,48", BF16), ("int8_matmul", "33,350,50;s", F32)]
)
def test_each_barrier_is_missed(run, name, case, dtype, which):
    """After a stage has landed, and before its memory is taken for the next or for sums."""

    def change(entry):
        parts = re.split(r"(bar\.sync\s+0;)", entry)
        assert len(parts) == 5
        del parts[1 + 2 * which]
        return "".join(parts)

    run(ptx.Programs(FOLDER, SOURCES, change))
    with pytest.raises(ptx.Finding, match=r"^race: "):
        forward(name, case, dtype)


def test_warps_that_write_one_place_at_once():
    """By one instruction: threads run in step here, so no earlier mark shows it."""
    memory = SharedMemory(64, warps=2)
    same, values = np.full(2, SHARED_BASE), np.zeros((2, 1), np.uint32)
    memory.store(same, values, np.array([0, 0]))  # lanes of one warp
    memory.epoch += 1
    with pytest.raises(ptx.Finding, match=r"^race: two warps write at once"):
        memory.store(same, values, np.array([0, 1]))
