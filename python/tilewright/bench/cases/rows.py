"""Row kernels: norms, softmax, activations, losses, rotations; and the optimizer's step.

Each row of the table moves its arrays once, so that memory is what binds it where they leave the
cache; ``moved`` counts arrays of the input's size, forward and with gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import tilewright
from tilewright.autograd import Tensor
from tilewright.bench import oracle, targets
from tilewright.bench.case import Case, Plan
from tilewright.bench.ort import FUSED, Ort
from tilewright.bench.peers import (
    Call,
    Peers,
    normal,
    tensor,
    torch_gradients,
    wide,
    with_gradients,
)
from tilewright.registry import Cost

tw: Any = tilewright  # as in products.py


@dataclass(frozen=True)
class RowOp:
    """How every engine computes it, from ``inputs`` matrices and then ``vectors`` of a row each."""

    name: str
    ours: Callable[..., Any]
    torch: Callable[[Any], Callable[..., Any]]  # torch -> the call
    want: Callable[..., Any]
    want_grad: Callable[..., list[Any]] | None = None  # of inputs and dy: y and every gradient
    inputs: int = 1
    vectors: int = 0
    moved: tuple[int, int] = (2, 5)
    ort: str = ""  # ONNX's node: "Op inputs... -> outputs...", x r matrices, g b vectors
    attributes: tuple[tuple[str, Any], ...] = ()
    domain: str = ""
    target: bool = True
    loose: tuple[str, ...] = ()


def _functional(name: str, *arguments: Any, **options: Any) -> Callable[[Any], Callable[..., Any]]:
    return lambda torch: lambda x: getattr(torch.nn.functional, name)(x, *arguments, **options)


def _torch_layernorm(torch: Any) -> Callable[..., Any]:
    return lambda x, g, b: torch.nn.functional.layer_norm(x, g.shape, g, b)


def _torch_add_layernorm(torch: Any) -> Callable[..., Any]:
    def call(x: Any, r: Any, g: Any, b: Any) -> Any:
        s = x + r
        return torch.nn.functional.layer_norm(s, g.shape, g, b), s

    return call


def _torch_rmsnorm(torch: Any) -> Callable[..., Any]:
    return lambda x, g: torch.nn.functional.rms_norm(x, g.shape, g, 1e-6)


NORM: dict[str, Any] = {
    "attributes": (("epsilon", 1e-5),),
    "ort": "LayerNormalization x g b -> y",
    "vectors": 2,
}
OPS = (
    RowOp(
        "layernorm", lambda *a: tw.layernorm(*a), _torch_layernorm,
        lambda *a: oracle.layernorm(*a)[0], lambda *a: oracle.layernorm(*a), **NORM,
    ),
    RowOp(
        "add_layernorm", lambda x, r, g, b: tw.layernorm(x, g, b, residual=r), _torch_add_layernorm,
        lambda x, r, g, b: [*oracle.layernorm(x + r, g, b), x + r],
        lambda x, r, g, b, dy: oracle.add_layernorm(x, r, g, b, dy), inputs=2, moved=(4, 7),
        **NORM | {"ort": "SkipLayerNormalization x r g b -> y - - s", "domain": FUSED},
    ),
    RowOp(
        "rmsnorm", lambda *a: tw.rmsnorm(*a), _torch_rmsnorm, oracle.rmsnorm, oracle.rmsnorm_grad,
        vectors=1, ort="SimplifiedLayerNormalization x g -> y", attributes=(("epsilon", 1e-6),),
    ),
    RowOp(
        "softmax", lambda x: tw.softmax(x), _functional("softmax", -1), oracle.softmax,
        oracle.softmax_grad, ort="Softmax x -> y", attributes=(("axis", -1),),
    ),
    RowOp(
        "gelu", lambda x: tw.gelu(x), _functional("gelu"), oracle.gelu, oracle.gelu_grad,
        ort="Gelu x -> y",
    ),
)  # fmt: skip
OTHERS = (
    RowOp(
        "log_softmax", lambda x: tw.log_softmax(x), _functional("log_softmax", -1),
        lambda x: np.log(oracle.softmax(x)), ort="LogSoftmax x -> y", attributes=(("axis", -1),),
        target=False,
    ),
    RowOp(
        "tanh", lambda x: tw.tanh(x), lambda torch: torch.tanh, np.tanh, ort="Tanh x -> y",
        target=False,
    ),
    RowOp(
        "sigmoid", lambda x: tw.sigmoid(x), lambda torch: torch.sigmoid,
        lambda x: 1 / (1 + np.exp(-x)), ort="Sigmoid x -> y", target=False,
    ),
    RowOp(
        "dropout", lambda x: tw.dropout(x, 0.1, seed=1), _functional("dropout", 0.1),
        lambda x: oracle.dropout(x, 0.1, 1), target=False, loose=("torch",),  # drops others
    ),
    RowOp(
        "mse", lambda x, y: tw.mse(x, y), lambda torch: torch.nn.functional.mse_loss,
        lambda x, y: np.mean((x - y) ** 2), lambda x, y, _: oracle.mse_grad(x, y), inputs=2,
        moved=(2, 6), target=False,
    ),
)  # fmt: skip


def common(rows: int, width: int, *, full: bool = False) -> Iterator[Plan]:
    """The kernels that every Transformer calls, forward and with gradients."""
    for op in OPS:
        for grad in (False, True):
            yield plan(op, rows, width, grad, full=full)


def others(rows: int, width: int, *, full: bool = False) -> Iterator[Plan]:
    """The rest of them."""
    for op in OTHERS:
        yield plan(op, rows, width, full=full)
        if op.want_grad:
            yield plan(op, rows, width, True, full=full)
    for grad in (False, True):
        yield plan(_rope(rows, width // 2), rows, width, grad, full=full)


def plan(op: RowOp, rows: int, width: int, grad: bool = False, *, full: bool = False) -> Plan:
    """One op of one size."""

    def build(peers: Peers) -> Case:
        arrays = normal(*[(rows, width)] * op.inputs, *[(width,)] * op.vectors)
        dy = normal((rows, width))[0] if grad and op.name != "mse" else None
        calls: dict[str, Call] = {
            "tilewright": with_gradients(op.ours, arrays, dy) if grad else lambda: op.ours(*arrays)
        }
        if torch := peers.torch:
            tensors, theirs = [tensor(torch, x) for x in arrays], op.torch(torch)
            calls["torch"] = (
                torch_gradients(torch, theirs, arrays, dy) if grad else lambda: theirs(*tensors)
            )
        if peers.ort and op.ort and not grad:
            calls["ort"] = _ort_rows(peers.ort, op, arrays)
        cost = Cost(8.0 * (1 + grad) * rows * width, 4.0 * rows * width * op.moved[grad])

        def want() -> list[Any]:
            if grad:
                assert op.want_grad is not None
                return op.want_grad(*wide(*arrays), None if dy is None else wide(dy)[0])
            found = op.want(*wide(*arrays))
            return found if isinstance(found, list) else [np.asarray(found)]

        return Case(label, name, calls, want, cost, loose=op.loose)

    label, name = op.name + "+grad" * grad, f"{rows}x{width}"
    return Plan(label, name, build, (targets.ROWS,) if op.target else (), full)


def _ort_rows(ort: Ort, op: RowOp, arrays: list[Any]) -> Call:
    kind, inputs, outputs = op.ort.partition(" ")[0], *op.ort.partition(" ")[2].split(" -> ")
    named = dict(zip(inputs.split(), arrays, strict=True))
    matrices = {n: x for n, x in named.items() if x.ndim == 2}
    vectors = {n: x for n, x in named.items() if x.ndim == 1}
    results = {n: np.empty_like(arrays[0]) for n in outputs.split() if n != "-"}
    node = ort.node(kind, inputs, outputs, op.domain, **dict(op.attributes))
    return ort.call([node], matrices, results, vectors)


def _rope(rows: int, half: int) -> RowOp:
    """Beside torch's as Hugging Face's Llama writes it, its doubled tables made beforehand."""

    @functools.cache
    def tables() -> tuple[Any, Any]:
        angles = np.random.default_rng(1).random((rows, half))
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def theirs(torch: Any) -> Callable[..., Any]:
        c, s = (torch.from_numpy(np.concatenate([t, t], axis=-1)) for t in tables())

        def call(x: Any) -> Any:
            a, b = x.chunk(2, dim=-1)
            return x * c + torch.cat([-b, a], dim=-1) * s

        return call

    def want_grad(x: Any, dy: Any) -> list[Any]:
        cos, sin = tables()
        return [oracle.rope(x, cos, sin), oracle.rope(dy, cos, -sin)]

    return RowOp(
        "rope", lambda x: tw.rope(x, *tables()), theirs, lambda x: oracle.rope(x, *tables()),
        want_grad, moved=(3, 6), target=False,
    )  # fmt: skip


def cross_entropy(rows: int, classes: int, grad: bool, *, full: bool = False) -> Plan:
    """Mean loss of class ids; with the gradient of the logits."""

    def build(peers: Peers) -> Case:
        (logits,) = normal((rows, classes))
        target = np.random.default_rng(0).integers(0, classes, rows)

        def ours(x: Any) -> Any:
            return tw.cross_entropy(x, target)

        calls: dict[str, Call] = {
            "tilewright": with_gradients(ours, [logits], None) if grad else lambda: ours(logits)
        }
        if torch := peers.torch:
            tx, labels = tensor(torch, logits), torch.from_numpy(target)
            loss = torch.nn.functional.cross_entropy
            calls["torch"] = (
                torch_gradients(torch, lambda x: loss(x, labels), [logits], None)
                if grad
                else lambda: loss(tx, labels)
            )
        if (ort := peers.ort) and not grad:
            node = ort.node("SoftmaxCrossEntropyLoss", "x t", "y")
            y = np.empty((), np.float32)
            calls["ort"] = ort.call([node], {"x": logits, "t": target}, {"y": y})
        # Reads the logits; the gradient reads them again and is written.
        cost = Cost(8.0 * (1 + grad) * logits.size, 4.0 * logits.size * (3 if grad else 1))

        def want() -> list[Any]:
            return oracle.cross_entropy(logits.astype(float), target)[: 1 + grad]

        return Case(label, name, calls, want, cost)

    label, name = "cross_entropy" + "+grad" * grad, f"{rows}x{classes}"
    return Plan(label, name, build, (targets.ROWS,), full)


NANOGPT = {"layers": 6, "width": 384, "context": 256, "vocabulary": 256}
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def gpt_shapes(layers: int, width: int, context: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Of the parameters of a GPT-2-like model."""
    wider = (3 * width, width, 4 * width)
    block = [(width,)] * 4 + [(n, width) for n in wider] + [(width, 4 * width)]
    block += [(n,) for n in wider] + [(width,)]
    return [(vocabulary, width), (context, width), *block * layers, (width,), (width,)]


def adamw(name: str, shapes: list[tuple[int, ...]], *, full: bool = False) -> Plan:
    """One step over all parameters of a model; torch's fused one."""

    def build(peers: Peers) -> Case:
        start = normal(*shapes)
        grads = [x + np.float32(0.5) for x in start[::-1]][::-1]
        params = [Tensor(x.copy(), requires_grad=True) for x in start]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        ours = tw.optim.AdamW(params, **ADAMW)

        def step() -> list[Any]:
            ours.step()
            return [p.data for p in params]

        calls: dict[str, Call] = {"tilewright": step}
        if torch := peers.torch:
            calls["torch"] = _torch_adamw(torch, start, grads)
        size = sum(x.size for x in start)
        cost = Cost(15.0 * size, 4.0 * 7 * size)  # reads p, g, m, v; writes p, m, v

        def want() -> list[Any]:
            pairs = zip(start, grads, strict=True)
            return [oracle.adamw_first_step(*wide(x, g), **ADAMW) for x, g in pairs]

        return Case("adamw", name, calls, want, cost)

    return Plan("adamw", name, build, (targets.ROWS,), full)


def _torch_adamw(torch: Any, start: list[Any], grads: list[Any]) -> Call:
    params = [torch.nn.Parameter(torch.from_numpy(x.copy())) for x in start]
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.from_numpy(g)
    optimizer = torch.optim.AdamW(params, fused=True, **ADAMW)

    def step() -> list[Any]:
        optimizer.step()
        return [p.detach() for p in params]

    return step
