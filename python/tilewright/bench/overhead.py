"""What a call costs beside its arithmetic: tiny inputs, plain arrays.

The whole call is timed on inputs so small that the kernel's own work is some tens of nanoseconds:
an upper bound of the overhead. For matmul the kernel alone is measured too, in a loop in C++
without checks or Python.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import timeit
from collections.abc import Callable
from typing import Any

import numpy as np

import tilewright
from tilewright import _core

tw: Any = tilewright  # as in cases.py


def measure(quick: bool = False) -> dict[str, Any]:
    """Microseconds of every op's tiny call, and milliseconds of the imports."""
    rounds, number = (2, 200) if quick else (30, 2000)
    a = np.ones((4, 4), np.float32)
    out = np.empty_like(a)
    tiny = {n: {"us": c} for n, c in tiny_calls().items() if hasattr(tw, n.split()[0])}
    tiny["matmul 4x4"]["numpy"] = lambda: np.matmul(a, a)
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        pass
    else:
        t = torch.from_numpy(a)
        tiny["matmul 4x4"]["torch"] = lambda: torch.matmul(t, t)
    calls = {name: dict.fromkeys(timed, float("inf")) for name, timed in tiny.items()}
    kernel = float("inf")
    for _ in range(rounds):  # all of them each round: a slow moment passes before the next
        kernel = min(kernel, _core.time_gemm(a, a, out, number) * 1e6)
        for name, timed in tiny.items():
            for engine, call in timed.items():
                taken = timeit.timeit(call, number=number) / number * 1e6
                calls[name][engine] = min(calls[name][engine], taken)
    calls["matmul 4x4"]["kernel"] = kernel
    tries = 2 if quick else 12
    bare, ours = float("inf"), float("inf")
    for _ in range(tries):
        bare, ours = (
            min(bare, _import_ms("import numpy")),
            min(ours, _import_ms("import tilewright")),
        )
    return {"calls": calls, "import_ms": ours, "import_numpy_ms": bare}


def tiny_calls() -> dict[str, Callable[[], Any]]:
    """A call of every public op."""
    x = np.ones((4, 4), np.float32)
    row = np.ones(4, np.float32)
    q = np.ones((1, 1, 1, 4), np.float32)
    ids = np.zeros(4, np.int64)
    rows, ends = np.ones((2, 1, 4), np.float32), np.array([0, 1, 2], np.int32)
    cos, sin = np.ones((4, 2), np.float32), np.zeros((4, 2), np.float32)
    small = np.ones((4, 4), np.int8)
    quantized = tw.quantize(x, axis=1) if hasattr(tw, "quantize") else None
    packed = tw.pack(quantized) if quantized is not None else None
    return {
        "matmul 4x4": lambda: tw.matmul(x, x),
        "matmul 4x4 +bias": lambda: tw.matmul(x, x, bias=row),
        "attention": lambda: tw.attention(q, q, q),
        "attention_varlen": lambda: tw.attention_varlen(rows, rows, rows, ends, ends),
        "layernorm": lambda: tw.layernorm(x, row, row),
        "rmsnorm": lambda: tw.rmsnorm(x, row),
        "softmax": lambda: tw.softmax(x),
        "log_softmax": lambda: tw.log_softmax(x),
        "rope": lambda: tw.rope(x, cos, sin),
        "gelu": lambda: tw.gelu(x),
        "gelu_tanh": lambda: tw.gelu_tanh(x),
        "relu": lambda: tw.relu(x),
        "silu": lambda: tw.silu(x),
        "tanh": lambda: tw.tanh(x),
        "sigmoid": lambda: tw.sigmoid(x),
        "dropout": lambda: tw.dropout(x, 0.5, seed=1),
        "embedding": lambda: tw.embedding(ids, x),
        "cross_entropy": lambda: tw.cross_entropy(x, ids),
        "mse": lambda: tw.mse(x, x),
        "int8_matmul": lambda: tw.int8_matmul(small, small),
        "qmatmul packed": lambda: tw.qmatmul(x, packed),
        "quantize": lambda: tw.quantize(x, axis=1),
        "dequantize": lambda: tw.dequantize(quantized),
    }


def _import_ms(statement: str) -> float:
    """Of a fresh process, the interpreter's own start not counted."""
    code = f"import time; start = time.perf_counter(); {statement}"
    code += "; print(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout) * 1e3
