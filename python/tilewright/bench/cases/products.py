"""Float products: squares, linear layers, few rows, batches, and a small one through Python."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright
from tilewright.bench import oracle, targets
from tilewright.bench.case import Case, Plan
from tilewright.bench.ort import Ort
from tilewright.bench.peers import (
    Call,
    Peers,
    normal,
    rounded,
    tensor,
    torch_packed_linear,
    under,
    wide,
)
from tilewright.registry import Cost

tw: Any = (
    tilewright  # type checkers see the classes that define the ops, not the callables they become
)
SIZES = {"float32": 4.0, "bfloat16": 2.0}
LARGE_WEIGHT = 4 << 20  # bytes: beyond it few rows are held to bandwidth


def matmul(n: int, layout: str = "nn", *, full: bool = False) -> Plan:
    """Square, float32; "nt": the right operand is a transposed view."""

    def build(peers: Peers) -> Case:
        a, b = normal((n, n), (n, n))
        stored, b = b, b.T if layout == "nt" else b
        calls: dict[str, Call] = {
            "tilewright": lambda: tw.matmul(a, b),
            "numpy": lambda: np.matmul(a, b),
        }
        if torch := peers.torch:
            ta, tb = tensor(torch, a), tensor(torch, b)
            calls["torch"] = lambda: torch.matmul(ta, tb)
        if ort := peers.ort:
            node = ort.node("Gemm", "a b", "y", transB=1) if layout == "nt" else None
            node = node or ort.node("MatMul", "a b", "y")
            calls["ort"] = ort.call([node], {"a": a, "b": stored}, {"y": np.empty_like(a)})
        cost = Cost(2.0 * n**3, 4.0 * 3 * n * n)
        return Case("matmul", name, calls, lambda: [np.matmul(*wide(a, b))], cost)

    name = f"{n}x{n}x{n} {layout}"
    held = (targets.MATMUL,) if layout == "nn" and n >= 512 else ()
    return Plan("matmul", name, build, held, full)


def matmul_bf16(n: int, *, full: bool = False) -> Plan:
    """Beside it our own float32 matmul of that size (column ×f32). NumPy has no bfloat16 kernel."""

    def build(peers: Peers) -> Case:
        fa, fb = normal((n, n), (n, n))
        a, b = rounded(fa, "bfloat16"), rounded(fb, "bfloat16")
        calls: dict[str, Call] = {
            "tilewright": lambda: tw.matmul(a, b),
            "f32": lambda: tw.matmul(fa, fb),
        }
        if torch := peers.torch:
            ta, tb = tensor(torch, a), tensor(torch, b)
            calls["torch"] = lambda: torch.matmul(ta, tb)
        cost = Cost(2.0 * n**3, 2.0 * 3 * n * n)

        def want() -> list[Any]:
            return [np.matmul(*wide(a, b))]

        return Case("matmul", name, calls, want, cost, "bfloat16", loose=("f32",))

    name = f"{n}x{n}x{n} bf16"
    held = (targets.BF16,) if n >= 512 else ()
    return Plan("matmul", name, build, held + (targets.BF16_ROOF,) * (n in (1024, 2048)), full)


def batched(batch: int, m: int, k: int, n: int, dtype: str, *, full: bool = False) -> Plan:
    """Many small products at once."""

    def build(peers: Peers) -> Case:
        a, b = normal((batch, m, k), (batch, k, n), dtype=dtype)
        calls: dict[str, Call] = {"tilewright": lambda: tw.matmul(a, b)}
        if dtype == "float32":
            calls["numpy"] = lambda: np.matmul(a, b)
        if torch := peers.torch:
            ta, tb = tensor(torch, a), tensor(torch, b)
            calls["torch"] = lambda: torch.matmul(ta, tb)
        if (ort := peers.ort) and dtype == "float32":
            y = np.empty((batch, m, n), np.float32)
            calls["ort"] = ort.call([ort.node("MatMul", "a b", "y")], {"a": a, "b": b}, {"y": y})
        moved = SIZES[dtype] * batch * (m * k + k * n + m * n)
        cost = Cost(2.0 * batch * m * k * n, moved)
        return Case("matmul", name, calls, lambda: [np.matmul(*wide(a, b))], cost, dtype)

    name = f"{batch} of {m}x{k}x{n}{' bf16' * (dtype == 'bfloat16')}"
    return Plan("matmul", name, build, (targets.BATCHED,) * (dtype == "float32"), full)


def small_out(n: int) -> Plan:
    """One small product through Python, into an array that every engine is given."""

    def build(peers: Peers) -> Case:
        a, b = normal((n, n), (n, n))
        ours, numpys = np.empty_like(a), np.empty_like(a)
        calls: dict[str, Call] = {
            "tilewright": lambda: tw.matmul(a, b, out=ours),
            "numpy": lambda: np.matmul(a, b, out=numpys),
        }
        if torch := peers.torch:
            ta, tb, ty = (tensor(torch, x) for x in (a, b, np.empty_like(a)))
            calls["torch"] = lambda: torch.matmul(ta, tb, out=ty)
        cost = Cost(2.0 * n**3, 4.0 * 3 * n * n)
        return Case("matmul", name, calls, lambda: [np.matmul(*wide(a, b))], cost)

    name = f"{n}x{n}x{n} out="
    return Plan("matmul", name, build, (targets.SMALL_OUT,))


def linear(
    m: int, k: int, n: int, dtype: str = "float32", *, gelu: bool = False, full: bool = False
) -> Plan:
    """A layer, x @ w.T + bias, or gelu of it; the weight packed once where the engine can."""

    def build(peers: Peers) -> Case:
        x, w, bias = _layer(m, k, n, dtype)
        packed, activation = tw.pack(w.T), "gelu" if gelu else None
        calls: dict[str, Call] = {
            "tilewright": lambda: tw.matmul(x, packed, bias=bias, activation=activation)
        }
        calls |= _linear_peers(peers, x, w, bias, gelu)
        return Case(op, name, calls, lambda: _linear_answer(x, w, bias, gelu), _cost(x, w), dtype)

    op = "linear_gelu" if gelu else "linear"
    name = f"{m}x{k}x{n}{' bf16' * (dtype == 'bfloat16')}"
    held: tuple[str, ...] = ()
    if dtype == "bfloat16":
        held = (targets.BF16,) if m >= 128 else few_rows_targets(m, SIZES[dtype] * k * n, "bf16")
    return Plan(op, name, build, held, full)


def linear_few(m: int, k: int, n: int, how: str, *, full: bool = False) -> Plan:
    """Few float32 rows: "latency" (so packed) or "variant" (batch_invariant=False).

    Beside it the default's time (column ×f32): what rows cost that have the bits of any batch.
    """

    def build(peers: Peers) -> Case:
        x, w, bias = _layer(m, k, n, "float32")
        default, packed = tw.pack(w.T), tw.pack(w.T, prefer="latency")
        calls: dict[str, Call] = {
            "tilewright": (lambda: tw.matmul(x, packed, bias=bias))
            if how == "latency"
            else under(lambda: tw.matmul(x, default, bias=bias), batch_invariant=False),
            "f32": lambda: tw.matmul(x, default, bias=bias),
        }
        calls |= _linear_peers(peers, x, w, bias, False)
        return Case("linear", name, calls, lambda: _linear_answer(x, w, bias, False), _cost(x, w))

    name = f"{m}x{k}x{n} {how}"
    held = (*few_rows_targets(m, 4.0 * k * n, f"float32 {how}"), targets.FEW_ROWS_DEFAULT)
    return Plan("linear", name, build, held, full)


def few_rows_targets(m: int, weight_bytes: float, kind: str) -> tuple[str, ...]:
    """What products with 1 and 8 rows are held to."""
    if m not in (1, 8):
        return ()
    return (targets.FEW_ROWS[kind],) + (targets.FEW_ROWS_BANDWIDTH,) * (weight_bytes > LARGE_WEIGHT)


def _layer(m: int, k: int, n: int, dtype: str) -> list[Any]:
    x, w, bias = normal((m, k), (n, k), (n,))
    w /= np.float32(np.sqrt(k))
    return [rounded(v, dtype) for v in (x, w, bias)]


def _cost(x: Any, w: Any) -> Cost:
    (m, k), n, size = x.shape, len(w), x.itemsize
    return Cost(2.0 * m * k * n, float(size) * (m * k + k * n + m * n))


def _linear_answer(x: Any, w: Any, bias: Any, gelu: bool) -> list[Any]:
    wx, ww, wb = wide(x, w, bias)
    z = wx @ ww.T + wb
    return [oracle.gelu(z) if gelu else z]


def _linear_peers(peers: Peers, x: Any, w: Any, bias: Any, gelu: bool) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    if torch := peers.torch:
        tx, tweight, tbias = (tensor(torch, v) for v in (x, w, bias))
        functional = torch.nn.functional
        if gelu:
            calls["torch"] = lambda: functional.gelu(functional.linear(tx, tweight, tbias))
        else:
            calls["torch"] = lambda: functional.linear(tx, tweight, tbias)
        if x.dtype == np.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
            calls["torch_packed"] = torch_packed_linear(torch, x, w, bias, gelu)
    if peers.ort and x.dtype == np.float32:
        calls["ort"] = _ort_linear(peers.ort, x, w, bias, gelu)
    return calls


def _ort_linear(ort: Ort, x: Any, w: Any, bias: Any, gelu: bool) -> Call:
    nodes = [ort.node("Gemm", "x w b", "z" if gelu else "y")]
    nodes += [ort.node("Gelu", "z", "y")] * gelu
    y = np.empty((len(x), len(w)), np.float32)
    return ort.call(nodes, {"x": x}, {"y": y}, {"w": np.ascontiguousarray(w.T), "b": bias})
