"""KVCache against lists of arrays in NumPy, over sequences of calls that nobody chose.

Caches are forked, appended to, truncated and let go in any order. After each call every one of them
has the lengths of its model and the pages that it should have, shared ones counted once; attention
is within the bound of test_forward.py of the float64 reference over what the model holds.
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import seed, stateful
from hypothesis import strategies as st
from hypothesis.stateful import consumes, initialize, invariant, precondition, rule

import drawn
import harness
import tilewright as tw
from test_kvcache import stored

MOST = 5  # caches alive


class Sequence:
    """The tokens of one layer and sequence: K and V (Hkv, n, D) as stored, and its pages."""

    def __init__(self, heads, dims):
        self.k = self.v = np.zeros((heads, 0, dims), np.float32)
        self.pages = []

    def __len__(self):
        return self.k.shape[1]

    def extend(self, k, v, page, holders):
        """Append tokens. A page that begins or has other holders is a new one."""
        first, end = len(self) // page, -(-(len(self) + k.shape[1]) // page)
        if k.shape[1]:
            tail = [p if holders[p] == 1 else object() for p in self.pages[first:end]]
            new = [object() for _ in range(end - first - len(tail))]
            self.pages = self.pages[:first] + tail + new
        self.k, self.v = (np.concatenate(x, 1) for x in ((self.k, k), (self.v, v)))

    def truncated(self, n, page):
        """What is left of it; with all of them, a copy."""
        left = object.__new__(Sequence)
        left.k, left.v = self.k[:, :n], self.v[:, :n]
        left.pages = self.pages[: -(-len(left) // page)]
        return left


class Pair:
    """A cache and its model: a list of sequences for each layer."""

    def __init__(self, cache, layers):
        self.cache, self.layers = cache, layers


class Machine(stateful.RuleBasedStateMachine):
    """What may be done to caches."""

    pairs = stateful.Bundle("pairs")

    def __init__(self):
        super().__init__()
        self.live = []

    def add(self, cache, layers):
        self.live.append(Pair(cache, layers))
        return self.live[-1]

    def random(self, *shape, dtype=np.float32):
        return self.rng.standard_normal(shape).astype(dtype)

    @initialize(
        target=pairs,
        dtype=st.sampled_from(["float32", "bfloat16", "int8"]),
        page=st.sampled_from([1, 3, 16, 128]),
        layers=st.integers(1, 2),
        batch=st.integers(1, 3),
        heads=st.integers(1, 2),
        dims=st.sampled_from([1, 7, 16, 33]),
        max_tokens=st.sampled_from([5, 40, 300]),
    )
    def start(self, dtype, page, layers, batch, heads, dims, max_tokens):
        self.rng = harness.rng_for("kvcache", dtype, page, layers, batch, heads, dims)
        self.dtype, self.heads, self.dims, self.most = dtype, heads, dims, max_tokens
        self.page = min(page, max_tokens)
        one = tw.KVCache(1, 1, heads, dims, max_tokens, dtype=dtype, page=page)
        one.append(0, *np.zeros((2, 1, heads, 1, dims), np.float32))
        self.page_bytes = one.nbytes
        cache = tw.KVCache(layers, batch, heads, dims, max_tokens, dtype=dtype, page=page)
        model = [[Sequence(heads, dims) for _ in range(batch)] for _ in range(layers)]
        return self.add(cache, model)

    @rule(pair=pairs, data=st.data(), tokens=st.integers(0, 9) | st.integers(0, 150))
    def append(self, pair, data, tokens):
        layer = data.draw(st.integers(0, len(pair.layers) - 1), label="layer")
        sequences = pair.layers[layer]
        shape = (len(sequences), self.heads, tokens, self.dims)
        k, v = (self.random(*shape, dtype=data.draw(drawn.DTYPES)) for _ in range(2))
        given = [drawn.relaid(data.draw, x) for x in (k, v)]
        if any(len(s) + tokens > self.most for s in sequences):
            with pytest.raises(tw.ShapeError, match=r"KVCache.append: k must fit into max_tokens"):
                pair.cache.append(layer, *given)
            return
        pair.cache.append(layer, *given)
        k, v = (stored(x.astype(np.float32), self.dtype).astype(np.float32) for x in (k, v))
        everything = itertools.chain(*(layer for p in self.live for layer in p.layers))
        holders = Counter(page for sequence in everything for page in sequence.pages)
        for b, sequence in enumerate(sequences):
            sequence.extend(k[b], v[b], self.page, holders)

    @rule(pair=pairs, data=st.data())
    def truncate(self, pair, data):
        sizes = st.integers(0, 20) | st.integers(0, self.most + 1)
        n = [data.draw(sizes) for _ in range(pair.cache.batch)]
        pair.cache.truncate(n)
        for sequences in pair.layers:
            sequences[:] = [s.truncated(n[b], self.page) for b, s in enumerate(sequences)]

    @precondition(lambda self: len(self.live) < MOST)
    @rule(target=pairs, pair=pairs, data=st.data())
    def fork(self, pair, data):
        chosen = st.lists(st.integers(0, max(0, pair.cache.batch - 1)), max_size=3)
        chosen = data.draw(chosen if pair.cache.batch else st.just([]), label="sequences")
        layers = [
            [layer[b].truncated(self.most, self.page) for b in chosen] for layer in pair.layers
        ]
        return self.add(pair.cache.fork(chosen), layers)

    @precondition(lambda self: len(self.live) > 1)
    @rule(pair=consumes(pairs))
    def let_go(self, pair):
        self.live.remove(pair)
        pair.cache = None  # hypothesis keeps the pair itself

    @rule(
        pair=pairs,
        data=st.data(),
        rows=st.sampled_from([1, 1, 2, 5, 40]),
        group=st.integers(1, 3),
        options=st.sampled_from([{}, {"causal": True}, {"window": (6, 2)}, {"softcap": 1.5}]),
        shorter=st.booleans(),
    )
    def attention(self, pair, data, rows, group, options, shorter):
        layer = data.draw(st.integers(0, len(pair.layers) - 1), label="layer")
        sequences = pair.layers[layer]
        lengths = [len(s) for s in sequences]
        q = self.random(len(sequences), self.heads * group, rows, self.dims)
        more = {}
        if shorter:
            lengths = [data.draw(st.integers(0, n)) for n in lengths]
            more = {"kv_lengths": np.array(lengths, np.int64)}
        got = tw.attention(q, pair.cache.layer(layer), return_lse=True, **options, **more)
        for b, (sequence, n) in enumerate(zip(sequences, lengths, strict=True)):
            exact = (x[None, :, :n] for x in (sequence.k, sequence.v))
            arguments = dict(zip("qkv", (q[b : b + 1], *exact), strict=True))
            refs = harness.evaluate("attention", arguments | options | {"return_lse": True})
            harness.check("attention", [x[b : b + 1] for x in got], refs, f"{self.dtype} cache")

    @invariant()
    def every_cache_holds_what_it_should(self):
        for pair in self.live:
            for i, sequences in enumerate(pair.layers):
                assert pair.cache.layer(i).lengths.tolist() == [len(s) for s in sequences]
            pages = {page for sequences in pair.layers for s in sequences for page in s.pages}
            assert pair.cache.nbytes == len(pages) * self.page_bytes


def test_any_sequence_of_calls(isa):
    settings = drawn.settings(2 * drawn.EXAMPLES, stateful_step_count=30)
    stateful.run_state_machine_as_test(seed(harness.seed)(Machine), settings=settings)
