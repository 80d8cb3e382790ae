"""Times every op on a GPU, beside cuBLAS (by CuPy) and torch where they are installed.

    python bench/gpu.py --json gpu.json       bench/gpu.sh runs it, once the tests have passed
    TILEWRIGHT_EMULATED=... python bench/gpu.py
                                              small cases on the emulator: its times mean nothing

A row is a case of an op, as its own file understands cases. The answer comes first: held to the
float64 reference by the tests' bounds, gradients to differences of it. Times are CUDA events around
as many calls as take 5 ms, in rounds of all engines. The roof of a row is what the card was seen
to do a moment before: the fastest product of any engine in the row's dtype, and a copy.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import pathlib
import statistics
import sys
import time
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

import emulated

if EMULATED := os.environ.get("TILEWRIGHT_EMULATED"):  # before tilewright is imported
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "python"))
    emulated.load(EMULATED)

import harness
import on_device
import slopes
import tilewright as tw
import tolerance
from tilewright.bench.cases import registered
from tilewright.device import running_on
from tilewright.registry import OPS

ROUNDS, SAMPLE_SECONDS, COPIED = (1, 0.0, 1 << 20) if EMULATED else (20, 0.005, 1 << 28)
DTYPES = F32, BF16, F16 = [harness.DTYPES[name] for name in ("float32", "bfloat16", "float16")]

# op -> cases, each with a small one for a dry run. An op without a line here gets the largest of
# its own.
CASES = {
    "matmul": [
        ("4096,4096,4096", "40,72,48"),
        ("16,4096,4096", "5,72,40"),
        ("4096,1024,4096;bias;gelu", "33,40,48;bias;gelu"),
    ],
    "int8_matmul": [("4096,4096,4096;s", "33,150,50;s")],
    "qmatmul": [
        ("2048,4096,4096;b", "33,64,40;b"),
        ("8,4096,4096;4;g64", "3,128,40;4;g64"),
    ],
    "attention": [
        ("1,16,16,2048,2048,64;causal", "1,2,2,40,40,64;causal"),
        ("1,16,4,2048,2048,128", "1,2,1,40,40,128"),
        ("16,32,8,1,4096,128", "1,2,1,1,600,8"),
        ("1,8,8,512,512,64;window=128:0;causal", "1,2,2,33,33,16;window=7:0;causal"),
    ],
    "attention_varlen": [
        ("12,12,64; 512,31,257,128,400,64,300,190; =; causal", "2,1,16; 33,7; =; causal")
    ],
    "layernorm": [("16384,4096", "16,48")],
    "rmsnorm": [("16384,4096", "16,48")],
    "softmax": [("16384,4096", "16,48")],
    "log_softmax": [("16384,4096", "16,48")],
    "cross_entropy": [("4096,32000", "16,48")],
    "embedding": [("16384;32000,1024", "40;64,48")],
    "gelu": [("16384,4096", "16,48")],
    "gelu_tanh": [("16384,4096", "16,48")],
    "silu": [("16384,4096", "16,48")],
    "quantize": [("4096,4096;0", "16,48;0"), ("4096,4096;0;4;g64", "16,48;0;4;g16")],
    "dequantize": [("4096,4096;0", "16,48;0"), ("4096,4096;0;4;g64", "16,48;0;4;g16")],
}
PRECISIONS = ("highest", "high", "medium")  # of float32 products
FLOAT32_ONLY = ("int8_matmul", "quantize", "dequantize", "mse", "qmatmul")
SPLIT_ERROR = {"highest": 0.0, "high": 2.0**-21, "medium": 2.0**-11}  # csrc/cuda/matmul_mma.cu
GRADIENTS = ("attention", "layernorm", "rmsnorm", "cross_entropy")


class Row(NamedTuple):
    op: str
    case: str
    dtype: np.dtype
    precision: str
    gradient: bool

    def __str__(self) -> str:
        parts = [self.op + "+grad" * self.gradient, self.case.replace("; ", ";"), str(self.dtype)]
        return "  ".join(parts + [self.precision] * (self.precision != "highest"))


def rows():
    for name, op in OPS.items():
        for real, small in CASES.get(name, [(registered.largest(op),) * 2]):
            for dtype in DTYPES if name not in FLOAT32_ONLY else DTYPES[:1]:
                case = small if EMULATED else real
                for precision in PRECISIONS if (name, dtype) == ("matmul", F32) else ["highest"]:
                    yield Row(name, case, dtype, precision, False)
                if name in GRADIENTS and dtype != F16:
                    yield Row(name, case, dtype, "highest", True)


# --- engines: a function without arguments for each -----------------------------------------------


def our_call(row):
    """The call on device arrays, once its answer is right."""
    op, arguments = OPS[row.op], harness.inputs(row.op, row.case, row.dtype)
    there = {name: on_device.moved(value) for name, value in arguments.items()}
    if not row.gradient:
        call = functools.partial(harness.call, op, there)
        found = harness.as_tuple(on_device.returned(call()))
        for got, ref in zip(found, harness.reference(row.op, row.case, row.dtype), strict=True):
            allowed = None
            if extra := SPLIT_ERROR[row.precision]:
                allowed = tolerance.bound(ref, got.dtype) + extra * ref.magnitude
            harness.check_output(row.op, got, ref, str(row), allowed)
        return call
    needs = slopes.differentiable(op, arguments)
    outs = harness.as_tuple(on_device.returned(harness.call(op, there)))
    exact = slopes.output_gradients(row.op, row.case, row.dtype)
    dys = [on_device.moved(dy.astype(o.dtype)) for dy, o in zip(exact, outs, strict=True)]

    def call():
        with running_on(on_device.device(), op.name):
            return slopes.gradients(op, there, needs, dys)

    found = call()
    for which in needs:
        s = slopes.slope(row.op, row.case, row.dtype, which)
        slopes.check(
            row.op, on_device.returned(found[which]), arguments[which], s, row.dtype, str(row)
        )
    return call


def cublas_call(row):
    """CuPy's product, where the row is no more than one: float32 without TF32."""
    if EMULATED or row.op != "matmul" or ";" in row.case or row.precision != "highest":
        return None
    import cupy

    a, b = (on_device.moved(v) for v in harness.inputs(row.op, row.case, row.dtype).values())
    return lambda: cupy.matmul(a, b)


def torch_call(row, torch):
    if not torch or row.op not in TORCH:
        return None
    arguments = harness.inputs(row.op, row.case, row.dtype)
    arrays = {n: v for n, v in arguments.items() if isinstance(v, np.ndarray)}

    def tensor(x):
        bits = x.view(np.int16) if x.dtype == BF16 else x
        t = torch.from_numpy(np.ascontiguousarray(bits)).cuda()
        return t.view(torch.bfloat16) if x.dtype == BF16 else t

    tensors = {n: tensor(x) for n, x in arrays.items()}
    options = {n: v for n, v in arguments.items() if n not in arrays}
    forward = TORCH[row.op](torch, torch.nn.functional, tensors, options)
    if forward is None or not row.gradient:
        return forward
    leaves = [t.requires_grad_() for t in tensors.values() if t.is_floating_point()]
    dy = torch.ones_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, dy)


def _sdpa(torch, f, t, o):
    if set(o) - {"causal"} or set(t) - {"q", "k", "v"}:
        return None
    grouped = t["q"].shape[1] != t["k"].shape[1]
    return lambda: f.scaled_dot_product_attention(
        t["q"], t["k"], t["v"], is_causal=o.get("causal", False), enable_gqa=grouped
    )


def _product(torch, f, t, o):
    if not o and set(t) == {"a", "b"}:
        return lambda: t["a"] @ t["b"]
    if o == {"activation": "gelu"} and set(t) == {"a", "b", "bias"}:
        return lambda: f.gelu(torch.addmm(t["bias"], t["a"], t["b"]))
    return None


# op -> the same of torch's tensors t and options o, or None where torch has no one call
TORCH = {
    "matmul": _product,
    "int8_matmul": lambda torch, f, t, o: lambda: torch._int_mm(t["a"], t["b"]),
    "attention": _sdpa,
    "layernorm": lambda torch, f, t, o: (
        lambda: f.layer_norm(t["x"], t["x"].shape[-1:], t.get("gamma"), t.get("beta"))
    ),
    "rmsnorm": lambda torch, f, t, o: lambda: f.rms_norm(t["x"], t["x"].shape[-1:], t.get("gamma")),
    "softmax": lambda torch, f, t, o: lambda: torch.softmax(t["x"], -1),
    "log_softmax": lambda torch, f, t, o: lambda: torch.log_softmax(t["x"], -1),
    "cross_entropy": lambda torch, f, t, o: lambda: f.cross_entropy(t["logits"], t["target"]),
    "embedding": lambda torch, f, t, o: lambda: f.embedding(t["ids"], t["table"]),
    "relu": lambda torch, f, t, o: lambda: f.relu(t["x"]),
    "gelu": lambda torch, f, t, o: lambda: f.gelu(t["x"]),
    "gelu_tanh": lambda torch, f, t, o: lambda: f.gelu(t["x"], approximate="tanh"),
    "silu": lambda torch, f, t, o: lambda: f.silu(t["x"]),
    "tanh": lambda torch, f, t, o: lambda: torch.tanh(t["x"]),
    "sigmoid": lambda torch, f, t, o: lambda: torch.sigmoid(t["x"]),
}


# --- time -----------------------------------------------------------------------------------------


def sample(call, repeats):
    """Seconds a call, on the device's own clock."""
    if EMULATED:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return cupy.cuda.get_elapsed_time(start, end) / 1e3 / repeats


def times(calls):
    """The best and the median of each engine, a round of all after the other."""
    repeats = {n: max(1, math.ceil(SAMPLE_SECONDS / sample(c, 3))) for n, c in calls.items()}
    samples = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            samples[name].append(sample(call, repeats[name]))
    return {n: {"min": min(s), "median": statistics.median(s)} for n, s in samples.items()}


def bandwidth():
    """Bytes a second of a copy, both directions."""
    device = on_device.device()
    here, there = device.empty((COPIED,), np.uint8), device.empty((COPIED,), np.uint8)

    def copy():
        there[...] = here

    return 2 * COPIED / times({"copy": copy})["copy"]["min"]


def measure(row, torch):
    """One line of the report; a wrong answer has no times."""
    line = {"row": str(row), "dtype": str(row.dtype), "precision": row.precision}
    with tw.options(precision=row.precision):
        try:
            calls = {"tilewright": our_call(row)}
        except (AssertionError, tw.TilewrightError) as error:
            return {**line, "error": f"{type(error).__name__}: {error}"[:300]}
        others = {"cublas": cublas_call(row), "torch": torch_call(row, torch)}
        calls |= {name: call for name, call in others.items() if call}
        line["engines"] = times(calls)
    cost = OPS[row.op].cost(**harness.inputs(row.op, row.case, row.dtype))
    gradient = 3.5 if row.op == "attention" else 2.5  # products, passes beside the forward one
    factor = gradient if row.gradient else 1.0
    line |= {"flops": factor * cost.flops, "bytes": factor * cost.bytes}
    line["kind"] = "int8" if row.op == "int8_matmul" else f"{row.dtype} {row.precision}"
    line["product"] = row.op.endswith("matmul")
    return line


def with_roofs(lines, copied):
    """Each line's share of its roof: the fastest product of its kind, or a copy of its bytes."""
    peaks = {}
    for line in lines:
        if line.get("product"):
            best = min(engine["min"] for engine in line["engines"].values())
            kind = line["kind"]
            peaks[kind] = max(peaks.get(kind, 0.0), line["flops"] / best)
    for line in lines:
        if "engines" not in line:
            continue
        peak = peaks.get(line["kind"], math.inf)
        least = max(line["flops"] / peak, line["bytes"] / copied)
        line["roof"] = least / line["engines"]["tilewright"]["min"]
        line["bound"] = "products" if line["flops"] / peak >= line["bytes"] / copied else "memory"
    return peaks


def where():
    """What the numbers are of."""
    if EMULATED:
        return "the CUDA emulator: **no GPU; the times mean nothing**"
    import cupy

    runtime = cupy.cuda.runtime
    name = runtime.getDeviceProperties(0)["name"].decode()
    return f"{name}, driver {runtime.driverGetVersion()}, CuPy {cupy.__version__}"


def table(lines):
    yield "| call | ms | median | x cublas | x torch | % of roof | bound |"
    yield "|---|--:|--:|--:|--:|--:|---|"
    for line in lines:
        if "error" in line:
            yield f"| {line['row']} | **{line['error']}** | | | | | |"
            continue
        engines = line["engines"]
        own = engines["tilewright"]
        ratios = [f"{engines[n]['min'] / own['min']:.2f}" if n in engines else "" for n in PEERS]
        yield (
            f"| {line['row']} | {1e3 * own['min']:.4f} | {1e3 * own['median']:.4f} | "
            f"{' | '.join(ratios)} | {100 * line['roof']:.0f} | {line['bound']} |"
        )


PEERS = ("cublas", "torch")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--op", nargs="+", help="only these ops")
    parser.add_argument("--json", type=pathlib.Path, help="write the results")
    options = parser.parse_args()
    if EMULATED:
        on_device.use(emulated.DEVICE, emulated.EmulatedArray, emulated.to_device)
        torch = None
    else:
        import on_cuda

        on_device.use(on_cuda.DEVICE, on_cuda.KIND, on_cuda.to_device)
        try:
            import torch
        except ImportError:
            torch = None
    chosen = [r for r in rows() if r.op in on_device.KERNELS and r.op in (options.op or OPS)]
    copied, lines = bandwidth(), []
    for row in chosen:
        print(row, file=sys.stderr, flush=True)
        lines.append(measure(row, torch))
        for kept in (harness.inputs, harness.reference, slopes.slope, slopes.output_gradients):
            kept.cache_clear()  # gigabytes
    peaks = with_roofs(lines, copied)
    print(f"Measured on {where()}{f', torch {torch.__version__}' if torch else ''}.\n")
    print(f"Roof: copies {copied / 1e9:.0f} GB/s; products, in TFLOP/s: ", end="")
    print(", ".join(f"{kind} {peak / 1e12:.1f}" for kind, peak in peaks.items()) + ".\n")
    print("\n".join(table(lines)))
    if options.json:
        options.json.write_text(json.dumps({"where": where(), "rows": lines}, indent=1) + "\n")
    return int(any("error" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
