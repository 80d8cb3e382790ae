"""A test of the tests: known faults, put into a copy of the kernels, must exceed the bounds.

The library without Python is compiled once, for the level `generic` alone; each fault changes one
text in one source, recompiles that source and links again. What is run and how it is judged are
the op's own cases and the harness of the other tests.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import pathlib
import re
import shutil
import subprocess
from typing import NamedTuple

import numpy as np
import pytest

import harness
import slopes

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMPILER = shutil.which("g++") or shutil.which("c++")
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
SIMD_FLAGS = ["-O1", "-ffp-contract=off", "-fno-math-errno", "-DISA=generic", "-DISA_generic=1"]
KINDS = ("", "relu", "gelu", "gelu_tanh", "silu")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


class Fault(NamedTuple):
    """One text replaced in one file, the source to recompile for it, and the op that must fail.

    ``op`` ending in "_backward" means the gradients of that op.
    """

    name: str
    file: str
    text: str
    wrong: str
    source: str
    op: str
    dtype: str = "float32"


GEMM, QGEMM, WEIGHTS, LAYERNORM, ELEMENT, ATTENTION, DECODE, ROPE = (
    f"simd/{stem}.cc"
    for stem in (
        "gemm_kernel",
        "qgemm_kernel",
        "weights",
        "layernorm",
        "elementwise",
        "attention",
        "attention_decode",
        "rope",
    )
)
FAULTS = [
    Fault(
        "last terms of K dropped",
        GEMM,
        "k < kc; ++k, a += MR",
        "k < (kc & ~1ll); ++k, a += MR",
        GEMM,
        "matmul",
    ),
    Fault(
        "the last row of a tile is its neighbour's",
        GEMM,
        "words[i]",
        "words[i == 3 ? 2 : i]",
        GEMM,
        "matmul",
    ),
    Fault(
        "a block of K overwrites the sum",
        GEMM,
        "first ? t : load(dst + i) + t",
        "t",
        GEMM,
        "matmul",
    ),
    Fault(
        "operands truncated to bfloat16",
        "simd/pack.h",
        "store(q + i, load(p + i))",
        "store(q + i, (Vec)((VecU)load(p + i) & 0xffff0000u))",
        GEMM,
        "matmul",
    ),
    Fault(
        "operands truncated to TF32",
        "simd/pack.h",
        "store(q + i, load(p + i))",
        "store(q + i, (Vec)((VecU)load(p + i) & 0xffffe000u))",
        GEMM,
        "matmul",
    ),
    Fault(
        "last column of an edge tile not written",
        GEMM,
        "? nr - j : kWidth",
        "? nr - j - 1 : kWidth",
        GEMM,
        "matmul",
    ),
    Fault(
        "bfloat16 results truncated",
        "simd/vec.h",
        "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16",
        "bits >> 16",
        GEMM,
        "matmul",
        "bfloat16",
    ),
    Fault(
        "float16 results truncated",
        "simd/vec.h",
        "(magnitude - 0x38000000 + 0xfff + even) >> 13",
        "(magnitude - 0x38000000 + 0 * even) >> 13",
        GEMM,
        "matmul",
        "float16",
    ),
    Fault(
        "bias of the first columns everywhere",
        GEMM,
        "load(e.bias + j0 + j) :",
        "load(e.bias + j) :",
        GEMM,
        "matmul",
    ),
    Fault(
        "residual of the first row of the tile",
        GEMM,
        "load_elements(e.residual, i0 + i,",
        "load_elements(e.residual, i0,",
        GEMM,
        "matmul",
    ),
    Fault("alpha forgotten", GEMM, "y = y * e.alpha", "y = y", GEMM, "matmul"),
    Fault(
        "every block of K packs the first terms of a",
        "cpu/gemm.cc",
        "mr, k, kc, p.K,",
        "mr, 0, kc, p.K,",
        "cpu/gemm.cc",
        "matmul",
    ),
    Fault(
        "batch stride of b ignored",
        "ops/batch.cc",
        "product.b[d] = b.stride;",
        "product.b[d] = 0;",
        "ops/batch.cc",
        "matmul",
    ),
    Fault(
        "a constant of gelu_tanh to three digits",
        "simd/activation.h",
        "kCubic = 0.044715f",
        "kCubic = 0.0447f",
        ELEMENT,
        "gelu_tanh",
    ),
    Fault(
        "tail of a row left out of the mean",
        LAYERNORM,
        "if (i < C) sum[1] = sum[1] + f(i, C - i);",
        "",
        LAYERNORM,
        "layernorm",
    ),
    Fault(
        "eps forgotten",
        LAYERNORM,
        "squares / float(C) + p.eps",
        "squares / float(C)",
        LAYERNORM,
        "layernorm",
    ),
    Fault(
        "variance by C - 1",
        LAYERNORM,
        "squares / float(C)",
        "squares / float(C - (C > 1))",
        LAYERNORM,
        "layernorm",
    ),
    Fault(
        "int8 products saturate at 16 bits",
        "simd/dot_s8.h",
        "return acc + (VecU)__builtin_ia32_pmaddwd128(a, b);",
        "const VecI s = (VecI)__builtin_ia32_pmaddwd128(a, b);"
        "return acc + (VecU)(s > 32767 ? VecI{} + 32767 : s);",
        QGEMM,
        "int8_matmul",
    ),
    Fault(
        "second half of the last pair dropped",
        QGEMM,
        "k < whole ? first + step : nullptr",
        "k + 1 < whole ? first + step : nullptr",
        QGEMM,
        "int8_matmul",
    ),
    Fault(
        "signs of lower nibbles lost",
        WEIGHTS,
        "words[v] << kUnused >> kUnused",
        "words[v] & ((1 << Bits) - 1)",
        WEIGHTS,
        "qmatmul",
    ),
    Fault(
        "halves of a word swapped",
        WEIGHTS,
        "if (k % 2) rows(k++, false, true)",
        "if (k % 2) rows(k++, true, false)",
        WEIGHTS,
        "qmatmul",
    ),
    Fault(
        "the first group's scales for all",
        WEIGHTS,
        "scales.load_group(w, group)",
        "scales.load_group(w, 0)",
        WEIGHTS,
        "qmatmul",
    ),
    Fault(
        "groups end one row late",
        WEIGHTS,
        "next = (group + 1) * w.group,",
        "next = (group + 1) * w.group + 1,",
        WEIGHTS,
        "qmatmul",
    ),
    Fault(
        "floats without their offset",
        WEIGHTS,
        "fma_once(to_float(q) + shift, scale[v], offset[v])",
        "(to_float(q) + shift) * scale[v]",
        WEIGHTS,
        "qmatmul",
    ),
    Fault(
        "unsigned weights read as signed",
        WEIGHTS,
        "to_float(q) + shift",
        "to_float(q)",
        WEIGHTS,
        "qmatmul",
    ),
    Fault(
        "upper nibbles leak into lower ones",
        WEIGHTS,
        "both << 12 >> 12 & 0xff",
        "both & 0xff",
        WEIGHTS,
        "qmatmul",
    ),
    Fault(
        "a group overwrites the sum",
        WEIGHTS,
        "first ? Vec{} : load(to)",
        "Vec{}",
        WEIGHTS,
        "qmatmul",
    ),
    Fault(
        "sums of the rows without the shift",
        WEIGHTS,
        "load_words(src + i * NR + j) + shifted",
        "load_words(src + i * NR + j)",
        WEIGHTS,
        "qmatmul",
    ),
    Fault(
        "sums of the rows restart in every block of K",
        "cpu/qgemm.cc",
        "row_sums(s.begins(at),",
        "row_sums(true,",
        "cpu/qgemm.cc",
        "qmatmul",
    ),
    Fault(
        "pieces of a group overwrite each other",
        "cpu/qgemm.cc",
        "g.add_tile(s.begins(at),",
        "g.add_tile(true,",
        "cpu/qgemm.cc",
        "qmatmul",
    ),
    Fault(
        "causal rows see one key too few",
        "cpu/attention_panels.cc",
        "own + p.right + 1",
        "own + p.right",
        "cpu/attention_panels.cc",
        "attention",
    ),
    Fault(
        "causal aligned to the first row",
        "cpu/attention_panels.cc",
        "return length - p.seqlen_q + row;",
        "return row;",
        "cpu/attention_panels.cc",
        "attention",
    ),
    Fault(
        "kv_lengths ignored",
        "cpu/attention_panels.cc",
        "if (!p.kv_lengths) return",
        "return",
        "cpu/attention_panels.cc",
        "attention",
    ),
    Fault(
        "sums of earlier keys not rescaled",
        ATTENTION,
        "fma(load(sum_of + lane), a, sum)",
        "load(sum_of + lane) + sum",
        ATTENTION,
        "attention",
    ),
    Fault(
        "chunks combined without rescaling",
        ATTENTION,
        "fma(load(out + i), a, load(chunk_out + i) * b)",
        "load(out + i) + load(chunk_out + i) * b",
        ATTENTION,
        "attention",
    ),
    Fault("additive mask forgotten", ATTENTION, "t + bias", "t", ATTENTION, "attention"),
    Fault(
        "a window reaches one key too far back",
        "cpu/attention_panels.cc",
        "own - p.left",
        "own - p.left - 1",
        "cpu/attention_panels.cc",
        "attention",
    ),
    Fault(
        "few rows see what lies before their window",
        DECODE,
        "(lane >= begin - key)",
        "(lane >= 0)",
        DECODE,
        "attention",
    ),
    Fault(
        "softcap without tanh",
        "simd/streaming_softmax.h",
        "tanh(t) * rule.softcap",
        "t * rule.softcap",
        ATTENTION,
        "attention",
    ),
    Fault(
        "dropout without its scale",
        "simd/philox.h",
        "v * rule.scale",
        "v",
        ATTENTION,
        "attention",
    ),
    Fault(
        "every block of keys drops alike",
        "cpu/attention_panels.cc",
        "uint64_t(p.seqlen_k) + uint64_t(key)",
        "uint64_t(p.seqlen_k)",
        "cpu/attention_panels.cc",
        "attention",
    ),
    Fault(
        "ALiBi rewards later keys",
        "simd/streaming_softmax.h",
        "abs(to_float(distance))",
        "to_float(distance)",
        ATTENTION,
        "attention",
    ),
    Fault(
        "ALiBi counts from the wrong key",
        ATTENTION,
        "load_ints(rule.position + lane) - rule.first",
        "load_ints(rule.position + lane)",
        ATTENTION,
        "attention",
    ),
    Fault(
        "few rows see the whole block",
        DECODE,
        "lane < seen - key",
        "lane < int32_t(b.keys) - key",
        DECODE,
        "attention",
    ),
    Fault(
        "few rows: sums of earlier keys not rescaled",
        DECODE,
        "fma(broadcast(s.sum[r]), alpha[r], sum[r])",
        "(broadcast(s.sum[r]) + sum[r])",
        DECODE,
        "attention",
    ),
    Fault(
        "few rows: chunks combined without rescaling",
        DECODE,
        "fma(load(out + d), a, load(x + d) * b)",
        "load(out + d) + load(x + d) * b",
        DECODE,
        "attention",
    ),
    Fault(
        "few rows: the last columns of V dropped",
        DECODE,
        "b.head_dim_v - d, alpha, s)",
        "b.head_dim_v - d - 1, alpha, s)",
        DECODE,
        "attention",
    ),
    Fault(
        "lanes beyond the row counted in the sum",
        "simd/softmax.cc",
        "- shift), n, 0.0f)",
        "- shift), n, 1.0f)",
        "simd/softmax.cc",
        "softmax",
    ),
    Fault(
        "exp with a coefficient to three digits",
        "simd/vec.h",
        "1.6666665459e-1f",
        "1.66e-1f",
        "simd/softmax.cc",
        "softmax",
    ),
    Fault(
        "a mean where the mean square belongs",
        LAYERNORM,
        "Centred ? v : v * v",
        "Centred ? v : v",
        LAYERNORM,
        "rmsnorm",
    ),
    Fault("halves turned one way only", ROPE, "a * s)", "-(a * s))", ROPE, "rope"),
    Fault(
        "neighbours turned the other way",
        ROPE,
        "(lane & 1) == 1",
        "(lane & 1) == 0",
        ROPE,
        "rope",
    ),
    Fault(
        "every sequence has the first one's angles",
        "cpu/rope.cc",
        "row / sequence * T + row % T",
        "row % T",
        "cpu/rope.cc",
        "rope",
    ),
    Fault(
        "a round of the generator too few",
        "simd/philox.h",
        "round < 10",
        "round < 9",
        "simd/dropout.cc",
        "dropout",
    ),
    Fault(
        "every block of elements begins the stream anew",
        "cpu/dropout.cc",
        "b.row * y.C() + b.column",
        "0",
        "cpu/dropout.cc",
        "dropout",
    ),
    Fault(
        "what is kept is not scaled",
        "simd/philox.h",
        "v * rule.scale",
        "v",
        "simd/dropout.cc",
        "dropout",
    ),
    Fault(
        "the variance is a constant to the gradient",
        LAYERNORM,
        "fma(xhat, broadcast(-row.c2), g)",
        "g",
        LAYERNORM,
        "layernorm_backward",
    ),
    Fault(
        "gamma's gradient of the last row alone",
        LAYERNORM,
        "fma(dy, xhat, dgamma[v])",
        "dy * xhat",
        LAYERNORM,
        "layernorm_backward",
    ),
    Fault(
        "the gradient that reached the sum itself forgotten",
        LAYERNORM,
        "if (HasDs) dx",
        "if (false) dx",
        LAYERNORM,
        "layernorm_backward",
    ),
    Fault(
        "softmax's gradient without its mean",
        "simd/softmax.cc",
        "(load(dy + i) - mean)",
        "load(dy + i)",
        "simd/softmax.cc",
        "softmax_backward",
    ),
    Fault(
        "rope's gradient turned forward",
        "cpu/rope.cc",
        "op.inverse ? -1.0f : 1.0f",
        "1.0f",
        "cpu/rope.cc",
        "rope_backward",
    ),
    Fault(
        "attention's gradient without the rows' mean",
        "cpu/attention_backward.cc",
        "= sum[i] - dlse[i]",
        "= -dlse[i]",
        "cpu/attention_backward.cc",
        "attention_backward",
    ),
    Fault(
        "the gradient of the queries not scaled",
        "cpu/attention_backward.cc",
        "store_panel(dq, rows, c.p.scale, c.g.dq",
        "store_panel(dq, rows, 1.0f, c.g.dq",
        "cpu/attention_backward.cc",
        "attention_backward",
    ),
]


class View(ctypes.Structure):
    """csrc/include/tilewright/view.h"""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_uint8),
        ("present", ctypes.c_bool),
        ("writable", ctypes.c_bool),
        ("rank", ctypes.c_int),
        ("note", ctypes.c_char_p),
        ("shape", ctypes.c_int64 * 8),
        ("stride", ctypes.c_int64 * 8),
    ]

    @classmethod
    def of(cls, array):
        view = cls()
        if array is None:
            return view
        codes = ("float32", "bfloat16", "int8", "uint8", "int32", "int64", "bool", "float16")
        view.data = array.ctypes.data
        view.dtype = codes.index(array.dtype.name)
        view.present = view.writable = True
        view.rank = array.ndim
        view.shape[: array.ndim] = array.shape
        view.stride[: array.ndim] = [s // array.itemsize for s in array.strides]
        return view


class Library:
    """A build of csrc; its methods take what the ops of the same name take."""

    def __init__(self, path):
        self.run_op = ctypes.CDLL(str(path)).run_op
        self.run_op.restype = ctypes.c_char_p

    def run(self, op, views, numbers):
        message = self.run_op(
            op.encode(),
            (View * len(views))(*[View.of(v) for v in views]),
            (ctypes.c_double * 8)(*numbers),
        )
        assert message is None, message

    def matmul(self, a, b, bias=None, activation=None, residual=None, alpha=1.0, out_dtype=None):
        dtype = a.dtype if a.dtype == b.dtype else np.float32
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        out = np.full((*batch, a.shape[-2], b.shape[-1]), np.nan, out_dtype or dtype)
        code = KINDS.index(activation or "")
        self.run("matmul", (a, b, bias, residual, out), (code, alpha))
        return out

    def gelu_tanh(self, x):
        out = np.full_like(x, np.nan)
        self.run("activation", (x, out), (KINDS.index("gelu_tanh"),))
        return out

    def layernorm(self, x, gamma=None, beta=None, eps=1e-5, residual=None):
        y, mean = np.full_like(x, np.nan), np.empty(x.shape[:-1], np.float32).ravel()
        s = None if residual is None else np.full_like(x, np.nan)
        views = (x, gamma, beta, residual, y, s, mean, np.empty_like(mean))
        self.run("layernorm", views, (eps,))
        return y if s is None else (y, s)

    def rmsnorm(self, x, gamma=None, eps=1e-6, residual=None):
        y, rstd = np.full_like(x, np.nan), np.empty(x.shape[:-1], np.float32).ravel()
        s = None if residual is None else np.full_like(x, np.nan)
        self.run("rmsnorm", (x, gamma, residual, y, s, rstd), (eps,))
        return y if s is None else (y, s)

    def rope(self, x, cos, sin, interleaved=False, inverse=False):
        out = np.full_like(x, np.nan)
        self.run("rope", (x, cos, sin, out), (interleaved, inverse))
        return out

    def dropout(self, x, p, seed):
        out = np.full_like(x, np.nan)
        self.run("dropout", (x, out), (p, seed & 0xFFFFFFFF, seed >> 32))
        return out

    def layernorm_backward(self, arguments, dy, ds=None):
        """The gradients by name, from the op's arguments and the gradients of its results."""
        x, residual = arguments["x"], arguments.get("residual")
        gamma, beta = arguments.get("gamma"), arguments.get("beta")
        y, mean, rstd = np.empty_like(x), *np.empty((2, x.size // x.shape[-1]), np.float32)
        s = x if residual is None else np.empty_like(x)
        forward = (x, gamma, beta, residual, y, None if residual is None else s, mean, rstd)
        self.run("layernorm", forward, (arguments.get("eps", 1e-5),))
        dx = np.full_like(x, np.nan)
        dgamma, dbeta = (None if v is None else np.full_like(v, np.nan) for v in (gamma, beta))
        self.run("layernorm_backward", (s, gamma, mean, rstd, dy, ds, dx, dgamma, dbeta), ())
        return {"x": dx, "residual": dx, "gamma": dgamma, "beta": dbeta}

    def softmax_backward(self, arguments, dy):
        axis = arguments.get("axis", -1)
        y, dx = self.softmax(**arguments), np.full_like(np.moveaxis(dy, axis, -1), np.nan)
        self.run("softmax_backward", (np.moveaxis(y, axis, -1), np.moveaxis(dy, axis, -1), dx), ())
        return {"x": np.moveaxis(dx, -1, axis)}

    def rope_backward(self, arguments, dy):
        return {"x": self.rope(**{**arguments, "x": dy}, inverse=True)}

    def softmax(self, x, axis=-1):
        out = np.full_like(np.moveaxis(x, axis, -1), np.nan)
        self.run("softmax", (np.moveaxis(x, axis, -1), out), ())
        return np.moveaxis(out, -1, axis)

    def attention(self, **arguments):
        views, _ = self._attention(**arguments)
        return views[5:7] if arguments.get("return_lse") else views[5]

    def _attention(self, q, k, v, causal=False, mask=None, scale=None, **more):
        out = np.full((*q.shape[:-1], v.shape[-1]), np.nan, q.dtype)
        lse = np.full(q.shape[:-1], np.nan, np.float32)
        if mask is not None:
            mask = np.broadcast_to(mask, (*q.shape[:-1], k.shape[-2]))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        views = (q, k, v, mask, more.get("kv_lengths"), out, lse, more.get("alibi_slopes"))
        window, drops = (
            more.get("window", (-1, -1)),
            (more.get("dropout_p", 0), more.get("seed", 0)),
        )
        numbers = (causal, scale, *window, more.get("softcap", 0), *drops)
        self.run("attention", views, numbers)
        return views, numbers

    def attention_backward(self, arguments, dout, dlse=None):
        views, numbers = self._attention(**arguments)
        found = {name: np.full_like(arguments[name], np.nan) for name in ("q", "k", "v")}
        self.run("attention_backward", (*views, dout, dlse, *found.values()), numbers)
        return found

    def int8_matmul(self, a, b):
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        out = np.full((*batch, a.shape[-2], b.shape[-1]), -7, np.int32)
        self.run("int8_matmul", (a, b, out), ())
        return out

    def qmatmul(self, a, qb, bias=None, activation=None, residual=None, compute=None):
        out = np.full((*a.shape[:-1], qb.shape[1]), np.nan, a.dtype)
        floats = compute == "float" or (compute is None and qb.bits == 4)
        views = (a, qb.data, qb.scale, qb.offset, bias, residual, out)
        numbers = (KINDS.index(activation or ""), qb.bits, qb.group_size or 0, floats)
        self.run("qmatmul", views, numbers)
        return out


def compile_source(source, tree, objects):
    """Compile tree/source; returns the object."""
    made = objects / (source.replace("/", "_") + ".o")
    extra = SIMD_FLAGS if source.startswith("simd/") else ["-O0"]
    includes = ["-I", tree, "-I", tree / "include"]
    command = [COMPILER, *FLAGS, *extra, *includes, "-c", tree / source, "-o", made]
    subprocess.run(command, check=True, timeout=300)
    return made


def link(objects, made):
    command = [COMPILER, "-shared", "-o", made, *objects, "-lpthread"]
    subprocess.run(command, check=True, timeout=300)
    return Library(made)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A copy of csrc and its objects by source; the driver is one of them."""
    folder = tmp_path_factory.mktemp("faults")
    tree = folder / "csrc"
    shutil.copytree(ROOT / "csrc", tree)
    shutil.copy(ROOT / "tests/cpp/fault_driver.cc", tree / "fault_driver.cc")
    layers = ("core", "cpu", "ops", "simd")
    sources = [str(p.relative_to(tree)) for layer in layers for p in (tree / layer).glob("*.cc")]
    sources.append("fault_driver.cc")
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = pool.map(lambda s: compile_source(s, tree, folder), sources)
        return tree, dict(zip(sources, made, strict=True))


def cases_of(name, dtype):
    """Small cases that the driver can run: no 1-D operands, no empty arrays."""
    least_axes = {"matmul": 1, "int8_matmul": 1, "attention": 3}.get(name, 0)
    for case in harness.OPS[name].cases:
        arguments = harness.inputs(name, case, dtype)
        arrays = [v for v in arguments.values() if isinstance(v, np.ndarray)]
        if all(0 < v.size < 1e5 for v in arrays) and min(v.ndim for v in arrays[:2]) > least_axes:
            yield case, arguments


def check_results(library, name, case, arguments, dtype):
    got = getattr(library, name)(**arguments)
    harness.check(name, got, harness.reference(name, case, dtype), f"case={case}")


def check_gradients(library, name, case, arguments, dtype):
    """As test_backward.py does, which this is a test of."""
    dys = [dy.astype(dtype) for dy in slopes.output_gradients(name, case, dtype)]
    found = getattr(library, f"{name}_backward")(arguments, *dys)
    for which in slopes.differentiable(harness.OPS[name], arguments):
        got, want = found[which].astype(np.float64), slopes.slope(name, case, dtype, which)
        slopes.compare(name, got, want, dtype, f"d{which} case={case}")


def failing_cases(library, op, dtype):
    """The cases whose results, or gradients, are out of bounds."""
    name = op.removesuffix("_backward")
    check = check_results if name == op else check_gradients
    kept, failed, seen = dict(harness.worst), [], 0
    for case, arguments in cases_of(name, dtype):
        seen += 1
        try:
            check(library, name, case, arguments, dtype)
        except (AssertionError, pytest.fail.Exception):
            failed.append(case)
    harness.worst.clear()
    harness.worst.update(kept)  # faults don't belong into the closing table
    assert seen > 3, f"only {seen} cases of {name} were run"
    return failed


def test_without_a_fault_nothing_fails(build, tmp_path):
    _, objects = build
    library = link(objects.values(), tmp_path / "right.so")
    for fault in FAULTS:
        assert not failing_cases(library, fault.op, harness.DTYPES[fault.dtype]), fault.op


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_caught(fault, build, tmp_path):
    original, objects = build
    tree = tmp_path / "csrc"
    shutil.copytree(original, tree)
    path = tree / fault.file
    text = path.read_text(encoding="utf-8")
    found = len(re.findall(re.escape(fault.text), text))
    assert found, f"{fault.file} no longer has {fault.text!r}: give this fault its new place"
    path.write_text(text.replace(fault.text, fault.wrong), encoding="utf-8")
    changed = compile_source(fault.source, tree, tmp_path)
    library = link(
        [*(o for s, o in objects.items() if s != fault.source), changed], tmp_path / "wrong.so"
    )
    failed = failing_cases(library, fault.op, harness.DTYPES[fault.dtype])
    assert failed, f"{fault.name}: every case is still within its bound"
