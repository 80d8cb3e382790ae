"""float32 multiplied by bfloat16 terms is float32: bounds, contents that don't fit, bits of a row.

The products are large enough for the kernels by terms (N * K >= 65536, K >= 64); every level is
held to the same.
"""

from __future__ import annotations

import ctypes
import pathlib
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import harness
import tilewright as tw
import tolerance
from fault_library import COMPILER
from tilewright.registry import Reference

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPES = [
    (1, 64, 1024),
    (3, 65, 1031),
    (33, 255, 300),
    (40, 256, 256),
    (17, 257, 290),
    (70, 700, 95),
]
LARGEST = np.float32(np.finfo(np.float32).max)
SMALLEST = np.float32(2.0**-149)
PRECISIONS = {"highest": 3, "high": 2, "medium": 1}


def operands(rng, M, K, N):
    return (rng.standard_normal(shape).astype(np.float32) for shape in ((M, K), (K, N)))


def check(a, b, where, got=None, terms=3):
    want = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    got = tw.matmul(a, b) if got is None else got
    allowed = tolerance.split_bound(a, b, terms)
    reference = Reference(want, np.abs(want), a.shape[1])
    harness.check_output("matmul by terms", got, reference, where, allowed)


@pytest.mark.parametrize("shape", SHAPES)
def test_bound(shape, isa, rng):
    a, b = operands(rng, *shape)
    check(a, b, f"isa={isa} {shape}")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision, isa, rng):
    a, b = operands(rng, 33, 300, 300)
    with tw.options(precision=precision):
        check(a, b, f"isa={isa} {precision}", tw.matmul(a, b), PRECISIONS[precision])


@pytest.mark.parametrize("K", [64, 255, 256, 257, 1024])
def test_all_ones_mantissas(K, isa):
    """Every rounding of a term goes up, and every sum grows."""
    x = np.float32(2.0 - 2.0**-23)
    for signs in (1.0, np.where(np.arange(K) % 2, 1.0, -0.5)):
        a = np.full((5, K), x) * np.float32(signs)
        b = np.full((K, 1 + 65536 // K), x)
        check(a.astype(np.float32), b, f"isa={isa} K={K} all ones")


def scales(count, low, high):
    return np.float32(2.0) ** np.linspace(low, high, count).round().astype(np.float32)


@pytest.mark.parametrize("other", [0, -60, 60])
@pytest.mark.parametrize("axis", ["rows", "columns", "both"])
def test_every_exponent(axis, other, isa, rng):
    """Rows and columns from the smallest to nearly the largest number, beside one another."""
    a, b = operands(rng, 270, 64, 1100)
    high = min(120, 120 - other)
    rows = scales(270, -149, high if axis == "rows" else 60)[:, None]
    columns = scales(1100, -149, high if axis == "columns" else 60)
    a *= rows if axis != "columns" else np.float32(2.0**other)
    b *= columns if axis != "rows" else np.float32(2.0**other)
    check(a, b, f"isa={isa} exponents of {axis}, others 2^{other}")


def test_exponents_inside_a_row(isa, rng):
    a, b = operands(rng, 9, 300, 300)
    a *= scales(300, -140, 20)
    check(a, b, f"isa={isa} exponents along K")
    b *= scales(300, 20, -140)[:, None]
    check(a, b, f"isa={isa} exponents along K, both")


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, LARGEST, -LARGEST, SMALLEST, -0.0])
@pytest.mark.parametrize("side", ["a", "b", "both"])
def test_contents_that_have_no_terms(value, side, isa, rng):
    """They reach the rows and columns that hold them, as they would in float32, and no others."""
    a, b = operands(rng, 40, 256, 300)
    before = tw.matmul(a, b)
    if side != "b":
        a[33, 200] = value
    if side != "a":
        b[100, 37] = value
    got = tw.matmul(a, b)
    with np.errstate(all="ignore"):
        want = (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)
    changed = np.zeros(got.shape, bool)
    changed[33, :] |= side != "b"
    changed[:, 37] |= side != "a"
    if (
        side == "both" and abs(value) == LARGEST
    ):  # whether a sum of both is finite is up to its order
        got[33, 37] = want[33, 37]
    assert harness.same_bits(got[~changed], before[~changed])
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    finite = np.isfinite(want)
    held = [np.where(np.isfinite(x), x, 0).astype(np.float64) for x in (a, b)]
    allowed = tolerance.split_bound(*held)
    assert (np.abs(got[finite] - want[finite].astype(np.float64)) <= allowed[finite]).all()


def test_a_row_has_the_bits_it_has_alone(isa, rng):
    a, b = operands(rng, 70, 300, 301)
    a[5] *= np.float32(2.0**-90)
    a[6, 7] = np.inf
    want = tw.matmul(a, b)
    packed = tw.pack(b)
    transposed = np.ascontiguousarray(b.T).T
    for rows in (slice(0, 1), slice(5, 6), slice(6, 7), slice(3, 20), slice(31, 70)):
        for right in (b, packed, transposed):
            assert harness.same_bits(tw.matmul(a[rows], right), want[rows]), rows
    batch = np.stack([a, a[::-1]])
    assert harness.same_bits(tw.matmul(batch, b), np.stack([want, want[::-1]]))
    for threads in (1, 2, 5):
        with tw.options(threads=threads):
            assert harness.same_bits(tw.matmul(a, b), want)
            assert harness.same_bits(tw.matmul(a, packed), want)


@pytest.mark.parametrize("left", ["float32", "bfloat16", "float16"])
def test_packed_bfloat16_meets_every_float(left, isa, rng):
    """It keeps 16 bits, whatever it is multiplied by."""
    a, b = operands(rng, 35, 301, 300)
    a, b = a.astype(harness.DTYPES[left]), b.astype(ml_dtypes.bfloat16)
    packed = tw.pack(b)
    got, want = tw.matmul(a, packed), tw.matmul(a, b)
    assert got.dtype == want.dtype
    assert harness.same_bits(got, want)


def test_latency_is_the_kernel_of_float32(isa, rng):
    """tw.pack(prefer="latency"), and few rows where their number may count."""
    a, b = operands(rng, 40, 256, 300)
    packed = tw.pack(b, prefer="latency")
    want = tw.matmul(a, packed)
    check(a, b, f"isa={isa} latency", want)
    assert tw.explain(tw.matmul, a, packed).calls[0].kernel == "gemm_f32_packed"
    with tw.options(batch_invariant=False):
        assert harness.same_bits(tw.matmul(a[:1], b), want[:1])
        assert harness.same_bits(tw.matmul(a[:1], tw.pack(b)), want[:1])


# --- faults ---------------------------------------------------------------------------------------

FAULTS = {  # a file of csrc/simd, a text of it, and what replaces it
    "none": ("gemm_split.cc", "", ""),
    "terms cut off": ("terms.h", " + 0x8000u", ""),
    "a1 b1 left out": (
        "split_tiles.h",
        "if constexpr (TermsA == 3) multiply_both();  // a1 b1",
        "",
    ),
    "a0 b2 left out": ("split_tiles.h", "multiply_both();  // a0 b2", ""),
    "no third term of b": (
        "split_tiles.h",
        "load_right(b + 2 * kTermBytes);",
        "load_right(b + kTermBytes);",
    ),
    "pairs the wrong way round": (
        "gemm_split.cc",
        "split(first, second, terms)",
        "split(second, first, terms)",
    ),
}
FLAGS = "-std=c++20 -O2 -fPIC -shared -ffp-contract=off -Wno-psabi -mavx512f -mavx512bw -mavx512dq"
FLAGS += " -mavx512vl -mavx512bf16 -mfma -mf16c -DISA=amx -DISA_amx=1 -DISA_avx512=1"
if harness.EMULATES_AMX or "amx" not in harness.SUPPORTED_ISAS:
    FLAGS += " -DTILEWRIGHT_EMULATE_AMX -DTILEWRIGHT_OWN_TILES"


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.skipif("avx512_bf16" not in harness.SUPPORTED_ISAS, reason="tiles need AVX-512 here")
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_exceed_the_bound(fault, tmp_path, rng):
    tree = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", tree)
    name, text, wrong = FAULTS[fault]
    source = tree / "simd" / name
    code = source.read_text(encoding="utf-8")
    assert text in code, f"{name} no longer has {text!r}: give this fault its new place"
    source.write_text(code.replace(text, wrong) if text else code, encoding="utf-8")
    library = tmp_path / "split.so"
    subprocess.run(
        [
            *(COMPILER, *FLAGS.split(), f"-I{tree}", f"-I{tree}/include"),
            *(str(ROOT / "tests/cpp/split_driver.cc"), "-o", str(library)),
        ],
        check=True,
    )
    multiply = ctypes.CDLL(str(library)).multiply
    multiply.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    worst = 0.0
    for K in (1, 2, 3, 8, 64, 255):
        a, b = operands(rng, 32, K, 32)
        out = np.empty((32, 32), np.float32)
        assert multiply(a.ctypes.data, b.ctypes.data, K, out.ctypes.data) == 0
        error = np.abs(out - a.astype(np.float64) @ b.astype(np.float64))
        worst = max(worst, float(np.max(error / tolerance.split_bound(a, b))))
    assert worst < 1 if fault == "none" else worst > 1


# --- permission -----------------------------------------------------------------------------------

# A signal stack too small for the tiles' state: for the kernel a reason to refuse them.
REFUSED = """
import ctypes
libc = ctypes.CDLL(None)
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(8192)
stack = Stack(ctypes.addressof(memory), 0, 4096)
assert libc.sigaltstack(ctypes.byref(stack), None) == 0
import numpy as np
import tilewright as tw
x = np.ones((300, 300), np.float32)
assert tw.matmul(x, x)[0, 0] == 300
call = tw.explain(tw.matmul, x, x).calls[0]
print(call.isa, call.kernel, *call.notes, sep="|")
try:
    tw.set_isa("amx")
except tw.UnsupportedError as error:
    print(error)
"""


@pytest.mark.skipif("amx" not in harness.SUPPORTED_ISAS, reason="no AMX on this machine")
@pytest.mark.skipif(harness.EMULATES_AMX, reason="emulated tiles ask nobody")
def test_refused_tiles_are_done_without_and_said_so():
    found = subprocess.run(
        [sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=60
    )
    if "sigaltstack" in found.stderr:
        pytest.skip("no signal stack as small as that here")
    assert found.returncode == 0, found.stderr
    explained, error = found.stdout.splitlines()
    assert explained.startswith("avx512_bf16|gemm_f32|")
    assert "refuses AMX" in explained
    assert "amx" in error
    assert "refuses AMX" in error
