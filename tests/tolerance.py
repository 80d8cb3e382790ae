"""How wrong a result may be. No other test file holds a number of this kind.

Every op's ``reference`` computes in float64 on the same rounded inputs and says, for each element,
the sum of the absolute values of the terms behind it (``magnitude``) and how many there are
(``terms`` = n).

Forward
    A float32 sum of n terms makes n roundings, each below u * |partial sum|. Their signs are as
    good as random for zero-mean data, so the error grows like sqrt(n), and twice that is above what
    any order of summation was seen to make (a naive serial sum reaches 0.45 of it, a blocked one
    0.2). The store rounds once more, to the output's own precision:

        |got - want| <= 2 sqrt(n) u32 magnitude + u_out |want| + underflow

    For n <= 4 it is also the deterministic bound, n u. What it must reject is far outside: a
    dropped last term of K exceeds it 158-fold and more, operands rounded to bfloat16 14- to
    1960-fold, to TF32 1.9- to 245-fold (test_seeded_faults.py).

One-signed data
    Roundings of a growing sum have one sign and the random-walk argument fails. The longest chain
    counts: KC terms inside a block and one addition for each of the n / KC blocks, each with a
    relative error of u (``chain_bound``).

Gradients, element by element
    The central difference of the reference gives a whole column of the Jacobian, hence the
    magnitude of each gradient element: M_j = sum_i |dy_i J_ij|. Backward passes subtract means
    (softmax, layernorm), so their terms can be larger than the result; they are of the order of the
    array's largest M. Where all of it cancels (norms of few elements, attention to one key), the
    terms are counted themselves (``tangent_size``). What forward saved was rounded to the array's
    dtype:

        |got - want| <= 4 (sqrt(n) u32 + u_dtype) max M + u_dtype |want| + error of the difference

    and for float32, where saved values are as exact as the arithmetic, u_dtype is u32. The
    difference itself, with step h in float64, is wrong by about h^2 (curvature) and 2^-52 / h
    (cancellation).

Gradients, along a direction d
    sum_j g_j d_j is compared. T = sum_j |g_j d_j| is its magnitude, and the same factors apply to
    T.

int8 keys and values
    Rounding to s q with s = amax / 127 moves an element by at most h = s / 2 and a few roundings of
    amax. So the score of key j moves by at most d_j = scale * sum|q| h_j, and its weight P_j to
    between P_j e^-d_j / sum_i P_i e^d_i and P_j e^d_j / sum_i P_i e^-d_i. With r_j P_j the larger
    distance and h'_j the step of v, the output moves by at most

        sum_j P_j r_j |v_j| + sum_j P_j (1 + r_j) h'_j

Gradients of attention in bfloat16, element by element
    Inputs are taken as they are and results rounded once; the forward's output is not rounded on
    its way to the backward pass. With t = scale q . k and x = t - lse, a score is wrong by

        2 sqrt(D) u32 scale |q| . |k| + 2 u32 |t|

    lse by the mean of that under P, by 2 sqrt(T) u32 for its sum and u32 |lse| for its store; exp
    adds (4 + |x|) u32, which is 2 ulp and grows to 30 at x = -87, below which a weight is 0. That
    makes e, relative in P. Where weights W multiply, out = P v, dQ = dS K, dK = dS^T Q and dV = P^T
    dO, they are two terms of 8 bits, which lack 2^-17 at most (``TWO_TERMS``). A sum of n of them
    that are off by d is wrong by

        d |X| + (2^-17 + 2 sqrt(n) u32) |W| |X|

    dS = P (dP - delta) has the error of P, that of dP (a sum of D terms), two roundings, and that
    of delta = rowsum(dO out). The latter is one number for a row: it meets the sum of P k before
    its absolute value. The store adds u |want|.

Integers are exact. The elementary functions claim ulp bounds of their own, which
tests/cpp/test_accuracy.cc holds them to.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

U32 = 2.0**-24
UNIT_ROUNDOFF = {
    np.dtype(np.float32): U32,
    np.dtype(ml_dtypes.bfloat16): 2.0**-8,
    np.dtype(np.float16): 2.0**-11,
    np.dtype(np.float64): 2.0**-53,
}
# Half the distance between subnormals: what a result near zero loses whatever its relative
# precision.
UNDERFLOW = {
    np.dtype(np.float32): 2.0**-149,
    np.dtype(ml_dtypes.bfloat16): 2.0**-133,
    np.dtype(np.float16): 2.0**-25,
    np.dtype(np.float64): 0.0,
}
TWO_TERMS = 2.0**-17  # of a number: what two bfloat16 terms, rounded to nearest, lack of it
STEP = 2.0**-17  # of the central differences, relative to max(1, |x|)


def bound(reference, dtype):
    """Allowed error of each element of a float result."""
    dtype = np.dtype(dtype)
    n = max(1, reference.terms)
    return (
        2.0 * np.sqrt(n) * U32 * np.asarray(reference.magnitude, np.float64)
        + UNIT_ROUNDOFF[dtype] * np.abs(reference.value)
        + n * 2.0**-149
        + UNDERFLOW[dtype]
    )


def chain_bound(reference, dtype, block):
    """Allowed error where all terms have one sign and ``block`` of them are added in one chain."""
    dtype = np.dtype(dtype)
    n = max(1, reference.terms)
    chain = min(n, block) + -(-n // block)
    return chain * U32 * np.asarray(reference.magnitude) + UNIT_ROUNDOFF[dtype] * np.abs(
        reference.value
    )


def split_bound(a, b, terms=3):
    """Allowed error of each element of a @ b in float32 where it may be multiplied by terms.

    With three terms that of plain float32, and what the terms themselves can't hold: elements far
    below the largest one of their row or column, and sums near the smallest normal number, which
    matrix units flush to zero. With t terms of 8 bits a product lacks what is below 2^-8t of it:
    t + 1 of those, half a unit each, of either sign.
    """
    a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
    K = a64.shape[1]
    magnitude = np.abs(a64) @ np.abs(b64)
    largest = np.max(np.abs(a64), axis=1)[:, None] * np.max(np.abs(b64), axis=0)
    lost = 0.0 if terms == 3 else (terms + 1) * 2.0 ** (-8 * terms - 1)
    return (
        2.0 * np.sqrt(K) * U32 * magnitude
        + U32 * np.abs(a64 @ b64)
        + lost * magnitude
        + K * 2.0**-32 * largest
        + K * 2.0**-123
    )


def difference_error(scale):
    """Error of a central difference in float64 of a function of about this size."""
    return 8.0 * (STEP**2 + 2.0**-52 / STEP) * scale


def gradient_bound(want, magnitude, terms, dtype, scale):
    """Allowed error of each gradient element; ``scale`` is the size of what was differentiated."""
    u = UNIT_ROUNDOFF[np.dtype(dtype)]
    largest = float(np.max(magnitude, initial=0.0))
    return (
        4.0 * (np.sqrt(max(1, terms)) * U32 + u) * largest
        + u * np.abs(want)
        + difference_error(scale + largest)
        + UNDERFLOW[np.dtype(dtype)]
    )


def directional_bound(magnitude, terms, dtype, scale):
    """Allowed error of sum(gradient * direction), whose terms have this sum of absolute values."""
    u = UNIT_ROUNDOFF[np.dtype(dtype)]
    return 4.0 * (np.sqrt(max(1, terms)) * U32 + u) * magnitude + difference_error(
        scale + magnitude
    )


def int8_cache_bound(q, k, v):
    """How far int8 keys and values may move causal attention: (B, H, Tq, D) and (B, Hkv, Tk, D)."""

    def half_step(x):
        return (0.5 + 4 * 127 * U32) * np.max(np.abs(x), -1, keepdims=True) / 127

    (Tq, D), Tk, group = q.shape[2:], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(D)
    scores = np.where(np.arange(Tk) <= np.arange(Tk - Tq, Tk)[:, None], scores, -np.inf)
    P = np.exp(scores - scores.max(-1, keepdims=True))
    P /= P.sum(-1, keepdims=True)
    moved = np.abs(q).sum(-1, keepdims=True) * half_step(k).swapaxes(-1, -2) / np.sqrt(D)
    up, down = np.exp(moved), np.exp(-moved)
    ratio = np.maximum(
        up / (P * down).sum(-1, keepdims=True) - 1, 1 - down / (P * up).sum(-1, keepdims=True)
    )
    return (P * ratio) @ np.abs(v) + (P * (1 + ratio)) @ half_step(v)


def attention_gradients(q, k, v, dout, scale):
    """(gradient, allowed error) of q (B, H, Tq, D) and k, v (B, Hkv, Tk, D), all bfloat16."""
    B, H, rows, D = q.shape
    Hkv, keys = k.shape[1:3]
    u = UNIT_ROUNDOFF[q.dtype]
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    k, v = (np.repeat(x, H // Hkv, axis=1) for x in (k, v))

    def turned(x):
        return x.swapaxes(-1, -2)

    def of_rows(x):
        return x.sum(-1, keepdims=True)

    def of_groups(x):
        return x.reshape(B, Hkv, H // Hkv, keys, -1).sum(2)

    def of_sums(d, W, X, n):
        return (d + (TWO_TERMS + 2 * np.sqrt(n) * U32) * np.abs(W)) @ np.abs(X)

    t = scale * q @ turned(k)
    top = t.max(-1, keepdims=True)
    lse = top + np.log(of_rows(np.exp(t - top)))
    P = np.exp(t - lse)
    out = P @ v
    distance = dout @ turned(v) - of_rows(dout * out)  # dP - delta
    dS = P * distance

    e = U32 * (2 * np.sqrt(D) * scale * np.abs(q) @ turned(np.abs(k)) + 2 * np.abs(t))
    e += of_rows(P * e) + U32 * (2 * np.sqrt(keys) + np.abs(lse) + 4 + np.abs(t - lse))
    d_P = P * e + 2.0**-125
    d_out = of_sums(d_P, P, v, keys) + 2 * np.sqrt(D) * U32 * np.abs(out)
    d_delta = of_rows(np.abs(dout) * d_out)
    d_dP = 2 * np.sqrt(D) * U32 * np.abs(dout) @ turned(np.abs(v)) + 2 * U32 * np.abs(distance)
    d_dS = d_P * np.abs(distance) + P * d_dP

    terms = rows * H // Hkv
    dq = scale * (of_sums(d_dS, dS, k, keys) + d_delta * np.abs(P @ k))
    dk = scale * (of_sums(turned(d_dS), turned(dS), q, terms) + turned(P) @ (d_delta * np.abs(q)))
    dv = of_sums(turned(d_P), turned(P), dout, terms)
    wants = (scale * dS @ k, scale * of_groups(turned(dS) @ q), of_groups(turned(P) @ dout))
    return [
        (want, moved + u * np.abs(want) + UNDERFLOW[np.dtype(ml_dtypes.bfloat16)])
        for want, moved in zip(wants, (dq, of_groups(dk), of_groups(dv)), strict=True)
    ]
