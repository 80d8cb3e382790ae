"""QuantizedLinear: a Linear whose weight has 8 or 4 bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.device import device_of
from tilewright.nn.linear import Linear
from tilewright.nn.module import Module, tw
from tilewright.quantized import QuantizedArray
from tilewright.runtime import active_isa


class QuantizedLinear(Module):
    """y = activation(x @ weights.T + bias) + residual, weights ~ scale * weight + offset.

    With 8 bits the rows of x are quantized as they come and multiplied in integers; with 4 bits
    the weights are made floats on their way into the product (``tw.qmatmul``'s defaults). The
    gradient passes through to x; the weights are constants.

    Args:
        in_features: last axis of x.
        out_features: last axis of the result.
        bias: add one.
        bits: of a weight: 8 or 4.
        group_size: how many neighbours along in_features share a scale; None: all.
        symmetric: without offsets.

    Attributes:
        weight: (out_features, in_features) int8, uint8 with offsets; 4 bits: two a byte.
        scale: (out_features,) float32, or (out_features, groups).
        offset: like scale, or None.
        bias: (out_features,) float32, or None.
    """

    weight: Any
    scale: Any
    offset: Any
    _float32 = frozenset({"scale", "offset"})  # as a QuantizedArray has them

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self._take(np.zeros((out_features, in_features), np.float32))
        if bias:
            self.register_buffer("bias", np.zeros(out_features, np.float32))
        else:
            self.bias = None
        self._pack: Any = None
        self._packed_for = ""

    @classmethod
    def from_linear(
        cls,
        linear: Linear,
        *,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool = True,
    ) -> QuantizedLinear:
        """Quantize a Linear's weight, each output channel (and group) by its largest element."""
        options: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, **options)
        made._take(linear.weight.data)
        if linear.bias is not None:
            made.bias = linear.bias.data.astype(np.float32)
        return made

    def _take(self, weight: Any) -> None:
        q = tw.quantize(
            weight, bits=self.bits, axis=0, group_size=self.group_size, symmetric=self.symmetric
        )
        self.register_buffer("weight", q.data)
        self.register_buffer("scale", q.scale)
        if q.offset is None:
            self.offset = None
        else:
            self.register_buffer("offset", q.offset)

    def quantized(self) -> QuantizedArray:
        """Return the weights (out_features, in_features)."""
        return QuantizedArray(
            self.weight,
            self.scale,
            0,
            bits=self.bits,
            group_size=self.group_size,
            offset=self.offset,
            shape=(self.out_features, self.in_features),
        )

    def forward(self, x: Any, *, activation: str | None = None, residual: Any = None) -> Any:
        """Map x (..., in_features); residual is shaped like the result (..., out_features)."""
        return tw.qmatmul(
            x, self._packed(), bias=self.bias, activation=activation, residual=residual
        )

    def _packed(self) -> Any:
        if device_of(self.weight) is not None:  # there the kernels read the weights as they are
            return self.quantized().T
        isa = active_isa()
        if self._packed_for != isa:
            self._pack = tw.pack(self.quantized().T)
            self._packed_for = isa
        return self._pack

    def _mode_changed(self) -> None:
        self._packed_for = ""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pack": None, "_packed_for": ""}

    def extra_repr(self) -> str:
        group = "" if self.group_size is None else f" in groups of {self.group_size}"
        kind = f"{'u' * (not self.symmetric)}int{self.bits}{group}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}"


def quantize_linears(module: Module, **options: Any) -> None:
    """Replace every Linear below a module by its QuantizedLinear, made with these options."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is Linear:
                made = QuantizedLinear.from_linear(child, **options)
                setattr(parent, name, made.train(child.training))
