"""Attention over one fused projection, and MultiheadAttention."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright import _core, random
from tilewright.autograd import Tensor, unwrap
from tilewright.device import as_array, device_of, moved
from tilewright.errors import ShapeError, UnsupportedError
from tilewright.nn import init
from tilewright.nn.linear import Linear
from tilewright.nn.module import Module, Parameter, tw
from tilewright.nn.pack import TransposedWeight
from tilewright.registry import Context, converted, rule


def split_heads(packed: Any, count: int, heads: int) -> tuple[Any, ...]:
    """(B, T, count * C) -> count views (B, heads, T, C / heads)."""
    B, T, width = packed.shape
    views = packed.reshape(B, T, count, heads, width // (count * heads))
    return tuple(views.transpose(2, 0, 3, 1, 4))


class _SelfAttention:
    """Attention of q, k, v that lie side by side in one array.

        qkv (B, T, 3 * C) -> y (B, T, C)            heads are views of both: nothing is copied

    The gradients of q, k and v are written side by side as well, where the product that made qkv
    reads them as one matrix.
    """

    @staticmethod
    def forward(
        ctx: Context,
        qkv: Any,
        heads: int,
        *,
        causal: bool = False,
        mask: Any = None,
        prefer: str = "throughput",
    ) -> Any:
        latency = prefer == "latency"
        B, T, width = qkv.shape
        q, k, v = split_heads(qkv, 3, heads)
        scale = float(q.shape[-1]) ** -0.5
        # The backward pass reads the result before it is rounded to 16 bits.
        y = _core.empty((B, T, width // 3), np.float32 if ctx.needs else qkv.dtype)
        out = split_heads(y, 1, heads)[0]
        lse = _core.empty((B, heads, T), np.float32) if ctx.needs else None
        _core.attention_forward(q, k, v, mask, None, causal, scale, out, lse, latency=latency)
        ctx.save(qkv, heads, causal, mask, scale, y, lse, latency)
        return converted(y, qkv.dtype)

    @staticmethod
    def backward(ctx: Context, dy: Any) -> Any:
        qkv, heads, causal, mask, scale, y, lse, latency = ctx.saved
        dqkv = _core.empty(qkv.shape, qkv.dtype)
        q, k, v = split_heads(qkv, 3, heads)
        dq, dk, dv = split_heads(dqkv, 3, heads)
        out, dout = split_heads(y, 1, heads)[0], split_heads(dy, 1, heads)[0]
        given = (q, k, v, mask, None, causal, scale, out, lse)
        _core.attention_backward(*given, dout, None, dq, dk, dv, latency=latency)
        return dqkv


self_attention: Any = rule(grads=("qkv",))(_SelfAttention)


class MultiheadAttention(Module):
    """Attention with several heads between projections.

        y = softmax(q @ k^T / sqrt(D)) @ v      for each head of size D,
        then out_proj of all heads                 D = embed_dim / num_heads

    Masks are PyTorch's: True = ignore, the opposite of ``tw.attention``'s. A query that may see no
    key gets attention 0 (hence out_proj's bias), weights 0 and gradients 0; PyTorch gives it NaN
    where it returns weights. ``is_causal`` is a mask of its own here; PyTorch's is a hint that
    attn_mask is causal.

    Without weights to return one kernel computes the attention: memory is linear in the sequence
    lengths. Otherwise the weights (B, num_heads, L, S) exist for a while.

    Args:
        embed_dim: E, of queries and of the result.
        num_heads: divides embed_dim.
        dropout: probability of dropping a weight, in training.
        bias: of the projections.
        add_bias_kv: one more key and value, learned (bias_k, bias_v).
        add_zero_attn: one more key and value of zeros.
        kdim, vdim: sizes of keys and values, by default embed_dim.
        batch_first: inputs are (B, T, E), else (T, B, E).

    Attributes:
        in_proj_weight: (3 * E, E), of q, k and v in this order; None where kdim or vdim is another
            than E. Then there are q_proj_weight (E, E), k_proj_weight (E, kdim) and v_proj_weight
            (E, vdim).
        in_proj_bias: (3 * E,), or None.
        out_proj: Linear.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ShapeError(
                f"MultiheadAttention: embed_dim must be a multiple of num_heads, "
                f"got {embed_dim} and {num_heads}"
            )
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"MultiheadAttention: dropout must be in [0, 1], got {dropout}")
        E = embed_dim
        self.embed_dim, self.num_heads, self.dropout = E, num_heads, dropout
        self.kdim, self.vdim = kdim or E, vdim or E
        self.add_zero_attn, self.batch_first = add_zero_attn, batch_first
        self.in_proj_weight = None
        if self.kdim == self.vdim == E:
            self.in_proj_weight = init.xavier_uniform_(_empty(3 * E, E))
        else:
            self.q_proj_weight = init.xavier_uniform_(_empty(E, E))
            self.k_proj_weight = init.xavier_uniform_(_empty(E, self.kdim))
            self.v_proj_weight = init.xavier_uniform_(_empty(E, self.vdim))
        self.in_proj_bias = Parameter(np.zeros(3 * E, np.float32)) if bias else None
        self.out_proj = Linear(E, E, bias)
        if self.out_proj.bias is not None:
            init.constant_(self.out_proj.bias, 0.0)
        self.bias_k = init.xavier_normal_(_empty(1, 1, E)) if add_bias_kv else None
        self.bias_v = init.xavier_normal_(_empty(1, 1, E)) if add_bias_kv else None
        self._packs = tuple(TransposedWeight() for _ in range(4))  # of q, k, v, and all of them

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Any, Any]:
        """Attend from query to key and value.

        Args:
            query: (L, B, E); (B, L, E) with batch_first; or (L, E).
            key: (S, B, kdim), (B, S, kdim) or (S, kdim).
            value: (S, B, vdim), (B, S, vdim) or (S, vdim).
            key_padding_mask: (B, S) or (S,), bool (True = ignore) or added to the scores.
            need_weights: also return the attention weights; slower.
            attn_mask: (L, S), (1, L, S) or (B * num_heads, L, S), bool (True = ignore) or added to
                the scores.
            average_attn_weights: over the heads.
            is_causal: a query sees the keys up to its own position; needs L = S.

        Returns:
            (y like query, weights), weights None, (B, L, S) or (B, num_heads, L, S), without B
            for inputs without it.
        """
        single = query.ndim == 2
        q = self._batch_first("query", query, self.embed_dim, single)
        k, v = q, q  # the same object where it is the same input: one product projects it
        if key is not query or self.kdim != self.embed_dim:
            k = self._batch_first("key", key, self.kdim, single)
        if value is not query or self.vdim != self.embed_dim:
            v = self._batch_first("value", value, self.vdim, single)
        B, L, S = len(q), q.shape[1], k.shape[1]
        if len({B, len(k), len(v)}) > 1 or v.shape[1] != S:
            raise ShapeError(
                f"MultiheadAttention: query, key and value must be of one batch, key and value of "
                f"one length, got {query.shape}, {key.shape} and {value.shape}"
            )
        if is_causal and L != S:
            raise UnsupportedError(
                f"MultiheadAttention: is_causal needs as many queries as keys, got {L} and {S}"
            )
        more = (self.bias_k is not None) + self.add_zero_attn
        masks = _ignored(attn_mask, key_padding_mask, (B, self.num_heads, L, S), single)
        if is_causal and more:  # the added keys come after the last position, for all to see
            masks.append(np.triu(np.ones((1, 1, L, S), np.bool_), 1))
            is_causal = False
        mask = _kernel_mask([moved(m, device_of(q.data)) for m in masks], more)
        drops = self.training and self.dropout > 0.0
        weights = None
        if q is k is v and not (more or drops or need_weights) and self.in_proj_weight is not None:
            packed = self._packs[3].of(self.in_proj_weight, self.training)
            qkv = tw.matmul(q, packed, bias=self.in_proj_bias)
            y = self_attention(qkv, self.num_heads, causal=is_causal, mask=mask)
        else:
            heads = self._projected(q, k, v)
            y, weights = self._attend(heads, mask, is_causal, drops, need_weights)
            y = y.transpose(1, 2).reshape(B, L, self.embed_dim)
        y = self.out_proj(y)
        if weights is not None and average_attn_weights:
            weights = weights.mean(axis=1)
        if single:
            return y[0], None if weights is None else weights[0]
        return y if self.batch_first else y.transpose(0, 1), weights

    def _batch_first(self, name: str, x: Any, size: int, single: bool) -> Any:
        """An input as a Tensor (B, T, C)."""
        x = x if isinstance(x, Tensor) else Tensor(as_array(x))
        if x.ndim != (2 if single else 3) or x.shape[-1] != size:
            raise ShapeError(
                f"MultiheadAttention: {name} must have {2 if single else 3} axes, the last of "
                f"{size}, got {x.shape}"
            )
        if single:
            return x.reshape(1, *x.shape)
        return x if self.batch_first else x.transpose(0, 1)

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        """Queries, keys and values (B, H, T, D), the added ones among them."""
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.split(self.embed_dim)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        bias = self.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.split(self.embed_dim)
        added = (None, self.bias_k, self.bias_v)
        found = []
        for i, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
            y = tw.matmul(x, self._packs[i].of(weight, self.training), bias=biases[i])
            B, E = len(y), y.shape[2]
            extra = added[i]
            if extra is not None:
                y = tw.concatenate([y, extra.to(y.dtype).broadcast_to(B, 1, E)], axis=1)
            if i and self.add_zero_attn:
                y = tw.concatenate(
                    [y, Tensor(np.zeros_like(y.data[:, :1], shape=(B, 1, E)))], axis=1
                )
            y = y.reshape(B, y.shape[1], self.num_heads, E // self.num_heads)
            found.append(y.transpose(1, 2))
        return found

    def _attend(
        self, heads: list[Any], mask: Any, causal: bool, drops: bool, weighs: bool
    ) -> tuple[Any, Any]:
        """The heads' results (B, H, L, D), and their weights if wanted."""
        q, k, v = heads
        if not weighs:
            p = self.dropout if drops else 0.0
            return tw.attention(q, k, v, causal=causal, mask=mask, dropout_p=p), None
        y, lse = tw.attention(q, k, v, causal=causal, mask=mask, return_lse=True)
        weights = _weights(q, k, lse, mask, causal)
        if drops:
            weights = tw.dropout(weights, self.dropout, seed=random.fresh_seed())
            y = tw.matmul(weights.to(v.dtype), v)
        return y, weights.to(q.dtype) if weighs else None

    def _mode_changed(self) -> None:
        for pack in self._packs:
            pack.clear()

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, batch_first={self.batch_first}"


def _empty(*shape: int) -> Tensor:
    return Parameter(np.empty(shape, np.float32))


def _weights(q: Any, k: Any, lse: Any, mask: Any, causal: bool) -> Any:
    """The softmax that the kernel leaves out, float32: exp(scores - lse), 0 where masked."""
    L, S = q.shape[2], k.shape[2]
    scale = float(q.shape[-1]) ** -0.5
    scores = tw.matmul(q, k.transpose(2, 3), alpha=scale, out_dtype=np.float32)
    seen = np.True_
    if causal:
        seen = moved(np.tri(L, S, S - L, dtype=np.bool_), device_of(q.data))
    if mask is not None and mask.dtype == np.bool_:
        seen = seen & mask
    elif mask is not None:
        seen = seen & (mask != -np.inf)
        scores = scores + np.where(mask == -np.inf, np.float32(0), mask)
    lse = tw.where(lse.data == -np.inf, np.float32(0), lse)  # no key: all are masked below
    scores = scores - lse.reshape(*lse.shape, 1)
    return tw.where(seen, scores, np.float32(-np.inf)).exp()


def _ignored(attn: Any, padding: Any, sizes: tuple[int, ...], single: bool) -> list[Any]:
    """PyTorch's masks as arrays that broadcast to (B, H, L, S)."""
    B, H, L, S = sizes
    masks = []
    if attn is not None:
        attn = _array("attn_mask", attn)
        if attn.shape not in ((L, S), (1, L, S), (B * H, L, S)):
            raise ShapeError(
                f"MultiheadAttention: attn_mask must have shape {(L, S)}, {(1, L, S)} or "
                f"{(B * H, L, S)}, got {attn.shape}"
            )
        one = attn.ndim == 2 or len(attn) == 1
        masks.append(attn.reshape(1, 1, L, S) if one else attn.reshape(B, H, L, S))
    if padding is not None:
        padding = _array("key_padding_mask", padding)
        expected = (S,) if single else (B, S)
        if padding.shape != expected:
            raise ShapeError(
                f"MultiheadAttention: key_padding_mask must have shape {expected}, "
                f"got {padding.shape}"
            )
        masks.append(padding.reshape(B, 1, 1, S))
    return masks


def _array(name: str, mask: Any) -> Any:
    if getattr(mask, "requires_grad", False):
        raise UnsupportedError(f"MultiheadAttention: {name} can't have a gradient")
    return as_array(unwrap(mask))


def _kernel_mask(masks: list[Any], more: int) -> Any:
    """All masks as the kernel's: bool with True = attend, or one to add; then ``more`` keys."""
    if not masks:
        return None
    if all(mask.dtype == np.bool_ for mask in masks):
        ignored = masks[0]
        for mask in masks[1:]:
            ignored = ignored | mask
        made, free = ~ignored, True
    else:
        floats = [
            np.where(m, np.float32(-np.inf), np.float32(0)) if m.dtype == np.bool_ else m
            for m in masks
        ]
        made, free = floats[0], False
        for mask in floats[1:]:
            made = made + mask
    return np.pad(made, [(0, 0)] * 3 + [(0, more)], constant_values=free) if more else made
