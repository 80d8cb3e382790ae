"""attention_varlen: csrc/ops/attention_varlen.cc (rule) · csrc/cpu/attention_varlen.cc (driver)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tilewright import _core
from tilewright.ops.attention import attention, score_options
from tilewright.registry import Context, Cost, Reference, converted, empty_for, op, outs_for

_FLOAT32 = np.dtype(np.float32)


@op(grads=("q", "k", "v"))
class attention_varlen:
    """Attention of sequences of any lengths that lie one after the other, without padding.

        out[s] = attention(q[s], k[s], v[s])        s = rows cu_seqlens[i] to cu_seqlens[i + 1]

    A row has the bits that ``tw.attention`` gives it in a call with its sequence alone.

    Args:
        q: (total_q, H, D) float32, bfloat16 or float16, any strides.
        k: (total_k, Hkv, D), Hkv divides H.
        v: (total_k, Hkv, Dv).
        cu_seqlens_q: (B + 1,) int32 or int64, where the sequences begin in q: 0, never descending,
            total_q. Two equal entries are an empty sequence.
        cu_seqlens_k: (B + 1,), the same in k and v.
        max_seqlen_q: if given, no sequence of q may be longer. Nothing depends on it on the CPU.
        max_seqlen_k: the same of k.
        causal: a row sees no key after its position; the last row of a sequence stands at its last
            key, as in ``tw.attention``.
        window: (left, right), how many keys before and after its position a row sees; -1 or None
            is all of them.
        softcap: a positive number that bounds the scores; 0 is none.
        alibi_slopes: (H,) or (B, H) float32.
        scale: of the scores, by default 1 / sqrt(D).
        dropout_p: the probability of dropping a weight, in [0, 1].
        seed: an int in [0, 2**64), by default the next one of ``tw.manual_seed``. The weights are
            numbered sequence after sequence, so that sequences of one length are dropped from as in
            a batch; only the first has the numbers that it has alone.
        return_lse: also return lse (H, total_q) float32.
        out: where to write the result; with ``return_lse`` a pair (out, lse).

    Returns:
        out (total_q, H, Dv), or (out, lse).

    Raises:
        ShapeError, DtypeError, UnsupportedError: naming the argument.

    Source: Dao 2023, FlashAttention-2, whose layout this is; see ``tw.attention``.
    """

    @staticmethod
    def forward(
        ctx: Context,
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        *,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        alibi_slopes: Any = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        seed: int | None = None,
        return_lse: bool = False,
        out: Any = None,
    ) -> Any:
        # What is no array gets any result: the kernel's own check words the error.
        q_shape: tuple[int, ...] = getattr(q, "shape", ())
        v_shape: tuple[int, ...] = getattr(v, "shape", ())
        known = len(q_shape) == len(v_shape) == 3
        q_shape, dtype = (q_shape if known else (0, 0, 0)), _core.result_dtype(q, k, v)
        if scale is None:
            scale = 1 / math.sqrt(q_shape[-1] or 1)
        # The backward pass reads the result before it is rounded to 16 bits.
        exact = bool(ctx.needs) and dtype != _FLOAT32
        out, lse = outs_for("attention_varlen", out, "out", "lse") if return_lse else (out, None)
        shape = (*q_shape[:2], v_shape[2] if known else 0)
        given = empty_for(None if exact else out, shape, _FLOAT32 if exact else dtype)
        if return_lse or ctx.needs:
            lse = empty_for(lse, (q_shape[1], q_shape[0]), np.float32)
        options = score_options("attention_varlen", window, softcap, alibi_slopes, dropout_p, seed)
        options |= {"max_seqlen_q": -1 if max_seqlen_q is None else max_seqlen_q}
        options |= {"max_seqlen_k": -1 if max_seqlen_k is None else max_seqlen_k}
        arguments = (q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale, given, lse)
        _core.attention_varlen_forward(*arguments, **options)
        ctx.save(*arguments, options)
        result = converted(given, dtype) if exact else given
        return (result, lse) if return_lse else result

    @staticmethod
    def backward(ctx: Context, dout: Any, dlse: Any = None) -> tuple[Any, ...]:
        q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale, out, lse, options = ctx.saved
        if dout is None:
            dout = np.zeros_like(out)
        dq, dk, dv = (
            _core.empty(x.shape, x.dtype) if name in ctx.needs else None
            for name, x in (("q", q), ("k", k), ("v", v))
        )
        given = (q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale, out, lse)
        _core.attention_varlen_backward(*given, dout, dlse, dq, dk, dv, **options)
        return dq, dk, dv

    @staticmethod
    def reference(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        *,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        alibi_slopes: Any = None,
        return_lse: bool = False,
        **options: Any,
    ) -> Any:
        for ends, total in ((cu_seqlens_q, len(q)), (cu_seqlens_k, len(k))):
            assert ends.ndim == 1
            assert ends[0] == 0
            assert ends[-1] == total
        assert len(cu_seqlens_q) == len(cu_seqlens_k)
        found: list[tuple[Reference, Reference]] = []
        options["first_element"] = 0
        for i in range(len(cu_seqlens_q) - 1):
            rows, keys = (slice(c[i], c[i + 1]) for c in (cu_seqlens_q, cu_seqlens_k))
            if alibi_slopes is not None:
                options["alibi_slopes"] = (
                    alibi_slopes if alibi_slopes.ndim == 1 else alibi_slopes[i]
                )
            one = (x.swapaxes(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
            found.append(attention.reference(*one, return_lse=True, **options))
            options["first_element"] += q.shape[1] * len(q[rows]) * len(k[keys])
        H, Dv = q.shape[1], v.shape[2]
        empty = np.zeros((1, H, 0, Dv)), np.zeros((1, H, 0))
        terms = max((f[0].terms for f in found), default=1)

        def joined(which: int) -> Reference:
            value = [empty[which], *(f[which].value for f in found)]
            magnitude = [empty[which], *(f[which].magnitude for f in found)]
            rows_first = [np.concatenate(x, 2)[0].swapaxes(0, 1) for x in (value, magnitude)]
            return Reference(rows_first[0], rows_first[1], terms)

        out, lse = joined(0), joined(1)
        lse = lse._replace(value=lse.value.T, magnitude=lse.magnitude.T)
        return (out, lse) if return_lse else out

    @staticmethod
    def cost(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **options: Any) -> Cost:
        def one(i: int) -> Cost:
            rows, keys = (slice(c[i], c[i + 1]) for c in (cu_seqlens_q, cu_seqlens_k))
            heads_first = [x.swapaxes(0, 1) for x in (q[rows], k[keys], v[keys])]
            return attention.cost(*heads_first, **options)

        costs = [one(i) for i in range(len(cu_seqlens_q) - 1)]
        return Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs))

    rows = ()  # the first axis is no batch

    # H, Hkv, D; then lengths of q; then of k, or "=" for the same; then flags as of attention
    cases = (
        "2,1,8; 3,5,1; =",
        "4,2,16; 17,0,33,2; =; causal,lse",
        "2,2,24; 1,1,1; 40,513,7; causal",
        "3,1,12; 6,2; 9,0",
        "2,2,15; 70,9; 30,20; window=12:3",
        "4,4,8; 5,20,3; 8,20,130; softcap=1,alibi2,lse",
        "6,2,16; 40,1,12; 50,600,12; window=200:0,alibi,dv=9,max",
        "2,1,8; 7,20,5; 9,20,140; dropout=0.4,causal",
        "2,1,4; 0,0; 3,0",
        "2,1,4; ; =",
    )

    @staticmethod
    def make(case: str, rng: Any, dtype: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        sizes, *rest = (part.strip() for part in case.split(";"))
        H, Hkv, D = (int(n) for n in sizes.split(","))
        flags = [f for part in rest[2:] for f in part.split(",")]
        values = dict(f.split("=") for f in flags if "=" in f)
        q_lengths = [int(n) for n in rest[0].split(",") if n]
        k_lengths = q_lengths if rest[1] == "=" else [int(n) for n in rest[1].split(",")]

        def normal(*shape: int) -> Any:
            return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

        args = (
            normal(sum(q_lengths), H, D),
            normal(sum(k_lengths), Hkv, D),
            normal(sum(k_lengths), Hkv, int(values.get("dv", D))),
            np.cumsum([0, *q_lengths]).astype(np.int32),
            np.cumsum([0, *k_lengths]).astype(np.int64),
        )
        kwargs: dict[str, Any] = {n: True for n in ("causal",) if n in flags}
        if "lse" in flags:
            kwargs["return_lse"] = True
        if "max" in flags:
            kwargs["max_seqlen_q"], kwargs["max_seqlen_k"] = max(q_lengths), max(k_lengths)
        if "window" in values:
            left, right = values["window"].split(":")
            kwargs["window"] = int(left), int(right)
        if "softcap" in values:
            kwargs["softcap"] = float(values["softcap"])
        if "dropout" in values:
            kwargs["dropout_p"], kwargs["seed"] = float(values["dropout"]), int(rng.integers(2**63))
        if "alibi" in flags or "alibi2" in flags:
            slopes = rng.random((len(q_lengths), H), dtype=np.float32)
            kwargs["alibi_slopes"] = slopes if "alibi2" in flags else slopes[0]
        return args, kwargs
