"""What is benched: named shape families, each call written for tilewright and for its peers.

A case is built when its turn comes and dropped after it, so memory is that of one case. Shapes in
row names: matmul MxKxN, attention BxHxTxD, rows x width elsewhere. "+grad" is the forward and the
backward pass through each engine's tape. A run takes minutes; ``full`` adds every size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import tilewright
from tilewright.bench.case import Case, Plan
from tilewright.bench.cases import attention, products, quantized, registered, rows
from tilewright.registry import Cost

tw: Any = tilewright  # as in products.py


def plans(quick: bool = False, full: bool = True) -> Iterator[Plan]:
    """Every case, in the order of the table: those written here, then those of the registry."""
    written = list(quick_plans() if quick else full_plans())
    yield from (plan for plan in written if full or not plan.full)
    yield from registered.plans({plan.op.split("+")[0] for plan in written}, quick)


def full_plans() -> Iterator[Plan]:
    """The cases written here, whose peers or gradients need more than an op's own file says."""
    yield from _products()
    yield from _few_rows()
    yield from _quantized()
    yield from _attention()
    yield from _rows()


def _products() -> Iterator[Plan]:
    yield products.small_out(64)
    for n in (64, 128, 256, 512, 1024, 2048, 4096):
        yield products.matmul(n, full=n not in (512, 1024, 2048))
    for n in (256, 1024, 4096):
        yield products.matmul(n, "nt", full=n != 1024)
    yield products.batched(384, 96, 64, 64, "float32")
    yield products.batched(384, 96, 64, 64, "bfloat16", full=True)
    for n in (64, 128, 256, 512, 1024, 2048, 4096):
        yield products.matmul_bf16(n, full=n not in (512, 1024, 2048))
    for k, n in WEIGHTS:
        for m in (128, 512):
            common = m == 512 and (k, n) != (3072, 768)
            yield products.linear(m, k, n, "bfloat16", full=not common)
            yield products.linear(m, k, n, full=(k, n) != (768, 3072))
    for m, k, n in ((32, 768, 3072), (512, 768, 3072), (2048, 384, 1536)):
        yield products.linear(m, k, n, gelu=True, full=m != 512)
    yield products.linear(512, 768, 3072, "bfloat16", gelu=True, full=True)


WEIGHTS = ((384, 1536), (1536, 384), (768, 3072), (3072, 768), (4096, 4096))  # (K, N)


def _few_rows() -> Iterator[Plan]:
    for (k, n), m in itertools.product(WEIGHTS, (1, 8)):
        full = (k, n) not in ((768, 3072), (4096, 4096))
        yield products.linear(m, k, n, "bfloat16", full=full)
        for how in ("latency", "variant"):
            yield products.linear_few(m, k, n, how, full=full)
        yield quantized.qmatmul(m, k, n, full=True)
        for bits in (8, 4):
            yield quantized.weight_only(m, k, n, bits, full=full)


def _quantized() -> Iterator[Plan]:
    for n in (256, 512, 1024, 2048, 4096):
        yield quantized.int8_matmul(n, n, n, full=n not in (512, 1024))
        yield quantized.qmatmul(n, n, n, full=n not in (512, 1024))
    for (k, n), m in itertools.product(WEIGHTS, (128, 512)):
        full = m != 512 or (k, n) not in ((768, 3072), (4096, 4096))
        yield quantized.int8_matmul(m, k, n, packed=True, full=full)
        yield quantized.qmatmul(m, k, n, full=full)
    for m in (2, 4, 16):
        for bits in (8, 4):
            yield quantized.weight_only(m, 4096, 4096, bits, full=True)
    for bits in (8, 4):
        yield quantized.quantize(4096, 1024, bits)


def _attention() -> Iterator[Plan]:
    common = (1, 12, 128, 64), (8, 12, 512, 64)
    larger = (16, 6, 256, 64), (4, 16, 1024, 64), (1, 32, 2048, 128)
    both, kinds = (False, True), ("float32", "bfloat16")
    for shape, dtype, causal, grad in itertools.product(common + larger, kinds, both, both):
        yield attention.attention(shape, causal, grad, dtype, full=shape in larger)
    for dtype in ("float32", "bfloat16", "int8"):
        for b, h, h_kv, t, d in (
            (1, 12, 12, 1024, 64),
            (1, 32, 8, 2048, 128),
            (8, 32, 8, 4096, 128),
        ):
            yield attention.decode(b, h, h_kv, t, d, dtype, full=(b, h) != (1, 32))


def _rows() -> Iterator[Plan]:
    for count, width in ((512, 768), (4096, 768), (4096, 4096), (16384, 1024)):
        yield from rows.common(count, width, full=width != 768)
    yield from rows.others(512, 768)
    yield from rows.others(4096, 1024, full=True)
    for classes, grad in itertools.product((32000, 128256), (False, True)):
        yield rows.cross_entropy(512, classes, grad, full=classes > 32000)
    yield rows.cross_entropy(4096, 256, True, full=True)
    yield rows.adamw("nanoGPT, 10.8 M", rows.gpt_shapes(**rows.NANOGPT))


def quick_plans() -> Iterator[Plan]:
    """One small case of each of them: a smoke test of seconds."""
    yield products.small_out(16)
    yield products.matmul(64)
    yield products.matmul(64, "nt")
    yield products.matmul_bf16(64)
    yield products.batched(3, 9, 16, 8, "float32")
    for dtype in ("float32", "bfloat16"):
        yield products.linear(8, 64, 96, dtype)
        yield products.linear(8, 64, 96, dtype, gelu=True)
        for grad in (False, True):
            yield attention.attention((1, 2, 33, 16), True, grad, dtype)
    for how in ("latency", "variant"):
        yield products.linear_few(8, 64, 96, how)
    for dtype in ("float32", "bfloat16", "int8"):
        yield attention.decode(2, 4, 2, 150, 16, dtype)
    yield from rows.common(16, 48)
    yield from rows.others(16, 48)
    for grad in (False, True):
        yield rows.cross_entropy(16, 48, grad)
    yield rows.adamw("tiny", rows.gpt_shapes(1, 16, 8, 32))
    yield quantized.int8_matmul(64, 64, 64)
    yield quantized.int8_matmul(64, 64, 96, packed=True)
    yield quantized.qmatmul(8, 64, 96)
    for bits in (8, 4):
        yield quantized.weight_only(2, 64, 96, bits)
        yield quantized.quantize(16, 48, bits)


NEEDS = {
    "linear": "pack",
    "linear_gelu": "pack",
    "weight_only": "qmatmul",
    "decode": "KVCache",
    "add_layernorm": "layernorm",
    "adamw": "optim",
}  # the public name behind a row's op, where it is another


def exists(plan: Plan) -> bool:
    """Whether this build has the op already."""
    op = plan.op.removesuffix("+grad")
    made = getattr(tw, NEEDS.get(op, op), None)
    return made is not None and (op == plan.op or bool(made.grads))


__all__ = ["Case", "Cost", "Plan", "exists", "full_plans", "plans", "quick_plans"]
