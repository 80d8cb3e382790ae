"""The float dtypes: conversions bit for bit, what mixed ones make, what is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import harness
import tilewright as tw
from tilewright import _core
from tilewright.autograd import Context
from tilewright.registry import OPS

BF16, F16, F32 = (np.dtype(d) for d in (ml_dtypes.bfloat16, np.float16, np.float32))
PAIRS = [(a, b) for a in (F32, BF16, F16) for b in (F32, BF16, F16)]


def through(x, dtype, *, strided):
    """x in another dtype by the kernels' own conversions, contiguous or element by element."""
    out = np.empty((2 * x.size if strided else x.size, 1), dtype)[:: 2 if strided else 1, 0]
    return _core.embedding_forward(np.zeros(1, np.int64), x[None], out[None]) or out


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_every_16_bit_float_is_read_exactly(dtype, strided, isa):
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    got, want = through(every, F32, strided=strided), every.astype(np.float32)
    nan = np.isnan(want)
    assert (np.isnan(got) == nan).all()
    assert harness.same_bits(got[~nan], want[~nan])


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_every_result_is_rounded_as_numpy_does(dtype, strided, isa, rng):
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32).view(np.uint32)
    unit = np.uint32(1 << 12 if dtype == F16 else 1 << 15)  # half a unit of the last place
    ties = [every + unit, every + unit - np.uint32(1), every + unit + np.uint32(1)]
    anything = rng.integers(0, 1 << 32, 300_000, np.uint32)
    small = np.linspace(-1e-4, 1e-4, 200_001, dtype=np.float32).view(np.uint32)
    x = np.concatenate([every, *ties, anything, small]).view(np.float32)
    with np.errstate(all="ignore"):
        want = x.astype(dtype)
    got = through(x, dtype, strided=strided)
    nan = np.isnan(x)
    assert np.isnan(got[nan]).all()
    assert harness.same_bits(got[~nan], want[~nan])


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_promotion(a, b):
    want = a if a == b else F32
    assert _core.result_dtype(np.ones(3, a), np.ones((), b)) == want
    assert _core.result_dtype(np.ones(3, a), None, np.ones(2, np.int8), np.ones(1, b)) == want
    x, y = np.full((2, 2), 1.5, a), np.full((2, 2), 2.5, b)
    product = tw.matmul(x, y)
    assert product.dtype == want
    assert (product == 7.5).all()
    assert tw.attention(x[None], y[None], y[None]).dtype == want
    assert tw.attention(x[None], x[None], y[None]).dtype == want


@pytest.mark.parametrize(("a", "b"), PAIRS)
@pytest.mark.parametrize("out_dtype", [None, F32, BF16, F16, "float16", ml_dtypes.bfloat16])
def test_out_dtype_of_matmul(a, b, out_dtype, rng):
    x, y = rng.standard_normal((5, 9)).astype(a), rng.standard_normal((9, 4)).astype(b)
    want = tw.matmul(x.astype(F32), y.astype(F32))
    tape = tw.matmul(tw.tensor(x, requires_grad=True), y, activation="relu", out_dtype=out_dtype)
    for got in (tw.matmul(x, y, out_dtype=out_dtype), tw.matmul(x[0], y, out_dtype=out_dtype)):
        assert got.dtype == (np.dtype(out_dtype) if out_dtype else a if a == b else F32)
        assert harness.same_bits(
            got, want.astype(got.dtype)[: 5 if got.ndim == 2 else 1].reshape(got.shape)
        )
    assert tape.data.dtype == got.dtype


@pytest.mark.parametrize("wrong", [np.float64, np.int8, ">f4", np.complex64])
def test_impossible_out_dtype(wrong):
    a = np.ones((2, 2), F32)
    with pytest.raises(tw.DtypeError, match="matmul: out_dtype must be float32, bfloat16 or f"):
        tw.matmul(a, a, out_dtype=wrong)


def test_float16_overflows_to_infinity_and_keeps_subnormals():
    big = np.full((1, 4), 200, F16)
    assert tw.matmul(big, big.T)[0, 0] == np.inf  # 160000, summed in float32, then rounded
    assert tw.matmul(big, -big.T, out_dtype=F32)[0, 0] == -160000
    tiny = np.array([[2.0**-24]], F16)
    assert tw.matmul(tiny, np.ones((1, 1), F16)) == tiny
    assert tw.matmul(tiny, np.full((1, 1), 0.5, F16)) == 0  # a tie, to even
    assert tw.matmul(tiny, np.full((1, 1), 1.5, F16)) == 2 * tiny


# Mixed dtypes, on every op that takes several arrays of floats --------------------------------


def mixed_cases(together=harness.TOGETHER):
    """(op, case, dtypes by input): cases that differ in what they pass, three mixtures of each."""
    found = []
    for name, op in OPS.items():
        seen = set()
        for case in op.cases:
            inputs = harness.inputs(name, case, F32)
            floats = tuple(n for n in op.grads if harness.is_float(inputs.get(n)))
            sizes = [v.size for v in inputs.values() if isinstance(v, np.ndarray)]
            if (
                len(floats) < 2
                or floats in seen
                or "out_dtype" in inputs
                or min(sizes) < 2
                or max(sizes) > 3000
            ):
                continue
            seen.add(floats)
            for turn in range(3):
                dtypes = {n: (F16, BF16, F32)[(i + turn) % 3] for i, n in enumerate(floats)}
                first, *rest = together.get(name, floats[:1])
                dtypes |= {n: dtypes[first] for n in rest if n in dtypes}
                found.append(pytest.param(name, case, dtypes, id=f"{name}[{case}]-{turn}"))
    return found


def some_gradients(op, arguments, rng):
    """The gradients for a dy that every float dtype holds."""
    needs = [n for n in op.grads if harness.is_float(arguments.get(n))]
    ctx = Context(frozenset(needs))
    outs = harness.as_tuple(op.forward(ctx, **arguments))
    dys = [rng.integers(-4, 5, out.shape).astype(out.dtype) for out in outs]
    return dict(zip(op.grads, op.backward(ctx, *dys), strict=True))


@pytest.mark.parametrize(("name", "case", "dtypes"), mixed_cases())
def test_mixed_dtypes(name, case, dtypes, isa):
    op = OPS[name]
    mixed = harness.inputs(name, case, F32) | {
        n: harness.inputs(name, case, F32)[n].astype(d) for n, d in dtypes.items()
    }
    got = harness.as_tuple(harness.call(op, mixed))
    assert got[0].dtype == harness.promoted(op, mixed)
    harness.check(name, got, harness.evaluate(name, mixed), f"{case} {dtypes}")
    # Gradients are those of the same numbers in float32, rounded once to each input's own dtype.
    wide = mixed | {n: mixed[n].astype(F32) for n in dtypes}
    found, want = (some_gradients(op, a, harness.rng_for(name, case, "dy")) for a in (mixed, wide))
    for n, dtype in dtypes.items():
        assert found[n].dtype == dtype, f"d{n}"
        if name not in harness.TOGETHER:  # there the sum itself was rounded
            assert harness.same_bits(found[n], want[n].astype(dtype)), f"d{n}"


@pytest.mark.parametrize(("name", "case", "dtypes"), mixed_cases(together={}))
def test_a_gradient_has_the_dtype_of_its_input(name, case, dtypes):
    wide = harness.inputs(name, case, F32)
    mixed = wide | {n: wide[n].astype(d) for n, d in dtypes.items()}
    found = some_gradients(OPS[name], mixed, harness.rng_for(name, case, "dy"))
    assert {n: found[n].dtype for n in dtypes} == dtypes


# Tensors, layers and files ---------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_tensors_promote_as_ops_do(a, b):
    x = tw.tensor(np.array([[1.5, -2], [3, 0.25]], a), requires_grad=True)
    y = tw.tensor(np.array([[0.5, 1], [2, -4]], b), requires_grad=True)
    assert x.dtype == a
    want = a if a == b else F32
    for z in (x + y, x - y, x * y, x / y, x @ y, tw.where(x.data > 0, x, y)):
        assert z.data.dtype == want
        assert (z * 2 + 1).data.dtype == want
    for z in (tw.concatenate([x, y]), tw.stack([x, y], axis=1)):
        assert z.data.dtype == want
        assert z.data.ravel()[0] == 1.5
    ((x * y + x / y) @ y).sum().backward()
    assert (x.grad.dtype, y.grad.dtype) == (a, b)
    assert np.isfinite(x.grad.astype(F32)).all()


def test_a_quantized_operand_makes_float32_on_the_tape_too(rng):
    qa, qb = (tw.quantize(rng.standard_normal((6, 6)).astype(F32)) for _ in range(2))
    bias = rng.standard_normal(6).astype(BF16)
    taped = tw.qmatmul(qa, qb, bias=tw.tensor(bias, requires_grad=True), activation="gelu")
    assert taped.data.dtype == F32
    assert harness.same_bits(taped.data, tw.qmatmul(qa, qb, bias=bias, activation="gelu"))


class Net(tw.nn.Module):
    """One of each layer that computes."""

    def __init__(self):
        super().__init__()
        self.table = tw.nn.Embedding(11, 16)
        self.attend = tw.nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm, self.rms = tw.nn.LayerNorm(16), tw.nn.RMSNorm(16)
        self.up, self.down = tw.nn.Linear(16, 32), tw.nn.Linear(32, 11)

    def forward(self, ids):
        x = self.table(ids)
        y, _ = self.attend(x, x, x, need_weights=False)
        return self.down(tw.gelu(self.up(self.rms(self.norm(x + y)))))


@pytest.mark.parametrize("norms", [None, F32])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_layers_train_in_every_float(dtype, norms, rng):
    tw.manual_seed(3)
    net = Net().to(dtype)
    if norms is not None:  # their weights in float32 beside activations of 16 bits
        net.norm.to(norms)
        net.rms.to(norms)
    ids, target = rng.integers(0, 11, (4, 5)), rng.integers(0, 11, (4, 5))
    optimizer = tw.optim.AdamW(net.parameters(), lr=3e-2)
    losses = []
    for _ in range(30):
        logits = net(ids)
        assert logits.data.dtype == dtype
        loss = tw.cross_entropy(logits, target)
        assert loss.data.dtype == F32
        optimizer.zero_grad()
        loss.backward()
        for p in net.parameters():
            assert p.grad.dtype == p.data.dtype
        optimizer.step()
        losses.append(float(loss.data))
    assert losses[-1] < 0.5 * losses[0]


def test_files_keep_both_16_bit_floats(tmp_path, rng):
    weights = {str(d): rng.standard_normal((3, 4)).astype(d) for d in (F16, BF16, F32)}
    tw.save({n: tw.tensor(w) for n, w in weights.items()}, tmp_path / "w.safetensors")
    back = tw.load(tmp_path / "w.safetensors")
    for name, w in weights.items():
        assert harness.same_bits(back[name], w)
    linear = tw.nn.Linear(4, 3, bias=False).to(np.float16)
    linear.load_state_dict({"weight": back["bfloat16"]})  # converted to the layer's own
    assert linear.weight.dtype == F16
    assert harness.same_bits(linear.weight.data, weights["bfloat16"].astype(F16))


@pytest.mark.parametrize("target", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_conversion_is_numpys_whatever_the_contents_and_strides(source, target, rng):
    bits = rng.integers(0, 2**32, (40, 70), dtype=np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    x[0, :8] = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11]
    with np.errstate(all="ignore"):
        x = x.astype(source)
        for view in (x, x.T, x[::-2, 3::5], x[:, :1], x[:0]):
            want = view.astype(target)
            got = tw.tensor(view).to(target).data
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
            finite = ~np.isnan(want.astype(np.float32))
            np.testing.assert_array_equal(np.signbit(got)[finite], np.signbit(want)[finite])
