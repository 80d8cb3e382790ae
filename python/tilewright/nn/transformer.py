"""Transformer layers and stacks, with PyTorch's names: a PyTorch state dict loads.

    norm_first=False    x = norm(x + attention(x)),    x = norm(x + feed_forward(x))
    norm_first=True     x = x + attention(norm(x)),    x = x + feed_forward(norm(x))

A sum that a norm follows is made in the norm's kernel, the first product's activation and, where
nothing is dropped, the last sum in the product's. Masks are PyTorch's (True = ignore).

Source: Vaswani et al. 2017; Xiong et al. 2020 for norm_first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.nn import init
from tilewright.nn.attention import MultiheadAttention
from tilewright.nn.container import ModuleList
from tilewright.nn.dropout import Dropout
from tilewright.nn.linear import Linear
from tilewright.nn.module import Module
from tilewright.nn.norm import LayerNorm

_FUSED = ("relu", "gelu", "gelu_tanh", "silu")  # activations of matmul's epilogue


class _Layer(Module):
    """What both layers share: self-attention, the feed-forward part, and how a branch joins."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Any], Any] = "relu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if not (activation in _FUSED if isinstance(activation, str) else callable(activation)):
            raise ValueError(
                f"{type(self).__name__}: activation must be a function or one of "
                f"{', '.join(_FUSED)}, got {activation!r}"
            )
        self.norm_first, self.activation = norm_first, activation
        self.self_attn = MultiheadAttention(d_model, nhead, dropout, bias, batch_first=batch_first)
        self._add_more(d_model, nhead, dropout, bias, batch_first)
        self.linear1 = Linear(d_model, dim_feedforward, bias)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, bias)
        for i in range(1, self._branches + 1):
            self.add_module(f"norm{i}", LayerNorm(d_model, layer_norm_eps, bias=bias))
            self.add_module(f"dropout{i}", Dropout(dropout))

    _branches = 2

    def _add_more(self, *options: Any) -> None:
        """Modules between self-attention and the feed-forward part."""

    def _run(self, x: Any, *attentions: Callable[[Any], Any]) -> Any:
        """Add each branch to x, the feed-forward part last."""
        norms, drops = (
            [getattr(self, f"{kind}{i}") for i in range(1, self._branches + 1)]
            for kind in ("norm", "dropout")
        )
        if not self.norm_first:
            for branch, drop, norm in zip(
                (*attentions, self._feed_forward), drops, norms, strict=True
            ):
                x = norm(drop(branch(x)), residual=x)[0]
            return x
        h = norms[0](x)
        for branch, drop, norm in zip(attentions, drops, norms[1:], strict=False):
            h, x = norm(drop(branch(h)), residual=x)
        if drops[-1].training and drops[-1].p > 0.0:
            return drops[-1](self._feed_forward(h)) + x
        return self._feed_forward(h, residual=x)

    def _feed_forward(self, x: Any, residual: Any = None) -> Any:
        if isinstance(self.activation, str):
            h = self.linear1(x, activation=self.activation)
        else:
            h = self.activation(self.linear1(x))
        return self.linear2(self.dropout(h), residual=residual)


class TransformerEncoderLayer(_Layer):
    """Self-attention and a two-layer perceptron, each beside the residual stream.

    Args:
        d_model: size of the stream.
        nhead: attention heads; divides d_model.
        dim_feedforward: size between the perceptron's layers.
        dropout: probability; of attention weights, inside the perceptron, and of both branches.
        activation: "relu", "gelu", "gelu_tanh" or "silu", which run in the product's kernel, or a
            function.
        layer_norm_eps: of the norms.
        batch_first: inputs are (B, T, C), else (T, B, C).
        norm_first: norms before the branches, not after the sums.
        bias: of products and norms.
    """

    def forward(
        self,
        src: Any,
        src_mask: Any = None,
        src_key_padding_mask: Any = None,
        is_causal: bool = False,
    ) -> Any:
        """Map src (T, B, C) to the same shape; masks as MultiheadAttention's, True = ignore."""

        def attend(x: Any) -> Any:
            return self.self_attn(
                x, x, x, src_key_padding_mask, False, src_mask, is_causal=is_causal
            )[0]

        return self._run(src, attend)


class TransformerDecoderLayer(_Layer):
    """Self-attention, attention to an encoder's output, and a two-layer perceptron.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias: as TransformerEncoderLayer's.
    """

    _branches = 3

    def _add_more(
        self, d_model: int, nhead: int, dropout: float, bias: bool, batch_first: bool
    ) -> None:
        self.multihead_attn = MultiheadAttention(
            d_model, nhead, dropout, bias, batch_first=batch_first
        )

    def forward(
        self,
        tgt: Any,
        memory: Any,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Any:
        """Map tgt (T, B, C) to the same shape, attending to memory (S, B, C)."""

        def attend(x: Any) -> Any:
            return self.self_attn(
                x, x, x, tgt_key_padding_mask, False, tgt_mask, is_causal=tgt_is_causal
            )[0]

        def attend_to_memory(x: Any) -> Any:
            return self.multihead_attn(
                x,
                memory,
                memory,
                memory_key_padding_mask,
                False,
                memory_mask,
                is_causal=memory_is_causal,
            )[0]

        return self._run(tgt, attend, attend_to_memory)


class _Stack(Module):
    """Copies of a layer, which start with its weights; then a norm."""

    def __init__(self, layer: Module, num_layers: int, norm: Module | None) -> None:
        super().__init__()
        self.layers = ModuleList(copy.deepcopy(layer) for _ in range(num_layers))
        self.num_layers, self.norm = num_layers, norm

    def _run(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        for layer in self.layers:
            x = layer(x, *args, **kwargs)
        return x if self.norm is None else self.norm(x)


class TransformerEncoder(_Stack):
    """``num_layers`` copies of an encoder layer, then ``norm`` if there is one.

    The copies start with the same weights, as PyTorch's do.

    Args:
        encoder_layer: what is copied.
        num_layers: how often.
        norm: of the last layer's output, or None.
        enable_nested_tensor: PyTorch's, changes nothing: there are no nested tensors, and rows
            that are padding come out as attention makes them, where PyTorch may return zeros.
        mask_check: PyTorch's, changes nothing: it guards its nested tensors.
    """

    def __init__(
        self,
        encoder_layer: Module,
        num_layers: int,
        norm: Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm)
        self.enable_nested_tensor, self.mask_check = enable_nested_tensor, mask_check

    def forward(
        self,
        src: Any,
        mask: Any = None,
        src_key_padding_mask: Any = None,
        is_causal: bool | None = None,
    ) -> Any:
        """Feed src through every layer."""
        return self._run(src, mask, src_key_padding_mask, bool(is_causal))


class TransformerDecoder(_Stack):
    """``num_layers`` copies of a decoder layer, then ``norm`` if there is one."""

    def __init__(self, decoder_layer: Module, num_layers: int, norm: Module | None = None) -> None:
        super().__init__(decoder_layer, num_layers, norm)

    def forward(
        self,
        tgt: Any,
        memory: Any,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Any:
        """Feed tgt through every layer; each attends to memory."""
        return self._run(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            bool(tgt_is_causal),
            memory_is_causal,
        )


class Transformer(Module):
    """An encoder and a decoder, each with a norm at its end.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias: as TransformerEncoderLayer's.
        num_encoder_layers, num_decoder_layers: of the stacks.
        custom_encoder, custom_decoder: modules in their place.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Any], Any] = "relu",
        custom_encoder: Module | None = None,
        custom_decoder: Module | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        sizes = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps)
        layer: Any = (*sizes, batch_first, norm_first, bias)

        def norm() -> LayerNorm:
            return LayerNorm(d_model, layer_norm_eps, bias=bias)

        self.encoder = custom_encoder or TransformerEncoder(
            TransformerEncoderLayer(*layer), num_encoder_layers, norm()
        )
        self.decoder = custom_decoder or TransformerDecoder(
            TransformerDecoderLayer(*layer), num_decoder_layers, norm()
        )
        self.d_model, self.nhead, self.batch_first = d_model, nhead, batch_first
        for parameter in self.parameters():
            if parameter.ndim > 1:
                init.xavier_uniform_(parameter)

    def forward(
        self,
        src: Any,
        tgt: Any,
        src_mask: Any = None,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        src_key_padding_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Any:
        """Encode src (S, B, C), then map tgt (T, B, C), attending to what was encoded."""
        memory = self.encoder(src, src_mask, src_key_padding_mask, src_is_causal)
        return self.decoder(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal,
            memory_is_causal,
        )

    @staticmethod
    def generate_square_subsequent_mask(sz: int) -> Any:
        """The causal mask (sz, sz) to add: -inf above the diagonal, else 0."""
        return np.triu(np.full((sz, sz), -np.inf, np.float32), 1)
