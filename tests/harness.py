"""What the generic tests share: every case of every registered op, references, comparisons."""

from __future__ import annotations

import functools
import inspect
import zlib

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw  # (fills the registry)
import tolerance
from tilewright import _core
from tilewright.registry import OPS

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# Whose dtypes the result has, float32 where they differ; of other ops the first input.
DECIDES = {"matmul": ("a", "b")}
DECIDES |= dict.fromkeys(("attention", "attention_varlen"), ("q", "k", "v"))
LOSSES = ("cross_entropy", "mse")  # float32 whatever goes in
TOGETHER = {"layernorm": ("x", "residual"), "rmsnorm": ("x", "residual")}  # their sum is rounded
SUPPORTED_ISAS = [name for name, _, supported, _ in _core.isa_levels() if supported]
SKIPPED_ISAS = [name for name, _, supported, _ in _core.isa_levels() if not supported]

# Whether `amx` is the level on emulated tiles (a build for tests).
EMULATES_AMX = "TILEWRIGHT_EMULATE_AMX" in _core.build_info()["flags"]

seed = 0  # set by conftest from --seed
worst: dict[str, tuple[float, str]] = {}  # op, dtype -> largest error / bound seen, and where


def all_cases(*, differentiable=False):
    """(op name, case) of the whole registry, as pytest parameters."""
    return [
        pytest.param(op.name, case, id=f"{op.name}[{case}]")
        for op in OPS.values()
        if not differentiable or (op.backward is not None and op.grads)
        for case in op.cases
        if not (differentiable and is_straight_through(op, case))
    ]


def typed_cases(*, differentiable=False, float16=1):
    """(op name, case, dtype): float16 with one case in ``float16`` of each op.

    It runs through the kernels of bfloat16 and differs from it in how a number is read and written,
    which the other cases of test_forward.py cover.
    """
    found = []
    for op in OPS.values():
        cases = [p for p in all_cases(differentiable=differentiable) if p.values[0] == op.name]
        for index, case in enumerate(cases):
            for name, dtype in DTYPES.items():
                if name != "float16" or index % float16 == 0:
                    found.append(pytest.param(*case.values, dtype, id=f"{case.id}-{name}"))
    return found


def is_straight_through(op, case):
    """Whether the reference rounds: its differences are not the gradient that is promised."""
    test = getattr(op.definition, "straight_through", None)
    return test is not None and test(case)


def rng_for(*key):
    """A generator that depends on --seed and the key alone, so that a failure can be repeated."""
    return np.random.default_rng([seed, zlib.crc32(repr(key).encode())])


def is_float(value):
    return isinstance(value, np.ndarray) and value.dtype in tolerance.UNIT_ROUNDOFF


def promoted(op, arguments):
    """The dtype that the result must have, where no out_dtype overrides it."""
    names = () if op.name in LOSSES else DECIDES.get(op.name, op.grads[:1])
    dtypes = {arguments[n].dtype for n in names if is_float(arguments.get(n))}
    return dtypes.pop() if len(dtypes) == 1 else DTYPES["float32"]


def to_float64(value):
    """The same value exactly, for the reference: float arrays become float64, all else stays."""
    if is_float(value):
        return value.astype(np.float64)
    if isinstance(value, (tuple, list)):
        return type(value)(to_float64(v) for v in value)
    return value


def as_tuple(result):
    """Outputs as a tuple, also a QuantizedArray's; a Reference is a tuple and counts as one."""
    if type(result) is tw.QuantizedArray:
        return tuple(p for p in (result.data, result.scale, result.offset) if p is not None)
    return result if type(result) in (tuple, list) else (result,)


def as_out(arrays, like):
    """``out`` of these arrays for an op whose result is ``like``."""
    if type(like) is tw.QuantizedArray:
        data, scale, *offset = arrays
        options = {n: getattr(like, n) for n in ("axis", "bits", "group_size", "shape", "along")}
        return tw.QuantizedArray(data, scale, offset=offset[0] if offset else None, **options)
    return tuple(arrays) if type(like) is tuple else arrays[0]


signature = functools.cache(inspect.signature)


def bind(op, args, kwargs):
    """Argument values by name, in the op's order."""
    return dict(signature(op).bind(*args, **kwargs).arguments)


@functools.cache
def keyword_only(function):
    """The names of a function's parameters that are no positional ones."""
    parameters = signature(function).parameters
    return frozenset(n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY)


def call(op, arguments):
    """Call an op with the arguments of ``bind``."""
    named = keyword_only(op)
    args = [v for n, v in arguments.items() if n not in named]
    return op(*args, **{n: v for n, v in arguments.items() if n in named})


@functools.cache
def inputs(name, case, dtype):
    """The arguments of a case by name; read-only, since no op may write to its inputs."""
    op = OPS[name]
    args, kwargs = op.make(case, rng_for(name, case, str(dtype)), dtype)
    arguments = bind(op, args, kwargs)
    for value in arguments.values():
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    return arguments


def evaluate(name, arguments):
    """The references of an op's outputs for these arguments."""
    exact = {n: to_float64(v) for n, v in arguments.items() if n != "out"}
    definition = OPS[name].reference
    positional = signature(definition).parameters.keys() - keyword_only(definition)
    args = [v for n, v in exact.items() if n in positional]
    named = {n: v for n, v in exact.items() if n not in positional}
    with np.errstate(all="ignore"):
        return as_tuple(definition(*args, **named))


@functools.cache
def reference(name, case, dtype):
    """The references of a case's outputs; the same for every ISA level, hence computed once."""
    return evaluate(name, inputs(name, case, dtype))


def check(name, got, references, where):
    """Compare each output with its reference; the worst ratio goes into the closing table."""
    outputs = as_tuple(got)
    assert len(outputs) == len(references), (
        f"{name}: {len(outputs)} outputs, {len(references)} references"
    )
    for index, (out, ref) in enumerate(zip(outputs, references, strict=True)):
        check_output(name, out, ref, f"{where} output={index}" if len(outputs) > 1 else where)


def check_output(name, got, ref, where, allowed=None):
    want = np.asarray(ref.value)
    got = np.asarray(got)
    assert got.shape == want.shape, f"{name} {where}: shape {got.shape}, reference {want.shape}"
    if got.dtype not in tolerance.UNIT_ROUNDOFF:  # integers (and masks) are exact
        np.testing.assert_array_equal(got, want, err_msg=f"{name} {where} seed={seed}")
        return
    allowed = tolerance.bound(ref, got.dtype) if allowed is None else allowed
    assert_within(f"{name} {got.dtype}", got.astype(np.float64), want, allowed, where)


def assert_within(name, got, want, allowed, where):
    """|got - want| <= allowed everywhere; NaN and infinities just where the reference has them."""
    if want.size == 0:
        return
    with np.errstate(all="ignore"):
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        error = np.where(same, 0.0, np.abs(got - want))
        ratio = np.where(same, 0.0, error / np.broadcast_to(allowed, want.shape))
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    at = np.unravel_index(np.argmax(ratio), want.shape)
    if ratio[at] >= worst.get(name, (-1.0, ""))[0]:
        worst[name] = (float(ratio[at]), where)
    if ratio[at] <= 1.0:
        return
    limit = float(np.broadcast_to(allowed, want.shape)[at])
    pytest.fail(
        f"{name} {where} seed={seed}: {int((ratio > 1.0).sum())} of {want.size} elements "
        f"are out of bounds; worst at {tuple(int(i) for i in at)}: got {got[at]}, "
        f"want {want[at]}, error {error[at]:.3g}, bound {limit:.3g}, ratio {ratio[at]:.3g}",
        pytrace=False,
    )


def same_bits(a, b):
    """Bitwise equality, NaN payloads included."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def close(got, want, tolerance=1e-5):
    """For layers, whose parts the registry's tests hold to their bounds: close in float32."""
    want = np.asarray(want, np.float64)
    scale = max(1.0, float(np.abs(want[np.isfinite(want)]).max(initial=0.0)))
    got = np.asarray(got).astype(np.float64)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale)


def agrees(run, definition, *arrays, tolerance=1e-5, directions=3):
    """A layer's values, and its gradients along random directions, against float64 NumPy.

    ``run`` takes Tensors of the arrays, ``definition`` the arrays as float64.
    """
    rng = rng_for("agrees", [x.shape for x in arrays])
    tensors = [tw.tensor(x, requires_grad=True) for x in arrays]
    exact = [x.astype(np.float64) for x in arrays]
    y = run(*tensors)
    want = np.asarray(definition(*exact))
    assert y.shape == want.shape
    close(y.numpy(), want, tolerance)
    dy = rng.standard_normal(y.shape).astype(np.float32)
    y.backward(dy)
    for i, tensor in enumerate(tensors):
        assert tensor.grad.shape == tensor.shape
        for _ in range(directions):
            d = rng.standard_normal(tensor.shape)
            step = 2.0**-17
            above, below = (
                definition(*[x + s * step * d if j == i else x for j, x in enumerate(exact)])
                for s in (1, -1)
            )
            slopes = dy * (above - below) / (2 * step)
            scale = max(1.0, float(np.abs(slopes).sum()), float(np.abs(tensor.grad * d).sum()))
            found = float((tensor.grad.astype(np.float64) * d).sum())
            assert abs(found - slopes.sum()) <= 2 * tolerance * scale, f"gradient of input {i}"
