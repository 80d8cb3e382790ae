"""csrc without Python, for test_seeded_faults.py: compiled by hand, called through ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import numpy as np

COMPILER = shutil.which("g++") or shutil.which("c++")
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
SIMD_FLAGS = ["-O1", "-ffp-contract=off", "-fno-math-errno", "-DISA=generic", "-DISA_generic=1"]
KINDS = ("", "relu", "gelu", "gelu_tanh", "silu")


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
