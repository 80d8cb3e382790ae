"""Linear."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tilewright.autograd import Tensor
from tilewright.nn import init
from tilewright.nn.module import Module, Parameter, tw
from tilewright.nn.pack import TransposedWeight


class Linear(Module):
    """y = activation(x @ weight.T + bias) + residual, in one kernel.

    In eval mode under ``no_grad`` the weight is packed once for the kernel and the pack is used
    until the weight changes (through a Tensor's methods, an optimizer or ``load_state_dict``; after
    writing to ``weight.data`` by hand, call ``weight.mark_written()``).

    Attributes:
        weight: (out_features, in_features), uniform within 1 / sqrt(in_features) at first.
        bias: (out_features,), likewise, or None.
        prefer: of the pack, as ``tw.pack`` has it: "latency" for models that generate a token at a
            time.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = init.kaiming_uniform_(_empty(out_features, in_features), a=math.sqrt(5.0))
        self.bias = None
        if bias:
            bound = 1.0 / math.sqrt(max(1, in_features))
            self.bias = init.uniform_(_empty(out_features), -bound, bound)
        self.prefer = "throughput"
        self._pack = TransposedWeight()

    def forward(self, x: Any, *, activation: str | None = None, residual: Any = None) -> Any:
        """Map x (..., in_features); residual is shaped like the result (..., out_features)."""
        right = self._pack.of(self.weight, self.training, self.prefer)
        return tw.matmul(x, right, bias=self.bias, activation=activation, residual=residual)

    def _mode_changed(self) -> None:
        self._pack.clear()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def _empty(*shape: int) -> Tensor:
    return Parameter(np.empty(shape, np.float32))
