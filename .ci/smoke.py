"""Every kind of kernel once, against NumPy: `python .ci/smoke.py [expected ISA level]`."""

import sys

import ml_dtypes
import numpy as np

import tilewright as tw

level = next(isa.name for isa in tw.isas() if isa.active)
print("active ISA level:", level)
if len(sys.argv) > 1:
    assert level == sys.argv[1], f"expected {sys.argv[1]}"
rng = np.random.default_rng(0)

# Products.
x, w = (rng.standard_normal(s, dtype=np.float32) for s in ((33, 70), (70, 41)))
np.testing.assert_allclose(tw.matmul(x, w), x @ w, atol=1e-4)
for dtype in (np.float16, ml_dtypes.bfloat16):
    x16, w16 = x.astype(dtype), w.astype(dtype)
    exact = x16.astype(np.float32) @ w16.astype(np.float32)
    np.testing.assert_allclose(tw.matmul(x16, w16).astype(np.float32), exact, rtol=0.01, atol=0.01)
a, b = (rng.integers(-128, 128, s, dtype=np.int8) for s in ((5, 70), (70, 9)))
np.testing.assert_array_equal(tw.int8_matmul(a, b), a.astype(np.int32) @ b.astype(np.int32))
for options in ({}, {"bits": 4, "group_size": 32}, {"bits": 4, "symmetric": False}):
    q = tw.quantize(w, axis=1, **options)
    near = tw.dequantize(q)
    step = q.scale if q.scale.ndim == 1 else q.scale.max(0)
    assert (np.abs(near - w) <= 0.51 * step).all()
    np.testing.assert_allclose(tw.qmatmul(x, q, compute="float"), x @ near, atol=1e-4)
    np.testing.assert_allclose(tw.qmatmul(x, q, compute="int8"), x @ near, atol=0.4)

# Rows.
mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
np.testing.assert_allclose(tw.layernorm(x), (x - mean) / np.sqrt(var + 1e-5), atol=1e-5)
e = np.exp(x - x.max(-1, keepdims=True))
np.testing.assert_allclose(tw.softmax(x), e / e.sum(-1, keepdims=True), atol=1e-6)
ids = rng.integers(0, 33, (2, 5))
np.testing.assert_array_equal(tw.embedding(ids, x), x[ids])
angle = np.outer(np.arange(33), 1 / 100 ** np.linspace(0, 1, 35)).astype(np.float32)
cos, sin = np.cos(angle), np.sin(angle)
left, right = x[:, :35], x[:, 35:]
turned = np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)
np.testing.assert_allclose(tw.rope(x, cos, sin), turned, atol=1e-5)

# Attention, of arrays and of a cache.
q, k, v = (rng.standard_normal((1, 2, 9, 16), dtype=np.float32) for _ in range(3))
scores = q @ k.swapaxes(-1, -2) / 4
p = np.exp(scores - scores.max(-1, keepdims=True))
attended = p / p.sum(-1, keepdims=True) @ v
np.testing.assert_allclose(tw.attention(q, k, v), attended, atol=1e-5)
for dtype, error in (("float32", 1e-5), ("int8", 0.1)):
    cache = tw.KVCache(1, 1, 2, 16, 9, dtype=dtype)
    cache.append(0, k, v)
    np.testing.assert_allclose(tw.attention(q, cache.layer(0)), attended, atol=error)

# Training: a Linear, cross entropy, their gradients, a step.
linear, target = tw.nn.Linear(70, 41), rng.integers(0, 41, 33)
weight = linear.weight.numpy().copy()
logits = x @ weight.T + linear.bias.numpy()
loss = tw.cross_entropy(linear(tw.tensor(x)), target)
p = np.exp(logits - logits.max(-1, keepdims=True))
p /= p.sum(-1, keepdims=True)
np.testing.assert_allclose(loss.item(), -np.log(p[np.arange(33), target]).mean(), rtol=1e-5)
loss.backward()
p[np.arange(33), target] -= 1
np.testing.assert_allclose(linear.weight.grad, p.T @ x / 33, atol=1e-5)
np.testing.assert_allclose(linear.bias.grad, p.sum(0) / 33, atol=1e-5)
grad = linear.weight.grad
tw.optim.AdamW(linear.parameters(), lr=0.1, weight_decay=0.5).step()
expected = weight * (1 - 0.1 * 0.5) - 0.1 * grad / (np.abs(grad) + 1e-8)
np.testing.assert_allclose(linear.weight.numpy(), expected, atol=1e-5)
print("1 passed, 0 failed")
