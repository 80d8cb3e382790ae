"""Tensor and the tape: reverse-mode differentiation over NumPy arrays.

Every differentiable call leaves a Node: the op, what its forward saved, and the Tensors it read.
``backward`` walks the nodes in reverse topological order, asks each op for the gradients of its
inputs, and adds them up. Operators and methods of Tensor are in tensor.py; this file is the
mechanism alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright import _core, recording
from tilewright.device import Device, as_array, device_of, moved, running_on
from tilewright.errors import DeviceError, ShapeError
from tilewright.interop import FLOATS, PLAIN, Exported, array_over, importer_of, is_foreign
from tilewright.tensor import Operators

if TYPE_CHECKING:
    from tilewright.registry import Op

_state = threading.local()
_ONES: dict[Any, Any] = {}  # by shape, dtype and device: the gradients of single numbers
_ARRAYS = np.ndarray, np.generic  # NumPy gives a scalar where every operand has no axes


def grad_enabled() -> bool:
    """Whether calls are recorded in this thread; see ``no_grad``."""
    return getattr(_state, "enabled", True)


@contextmanager
def no_grad() -> Iterator[None]:
    """Record nothing inside the block: inference, and updates of parameters."""
    before = grad_enabled()
    _state.enabled = False
    try:
        yield
    finally:
        _state.enabled = before


class Context:
    """What a forward call hands to its backward.

    ``needs`` (input names), ``saved`` (anything), ``device`` (where the arrays are; None: the CPU).
    """

    __slots__ = ("device", "needs", "saved")

    def __init__(self, needs: frozenset[str], device: Device | None = None) -> None:
        self.needs = needs
        self.device = device
        self.saved: tuple[Any, ...] = ()

    def save(self, *values: Any) -> None:
        """Keep values for the backward pass."""
        self.saved = values


class _NoTape(Context):
    """The context of a call that nobody will differentiate."""

    __slots__ = ()

    def save(self, *values: Any) -> None:
        """Keep nothing."""


NO_TAPE = _NoTape(frozenset())


class Node:
    """One recorded call.

    ``edges`` leads from the name of an input to where its gradient goes: the node that made it and
    which of that node's outputs it was, or the leaf Tensor itself. No array is kept alive by it.
    """

    __slots__ = ("ctx", "edges", "op", "outputs", "watched")

    def __init__(self, op: Op, ctx: Context, inputs: dict[str, Tensor], outputs: int) -> None:
        self.op = op
        self.ctx: Context | None = ctx
        self.edges: dict[str, Tensor | tuple[Node, int]] = {
            name: tensor if tensor._node is None else (tensor._node, tensor._index)
            for name, tensor in inputs.items()
        }
        self.outputs = outputs
        self.watched: list[tuple[str, list[int], int]] = []

    def watch(self, name: str, tensor: Tensor) -> None:
        """Refuse to differentiate once ``tensor`` has been written in place."""
        self.watched.append((name, tensor._writes, tensor._writes[0]))

    def gradients(self, douts: list[Any]) -> dict[str, Any]:
        """Gradient of each recorded input, from those of the outputs. Frees what was saved."""
        if self.ctx is None:
            raise RuntimeError(f"{self.op.name}: backward was already called through this result")
        for name, writes, at_forward in self.watched:
            if writes[0] != at_forward:
                raise RuntimeError(
                    f"{self.op.name}: {name} was written in place after the forward pass that "
                    "saved it; compute the gradient first, or write to a copy"
                )
        assert self.op.backward is not None
        with running_on(self.ctx.device, self.op.name):
            found = self.op.backward(self.ctx, *douts)
        self.ctx = None
        if len(self.op.grads) == 1 and not isinstance(found, tuple):
            found = (found,)
        return {
            name: grad
            for name, grad in zip(self.op.grads, found, strict=True)
            if name in self.edges and grad is not None
        }


class Tensor(Operators):
    """A NumPy array that remembers how it was computed; made by ``tw.tensor``.

    Attributes:
        data: the array.
        grad: the accumulated gradient, an array like ``data``, or None.
        requires_grad: whether ``backward`` should reach this tensor.
    """

    __slots__ = ("__weakref__", "_index", "_node", "_writes", "data", "grad", "requires_grad")

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        self.data = data
        self.requires_grad = requires_grad
        self.grad: Any = None
        self._node: Node | None = None
        self._index = 0
        self._writes = [0]  # in-place writes so far; views of one array share the list

    def __reduce__(self) -> Any:
        """Leaves can be copied and pickled; the tape can't."""
        if self._node is not None:
            raise RuntimeError(
                "tensor: only a Tensor that no op made can be copied or pickled; use detach()"
            )
        return _leaf, (self.data, self.requires_grad, self.grad)


def _leaf(data: Any, requires_grad: bool, grad: Any) -> Tensor:
    made = Tensor(data, requires_grad)
    made.grad = grad
    return made


def unwrap(value: Any, what: str = "an array") -> Any:
    """Return the array of a Tensor or over a foreign array, and anything else as it is.

    ``what`` starts the messages about a foreign array that can't be read.
    """
    if type(value) is Tensor:
        return value.data
    return array_over(value, what) if is_foreign(value) else value


class _Arrays:
    """The arrays that stand for one call's arguments, and how its results go back."""

    __slots__ = ("device", "host", "importer", "name", "outs", "tensors")

    def __init__(self, name: str) -> None:
        self.name = name
        self.device: Device | None = None  # of the arguments; then none may be NumPy's
        self.host = ""  # the first argument that is an array of the CPU
        self.tensors = False  # whether some argument is a Tensor: then the results are
        self.importer: Any = None  # of the first foreign argument: makes results of its kind
        self.outs: list[tuple[Any, Any]] = []  # arrays to write to, and the objects given for them

    def read(self, value: Any, argument: str) -> Any:
        if type(value) is np.ndarray:
            self.host = self.host or argument
        if type(value) in PLAIN:
            return value
        if type(value) is tuple and argument == "out":
            return tuple(self.read(v, "out") for v in value)
        device = device_of(value)
        if type(value) is Tensor:
            self.tensors = True
            array = value.data
            device = device_of(array)
            if device is None:
                self.host = self.host or argument
        elif device is not None:
            array = value
        elif is_foreign(value):
            array = array_over(value, f"{self.name}: {argument}")
            device = device_of(array)
            if device is None:
                self.host = self.host or argument
            self.importer = self.importer or importer_of(value)
        else:
            return value
        if device is not None:
            self._settle(device, argument)
        if argument == "out":
            self.outs.append((array, value))
        return array

    def _settle(self, device: Device, argument: str) -> None:
        if self.device not in (None, device):
            raise DeviceError(
                f"{self.name}: {argument} must be on the same device as the arguments before it, "
                f"got {device.name} and {self.device.name}"
            )
        self.device = device

    def check(self) -> None:
        """Refuse arrays of the CPU beside those of a device."""
        if self.device is not None and self.host:
            raise DeviceError(
                f"{self.name}: {self.host} must be on {self.device.name} like the other arrays, "
                "got an array of the CPU"
            )

    def answer(self, result: Any) -> Any:
        """The object that was given as ``out``, else a Tensor, else a guest's kind, else NumPy."""
        for array, value in self.outs:
            if array is result:
                return value
        if device_of(result) is not None:
            if self.tensors:
                return Tensor(result)
            return result if self.importer is None else self.importer(result)
        if not isinstance(result, _ARRAYS):  # a QuantizedArray is its own kind
            return result
        if self.tensors:
            return Tensor(np.asarray(result))
        return result if self.importer is None else self.importer(Exported(np.asarray(result)))


def apply(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an op on arguments of which some are Tensors or foreign arrays.

    Recorded if a gradient may be wanted.
    """
    if len(args) > len(op.params):
        return op.forward(NO_TAPE, *args, **kwargs)  # which raises: too many arguments
    inputs = dict(zip(op.params, args, strict=False))
    inputs.update(kwargs)
    recorded: dict[str, Tensor] = {}
    if op.backward is not None and grad_enabled():
        for name in op.grads:
            value = inputs.get(name)
            if type(value) is Tensor and value.requires_grad:
                recorded[name] = value
    out = inputs.get("out")
    if recorded and out is not None:
        raise RuntimeError(f"{op.name}: out= can't be recorded; use it under no_grad()")
    arrays = _Arrays(op.name)
    positional = [arrays.read(a, name) for a, name in zip(args, op.params, strict=False)]
    named = {name: arrays.read(v, name) for name, v in kwargs.items()}
    arrays.check()
    if (noted := recording.current()) is not None:
        _note(noted, op, arrays, inputs)
    ctx = Context(frozenset(recorded), arrays.device) if recorded else NO_TAPE
    if out is not None:
        op.check_out(named.get("out"), positional, named)
        _mark_written(out)
    try:
        with running_on(arrays.device, op.name):
            result = op.forward(ctx, *positional, **named)
    except TypeError as error:
        op.check_numbers(error, positional, named)
        raise
    many = type(result) is tuple
    outputs = [arrays.answer(r) for r in (result if many else (result,))]
    if op.views and arrays.tensors:
        for tensor in outputs:
            tensor._writes = args[0]._writes
    if recorded:
        node = Node(op, ctx, recorded, len(outputs))
        for index, tensor in enumerate(outputs):
            tensor.requires_grad = True
            tensor._node = node
            tensor._index = index
        if any(isinstance(value, np.ndarray) or device_of(value) for value in ctx.saved):
            for name, value in inputs.items():
                if type(value) is Tensor:
                    node.watch(name, value)
            for tensor in outputs:
                node.watch("the result", tensor)
    return tuple(outputs) if many else outputs[0]


def _note(noted: recording.Recording, op: Op, arrays: _Arrays, inputs: dict[str, Any]) -> None:
    """Tell a recording what an op is called with, or refuse it."""
    if not op.views:
        noted.runs_on(arrays.device)
    numpys = op.__module__ == "tilewright.arithmetic" and op.name not in ("add", "astype")
    if numpys and not op.views:
        recording.refuse(
            f"{op.name}, which NumPy computes,", "call one of tilewright's ops, or do it outside"
        )
    for value in inputs.values():
        if type(value) is Tensor and value._node is None:
            noted.reads(value)


def _mark_written(out: Any) -> None:
    for value in out if type(out) is tuple else (out,):
        if type(value) is Tensor:
            value.mark_written()


def backward(root: Tensor, gradient: Any = None) -> None:
    """Add d(root)/d(leaf) to ``leaf.grad`` of every leaf that requires it.

    Args:
        root: the tensor to differentiate.
        gradient: d(loss)/d(root), shaped like root; may be left out when root has one element.

    Raises:
        RuntimeError: root is not on the tape, was differentiated before, or is no scalar.
    """
    if not root.requires_grad:
        raise RuntimeError("backward: this tensor does not require a gradient")
    if gradient is None:
        if root.data.size != 1:
            raise RuntimeError(
                f"backward: pass gradient= for a tensor of shape {root.data.shape}; "
                "only a single number has the gradient 1"
            )
        gradient = _one(root.data)
    gradient = as_array(unwrap(gradient))
    if gradient.shape != root.data.shape:
        raise ShapeError(
            f"backward: gradient must have shape {root.data.shape} to match the tensor it is for, "
            f"got {gradient.shape}"
        )
    gradient = gradient.astype(root.data.dtype, copy=False)
    if root._node is None:
        _add_to_leaf(root, gradient, alone=False)
        return
    pending: dict[Node, list[Any]] = {root._node: [None] * root._node.outputs}
    pending[root._node][root._index] = gradient
    borrowed = {(root._node, root._index)}  # slots whose array others may hold too
    for node in _reverse_topological(root._node):
        douts = pending.pop(node)
        found = node.gradients(douts)
        foreign = [d for index, d in enumerate(douts) if (node, index) in borrowed]
        # What others hold: those that come later, and those that were handed on.
        later, handed_on = list(found.values()), foreign
        for name, grad in found.items():
            del later[0]
            alone = _is_alone(grad, later + handed_on)
            edge = node.edges[name]
            if not isinstance(edge, tuple):
                _add_to_leaf(edge, grad, alone)
                continue
            parent, index = edge
            slots = pending.setdefault(parent, [None] * parent.outputs)
            if slots[index] is None:
                slots[index] = grad
                handed_on.append(grad)
                if not alone:
                    borrowed.add(edge)
            elif edge not in borrowed:
                slots[index] = _sum(slots[index], grad, in_place=True)
            else:
                slots[index] = _sum(slots[index], grad, in_place=False)
                borrowed.discard(edge)


def _is_alone(grad: Any, others: list[Any]) -> bool:
    """Whether nobody would notice a write to ``grad``: no other array shares its memory.

    A gradient that is a view of the only dout of its node counts: the tape has dropped that one.
    """
    if type(grad) is np.ndarray:
        if not grad.flags.writeable:
            return False
    elif any(np.may_share_memory(grad, one) for one in _ONES.values() if type(one) is type(grad)):
        return False  # a device's arrays can't be made read-only
    return not any(other is not None and np.may_share_memory(grad, other) for other in others)


def _add_to_leaf(leaf: Tensor, grad: Any, alone: bool) -> None:
    """Add to ``leaf.grad``, which shares memory with no other array: its owner may write to it."""
    noted = recording.current()
    if noted is not None:
        noted.gradient(leaf)
    if leaf.grad is not None:
        leaf.grad = _sum(leaf.grad, grad, in_place=True)
    else:
        leaf.grad = as_array(grad) if alone else _copied(as_array(grad))


# Sums and copies are NumPy's, or a kernel's that gives the same bits: it can be recorded, and
# works on a large array with every thread, into memory that is there.
_LARGE = 1 << 20  # bytes, as in csrc/core/recycle.h


def _for_kernel(array: Any) -> bool:
    if (noted := recording.current()) is not None:
        noted.runs_on(device_of(array))
        return True
    return type(array) is np.ndarray and array.nbytes >= _LARGE and array.dtype in FLOATS


def _copied(array: Any) -> Any:
    return _sum(array, None, in_place=False) if _for_kernel(array) else array.copy()


def _sum(a: Any, b: Any, in_place: bool) -> Any:
    if not _for_kernel(a):
        if not in_place:
            return a + b
        a += b
        return a
    with running_on(device_of(a), "backward"):
        out = a if in_place else _core.empty_like(a)
        _core.sum(a, b, out)
    return out


def _one(like: Any) -> Any:
    """The gradient of a single number: 1, of its shape. Nobody's to write."""
    key = like.shape, like.dtype, device_of(like)
    if key not in _ONES:
        made = np.ones(like.shape, like.dtype)
        made.flags.writeable = False
        _ONES[key] = moved(made, key[2])
    return _ONES[key]


def _reverse_topological(root: Node) -> list[Node]:
    """Nodes such that each comes before those it read from."""
    order: list[Node] = []
    seen = {root}
    stack: list[tuple[Node, Iterator[Node]]] = [(root, _parents(root))]
    while stack:
        node, parents = stack[-1]
        for parent in parents:
            if parent not in seen:
                seen.add(parent)
                stack.append((parent, _parents(parent)))
                break
        else:
            order.append(node)
            stack.pop()
    order.reverse()
    return order


def _parents(node: Node) -> Iterator[Node]:
    return iter([edge[0] for edge in node.edges.values() if type(edge) is tuple])
