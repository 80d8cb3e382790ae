"""Attention: forward, with gradients, and one new row against a cache."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright
from tilewright.bench import oracle, targets
from tilewright.bench.case import Case, Plan
from tilewright.bench.ort import FUSED, Ort
from tilewright.bench.peers import (
    Call,
    Peers,
    normal,
    rounded,
    tensor,
    torch_gradients,
    with_gradients,
)
from tilewright.registry import Cost

tw: Any = tilewright  # as in products.py


def attention(
    shape: tuple[int, int, int, int],
    causal: bool,
    grad: bool,
    dtype: str = "float32",
    *,
    full: bool = False,
) -> Plan:
    """Of B heads H of T rows of D, self-attention."""
    b, h, t, d = shape

    def build(peers: Peers) -> Case:
        q, k, v, do = normal(*[shape] * 4, dtype=dtype)

        def ours(q: Any, k: Any, v: Any) -> Any:
            return tw.attention(q, k, v, causal=causal)

        calls: dict[str, Call] = {
            "tilewright": with_gradients(ours, [q, k, v], do) if grad else lambda: ours(q, k, v)
        }
        if torch := peers.torch:
            sdpa = torch.nn.functional.scaled_dot_product_attention

            def theirs(q: Any, k: Any, v: Any) -> Any:
                return sdpa(q, k, v, is_causal=causal)

            tq, tk, tv = (tensor(torch, x) for x in (q, k, v))
            calls["torch"] = (
                torch_gradients(torch, theirs, [q, k, v], do)
                if grad
                else lambda: theirs(tq, tk, tv)
            )
        if peers.ort and dtype == "float32" and not grad:
            calls["ort"] = _ort_attention(peers.ort, q, k, v, causal)
        pairs = t * (t + 1) / 2 if causal else t * t
        # Two products forward; backward five (scores again, dV, dP, dQ, dK).
        flops = (2 + 5 * grad) * 2.0 * b * h * pairs * d
        cost = Cost(flops, float(q.itemsize) * b * h * t * d * (4 + 7 * grad))

        def want() -> list[Any]:
            return oracle.attention(q, k, v, causal, do if grad else None)

        rounded_within = oracle.BF16_GRADIENTS if grad and dtype == "bfloat16" else None
        return Case(op, name, calls, want, cost, dtype, tolerance=rounded_within)

    op = "attention" + "+grad" * grad
    name = "x".join(map(str, shape)) + " causal" * causal + " bf16" * (dtype == "bfloat16")
    held = (targets.ATTENTION_GRAD if grad else targets.ATTENTION)[dtype]
    return Plan(op, name, build, (held,), full)


def _ort_attention(ort: Ort, q: Any, k: Any, v: Any, causal: bool) -> Call:
    """Its fused op, given its own layout (B, T, H D); the answer is turned back untimed."""
    b, h, t, d = q.shape
    rows = {n: _joined(x) for n, x in zip("qkv", (q, k, v), strict=True)}
    attributes = {"num_heads": h, "unidirectional": int(causal)}
    node = ort.node("MultiHeadAttention", "q k v", "y", FUSED, **attributes)
    y = np.empty((b, t, h * d), np.float32)
    run = ort.call([node], rows, {"y": y})
    seen = y.reshape(b, t, h, d).transpose(0, 2, 1, 3)

    def call() -> Any:
        run()
        return seen

    return call


def _joined(x: Any) -> Any:
    """(B, H, T, D) as (B, T, H D)."""
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(x.shape[0], x.shape[2], -1)


def decode(b: int, h: int, h_kv: int, t: int, d: int, dtype: str, *, full: bool = False) -> Plan:
    """One new row a sequence against t tokens of a KVCache; ×f32: against float32 arrays.

    torch reads bfloat16 where the cache is narrower than float32.
    """

    def build(peers: Peers) -> Case:
        q, k, v = normal((b, h, 1, d), (b, h_kv, t, d), (b, h_kv, t, d))
        cache = tw.KVCache(1, b, h_kv, d, t, dtype=dtype)
        cache.append(0, k, v)
        calls: dict[str, Call] = {
            "tilewright": lambda: tw.attention(q, cache.layer(0)),
            "f32": lambda: tw.attention(q, k, v),
        }
        if torch := peers.torch:
            sdpa = torch.nn.functional.scaled_dot_product_attention
            narrow = "float32" if dtype == "float32" else "bfloat16"
            tq, tk, tv = (tensor(torch, rounded(x, narrow)) for x in (q, k, v))
            calls["torch"] = lambda: sdpa(tq, tk, tv, enable_gqa=h != h_kv)
        if peers.ort and dtype == "float32":
            calls["ort"] = _ort_decode(peers.ort, q, k, v)

        def stored(x: Any) -> Any:
            if dtype != "int8":
                return x.astype(dtype)
            rows = tw.dequantize(tw.quantize(x.reshape(-1, d), axis=0))
            return rows.reshape(x.shape)

        def want() -> list[Any]:
            return oracle.attention(q, stored(k), stored(v), False)

        cost = Cost(4.0 * b * h * t * d, cache.nbytes + 2.0 * q.nbytes)
        return Case("decode", name, calls, want, cost, loose=("f32", "torch"))

    short = dtype.replace("float", "f")  # the table has 22 letters for it
    name = f"{b}x{h}:{h_kv}x{t}x{d} {short}"
    held = {"float32": targets.ATTENTION["float32"], "bfloat16": targets.ATTENTION["bfloat16"]}
    return Plan("decode", name, build, (held[dtype],) if dtype in held else (), full)


def _ort_decode(ort: Ort, q: Any, k: Any, v: Any) -> Call:
    """Grouped-query attention over a cache that lacks the newest token, which it appends."""
    (b, h, _, d), (_, h_kv, t, _) = q.shape, k.shape
    past = {"pk": k.copy(), "pv": v.copy()}
    inputs = {
        "q": _joined(q),
        "k": _joined(k[:, :, -1:]),
        "v": _joined(v[:, :, -1:]),
        **past,
        "behind": np.full(b, t - 1, np.int32),
        "total": np.array([t], np.int32),
    }
    attributes = {"num_heads": h, "kv_num_heads": h_kv}
    node = ort.node(
        "GroupQueryAttention", "q k v pk pv behind total", "y nk nv", FUSED, **attributes
    )
    y = np.empty((b, 1, h * d), np.float32)
    run = ort.call([node], inputs, {"y": y, "nk": past["pk"], "nv": past["pv"]})

    def call() -> Any:
        run()
        return y.reshape(q.shape)

    return call
