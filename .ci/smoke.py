"""Every kind of kernel once, against NumPy: `python .ci/smoke.py [expected ISA level]`."""

import sys

import numpy as np

import tilewright as tw

level = next(isa.name for isa in tw.isas() if isa.active)
print("active ISA level:", level)
if len(sys.argv) > 1:
    assert level == sys.argv[1], f"expected {sys.argv[1]}"
rng = np.random.default_rng(0)
x, w = (rng.standard_normal(s, dtype=np.float32) for s in ((33, 70), (70, 41)))
np.testing.assert_allclose(tw.matmul(x, w), x @ w, atol=1e-4)
mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
np.testing.assert_allclose(tw.layernorm(x), (x - mean) / np.sqrt(var + 1e-5), atol=1e-5)
q, k, v = (rng.standard_normal((1, 2, 9, 16), dtype=np.float32) for _ in range(3))
scores = q @ k.swapaxes(-1, -2) / 4
p = np.exp(scores - scores.max(-1, keepdims=True))
np.testing.assert_allclose(tw.attention(q, k, v), p / p.sum(-1, keepdims=True) @ v, atol=1e-5)
a, b = (rng.integers(-128, 128, s, dtype=np.int8) for s in ((5, 70), (70, 9)))
np.testing.assert_array_equal(tw.int8_matmul(a, b), a.astype(np.int32) @ b.astype(np.int32))
print("1 passed, 0 failed")
