"""attention: csrc/ops/attention.cc (rule) · csrc/cpu/attention_*.cc · csrc/simd/attention.cc."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from tilewright import _core, random
from tilewright.errors import ShapeError, UnsupportedError
from tilewright.kvcache import CacheLayer
from tilewright.registry import Context, Cost, Reference, converted, empty_for, op, outs_for

_FLOAT32 = np.dtype(np.float32)


@op(grads=("q", "k", "v"))
class attention:
    """Softmax attention, streamed: memory is linear in the sequence lengths.

        out = softmax(t) @ v        lse = log(sum(exp(t)))        s = scale * q @ k^T
        t = softcap * tanh(s / softcap) - slope * abs(position - key) + mask

    Row i of a sequence of n keys has the position i + n - Tq: the last row stands at the last key
    (aligned bottom-right). What is not given is left out of t.

    Args:
        q: (B, H, Tq, D) float32, bfloat16 or float16, any strides; (B, Tq, D) is one head.
        k: (B, Hkv, Tk, D), Hkv divides H (grouped and multi-query attention); or a layer of a
            ``tw.KVCache``, then without v.
        v: (B, Hkv, Tk, Dv).
        causal: a row sees no key after its position.
        mask: broadcasts to (B, H, Tq, Tk), without H for one head: bool (True = attend), or
            a float dtype, which is added.
        scale: of the scores, by default 1 / sqrt(D).
        window: (left, right), how many keys before and after its position a row sees; -1 or None
            is all of them. Blocks outside are skipped.
        softcap: a positive number that bounds the scores; 0 is none.
        alibi_slopes: (H,) or (B, H) float32, without H for one head.
        kv_lengths: (B,) int32 or int64, n of each sequence; keys beyond do not exist.
        dropout_p: the probability of dropping a weight of the softmax, in [0, 1]; those that are
            kept are scaled by 1 / (1 - dropout_p). lse does not change.
        seed: an int in [0, 2**64), by default the next one of ``tw.manual_seed``. A weight is
            dropped as ``tw.dropout`` would drop it from the array (B, H, Tq, Tk) of them.
        prefer: "throughput" or "latency", which differ where the level has matrix units (amx) and
            head dimensions of 32 and more: "latency" leaves them alone, at any number of rows, and
            has the bits of the same keys in a KVCache, for which it is the rule. Few rows against
            many keys are faster so.
        return_lse: also return lse (B, H, Tq) float32.
        out: where to write the result, with ``return_lse`` a pair (out, lse); no overlap with an
            input.

    Returns:
        out (B, H, Tq, Dv), or (out, lse); out in the dtype of q, k and v if they share one, else
        float32. A row that sees no key has out 0, lse -inf and gradients 0. NaN and Inf in keys and
        values that a row does not see do not reach it. A row's bits depend on that row and its keys
        alone: the row of a prefill is the row of a decode.

    Raises:
        ShapeError, DtypeError, UnsupportedError: naming the argument.

    Source: Milakov & Gimelshein 2018 (streaming softmax); Dao 2023, FlashAttention-2; Press et al.
    2022 (ALiBi); Beltagy et al. 2020 (windows); Gemma Team 2024 (softcap); Salmon et al. 2011 (the
    generator of dropout).
    """

    @staticmethod
    def forward(
        ctx: Context,
        q: Any,
        k: Any,
        v: Any = None,
        *,
        causal: bool = False,
        mask: Any = None,
        scale: float | None = None,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        alibi_slopes: Any = None,
        kv_lengths: Any = None,
        dropout_p: float = 0.0,
        seed: int | None = None,
        prefer: str = "throughput",
        return_lse: bool = False,
        out: Any = None,
    ) -> Any:
        if prefer not in ("throughput", "latency"):
            raise UnsupportedError(
                f"attention: prefer must be 'throughput' or 'latency', got {prefer!r}"
            )
        like_v = v  # what has the last size of the result
        if type(k) is CacheLayer:
            if ctx.needs:
                raise UnsupportedError("attention: gradients through a KVCache are not computed")
            k, like_v = k.core, q
        # What is no array gets any result: the kernel's own check words the error.
        q_shape, last = getattr(q, "shape", ()) or (0,), getattr(like_v, "shape", ())[-1:] or (0,)
        shape, dtype = q_shape[:-1] + last, _core.result_dtype(q, k, v)
        if scale is None:
            scale = 1 / math.sqrt(q_shape[-1] or 1)
        lse = None
        if return_lse:
            out, lse = outs_for("attention", out, "out", "lse")
        # The backward pass reads the result before it is rounded to 16 bits.
        exact = bool(ctx.needs) and dtype != _FLOAT32
        given = empty_for(None if exact else out, shape, _FLOAT32 if exact else dtype)
        if return_lse or ctx.needs:
            lse = empty_for(lse, shape[:-1], np.float32)
        options = score_options("attention", window, softcap, alibi_slopes, dropout_p, seed)
        options["latency"] = prefer == "latency"
        _core.attention_forward(q, k, v, mask, kv_lengths, causal, scale, given, lse, **options)
        if ctx.needs:
            ctx.save(q, k, v, mask, kv_lengths, causal, scale, given, lse, options)
        result = converted(given, dtype) if exact else given
        return (result, lse) if return_lse else result

    @staticmethod
    def backward(ctx: Context, dout: Any, dlse: Any = None) -> tuple[Any, ...]:
        q, k, v, mask, kv_lengths, causal, scale, out, lse, options = ctx.saved
        if dout is None:
            dout = np.zeros_like(out)
        dq, dk, dv = (
            _core.empty(x.shape, x.dtype) if name in ctx.needs else None
            for name, x in (("q", q), ("k", k), ("v", v))
        )
        given = (q, k, v, mask, kv_lengths, causal, scale, out, lse)
        _core.attention_backward(*given, dout, dlse, dq, dk, dv, **options)
        return dq, dk, dv

    @staticmethod
    def reference(
        q: Any,
        k: Any,
        v: Any,
        *,
        causal: bool = False,
        mask: Any = None,
        scale: float | None = None,
        window: Any = None,
        softcap: float | None = None,
        alibi_slopes: Any = None,
        kv_lengths: Any = None,
        dropout_p: float = 0.0,
        seed: int = 0,
        first_element: int = 0,
        return_lse: bool = False,
    ) -> Any:
        if q.ndim == 3:
            q, k, v = q[:, None], k[:, None], v[:, None]
            if mask is not None and mask.ndim == 3:
                mask = mask[:, None]
            found = attention.reference(
                q,
                k,
                v,
                causal=causal,
                mask=mask,
                scale=scale,
                window=window,
                softcap=softcap,
                alibi_slopes=None if alibi_slopes is None else alibi_slopes[..., None],
                kv_lengths=kv_lengths,
                dropout_p=dropout_p,
                seed=seed,
                return_lse=True,
            )
            results = [Reference(r.value[:, 0], r.magnitude[:, 0], r.terms) for r in found]
            return tuple(results) if return_lse else results[0]
        (B, H, Tq, D), (Hkv, Tk) = q.shape, k.shape[1:3]
        scale = D**-0.5 if scale is None else scale
        k, v = (np.repeat(x, H // max(Hkv, 1), axis=1) for x in (k, v))
        lengths = np.full(B, Tk) if kv_lengths is None else np.asarray(kv_lengths)
        # of each row and key: how far the key lies behind the row's position
        behind = (lengths[:, None] - Tq + np.arange(Tq))[:, None, :, None] - np.arange(Tk)
        left, right = (-1 if n is None else n for n in window or (-1, -1))
        visible = np.broadcast_to(np.arange(Tk) < lengths[:, None, None, None], (B, H, Tq, Tk))
        if causal or right >= 0:
            visible = visible & (behind >= (0 if causal else -right))
        if left >= 0:
            visible = visible & (behind <= left)
        with np.errstate(invalid="ignore"):
            scores = scale * (q @ k.swapaxes(-1, -2))
            size = abs(scale) * (abs(q) @ abs(k).swapaxes(-1, -2))
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
                # what the score's own error becomes, and that of tanh and two products
                steep = 1 - (scores / softcap) ** 2
                size = np.where(steep == 0, 0, size * steep) + 2 * abs(scores)
            if alibi_slopes is not None:
                bias = -np.asarray(alibi_slopes)[..., None, None] * abs(behind)
                scores, size = scores + bias, size + abs(bias)
            if mask is not None and mask.dtype == np.bool_:
                visible = visible & mask
            elif mask is not None:
                visible = visible & (mask != -np.inf)
                scores = scores + mask
                size = size + np.where(np.isfinite(mask), abs(mask), 0)
            scores = np.where(visible, scores, -np.inf)
            top = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
            top = np.where(top == -np.inf, 0, top)
            weights = np.where(visible, np.exp(scores - top), 0)
        total = weights.sum(-1, keepdims=True)
        P = weights / np.where(total == 0, 1, total)
        # A score's own error, and that of its distance to the maximum, scale its weight.
        with np.errstate(invalid="ignore"):
            spread = np.where(P == 0, 0, P * (1 + size + abs(top)))
        error_of_sum = spread.sum(-1, keepdims=True)
        with np.errstate(divide="ignore"):
            lse = Reference(
                (np.log(total) + np.where(total == 0, 0, top))[..., 0],
                spread.sum(-1) + abs(top[..., 0]),
                D + Tk,
            )
        if threshold := round(dropout_p * 2**32):
            words = random.words(seed, first_element + np.arange(P.size)).reshape(P.shape)
            kept = (words >= threshold) / (1 - dropout_p if dropout_p < 1 else 1)
            # 0 also where a score is NaN, but the division by the row's sum brings it back
            P, spread = (
                np.where(kept == 0, 0 * total, P * kept),
                np.where(kept == 0, 0, spread * kept),
            )
        seen = _weigh(P, abs(v))
        magnitude = _weigh(spread, abs(v)) + np.where(seen == 0, 0, error_of_sum * seen)
        value = Reference(_weigh(P, v), magnitude, D + Tk)
        return (value, lse) if return_lse else value

    @staticmethod
    def cost(q: Any, k: Any, v: Any, *, causal: bool = False, window: Any = None, **_: Any) -> Cost:
        heads_rows, D = q.size // q.shape[-1], q.shape[-1]
        Tq, Tk = q.shape[-2], k.shape[-2]
        seen = _mean_visible(Tq, Tk, causal, window)
        moved = q.nbytes + k.nbytes + v.nbytes + heads_rows * v.shape[-1] * q.itemsize
        return Cost(2.0 * heads_rows * seen * (D + v.shape[-1]), moved)

    rows = ("q", "k", "v", "mask", "alibi_slopes", "kv_lengths")

    # B, H, Hkv, Tq, Tk, D; then flags: bool or add (a mask), row or key (the axes it has), dv=,
    # window=left:right, softcap=, alibi (one slope a head) or alibi2 (of each sequence), …
    cases = (
        "1,1,1,1,1,1",
        "1,1,1,1,1,64;causal;lse",
        "2,3,3,5,7,8",
        "2,4,2,17,33,16;causal",
        "1,4,1,31,33,17;causal;lse",
        "2,2,2,33,31,15;causal",
        "1,2,2,7,16,3;bool",
        "2,4,2,13,29,16;bool;causal;lse",
        "2,2,1,11,37,13;add;dv=5",
        "2,2,2,9,40,16;add;key;causal",
        "3,2,1,5,20,8;lengths;causal;lse",
        "3,2,1,6,20,8;lengths;bool",
        "2,6,2,3,19,32;causal;lengths",
        "1,8,2,1,130,64;causal",
        "2,3,3,1,513,24;causal;lse",
        "1,4,2,1,1025,37;causal",
        "2,4,2,2,300,21;causal;lengths;lse",
        "1,2,1,19,511,16",
        "1,1,1,40,512,16;causal",
        "1,2,2,3,513,31;add;row",
        "1,2,1,65,1025,20;causal;lse",
        "1,2,2,97,129,256;causal",
        "1,1,1,128,128,64",
        "1,0,0,4,4,8",
        "2,2,1,3,0,8",
        "2,2,2,0,5,8",
        "2,5,7,16;3d;causal;lse",
        "2,4,2,17,33,16;window=5:2;lse",
        "1,2,1,40,40,8;window=0:0",
        "2,2,2,33,31,15;window=7:-1;causal",
        "3,2,1,9,40,8;window=4:3;lengths;bool",
        "1,2,2,65,700,12;window=130:9",
        "2,4,2,2,1100,16;window=70:0;lse",
        "2,3,3,1,600,24;softcap=2;lse",
        "2,4,2,19,37,16;softcap=0.5;causal;add;lse",
        "3,4,2,13,29,16;alibi;lse",
        "2,4,2,35,33,16;alibi2;causal",
        "3,4,2,2,530,16;alibi2;lengths;causal;lse",
        "2,5,9,8;3d;alibi2;softcap=1",
        "2,4,1,45,150,16;window=33:12;softcap=3;alibi2;bool;lengths",
        "3,6,2,2,700,17;window=600:-1;softcap=1;alibi;lse",
        "1,2,1,5,9,8;dropout=0.5;lse",
        "1,4,2,37,41,16;dropout=0.1;causal",
        "1,3,1,2,650,12;dropout=0.3;dv=7",
        "1,4,2,19,150,16;dropout=0.9;window=40:3;softcap=2;alibi;bool",
        "2,2,2,4,6,8;dropout=1",
        "1,5,7,16;3d;dropout=0.25;add",
    )

    @staticmethod
    def make(case: str, rng: Any, dtype: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        numbers, *flags = case.split(";")
        sizes = [int(n) for n in numbers.split(",")]
        heads: tuple[int, ...]
        heads_kv: tuple[int, ...]
        if "3d" in flags:
            B, Tq, Tk, D = sizes
            heads = heads_kv = ()
        else:
            B, H, Hkv, Tq, Tk, D = sizes
            heads, heads_kv = (H,), (Hkv,)
        Dv = next((int(f[3:]) for f in flags if f.startswith("dv=")), D)

        def normal(*shape: int) -> Any:
            return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

        args = normal(B, *heads, Tq, D), normal(B, *heads_kv, Tk, D), normal(B, *heads_kv, Tk, Dv)
        kwargs: dict[str, Any] = {f"return_{f}": True for f in flags if f == "lse"}
        if "causal" in flags:
            kwargs["causal"] = True
        axes = (
            (Tq, Tk) if "row" in flags else (B, 1, 1, Tk) if "key" in flags else (B, *heads, Tq, Tk)
        )
        if "bool" in flags:
            kwargs["mask"] = rng.random(axes) < 0.7
        if "add" in flags:
            hidden = rng.random(axes) < 0.2
            kwargs["mask"] = np.where(hidden, -np.inf, normal(*axes)).astype(dtype)
        if "lengths" in flags:
            kwargs["kv_lengths"] = rng.integers(0, Tk + 1, B)
        values = dict(f.split("=") for f in flags if "=" in f)
        if "window" in values:
            left, right = values["window"].split(":")
            kwargs["window"] = int(left), int(right)
        if "softcap" in values:
            kwargs["softcap"] = float(values["softcap"])
        if "dropout" in values:
            kwargs["dropout_p"], kwargs["seed"] = float(values["dropout"]), int(rng.integers(2**53))
        if "alibi" in flags or "alibi2" in flags:
            slopes = rng.random((B, *heads), dtype=np.float32)
            kwargs["alibi_slopes"] = slopes if "alibi2" in flags else slopes[0]
        return args, kwargs


def _mean_visible(Tq: int, Tk: int, causal: bool, window: Any) -> float:
    """Keys that a row sees by its position, on average."""
    left, right = (Tk + Tq if n is None or n < 0 else n for n in window or (-1, -1))
    own = np.arange(Tq) + Tk - Tq
    begin = np.clip(own - left, 0, Tk)
    end = np.clip(own + (0 if causal else right) + 1, 0, Tk)
    return float((end - begin).mean()) if Tq else 0.0


def _weigh(P: Any, v: Any) -> Any:
    """P @ v, where a weight of zero hides what it weighs, NaN and Inf included."""
    if np.isfinite(v).all():
        return P @ v
    terms = np.where(P[..., None] == 0, 0, P[..., None] * v[..., None, :, :])
    return terms.sum(-2)


def score_options(
    op: str,
    window: Any,
    softcap: float | None,
    alibi_slopes: Any,
    dropout_p: float,
    seed: int | None,
) -> dict[str, Any]:
    """What the kernels take beside scale and mask, by name; empty where nothing was asked for."""
    options: dict[str, Any] = {}
    if window is not None:
        options["left"], options["right"] = _window(op, window)
    if softcap is not None:
        options["softcap"] = softcap
    if alibi_slopes is not None:
        options["alibi_slopes"] = alibi_slopes
    if dropout_p != 0:
        options["dropout_p"] = dropout_p
        options["seed"] = random.fresh_seed() if seed is None else random.checked(op, seed)
    return options


def _window(op: str, window: Any) -> tuple[int, int]:
    """(left, right), -1 standing for None."""
    try:
        left, right = (-1 if n is None else operator.index(n) for n in window)
    except (TypeError, ValueError):
        raise ShapeError(
            f"{op}: window must be (left, right), two integers or None, got {window!r}"
        ) from None
    return left, right
