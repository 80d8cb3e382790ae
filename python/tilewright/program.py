"""``tw.compile``: a step's kernel calls, recorded once and replayed by one call.

csrc/ops/program.h has the list and its memory, csrc/python/program.cc what is recorded,
recording.py what a step does in Python.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright import _core, random
from tilewright.autograd import Tensor, grad_enabled, unwrap
from tilewright.device import device_of, is_array, moved, running_on
from tilewright.errors import DtypeError, UnsupportedError
from tilewright.recording import Recording, current

_TRIES = 4  # recordings until two that follow each other must agree
_MOST = 64  # programs of one step: then the oldest goes
_MOST_DRAFTS = 8  # arguments that came once so far: the same


def compile(step: Callable[..., Any]) -> CompiledStep:
    """Record what a step computes, and replay it from its third call on.

    The first two calls with arguments of one shape run the step as it is and record its kernel
    calls. From then on a call replays them: one call into C++, without Python's part of the step,
    without an allocation, with the threads kept awake in between. The bits are the same.

    Args:
        step: a function of arrays, Tensors and plain values (numbers, strings, None) that calls
            tilewright's ops: a forward pass, ``backward``, ``clip_grad_norm_`` and optimizers'
            ``step`` and ``zero_grad`` included. What it returns is arrays, Tensors, None, or
            tuples, lists and dicts of these.

    Returns:
        A callable with the arguments and results of ``step``. Results are fresh arrays each time,
        Tensors among them off the tape. Gradients of parameters are the same arrays each time,
        written anew. A value of an argument that is no array is part of what a program is for: one
        that is another in each call (a rate, a count) is never replayed.

    A replay checks, and records again where something has changed (``tw.stats()`` counts
    ``("program", "record")`` and ``("program", "record again")``):
        - shape, strides and dtype of every array, and the value of every other argument;
        - the array of each Tensor which the step used and whether it requires a gradient, the
          gradients it began with, and whether a module is in training mode;
        - ``tw.options``, ``no_grad``, and which state an optimizer has.

    What it does in Python itself:
        - learning rate and other options of an optimizer are read, its step is counted;
        - ``dropout`` draws its seed;
        - tokens are appended to a ``KVCache``, and attention sees them.

    Everything else in Python is frozen as it was: branches, loops, numbers, attributes, random
    choices, calls of a schedule (refused: call it outside). A program has no place for arithmetic
    on arrays outside of the ops, reading a value (``item``, ``float``, ``numpy``), writing into an
    array by NumPy: that is refused, at the latest by the call that would have been replayed.
    Before the first replay is trusted it is run over the same state as the recorded call, and must
    give the same bits everywhere.

    Arrays may be a device's, all of one step the same one's: a replay launches the step's kernels
    on the current stream and does not wait for them. Replays that differ in nothing but what is in
    the arrays are launched as one CUDA graph.

    One call at a time: a second thread gets a RuntimeError meanwhile. Inside another compiled step
    the step is simply part of it.

    Raises:
        UnsupportedError: the step does what a program can't; the message says what, and where.
            DtypeError: an argument or a result of another kind. RuntimeError: see above.

    Example:
        >>> w = tensor(np.ones((2, 2)), dtype=np.float32, requires_grad=True)
        >>> sgd = optim.SGD([w], lr=0.5)
        >>> @compile
        ... def train(x, y):
        ...     sgd.zero_grad()
        ...     loss = mse(x @ w, y)
        ...     loss.backward()
        ...     sgd.step()
        ...     return loss
        >>> x, y = np.eye(2, dtype=np.float32), np.zeros((2, 2), np.float32)
        >>> [round(float(train(x, y)), 3) for _ in range(4)]
        [1.0, 0.562, 0.316, 0.178]
    """
    return CompiledStep(step)


class CompiledStep:
    """What ``tw.compile`` returns."""

    def __init__(self, step: Callable[..., Any]) -> None:
        functools.update_wrapper(self, step)
        self._step = step
        self._programs: dict[Any, _Program] = {}
        self._drafts: dict[Any, tuple[_Recorded, int]] = {}
        self._free = threading.Lock()
        _steps.add(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replay the step, or record it."""
        if current() is not None:
            return self._step(*args, **kwargs)
        if not self._free.acquire(blocking=False):
            raise RuntimeError(
                f"compile: {self!r} is being called by another thread, or by itself; a program "
                "runs once at a time"
            )
        try:
            given = _Arguments(args, kwargs)
            program = self._programs.get(given.key)
            if program is not None:
                numbers = program.prepare()
                if numbers is not None:
                    return program.replay(given, numbers)
                del self._programs[given.key]
            return self._record(given, again=program is not None)
        finally:
            self._free.release()

    def __repr__(self) -> str:
        return f"<compiled {getattr(self._step, '__qualname__', self._step)!s}>"

    def _record(self, given: _Arguments, again: bool) -> Any:
        """Run the step and record it; once two recordings agree, make the program."""
        _core.count_recording(again)
        draft, tries = self._drafts.pop(given.key, (None, 0))
        before = [(a, _bits(a)) for a in draft.kept()] if draft is not None else []
        recorded = _Recorded(self._step, given)
        if draft is not None:
            why = recorded.difference(draft)
            if not why:
                _put(self._programs, given.key, _Program(recorded, before), _MOST)
                return recorded.answer()
            if tries + 1 >= _TRIES:
                raise UnsupportedError(f"compile: {self!r} can't be replayed: {why}")
        _put(self._drafts, given.key, (recorded, tries + 1), _MOST_DRAFTS)
        return recorded.answer()


def _put(kept: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Keep a value, of ``most`` in all: the oldest make room."""
    while len(kept) >= most:
        del kept[next(iter(kept))]
    kept[key] = value


# A child of fork() has none of the threads that were calling.
_steps: weakref.WeakSet[CompiledStep] = weakref.WeakSet()


def _free_all() -> None:
    for step in list(_steps):
        step._free = threading.Lock()


os.register_at_fork(after_in_child=_free_all)


def _is_static(value: Any) -> bool:
    """Whether an argument belongs to the key as it is."""
    if type(value) is tuple:
        return all(_is_static(v) for v in value)
    return type(value) in _PLAIN or isinstance(value, np.dtype | type)


_PLAIN = frozenset({bool, int, float, str, type(None)})


class _Arguments:
    """What a step is called with: its arrays, and a key of everything that a program relies on."""

    __slots__ = ("args", "arrays", "key", "kwargs")

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.arrays: list[Any] = []
        found = [self._read(value) for value in args]
        if kwargs:
            found += [(name, self._read(value)) for name, value in kwargs.items()]
        self.key = (*found, grad_enabled(), _core.options_key())

    def _read(self, value: Any) -> Any:
        kind = type(value)
        if _is_static(value):
            return kind, value
        array = value.data if kind is Tensor else unwrap(value, "compile: an argument")
        device = device_of(array)
        if type(array) is not np.ndarray and device is None:
            raise DtypeError(
                "compile: an argument must be an array, a Tensor, a number, a string, a dtype, "
                "None or a tuple of such values, "
                f"got {kind.__name__}"
            )
        if kind is Tensor and value.requires_grad:
            raise UnsupportedError(
                "compile: an argument must not require a gradient: what does belongs to the step, "
                "as a parameter does"
            )
        if device is not None:
            self.arrays.append(array if array.flags.c_contiguous else array.copy())
            return kind, array.shape, array.dtype, device
        flags = array.flags
        if not (flags.c_contiguous or flags.f_contiguous) or not flags.aligned:
            array = np.ascontiguousarray(array)
            flags = array.flags
        self.arrays.append(array)
        return kind, array.shape, array.strides, array.dtype, flags.writeable

    def private(self) -> tuple[list[Any], tuple[Any, ...], dict[str, Any]]:
        """Copies of the arrays, which share memory with nothing, and the arguments with them."""
        copies = []
        for array in self.arrays:
            copy = moved(_bits(array), device_of(array))
            if type(array) is np.ndarray:
                copy.flags.writeable = array.flags.writeable
            copies.append(copy)
        left = iter(copies)

        def put(value: Any) -> Any:
            if _is_static(value):
                return value
            return Tensor(next(left)) if type(value) is Tensor else next(left)

        args = tuple(put(value) for value in self.args)
        return copies, args, {name: put(value) for name, value in self.kwargs.items()}


class _Recorded:
    """A step that was run once, and what it did."""

    def __init__(self, step: Callable[..., Any], given: _Arguments) -> None:
        self.originals = [_bits(array) for array in given.arrays]
        self.inputs, args, kwargs = given.private()
        self.given = [value for value in (*args, *kwargs.values()) if not _is_static(value)]
        self.recording = Recording(_core.Program(self.inputs))
        with self.recording:
            self.result = step(*args, **kwargs)
        self.gradients = [g for *_, g in self.recording.gradients() if g is not None]
        _check_result(self.result)
        for array, copy in zip(given.arrays, self.inputs, strict=True):
            written = type(array) is not np.ndarray or array.flags.writeable
            if written and not _same(array, copy):
                _write(array, _bits(copy))

    def difference(self, draft: _Recorded) -> str:
        """In words, what a replay would not do as this call did; nothing where it would."""
        why: str = self.recording.core.difference(draft.recording.core)
        if why:
            return why
        captured = [id(array) for array in self.recording.core.captured()]
        mine, other = _leaves(self.result), _leaves(draft.result)
        if len(mine) != len(other):
            return "it returns another structure each time"
        for a, b in zip(mine, other, strict=True):
            array = unwrap(a)
            if not is_array(array):
                if a != b:
                    return f"it returns {a!r}, and returned {b!r} in the call before"
            elif any(array is given for given in self.inputs):
                continue
            elif self.recording.core.locate(array) >= 0:
                return "it returns a view of an argument"
            elif self._is_elsewhere(array) and not (array is unwrap(b) and id(array) in captured):
                return "it returns an array that is made outside of the registry's ops"
        known = [id(array) for array in draft.gradients]
        for gradient in self.gradients:
            if self._is_elsewhere(gradient) and id(gradient) not in known:
                return (
                    "the gradient of a parameter is made outside of the registry's ops (a sum over "
                    "axes that were broadcast, or a conversion, which NumPy does)"
                )
        return ""

    def _is_elsewhere(self, array: Any) -> bool:
        """Whether it is neither in memory that the step made nor an argument."""
        return bool(self.recording.core.locate(array) == _ELSEWHERE)

    def kept(self) -> list[Any]:
        """The arrays that were there before the call, as far as it is known to use them."""
        gradients = [g for g in self.gradients if self._is_elsewhere(g)]
        return [*self.recording.core.captured(), *gradients]

    def answer(self) -> Any:
        """The result, in memory of its own."""
        return _mapped(self.result, _fresh)


_ELSEWHERE = -2  # what Program.locate says of memory that the step did not make


class _Program:
    """The replay of a step for arguments of one kind."""

    def __init__(self, recorded: _Recorded, before: list[tuple[Any, Any]]) -> None:
        recording = recorded.recording
        self._core = recording.core
        self._device = recording.device
        self._stream = self._device and self._device.stream()
        self._tensors = [(t, a, t.requires_grad) for t, a, _ in recording.tensors()]
        self._versions = [(t, v) for t, _, v in recording.tensors() if v is not None]
        self._modules = recording.modules()
        self._gradients = recording.gradients()
        self._varying = recording.varying
        self._draws = recording.draws
        self._effects = [*recording.effects]
        self._effects += [(after, t.mark_written) for after, t in recording.written()]
        self._result = _mapped(recorded.result, functools.partial(_slot, recorded.given))
        with running_on(self._device, "compile"):
            self._core.finish()
            _prove(self._core, recorded, before)

    def prepare(self) -> list[list[float]] | None:
        """The numbers of the next replay, or None where it would not be what the step does."""
        if self._device and self._device.stream() != self._stream:
            return None  # one arena: what is still running on the other would meet this run
        for tensor, array, differentiated in self._tensors:
            if tensor.data is not array or tensor.requires_grad is not differentiated:
                return None
        for tensor, version in self._versions:
            if tensor._version != version:
                return None
        for module, training in self._modules:
            if module.training is not training:
                return None
        for leaf, before, _ in self._gradients:
            if before and leaf.grad is not before[0]:
                return None
        try:
            return [numbers() for _, numbers in self._varying]
        except Stale:
            return None

    def replay(self, given: _Arguments, numbers: list[list[float]]) -> Any:
        """Run the program on these arguments."""
        core = self._core
        for (index, _), values in zip(self._varying, numbers, strict=True):
            core.assign(index, values)
        if self._draws:
            core.reseed([random.fresh_seed() for _ in range(self._draws)])
        done = -1
        try:
            with running_on(self._device, "compile"):
                core.run(given.arrays)
            done = core.size
        finally:
            done = core.done if done < 0 else done
            for after, effect in self._effects:
                if after <= done:
                    effect()
        for leaf, _, grad in self._gradients:
            leaf.grad = grad
        return _mapped(self._result, lambda slot: slot.value(given))


class Stale(Exception):
    """A program relies on what has changed."""


def _prove(core: Any, recorded: _Recorded, before: list[tuple[Any, Any]]) -> None:
    """Replay the recorded call over the state that it began with: the bits must be the same.

    What the step does to arrays by other means than kernel calls shows here.
    """
    arrays = [*recorded.kept(), *core.escaping(), *recorded.inputs]
    after = [(array, _bits(array)) for array in arrays]
    for array, old in (*before, *zip(recorded.inputs, recorded.originals, strict=True)):
        if not _same(array, old):
            _write(array, old)
    for cache, tokens in recorded.recording.caches:
        cache.truncate(tokens)
    core.poison()
    for array in (core.gpu_arena, *core.escaping()):
        if device_of(array) is not None:
            _write(array, _poison(array))
    core.prove(recorded.inputs)
    wrong = [array for array, want in after if not _same(array, want)]
    for array, want in after if wrong else ():
        _write(array, want)
    if wrong:
        shapes = ", ".join(f"{a.dtype} {a.shape}" for a in wrong[:4])
        raise UnsupportedError(
            "compile: the step writes to arrays by other means than tilewright's ops (NumPy's "
            f"arithmetic in place?): a replay gives other bits in {shapes}"
        )


def _bits(array: Any) -> Any:
    """A copy in the CPU's memory."""
    device = device_of(array)
    return array.copy("K") if device is None else device.get(array)


def _poison(like: Any) -> Any:
    return np.full(like.nbytes, 0xFF, np.uint8).view(like.dtype).reshape(like.shape)


def _write(array: Any, values: Any) -> None:
    array[...] = moved(values, device_of(array))


def _same(a: Any, b: Any) -> bool:
    return bool(moved(a, None).tobytes() == moved(b, None).tobytes())


# Results --------------------------------------------------------------------------------------


class _Slot:
    """A leaf of a step's result."""

    __slots__ = ("argument", "constant", "leaf")

    def __init__(self, leaf: Any, argument: int, constant: bool) -> None:
        self.leaf, self.argument, self.constant = leaf, argument, constant

    def value(self, given: _Arguments) -> Any:
        if self.argument >= 0:
            values = (*given.args, *given.kwargs.values())
            return [v for v in values if not _is_static(v)][self.argument]
        return self.leaf if self.constant else _fresh(self.leaf)


def _slot(given: list[Any], leaf: Any) -> _Slot:
    for i, value in enumerate(given):
        if leaf is value or unwrap(leaf) is unwrap(value):
            return _Slot(None, i, False)
    if type(leaf) is Tensor:
        leaf = Tensor(leaf.data)  # without the tape
    return _Slot(leaf, -1, not is_array(unwrap(leaf)))


def _fresh(leaf: Any) -> Any:
    if type(leaf) is Tensor:
        return Tensor(leaf.data.copy())
    return leaf.copy() if is_array(leaf) else leaf


def _mapped(value: Any, f: Callable[[Any], Any]) -> Any:
    """A structure with f of each leaf."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind(_mapped(v, f) for v in value)
    if kind is dict:
        return {name: _mapped(v, f) for name, v in value.items()}
    return f(value)


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    _mapped(value, found.append)
    return found


def _check_result(result: Any) -> None:
    for leaf in _leaves(result):
        if isinstance(leaf, float | np.generic):
            raise UnsupportedError(
                "compile: the step returns a number that was read from an array; return the array"
            )
        if not (isinstance(leaf, Tensor | bool | int | str | None) or is_array(leaf)):
            raise DtypeError(
                "compile: a step returns arrays, Tensors, None, or tuples, lists and dicts of "
                f"these, got {type(leaf).__name__}"
            )
        node = leaf._node if type(leaf) is Tensor else None
        if node is not None and node.ctx is not None:
            raise UnsupportedError(
                "compile: the step returns a Tensor that can still be differentiated; call "
                "backward() in the step, or let it run under no_grad()"
            )
