"""attention_varlen: every sequence is what attention makes of it alone, whatever lies beside it."""

import numpy as np
import pytest

import harness
import tilewright as tw
from tilewright.autograd import backward

LENGTHS = {  # of q and of k
    "mixed": ([5, 1, 40, 0, 17], [5, 9, 40, 3, 600]),
    "one large among small": ([3, 700, 20, 1], [3, 700, 20, 900]),
    "decode": ([1, 1, 1, 1], [513, 7, 1030, 1]),
    "some without keys": ([4, 2, 1], [0, 6, 0]),
}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (20, 1)},
    "all": {"softcap": 2.0, "window": (130, 0), "alibi_slopes": np.float32([0.5, 0.25, 0.1, 1])},
}
same_bits = harness.same_bits


def arrays(rng, lengths, H=4, Hkv=2, D=16, dtype=np.float32):
    q_lengths, k_lengths = LENGTHS[lengths]

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

    total_q, total_k = sum(q_lengths), sum(k_lengths)
    ends = [np.cumsum([0, *n]).astype(np.int32) for n in (q_lengths, k_lengths)]
    return [normal(total_q, H, D), normal(total_k, Hkv, D), normal(total_k, Hkv, D), *ends]


def alone(x, ends, i):
    """Sequence i as (1, H, T, D)."""
    return np.ascontiguousarray(x[ends[i] : ends[i + 1]].swapaxes(0, 1)[None])


def gradients(function, inputs, dout, *more, **options):
    recorded = [tw.Tensor(x, requires_grad=True) for x in inputs]
    backward(function(*recorded, *more, **options), dout)
    return [t.grad for t in recorded]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_sequence_has_the_bits_it_has_alone(rng, isa, dtype, lengths, options):
    *inputs, ends_q, ends_k = arrays(rng, lengths, dtype=dtype)
    options = OPTIONS[options]
    out, lse = tw.attention_varlen(*inputs, ends_q, ends_k, **options, return_lse=True)
    dout = rng.standard_normal(out.shape, dtype=np.float32).astype(dtype)
    found = gradients(tw.attention_varlen, inputs, dout, ends_q, ends_k, **options)
    for i in range(len(ends_q) - 1):
        one = [alone(x, e, i) for x, e in zip(inputs, (ends_q, ends_k, ends_k), strict=True)]
        want, want_lse = tw.attention(*one, **options, return_lse=True)
        assert same_bits(alone(out, ends_q, i), want)
        assert same_bits(lse[None, :, ends_q[i] : ends_q[i + 1]], want_lse)
        grads = gradients(tw.attention, one, alone(dout, ends_q, i), **options)
        for got, ends, g in zip(found, (ends_q, ends_k, ends_k), grads, strict=True):
            assert same_bits(alone(got, ends, i), g)


def test_sequences_of_one_length_are_a_batch(rng, isa):
    B, T, H, D = 3, 45, 4, 16
    q, k, v = (rng.standard_normal((B, T, H, D), dtype=np.float32) for _ in range(3))
    ends = np.arange(B + 1) * T
    slopes = rng.random((B, H), dtype=np.float32)
    packed = (x.reshape(B * T, H, D) for x in (q, k, v))
    options = {"causal": True, "alibi_slopes": slopes, "dropout_p": 0.3, "seed": 8}
    got = tw.attention_varlen(*packed, ends, ends, **options)
    want = tw.attention(*(x.swapaxes(1, 2) for x in (q, k, v)), **options).swapaxes(1, 2)
    assert same_bits(got.reshape(want.shape), want)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_threads_change_nothing(rng, threads, lengths):
    *inputs, ends_q, ends_k = arrays(rng, lengths)
    dout = rng.standard_normal(inputs[0].shape, dtype=np.float32)
    results = []
    for n in (1, 2, 5):
        threads(n)
        out = tw.attention_varlen(*inputs, ends_q, ends_k, causal=True)
        grads = gradients(tw.attention_varlen, inputs, dout, ends_q, ends_k, causal=True)
        results.append([out, *grads])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_sequence(rng, isa, bad):
    *inputs, ends_q, ends_k = arrays(rng, "mixed")
    dout = rng.standard_normal(inputs[0].shape, dtype=np.float32)

    def everything():
        out = tw.attention_varlen(*inputs, ends_q, ends_k)
        return [out, *gradients(tw.attention_varlen, inputs, dout, ends_q, ends_k)]

    clean = everything()
    for x, ends in zip(inputs, (ends_q, ends_k, ends_k), strict=True):
        x[ends[2] : ends[3]] = bad
    for got, want, ends in zip(everything(), clean, (ends_q, ends_q, ends_k, ends_k), strict=True):
        others = np.ones(len(got), bool)
        others[ends[2] : ends[3]] = False
        assert same_bits(got[others], want[others])
        assert not np.isfinite(got[~others]).any()


def test_any_strides_and_kinds_of_offsets(rng, isa):
    q, k, v, ends_q, ends_k = arrays(rng, "mixed")
    want = tw.attention_varlen(q, k, v, ends_q, ends_k, causal=True)
    turned = [np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1) for x in (q, k, v)]
    apart = np.repeat(ends_k.astype(np.int64), 2)[::2]
    assert same_bits(tw.attention_varlen(*turned, ends_q, apart, causal=True), want)
    most = {"max_seqlen_q": 40, "max_seqlen_k": 1000}
    assert same_bits(tw.attention_varlen(q, k, v, ends_q, ends_k, causal=True, **most), want)


def test_errors_name_the_argument(rng):
    q, k, v, ends_q, ends_k = arrays(rng, "mixed")
    backwards = ends_q[[0, 2, 1, 3, 4, 5]]
    for error, message, args, kwargs in [
        (tw.ShapeError, "q must have shape", (q[None], k, v, ends_q, ends_k), {}),
        (tw.ShapeError, "k must have shape", (q, k[..., :5], v, ends_q, ends_k), {}),
        (tw.ShapeError, "v must have shape", (q, k, v[1:], ends_q, ends_k), {}),
        (tw.ShapeError, "k must have a number of heads", (q[:, :3], k, v, ends_q, ends_k), {}),
        (tw.ShapeError, "cu_seqlens_q must begin with 0", (q, k, v, ends_q[1:], ends_k), {}),
        (tw.ShapeError, "cu_seqlens_q must begin", (q, k, v, backwards, ends_k), {}),
        (tw.ShapeError, "cu_seqlens_q must end with", (q, k, v, ends_q[:-1], ends_k), {}),
        (tw.ShapeError, "cu_seqlens_k must end with", (q, k, v, ends_q, ends_q), {}),
        (tw.ShapeError, "cu_seqlens_k must have the shape", (q, k, v, ends_q, ends_k[[0, 5]]), {}),
        (tw.ShapeError, "cu_seqlens_q must have shape", (q, k, v, ends_q[None], ends_k), {}),
        (tw.DtypeError, "cu_seqlens_q must be", (q, k, v, ends_q.astype("f4"), ends_k), {}),
        (tw.DtypeError, "cu_seqlens_k is required", (q, k, v, ends_q, None), {}),
        (tw.ShapeError, "max_seqlen_q must not", (q, k, v, ends_q, ends_k), {"max_seqlen_q": 39}),
        (tw.ShapeError, "max_seqlen_k must not", (q, k, v, ends_q, ends_k), {"max_seqlen_k": 599}),
        (tw.ShapeError, "window must be", (q, k, v, ends_q, ends_k), {"window": 5}),
    ]:
        with pytest.raises(error, match=f"^attention_varlen: {message}"):
            tw.attention_varlen(*args, **kwargs)
