"""What is benched: named shape families, each call written for tilewright and for its peers.

A case is built when its turn comes and dropped after it, so memory is that of one case. Shapes in
row names: matmul MxKxN, attention BxHxTxD, rows x width elsewhere. "+grad" is the forward and the
backward pass through each engine's tape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

import tilewright
from tilewright.autograd import Tensor
from tilewright.bench import oracle, registered
from tilewright.bench.case import Call, Case, Plan
from tilewright.registry import Cost

tw: Any = (
    tilewright  # type checkers see the classes that define the ops, not the callables they become
)


def plans(quick: bool = False) -> Iterator[Plan]:
    """Every case, in the order of the table: those written here, then those of the registry."""
    rows = list(quick_plans() if quick else full_plans())
    yield from rows
    yield from registered.plans({row.op.split("+")[0] for row in rows}, quick)


def full_plans() -> Iterator[Plan]:
    """The cases written here, whose peers or gradients need more than an op's own file says."""
    for n in (64, 128, 256, 512, 1024, 2048):
        yield _matmul(n, n, n, "nn")
    for n in (512, 1024, 2048):
        yield _matmul(n, n, n, "nt")
    for n in (256, 512, 1024, 2048):
        yield _matmul_bf16(n)
    for m, k, n in (
        (1, 768, 3072),
        (8, 768, 3072),
        (128, 768, 3072),
        (512, 768, 3072),
        (2048, 384, 1536),
    ):
        yield _linear(m, k, n)
    for b, h, t, d in ((1, 12, 128, 64), (16, 6, 256, 64), (8, 12, 512, 64), (4, 16, 1024, 64)):
        for causal in (False, True):
            for grad in (False, True):
                yield _attention(b, h, t, d, causal, grad)
    for dtype in ("float32", "bfloat16", "int8"):
        for b, h, h_kv, t, d in ((1, 12, 12, 1024, 64), (8, 32, 8, 4096, 128)):
            yield _decode(b, h, h_kv, t, d, dtype)
    for rows, width in ((512, 768), (4096, 768), (4096, 384), (2048, 4096)):
        for grad in (False, True):
            yield _layernorm(rows, width, grad)
    for rows, width in ((512, 768), (4096, 1024)):
        yield _softmax(rows, width)
    for rows, width in ((512, 768), (4096, 1024)):
        yield from _rowwise(rows, width)
    for rows, width in ((512, 3072), (4096, 3072)):
        yield _gelu(rows, width)
    for rows, classes in ((4096, 256), (1024, 32000)):
        yield _cross_entropy(rows, classes)
    for n in (256, 512, 1024, 2048):
        yield _int8_matmul(n)
    for m, k, n in ((1, 768, 3072), (512, 768, 3072), (1024, 1024, 1024)):
        yield _qmatmul(m, k, n)
    for bits in (8, 4):
        for m in (1, 2, 4, 8, 16):
            yield _weight_only(m, 4096, 4096, bits)
        yield _quantize(4096, 1024, bits)


def quick_plans() -> Iterator[Plan]:
    """One small case of each of them: a smoke test of seconds."""
    yield _matmul(64, 64, 64, "nn")
    yield _matmul(64, 64, 64, "nt")
    yield _linear(8, 64, 96)
    for grad in (False, True):
        yield _attention(1, 2, 33, 16, True, grad)
        yield _layernorm(16, 48, grad)
    yield _decode(2, 4, 2, 150, 16, "int8")
    yield _softmax(16, 48)
    yield from _rowwise(16, 48)
    yield _gelu(16, 48)
    yield _cross_entropy(16, 48)
    yield _int8_matmul(64)
    yield _qmatmul(8, 64, 96)
    for bits in (8, 4):
        yield _weight_only(2, 64, 96, bits)
        yield _quantize(16, 48, bits)


NEEDS = {
    "linear_gelu": "pack",
    "weight_only": "qmatmul",
    "decode": "KVCache",
}  # the public name behind a row's op, where it is another


def exists(plan: Plan) -> bool:
    """Whether this build has the op already."""
    op = plan.op.removesuffix("+grad")
    made = getattr(tw, NEEDS.get(op, op), None)
    return made is not None and (op == plan.op or bool(made.grads))


def _normal(*shapes: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def _with_gradients(f: Callable[..., Any], inputs: list[Any], dy: Any) -> Call:
    """Ours: forward, backward, and every gradient, as arrays."""
    tensors = [Tensor(x, requires_grad=True) for x in inputs]

    def call() -> list[Any]:
        for t in tensors:
            t.grad = None
        y = f(*tensors)
        y.backward(dy)
        return [y.data, *(t.grad for t in tensors)]

    return call


def _torch_gradients(torch: Any, f: Callable[..., Any], inputs: list[Any], dy: Any) -> Call:
    tensors = [torch.from_numpy(x).requires_grad_() for x in inputs]
    gradient = None if dy is None else torch.from_numpy(dy)

    def call() -> list[Any]:
        y = f(*tensors)
        return [y.detach(), *torch.autograd.grad(y, tensors, gradient)]

    return call


def _matmul(m: int, k: int, n: int, layout: str) -> Plan:
    def build(torch: Any) -> Case:
        a, b = _normal((m, k), (k, n) if layout == "nn" else (n, k))
        if layout == "nt":
            b = b.T
        calls: dict[str, Call] = {
            "tilewright": lambda: tw.matmul(a, b),
            "numpy": lambda: np.matmul(a, b),
        }
        if torch:
            ta, tb = torch.from_numpy(a), torch.from_numpy(b)
            calls["torch"] = lambda: torch.matmul(ta, tb)
        cost = Cost(2.0 * m * k * n, 4.0 * (m * k + k * n + m * n))
        return Case("matmul", name, calls, lambda: [a.astype(float) @ b.astype(float)], cost)

    name = f"{m}x{k}x{n} {layout}"
    return Plan("matmul", name, build)


def _matmul_bf16(n: int) -> Plan:
    """Beside it our own float32 matmul of that size (column ×f32). NumPy has no bfloat16 kernel."""

    def build(torch: Any) -> Case:
        fa, fb = _normal((n, n), (n, n))
        a, b = fa.astype(ml_dtypes.bfloat16), fb.astype(ml_dtypes.bfloat16)
        calls: dict[str, Call] = {
            "tilewright": lambda: tw.matmul(a, b),
            "f32": lambda: tw.matmul(fa, fb),
        }
        if torch:
            ta, tb = (torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) for x in (a, b))
            calls["torch"] = lambda: torch.matmul(ta, tb)
        cost = Cost(2.0 * n**3, 2.0 * 3 * n * n)

        def want() -> list[Any]:
            return [a.astype(float) @ b.astype(float)]

        return Case("matmul", name, calls, want, cost, "bfloat16", loose=("f32",))

    name = f"{n}x{n}x{n} bf16"
    return Plan("matmul", name, build)


def _linear(m: int, k: int, n: int) -> Plan:
    """gelu(x @ w.T + bias), the weight packed once where the engine can (torch eager cannot)."""

    def build(torch: Any) -> Case:
        x, w, bias = _normal((m, k), (n, k), (n,))
        w /= np.float32(np.sqrt(k))
        packed = tw.pack(w.T)
        calls: dict[str, Call] = {
            "tilewright": lambda: tw.matmul(x, packed, bias=bias, activation="gelu")
        }
        if torch:
            tx, tweight, tbias = (torch.from_numpy(v) for v in (x, w, bias))
            linear, gelu = torch.nn.functional.linear, torch.nn.functional.gelu
            calls["torch"] = lambda: gelu(linear(tx, tweight, tbias))
        cost = Cost(2.0 * m * k * n, 4.0 * (m * k + k * n + m * n))

        def want() -> list[Any]:
            return [oracle.gelu(x.astype(float) @ w.T.astype(float) + bias)]

        return Case("linear_gelu", name, calls, want, cost)

    name = f"{m}x{k}x{n} packed"
    return Plan("linear_gelu", name, build)


def _attention(b: int, h: int, t: int, d: int, causal: bool, grad: bool) -> Plan:
    def build(torch: Any) -> Case:
        q, k, v, do = _normal(*[(b, h, t, d)] * 4)

        def ours(q: Any, k: Any, v: Any) -> Any:
            return tw.attention(q, k, v, causal=causal)

        calls: dict[str, Call] = {
            "tilewright": _with_gradients(ours, [q, k, v], do) if grad else lambda: ours(q, k, v)
        }
        if torch:
            sdpa = torch.nn.functional.scaled_dot_product_attention

            def theirs(q: Any, k: Any, v: Any) -> Any:
                return sdpa(q, k, v, is_causal=causal)

            tq, tk, tv = (torch.from_numpy(x) for x in (q, k, v))
            calls["torch"] = (
                _torch_gradients(torch, theirs, [q, k, v], do)
                if grad
                else lambda: theirs(tq, tk, tv)
            )
        pairs = t * (t + 1) / 2 if causal else t * t
        # Two products forward; backward five (scores again, dV, dP, dQ, dK).
        flops = (2 + 5 * grad) * 2.0 * b * h * pairs * d
        cost = Cost(flops, 4.0 * b * h * t * d * (4 + 7 * grad))

        def want() -> list[Any]:
            return oracle.attention(q, k, v, causal, do if grad else None)

        return Case(op, name, calls, want, cost)

    op = "attention" + "+grad" * grad
    name = f"{b}x{h}x{t}x{d}" + " causal" * causal
    return Plan(op, name, build)


def _decode(b: int, h: int, h_kv: int, t: int, d: int, dtype: str) -> Plan:
    """One new row a sequence against t tokens of a KVCache; beside it float32 arrays."""

    def build(torch: Any) -> Case:
        q, k, v = _normal((b, h, 1, d), (b, h_kv, t, d), (b, h_kv, t, d))
        cache = tw.KVCache(1, b, h_kv, d, t, dtype=dtype)
        cache.append(0, k, v)
        calls: dict[str, Call] = {
            "tilewright": lambda: tw.attention(q, cache.layer(0)),
            "f32": lambda: tw.attention(q, k, v),
        }
        if torch:
            sdpa = torch.nn.functional.scaled_dot_product_attention
            tq, tk, tv = (torch.from_numpy(x) for x in (q, k, v))
            calls["torch"] = lambda: sdpa(tq, tk, tv, enable_gqa=h != h_kv)

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
    return Plan("decode", name, build)


def _layernorm(rows: int, width: int, grad: bool) -> Plan:
    def build(torch: Any) -> Case:
        x, dy, gamma, beta = _normal((rows, width), (rows, width), (width,), (width,))
        inputs = [x, gamma, beta]
        calls: dict[str, Call] = {
            "tilewright": _with_gradients(tw.layernorm, inputs, dy)
            if grad
            else lambda: tw.layernorm(x, gamma, beta)
        }
        if torch:

            def theirs(x: Any, gamma: Any, beta: Any) -> Any:
                return torch.nn.functional.layer_norm(x, (width,), gamma, beta)

            tensors = [torch.from_numpy(v) for v in inputs]
            calls["torch"] = (
                _torch_gradients(torch, theirs, inputs, dy) if grad else lambda: theirs(*tensors)
            )
        # Forward reads x, writes y; backward reads x and dy, writes dx.
        cost = Cost((8.0 + 14.0 * grad) * x.size, 4.0 * x.size * (2 + 3 * grad))

        def want() -> list[Any]:
            return oracle.layernorm(
                x.astype(float), gamma.astype(float), beta, dy if grad else None
            )

        return Case(op, name, calls, want, cost)

    op = "layernorm" + "+grad" * grad
    name = f"{rows}x{width}"
    return Plan(op, name, build)


def _softmax(rows: int, width: int) -> Plan:
    def build(torch: Any) -> Case:
        (x,) = _normal((rows, width))
        calls: dict[str, Call] = {"tilewright": lambda: tw.softmax(x)}
        if torch:
            tx = torch.from_numpy(x)
            calls["torch"] = lambda: torch.softmax(tx, -1)
        cost = Cost(20.0 * x.size, 8.0 * x.size)
        return Case("softmax", name, calls, lambda: [oracle.softmax(x.astype(float))], cost)

    name = f"{rows}x{width}"
    return Plan("softmax", name, build)


def _rowwise(rows: int, width: int) -> Iterator[Plan]:
    """The ops that move a row once or twice: bound by memory, so operations are not what counts."""
    half = width // 2

    def plan(
        op: str,
        inputs: int,
        ours: Callable[..., Any],
        theirs: Callable[..., Any],
        want: Any,
        extra: tuple[Any, ...] = (),
        grad: bool = False,
    ) -> Plan:
        def build(torch: Any) -> Case:
            arrays = [*_normal(*[(rows, width)] * inputs), *extra]
            dy = _normal((rows, width))[0] if grad and op != "mse" else None
            calls: dict[str, Call] = {
                "tilewright": _with_gradients(ours, arrays, dy) if grad else lambda: ours(*arrays)
            }
            if torch:
                tensors = [torch.from_numpy(x) for x in arrays]
                call = theirs(torch)
                calls["torch"] = (
                    _torch_gradients(torch, call, arrays, dy) if grad else lambda: call(*tensors)
                )
            # Forward reads every input and writes y, backward reads them and dy, writes gradients.
            moved = inputs + (op != "mse") + grad * (2 * inputs + (op != "mse"))
            cost = Cost(8.0 * (1 + grad) * rows * width, 4.0 * rows * width * moved)
            wide = [x.astype(float) for x in arrays]

            def answer() -> list[Any]:
                found = want(*wide, dy) if grad else want(*wide)
                return list(found) if grad else [found]

            loose = ("torch",) if op == "dropout" else ()  # it drops other elements
            return Case(label, name, calls, answer, cost, loose=loose)

        label = op + "+grad" * grad
        return Plan(label, name, build)

    gamma = np.linspace(0.5, 1.5, width, dtype=np.float32)

    @functools.cache
    def tables() -> tuple[Any, Any]:
        angles = np.random.default_rng(1).random((rows, half))
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    name = f"{rows}x{width}"
    yield plan("rmsnorm", 1, tw.rmsnorm, _torch_rmsnorm, oracle.rmsnorm, (gamma,))
    yield plan("rmsnorm", 1, tw.rmsnorm, _torch_rmsnorm, oracle.rmsnorm_grad, (gamma,), grad=True)
    yield plan(
        "rope", 1, lambda x: tw.rope(x, *tables()),
        lambda torch: _torch_rope(torch, *tables()), lambda x: oracle.rope(x, *tables()),
    )  # fmt: skip
    yield plan(
        "rope", 1, lambda x: tw.rope(x, *tables()),
        lambda torch: _torch_rope(torch, *tables()),
        lambda x, dy: [oracle.rope(x, *tables()), oracle.rope(dy, tables()[0], -tables()[1])],
        grad=True,
    )  # fmt: skip
    yield plan(
        "log_softmax", 1, lambda x: tw.log_softmax(x),
        lambda torch: lambda x: torch.log_softmax(x, -1), lambda x: np.log(oracle.softmax(x)),
    )  # fmt: skip
    yield plan("tanh", 1, lambda x: tw.tanh(x), lambda torch: torch.tanh, np.tanh)
    yield plan(
        "sigmoid", 1, lambda x: tw.sigmoid(x),
        lambda torch: torch.sigmoid, lambda x: 1 / (1 + np.exp(-x)),
    )  # fmt: skip
    yield plan(
        "dropout", 1, lambda x: tw.dropout(x, 0.1, seed=1),
        lambda torch: lambda x: torch.nn.functional.dropout(x, 0.1),
        lambda x: oracle.dropout(x, 0.1, 1),
    )  # fmt: skip
    mse = "mse", 2, tw.mse, lambda torch: torch.nn.functional.mse_loss
    yield plan(*mse, lambda x, y: np.mean((x - y) ** 2))
    yield plan(*mse, lambda x, y, _: oracle.mse_grad(x, y), grad=True)


def _torch_rmsnorm(torch: Any) -> Callable[..., Any]:
    return lambda x, weight: torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6)


def _torch_rope(torch: Any, cos: Any, sin: Any) -> Callable[..., Any]:
    """As Hugging Face's Llama writes it, with its doubled tables made beforehand."""
    c, s = (torch.from_numpy(np.concatenate([t, t], axis=-1)) for t in (cos, sin))

    def call(x: Any) -> Any:
        a, b = x.chunk(2, dim=-1)
        return x * c + torch.cat([-b, a], dim=-1) * s

    return call


def _gelu(rows: int, width: int) -> Plan:
    def build(torch: Any) -> Case:
        (x,) = _normal((rows, width))
        calls: dict[str, Call] = {"tilewright": lambda: tw.gelu(x)}
        if torch:
            tx = torch.from_numpy(x)
            calls["torch"] = lambda: torch.nn.functional.gelu(tx)
        cost = Cost(40.0 * x.size, 8.0 * x.size)
        return Case("gelu", name, calls, lambda: [oracle.gelu(x.astype(float))], cost)

    name = f"{rows}x{width}"
    return Plan("gelu", name, build)


def _cross_entropy(rows: int, classes: int) -> Plan:
    def build(torch: Any) -> Case:
        (logits,) = _normal((rows, classes))
        target = np.random.default_rng(0).integers(0, classes, rows)
        calls: dict[str, Call] = {
            "tilewright": _with_gradients(lambda x: tw.cross_entropy(x, target), [logits], None)
        }
        if torch:
            labels = torch.from_numpy(target)
            loss = torch.nn.functional.cross_entropy
            calls["torch"] = _torch_gradients(torch, lambda x: loss(x, labels), [logits], None)
        cost = Cost(40.0 * logits.size, 12.0 * logits.size)

        def want() -> list[Any]:
            return oracle.cross_entropy(logits.astype(float), target)

        return Case("cross_entropy+grad", name, calls, want, cost)

    name = f"{rows}x{classes}"
    return Plan("cross_entropy+grad", name, build)


def _int8_matmul(n: int) -> Plan:
    """Beside it our own float32 matmul of that size (column ×f32), and torch's int8 product."""

    def build(torch: Any) -> Case:
        rng = np.random.default_rng(n)
        a, b = (rng.integers(-127, 128, (n, n), np.int8) for _ in range(2))
        fa, fb = a.astype(np.float32), b.astype(np.float32)
        calls: dict[str, Call] = {
            "tilewright": lambda: tw.int8_matmul(a, b),
            "f32": lambda: tw.matmul(fa, fb),
        }
        if torch:
            ta, tb = torch.from_numpy(a), torch.from_numpy(b)
            calls["torch"] = lambda: torch._int_mm(ta, tb)
        cost = Cost(2.0 * n**3, 2.0 * n * n + 4.0 * n * n)

        def want() -> list[Any]:  # exact in float64: |sum| <= n * 127^2 < 2^53
            return [(a.astype(float) @ b.astype(float)).astype(np.int32)]

        return Case("int8_matmul", name, calls, want, cost, "int8", integer=True, loose=("f32",))

    name = f"{n}x{n}x{n}"
    return Plan("int8_matmul", name, build)


def _qmatmul(m: int, k: int, n: int) -> Plan:
    """float32 in and out, int8 inside, weight packed; torch's column is its float32 linear."""

    def build(torch: Any) -> Case:
        x, w = _normal((m, k), (k, n))
        quantized = tw.quantize(w, axis=1)
        packed, packed_float = tw.pack(quantized), tw.pack(w)
        calls: dict[str, Call] = {
            "tilewright": lambda: tw.qmatmul(x, packed),
            "f32": lambda: tw.matmul(x, packed_float),
        }
        if torch:
            tx, tweight = torch.from_numpy(x), torch.from_numpy(w.T.copy())
            calls["torch"] = lambda: torch.nn.functional.linear(tx, tweight)

        def want() -> list[Any]:
            amax = np.abs(x).max(axis=1, keepdims=True)
            scale = np.where(amax == 0, np.float32(1), amax / np.float32(127))
            q = np.clip(np.rint(x / scale), -127, 127).astype(float)
            weight = np.asarray(quantized.data).astype(float)
            return [
                (q @ weight)
                * scale.astype(float)
                * np.asarray(quantized.scale, float).reshape(1, -1)
            ]

        cost = Cost(2.0 * m * k * n, 4.0 * m * k + k * n + 4.0 * m * n)
        return Case("qmatmul", name, calls, want, cost, integer=True, loose=("f32", "torch"))

    name = f"{m}x{k}x{n} packed"
    return Plan("qmatmul", name, build)


def _weight_only(m: int, k: int, n: int, bits: int) -> Plan:
    """Few float32 rows times int8 (by channel) or int4 (groups of 64); beside it float32."""

    def build(torch: Any) -> Case:
        x, w = _normal((m, k), (n, k))
        quantized = tw.quantize(w, bits=bits, axis=0, group_size=64 if bits == 4 else None)
        packed, packed_float = tw.pack(quantized.T), tw.pack(w.T)
        calls: dict[str, Call] = {
            "tilewright": lambda: tw.qmatmul(x, packed, compute="float"),
            "f32": lambda: tw.matmul(x, packed_float),
        }
        if torch:
            tx, tweight = torch.from_numpy(x), torch.from_numpy(w)
            calls["torch"] = lambda: torch.nn.functional.linear(tx, tweight)

        def want() -> list[Any]:
            scale = np.asarray(quantized.scale, float).reshape(n, -1)
            weight = np.asarray(quantized.integers(), float).reshape(n, scale.shape[1], -1)
            return [x.astype(float) @ (weight * scale[..., None]).reshape(n, k).T]

        cost = Cost(2.0 * m * k * n, 4.0 * m * k + quantized.nbytes + 4.0 * m * n)
        return Case("weight_only", name, calls, want, cost, loose=("f32", "torch"))

    name = f"{m}x{k}x{n} int{bits}"
    return Plan("weight_only", name, build)


def _quantize(rows: int, width: int, bits: int) -> Plan:
    """A weight, a scale for each row or, in 4 bits, for every 16 neighbours; beside it NumPy."""
    group = 16 if bits == 4 else width
    most = np.float32(7 if bits == 4 else 127)

    def build(torch: Any) -> Case:
        (x,) = _normal((rows, width))
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
    return Plan("quantize", name, build)


__all__ = ["Case", "Cost", "Plan", "exists", "full_plans", "plans", "quick_plans"]
