"""What writing a case for several engines takes: their inputs, tapes and packed weights."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tilewright import _core
from tilewright.autograd import Tensor
from tilewright.bench.ort import Ort

Call = Callable[[], Any]


class Peers(NamedTuple):
    """The engines beside NumPy, as far as they are here."""

    torch: Any = None
    ort: Ort | None = None


NO_PEERS = Peers()


def normal(*shapes: tuple[int, ...], dtype: str = "float32") -> list[Any]:
    """Zero-mean random arrays, the same at each call."""
    rng = np.random.default_rng(0)
    return [rounded(rng.standard_normal(shape, np.float32), dtype) for shape in shapes]


def rounded(x: Any, dtype: str) -> Any:
    """The array in a dtype that NumPy may know by ml_dtypes only."""
    return x if dtype == "float32" else x.astype(getattr(ml_dtypes, dtype))


def wide(*arrays: Any) -> list[Any]:
    """For the oracle."""
    return [np.asarray(x).astype(np.float64) for x in arrays]


def tensor(torch: Any, x: Any) -> Any:
    """The array as torch's tensor, over the same memory."""
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def with_gradients(f: Callable[..., Any], inputs: Sequence[Any], dy: Any) -> Call:
    """Ours: forward, backward, and every gradient, as arrays. Of several results the first is y."""
    tensors = [Tensor(x, requires_grad=True) for x in inputs]

    def call() -> list[Any]:
        for t in tensors:
            t.grad = None
        found = f(*tensors)
        y = found[0] if isinstance(found, tuple) else found
        y.backward(dy)
        return [y.data, *(t.grad for t in tensors)]

    return call


def torch_gradients(torch: Any, f: Callable[..., Any], inputs: Sequence[Any], dy: Any) -> Call:
    """The same through torch's tape."""
    tensors = [tensor(torch, x).requires_grad_() for x in inputs]
    gradient = None if dy is None else tensor(torch, dy)

    def call() -> list[Any]:
        found = f(*tensors)
        y = found[0] if isinstance(found, tuple) else found
        return [y.detach(), *torch.autograd.grad(y, tensors, gradient)]

    return call


def torch_packed_linear(torch: Any, x: Any, w: Any, bias: Any, gelu: bool) -> Call:
    """The product with a weight (N, K) packed beforehand, as torch.compile's freezing does it.

    By the MKL inside torch for float32 and by its oneDNN for bfloat16, where gelu is fused.
    """
    tx, tw, tb = (tensor(torch, v) for v in (x, w, bias))
    rows = tx.shape[0]
    if tx.dtype == torch.float32 and torch.backends.mkl.is_available():
        packed = torch.ops.mkl._mkl_reorder_linear_weight(tw, rows)
        linear = torch.ops.mkl._mkl_linear
        if gelu:
            return lambda: torch.nn.functional.gelu(linear(tx, packed, tw, tb, rows))
        return lambda: linear(tx, packed, tw, tb, rows)
    packed = torch.ops.mkldnn._reorder_linear_weight(tw, rows)
    activation: tuple[str, list[Any], str]
    activation = ("gelu", [], "none") if gelu else ("none", [], "")
    return lambda: torch.ops.mkldnn._linear_pointwise(tx, packed, tb, *activation)


def under(call: Call, **options: Any) -> Call:
    """The call under options of ``tw.options``, which are entered once and not timed."""
    context = contextvars.copy_context()
    known = ("threads", "isa", "precision", "batch_invariant")
    context.run(_core.enter_options, *(options.get(name) for name in known))
    return lambda: context.run(call)
