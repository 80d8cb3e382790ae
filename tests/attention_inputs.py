"""What the tests of attention share: arrays, options, gradients."""

import numpy as np

import tilewright as tw
from tilewright.autograd import backward


def arrays(B, H, Hkv, Tq, Tk, D, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

    return normal(B, H, Tq, D), normal(B, Hkv, Tk, D), normal(B, Hkv, Tk, D)


def gradients(q, k, v, dout, **kwargs):
    """The gradients of q, k and v, as the tape asks for them."""
    tensors = [tw.Tensor(x, requires_grad=True) for x in (q, k, v)]
    backward(tw.attention(*tensors, **kwargs), dout)
    return [t.grad for t in tensors]


def powers_of_two(H):
    """Slopes as ALiBi has them: times a distance they are exact."""
    return np.exp2(-np.arange(1, H + 1)).astype(np.float32)


OPTIONS = {  # what shapes the scores, as functions of the number of heads
    "window": lambda H: {"window": (37, 5)},
    "window of one": lambda H: {"window": (0, 0)},
    "window before": lambda H: {"window": (130, None), "causal": True},
    "window behind": lambda H: {"window": (-1, 3)},
    "softcap": lambda H: {"softcap": 1.5, "causal": True},
    "alibi": lambda H: {"alibi_slopes": powers_of_two(H)},
    "all": lambda H: {"window": (260, 2), "softcap": 2.0, "alibi_slopes": powers_of_two(H)},
}
