"""Integer products: raw, with rows quantized on the way, weights of 8 and 4 bits; quantization."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

import tilewright
from tilewright.bench import targets
from tilewright.bench.case import Case, Plan
from tilewright.bench.cases.products import few_rows_targets
from tilewright.bench.ort import FUSED, Ort
from tilewright.bench.peers import Call, Peers, normal, tensor
from tilewright.registry import Cost

tw: Any = tilewright  # as in products.py
GROUP = 64  # weights of 4 bits that share a scale


def int8_matmul(m: int, k: int, n: int, *, packed: bool = False, full: bool = False) -> Plan:
    """Int8 in, int32 out, exact; beside it our own float32 matmul of that size (column ×f32)."""

    def build(peers: Peers) -> Case:
        rng = np.random.default_rng(n)
        a, b = (rng.integers(-127, 128, s, np.int8) for s in ((m, k), (k, n)))
        fa, fb = a.astype(np.float32), b.astype(np.float32)
        right, float_right = (tw.pack(b), tw.pack(fb)) if packed else (b, fb)
        calls: dict[str, Call] = {
            "tilewright": lambda: tw.int8_matmul(a, right),
            "f32": lambda: tw.matmul(fa, float_right),
        }
        if torch := peers.torch:
            ta, tb = tensor(torch, a), tensor(torch, b)
            calls["torch"] = lambda: torch._int_mm(ta, tb)
        if ort := peers.ort:
            calls["ort"] = _ort_int8(ort, a, b, packed)
        cost = Cost(2.0 * m * k * n, 1.0 * (m * k + k * n) + 4.0 * m * n)

        def want() -> list[Any]:  # exact in float64: |sum| <= K * 127^2 < 2^53
            return [(a.astype(float) @ b.astype(float)).astype(np.int32)]

        return Case("int8_matmul", name, calls, want, cost, "int8", integer=True, loose=("f32",))

    name = f"{m}x{k}x{n}" + " packed" * packed
    held = (targets.INT8_RAW,) if m >= 128 else few_rows_targets(m, k * n, "int8")
    return Plan("int8_matmul", name, build, held, full)


def _ort_int8(ort: Ort, a: Any, b: Any, packed: bool) -> Call:
    """With a as unsigned numbers around 128: its kernel for signed ones is forty times slower."""
    unsigned = (a.astype(np.int16) + 128).astype(np.uint8)
    varying, constants = {"a": unsigned}, {"zero": np.array(128, np.uint8)}
    (constants if packed else varying)["b"] = b
    y = np.empty((len(a), b.shape[1]), np.int32)
    return ort.call([ort.node("MatMulInteger", "a b zero", "y")], varying, {"y": y}, constants)


def qmatmul(m: int, k: int, n: int, *, full: bool = False) -> Plan:
    """float32 in and out, int8 inside, weight packed, with bias.

    torch's dynamically quantized linear (its oneDNN) and ONNX Runtime's DynamicQuantizeMatMul have
    one scale for all of x and unsigned x, so that their answers differ; ×f32 is our float32 linear.
    """

    def build(peers: Peers) -> Case:
        x, w, bias = normal((m, k), (k, n), (n,))
        quantized = tw.quantize(w, axis=1)
        packed, packed_float = tw.pack(quantized), tw.pack(w)
        scale = np.asarray(quantized.scale).reshape(-1)
        calls: dict[str, Call] = {
            "tilewright": lambda: tw.qmatmul(x, packed, bias=bias),
            "f32": lambda: tw.matmul(x, packed_float, bias=bias),
        }
        if torch := peers.torch:
            calls["torch"] = _torch_dynamic(torch, x, w, scale, bias)
        if ort := peers.ort:
            data = np.ascontiguousarray(quantized.data)
            node = ort.node("DynamicQuantizeMatMul", "x w s - b", "y", FUSED)
            y = np.empty((m, n), np.float32)
            constants = {"w": data, "s": scale, "b": bias}
            calls["ort"] = ort.call([node], {"x": x}, {"y": y}, constants)

        def want() -> list[Any]:
            amax = np.abs(x).max(axis=1, keepdims=True)
            rows = np.where(amax == 0, np.float32(1), amax / np.float32(127))
            q = np.clip(np.rint(x / rows), -127, 127).astype(float)
            weight = np.asarray(quantized.data).astype(float)
            return [(q @ weight) * rows.astype(float) * scale.astype(float) + bias]

        cost = Cost(2.0 * m * k * n, 4.0 * m * k + k * n + 4.0 * m * n)
        loose = ("f32", "torch", "ort")
        return Case("qmatmul", name, calls, want, cost, integer=True, loose=loose)

    name = f"{m}x{k}x{n} dynamic"
    held = (targets.INT8_DYNAMIC,) if m >= 128 else few_rows_targets(m, k * n, "int8")
    return Plan("qmatmul", name, build, held, full)


def _torch_dynamic(torch: Any, x: Any, w: Any, scale: Any, bias: Any) -> Call:
    torch.backends.quantized.engine = "onednn"
    weight, scales = torch.from_numpy(w.T.copy()), torch.from_numpy(scale).double()
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    with warnings.catch_warnings():  # torch announces that its quantized dtypes will move
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, torch.from_numpy(bias))
    tx = torch.from_numpy(x)
    return lambda: torch.ops.quantized.linear_dynamic(tx, packed, False)


def weight_only(m: int, k: int, n: int, bits: int, *, full: bool = False) -> Plan:
    """Few float32 rows times int8 (by channel) or int4 (groups of 64); beside it float32."""

    def build(peers: Peers) -> Case:
        x, w = normal((m, k), (n, k))
        quantized = tw.quantize(w, bits=bits, axis=0, group_size=GROUP if bits == 4 else None)
        packed, packed_float = tw.pack(quantized.T), tw.pack(w.T)
        integers = np.asarray(quantized.integers()).reshape(n, k)
        scale = np.asarray(quantized.scale, np.float32).reshape(n, -1)
        calls: dict[str, Call] = {
            "tilewright": lambda: tw.qmatmul(x, packed, compute="float"),
            "f32": lambda: tw.matmul(x, packed_float),
        }
        if peers.torch:
            calls["torch"] = _torch_weight_only(peers.torch, x, integers, scale, bits)
        if peers.ort and k % GROUP == 0:
            calls["ort"] = _ort_weight_only(peers.ort, x, integers, scale, bits)

        def want() -> list[Any]:
            grouped = integers.astype(float).reshape(n, scale.shape[1], -1)
            return [x.astype(float) @ (grouped * scale[..., None]).reshape(n, k).T]

        cost = Cost(2.0 * m * k * n, 4.0 * m * k + quantized.nbytes + 4.0 * m * n)
        return Case("weight_only", name, calls, want, cost, loose=("f32",))

    name = f"{m}x{k}x{n} int{bits}"
    return Plan(
        "weight_only", name, build, few_rows_targets(m, k * n * bits / 8, f"int{bits}"), full
    )


def _torch_weight_only(torch: Any, x: Any, integers: Any, scale: Any, bits: int) -> Call:
    tx = torch.from_numpy(x)
    if bits == 8:
        weight, scales = torch.from_numpy(integers.astype(np.int8)), torch.from_numpy(scale[:, 0])
        scales = scales.contiguous()
        return lambda: torch._weight_int8pack_mm(tx, weight, scales)
    unsigned = torch.from_numpy(integers.astype(np.int32) + 8)
    weight = torch._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    pairs = np.stack([scale.T, np.zeros_like(scale.T)], axis=-1)  # (groups, N, scale and zero)
    scales = torch.from_numpy(np.ascontiguousarray(pairs))
    return lambda: torch._weight_int4pack_mm_for_cpu(tx, weight, GROUP, scales)


def _ort_weight_only(ort: Ort, x: Any, integers: Any, scale: Any, bits: int) -> Call:
    """MatMulNBits with float32 arithmetic; its numbers are unsigned, with the middle as zero."""
    n, k = integers.shape
    unsigned = (integers.astype(np.int16) + (1 << bits - 1)).astype(np.uint8)
    if bits == 4:
        unsigned = unsigned[:, ::2] | unsigned[:, 1::2] << 4
    stored = np.ascontiguousarray(unsigned.reshape(n, k // GROUP, -1))
    scales = np.repeat(scale, k // GROUP // scale.shape[1], axis=1).reshape(-1)
    sizes = {"K": k, "N": n, "bits": bits, "block_size": GROUP, "accuracy_level": 0}
    node = ort.node("MatMulNBits", "x w s", "y", FUSED, **sizes)
    y = np.empty((len(x), n), np.float32)
    return ort.call([node], {"x": x}, {"y": y}, {"w": stored, "s": scales})


def quantize(rows: int, width: int, bits: int, *, full: bool = False) -> Plan:
    """A weight, a scale for each row or, in 4 bits, for every 16 neighbours; beside it NumPy."""
    group = 16 if bits == 4 else width
    most = np.float32(7 if bits == 4 else 127)

    def build(peers: Peers) -> Case:
        (x,) = normal((rows, width))
        options = {"bits": bits, "axis": 0, "group_size": group if bits == 4 else None}

        def ours() -> list[Any]:
            q = tw.quantize(x, **options)
            return [q.data, q.scale]

        def by_numpy() -> list[Any]:  # the definition itself, float32 as it says
            grouped = x.reshape(rows, -1, group)
            amax = np.abs(grouped).max(axis=-1)
            scale = np.where(amax == 0, np.float32(1), amax / most)
            q = np.clip(np.rint(grouped / scale[..., None]), -most, most).astype(np.int8)
            q = q.reshape(rows, width)
            if bits == 4:
                q = q[:, ::2] & 15 | q[:, 1::2] << 4
            return [q, scale if bits == 4 else scale[:, 0]]

        calls: dict[str, Call] = {"tilewright": ours, "numpy": by_numpy}
        cost = Cost(2.0 * x.size, 4.0 * x.size + bits / 8 * x.size)
        return Case("quantize", name, calls, by_numpy, cost)

    name = f"{rows}x{width} int{bits}"
    return Plan("quantize", name, build, (), full)
