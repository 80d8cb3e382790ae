"""Gradient clipping: all gradients at once, in place."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from tilewright import _core
from tilewright.autograd import Tensor
from tilewright.device import Device, device_of, running_on
from tilewright.recording import Recording, current, refuse


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> float:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)).

    Args:
        parameters: Tensors, those without a gradient included.
        max_norm: the largest norm that is left alone.
        norm_type: p of the norm (sum |g|^p)^(1/p) of all gradients as one vector; may be inf.
        error_if_nonfinite: raise where the norm is NaN or infinite.

    Returns:
        The norm before; where it is not finite, so are the gradients after. This waits for the
        device of gradients that are on one. In a step of ``tw.compile`` it is an array without
        axes, to be returned by the step and read outside.

    Raises:
        RuntimeError: the norm is not finite, and ``error_if_nonfinite``.
    """
    grads = _gradients(parameters)
    if (noted := current()) is not None:
        options = (max_norm, norm_type, error_if_nonfinite)
        return _recorded(noted, parameters, grads, *options)  # type: ignore[no-any-return]
    norm = _norm(grads, float(norm_type))
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(f"clip_grad_norm_: the {norm_type}-norm of the gradients is {norm}")
    scale = max_norm / (norm + 1e-6)
    if not scale >= 1.0:
        for device, some in _by_device(grads).items():
            with running_on(device, "clip_grad_norm_"):
                _core.scale_tensors(some, scale)
    return norm


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """Bring every element of every gradient into [-clip_value, clip_value]; NaN stays NaN."""
    if not clip_value >= 0.0:
        raise ValueError(f"clip_grad_value_: clip_value must be at least 0, got {clip_value}")
    refuse("clip_grad_value_", "call it outside of the step, or use clip_grad_norm_")
    for grad in _gradients(parameters):
        limit = grad.dtype.type(clip_value)
        np.minimum(np.maximum(grad, -limit, out=grad), limit, out=grad)


def _recorded(
    noted: Recording,
    parameters: Tensor | Iterable[Tensor],
    grads: list[Any],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
) -> Any:
    """clip_grad_norm_ as one kernel call, whose norm is an array that Python need not read."""
    devices = [*_by_device(grads)]
    if norm_type != 2.0 or error_if_nonfinite or len(devices) > 1:
        refuse(
            "clip_grad_norm_ with another norm than 2, error_if_nonfinite or several devices",
            "call it outside of the step",
        )
    for p in [parameters] if isinstance(parameters, Tensor) else parameters:
        noted.gradient(p)
    for device in devices:
        noted.runs_on(device)
    with running_on(devices[0] if devices else None, "clip_grad_norm_"):
        norm = _core.empty((), np.float64)
        _core.clip_norm(grads, max_norm, norm)
    return norm


def _gradients(parameters: Tensor | Iterable[Tensor]) -> list[Any]:
    given = [parameters] if isinstance(parameters, Tensor) else parameters
    return [p.grad for p in given if p.grad is not None]


def _by_device(grads: list[Any]) -> dict[Device | None, list[Any]]:
    found: dict[Device | None, list[Any]] = {}
    for grad in grads:
        found.setdefault(device_of(grad), []).append(grad)
    return found


def _norm(grads: list[Any], p: float) -> float:
    if p == 2.0:
        total = 0.0
        for device, some in _by_device(grads).items():
            with running_on(device, "clip_grad_norm_"):
                total += _core.sum_squares(some)
        return math.sqrt(total)
    sizes = [np.abs(g.astype(np.float64)) for g in grads if g.size]
    if p == math.inf:
        return float(np.max([float(size.max()) for size in sizes], initial=0.0))
    if not p > 0.0:
        raise ValueError(f"clip_grad_norm_: norm_type must be above 0, got {p}")
    return float(sum(float((size**p).sum()) for size in sizes) ** (1.0 / p))
