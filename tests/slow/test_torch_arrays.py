"""torch tensors in, torch tensors out: DLPack with the library that most people bring."""

import numpy as np
import pytest

import harness
import tilewright as tw
import tolerance
from tilewright.registry import Reference

torch = pytest.importorskip("torch", reason="torch is not installed: its arrays are not tried")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_answer_in_torch(dtype):
    torch.manual_seed(harness.seed)
    a, b = torch.randn(5, 7).to(dtype), torch.randn(7, 3).to(dtype)
    y = tw.matmul(a, b)
    assert type(y) is torch.Tensor
    assert y.dtype == dtype
    exact, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    allowed = tolerance.bound(
        Reference(exact.numpy(), magnitude.numpy(), 7),
        harness.DTYPES[str(dtype).removeprefix("torch.")],
    )
    assert ((y.double() - exact).abs().numpy() <= allowed).all()
    y, s = tw.layernorm(a, residual=a)
    assert torch.equal(s, a + a)
    assert type(y) is torch.Tensor
    out = torch.empty_like(a)
    assert tw.relu(a.t().contiguous().t(), out=out) is out
    assert torch.equal(out, a.relu())
    ids = torch.tensor([2, 0, 2])
    assert torch.equal(tw.embedding(ids, a), a[ids])
    q = torch.randn(1, 2, 4, 8).to(dtype)
    assert tw.attention(q, q, q, causal=True).shape == q.shape


def test_nothing_is_copied():
    x = torch.zeros(4)
    view = tw.interop.array_over(x, "x")
    view[1] = 3
    assert x.tolist() == [0, 3, 0, 0]
    t = tw.tensor(np.ones(3, np.float32))
    torch.from_dlpack(t)[0] = 5
    assert t.numpy().tolist() == [5, 1, 1]


def test_bfloat16_goes_both_ways():
    x = torch.randn(6, dtype=torch.bfloat16)
    back = torch.from_dlpack(tw.tensor(x))
    assert back.dtype == torch.bfloat16
    assert torch.equal(back, x)


def test_what_torch_or_we_refuse():
    with pytest.raises(tw.UnsupportedError, match=r"relu: x .*Parameter.*detach"):
        tw.relu(torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises((tw.DeviceError, tw.UnsupportedError), match=r"relu: x "):
        tw.relu(torch.zeros(2, device="meta"))
    with pytest.raises(tw.DtypeError, match=r"relu: x .*use x\.astype"):
        tw.relu(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(tw.DtypeError, match=r"relu: x .*code 10 of 8 bits"):
        tw.relu(torch.zeros(2, dtype=torch.float8_e4m3fn))


def test_tensors_of_both_kinds_meet():
    x, theirs = tw.tensor(np.ones(3, np.float32), requires_grad=True), torch.arange(3.0)
    for y in (x * theirs, theirs * x, tw.matmul(x, theirs)):
        assert type(y) is tw.Tensor
        y.backward(torch.ones(y.shape))
    assert x.grad.tolist() == [0, 3, 6]
