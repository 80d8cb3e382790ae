"""Arguments of attention that make no sense, each refused by its name."""

import numpy as np
import pytest

import tilewright as tw
from attention_inputs import arrays, powers_of_two
from harness import same_bits


def test_options_that_make_no_sense():
    q, k, v = arrays(2, 4, 2, 3, 5, 8)
    for error, message, kwargs in [
        (tw.ShapeError, r"window must be \(left, right\)", {"window": 3}),
        (tw.ShapeError, r"window must be \(left, right\)", {"window": (1, 2, 3)}),
        (tw.ShapeError, r"window must be \(left, right\)", {"window": (1.5, 0)}),
        (tw.ShapeError, r"window must be \(left, right\)", {"window": (-2, 0)}),
        (tw.ShapeError, "softcap must be a positive number", {"softcap": -1.0}),
        (tw.ShapeError, "softcap must be a positive number", {"softcap": np.nan}),
        (tw.ShapeError, "alibi_slopes must have shape", {"alibi_slopes": powers_of_two(3)}),
        (tw.ShapeError, "alibi_slopes must have shape", {"alibi_slopes": powers_of_two(4)[None]}),
        (
            tw.DtypeError,
            "alibi_slopes must be float32",
            {"alibi_slopes": powers_of_two(4).astype("f8")},
        ),
        (tw.DtypeError, "alibi_slopes must be float32", {"alibi_slopes": [0.5] * 4}),
        (tw.ShapeError, "dropout_p must be in", {"dropout_p": 1.5, "seed": 1}),
        (tw.ShapeError, "dropout_p must be in", {"dropout_p": np.nan, "seed": 1}),
        (tw.ShapeError, "seed must be in", {"dropout_p": 0.5, "seed": -1}),
        (tw.DtypeError, "seed must be an int", {"dropout_p": 0.5, "seed": 0.5}),
    ]:
        with pytest.raises(error, match=message):
            tw.attention(q, k, v, **kwargs)
    everything = tw.attention(q, k, v, window=(2**40, 2**62))
    assert same_bits(everything, tw.attention(q, k, v))


def test_errors_name_the_argument():
    q, k, v = arrays(2, 4, 2, 3, 5, 8)
    cases = [
        (tw.ShapeError, "k must have head dimension 8", (q, k[..., :4], v), {}),
        (tw.ShapeError, "v must have shape", (q, k, v[:, :, :4]), {}),
        (tw.ShapeError, "k must have a number of heads", (q[:, :3], k, v), {}),
        (tw.ShapeError, "mask must broadcast", (q, k, v), {"mask": np.ones((3, 4), bool)}),
        (tw.DtypeError, "mask must be bool", (q, k, v), {"mask": np.ones((3, 5), np.int8)}),
        (tw.ShapeError, "kv_lengths must lie", (q, k, v), {"kv_lengths": np.array([5, 6])}),
        (tw.DtypeError, "q must be float32", (q.astype(np.float64), k, v), {}),
        (tw.DtypeError, "v is required", (q, k, None), {}),
        (
            tw.ShapeError,
            "out must have shape",
            (q, k, v),
            {"out": np.empty((2, 4, 3, 7), np.float32)},
        ),
        (tw.ShapeError, "out must not share memory", (q, k, v), {"out": q}),
    ]
    for error, message, args, kwargs in cases:
        with pytest.raises(error, match=message):
            tw.attention(*args, **kwargs)
