"""tw.explain and tw.stats: nothing that a call does is silent."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import harness
import tilewright as tw
from tilewright.registry import OPS


def ones(*shape):
    return np.ones(shape, np.float32)


def only_call(*args, **kwargs):
    (call,) = tw.explain(*args, **kwargs).calls
    return call


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_explained_and_counted(name, isa):
    op = OPS[name]
    arguments = harness.inputs(name, op.cases[-1], harness.DTYPES["float32"])
    before = counted(tw.stats())
    found = tw.explain(lambda: harness.call(op, arguments))
    after = counted(tw.stats())
    assert found.calls
    for call in found.calls:
        assert call.isa == isa
        assert call.threads >= 1
        assert call.kernel
        kernel = f"{call.kernel}@{isa}"
        assert after[call.op, kernel] > before.get((call.op, kernel), 0)
        assert call.kernel in str(found)
    assert sum(after.values()) == sum(before.values()) + len(found.calls)


def counted(stats):
    return {(op, kernel): n for op, row in stats.calls.items() for kernel, n in row.items()}


def test_the_kernel_of_a_product_follows_from_its_operands(isa):
    x, few, b = ones(40, 30), ones(2, 30), ones(30, 500)
    assert only_call(tw.matmul, x, b).kernel == "gemm_f32"
    assert only_call(tw.matmul, x, ones(30, 50)).kernel == "gemm_f32_in_place"  # so small
    assert only_call(tw.matmul, few, b).kernel == "gemm_f32_in_place"
    assert only_call(tw.matmul, few, ones(500, 30).T).kernel == "gemm_f32"
    assert only_call(tw.matmul, x, tw.pack(b)).kernel == "gemm_f32_packed"
    half = tw.pack(b.astype(np.float16))
    for left, how in ((few, "few rows"), (x, "one panel after the other")):
        call = only_call(tw.matmul, left, half)
        assert call.kernel == "gemm_f32_packed"
        assert any("16 bits" in note and how in note for note in call.notes)
    call = only_call(tw.matmul, x, b)
    assert call.op == "matmul"
    assert call.shape == "1x40x500x30"
    assert "in registers" in call.details["tile"]
    assert any("tw.pack" in note for note in call.notes)
    q = tw.quantize(ones(30, 50), axis=1)
    assert any("tw.pack(qb)" in note for note in only_call(tw.qmatmul, x, q).notes)
    assert not any("tw.pack" in note for note in only_call(tw.qmatmul, x, tw.pack(q)).notes)
    assert "int8_matmul" in str(tw.explain(tw.int8_matmul, x.astype("i1"), x.T.astype("i1")))


def test_attention_says_which_of_its_kernels_ran():
    q, k = ones(1, 2, 1, 16), ones(1, 2, 90, 16)
    assert only_call(tw.attention, q, k, k).kernel == "attention_few_rows"
    mask = np.ones((1, 90), bool)
    call = only_call(tw.attention, q, k, k, mask=mask)
    assert call.kernel == "attention_panels"
    assert any("no mask" in note for note in call.notes)


def test_threads_and_why_there_is_one(threads):
    threads(2)
    small = only_call(tw.matmul, ones(4, 4), ones(4, 4))
    assert small.threads == 1
    assert any("too little work" in note for note in small.notes)
    large = only_call(tw.matmul, ones(1500, 1500), ones(1500, 1500))  # shared on a busy machine too
    assert large.threads == 2
    assert large.tasks >= 2
    with tw.options(threads=1):
        alone = only_call(tw.matmul, ones(300, 300), ones(300, 300))
    assert alone.threads == 1
    assert not any("too little work" in note for note in alone.notes)


def test_precision_and_batch_invariance_are_answered():
    x = ones(64, 64)
    assert not any("precision" in note for note in only_call(tw.matmul, x, x).notes)
    with tw.options(precision="medium", batch_invariant=False):
        found = tw.explain(tw.matmul, x, x)
    assert found.options["precision"] == "medium"
    assert any("precision medium: no kernel" in note for note in found.calls[0].notes)
    assert any("batch_invariant=False" in note for note in found.calls[0].notes)


def test_levels_above_are_answered():
    with tw.options(isa="generic"):
        found = tw.explain(tw.relu, ones(4))
    assert set(found.levels) == {level.name for level in tw.isas()[1:]}
    for name in harness.SUPPORTED_ISAS[1:]:
        assert "generic was asked for" in found.levels[name]
        assert f"not {name}" in str(found)


def test_a_model_is_explained_kernel_by_kernel():
    model = tw.nn.Sequential(tw.nn.Linear(8, 8), tw.nn.GELU(), tw.nn.LayerNorm(8))
    ops = [call.op for call in tw.explain(model, tw.tensor(ones(3, 8))).calls]
    assert ops == ["matmul", "gelu", "layernorm"]
    assert "NumPy did it" in str(tw.explain(lambda: tw.tensor(ones(2)) + 1))


def test_an_error_comes_through_and_leaves_nothing_behind():
    with pytest.raises(tw.ShapeError):
        tw.explain(tw.matmul, ones(2, 3), ones(2, 3))
    assert len(tw.explain(tw.relu, ones(3)).calls) == 1
    inner = []
    outer = tw.explain(lambda: inner.append(tw.explain(tw.relu, ones(3))))
    assert len(inner[0].calls) == 1
    assert not outer.calls


def test_a_busy_pool_is_a_counted_fallback(threads):
    """Two threads at once: one of them finds the pool taken now and then. The products are so long
    that they ask for it however busy the machine is."""
    threads(2)
    x = ones(1000, 1000)

    def fallbacks():
        reasons = tw.stats().fallbacks.get("matmul", {})
        return sum(count for why, count in reasons.items() if "held the pool" in why)

    def work(deadline=50):
        for _ in range(deadline):
            tw.matmul(x, x)
            if fallbacks() > before:
                return

    before = fallbacks()
    both = [threading.Thread(target=work) for _ in range(2)]
    for t in both:
        t.start()
    for t in both:
        t.join()
    assert fallbacks() > before
    assert "held the pool" in str(tw.stats())


def test_counts_of_many_threads_add_up():
    def count():
        return sum(tw.stats().calls.get("relu", {}).values())

    before = count()
    workers = [
        threading.Thread(target=lambda: [tw.relu(ones(3)) for _ in range(500)]) for _ in range(4)
    ]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert count() == before + 2000


def test_trace_prints_a_line_per_call():
    code = (
        "import numpy as np, tilewright as tw\nx = np.ones((4, 4), 'f4')\ntw.relu(tw.matmul(x, x))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TILEWRIGHT_TRACE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    head, first, second = done.stderr.splitlines()
    assert head == "op,kernel,isa,shape,threads,microseconds"
    assert first.startswith("matmul,gemm_f32_in_place,")
    assert second.startswith("relu,relu,")
