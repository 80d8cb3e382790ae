"""KVCache: the keys and values of past tokens, for decoding. csrc/cpu/kvcache.h has the pages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tilewright import _core
from tilewright.autograd import unwrap
from tilewright.device import device_of, running_on
from tilewright.errors import ShapeError
from tilewright.recording import Recording, current, refuse


class CacheLayer:
    """One layer of a ``KVCache``, to pass to ``attention`` as k, without v.

    It is a view: it sees what is appended later.
    """

    __slots__ = ("_cache", "_index", "core")

    def __init__(self, cache: Any, index: int) -> None:
        self._cache, self._index = cache, index
        self.core = cache.layer(index)

    @property
    def lengths(self) -> Any:
        """Tokens of each sequence, (B,) int64; attention's ``kv_lengths`` where none are given."""
        return np.array(self._cache.lengths(self._index), np.int64)


class KVCache:
    """Keys and values of the past tokens of all layers, in pages.

    Memory grows with the tokens that are there, a page at a time for each layer and sequence. It is
    where the first keys that are appended are: on the CPU or on a device.
    Attention reads the pages where they are, with the bits that it has for the same keys and values
    in one array.

    Args:
        layers: of the model.
        batch: sequences.
        heads_kv: key/value heads of a layer.
        head_dim: of keys and values, at most 256.
        max_tokens: that a sequence may reach.
        dtype: "bfloat16", "float16", "float32" or "int8", what is stored; what is appended is
            rounded to it. int8 is symmetric with a scale amax / 127 for each token's K and V of
            each head, as ``tw.quantize`` has it; attention computes with scale * int8. The result
            of attention has the dtype of q.
        page: tokens of a page. Attention reads pages of a multiple of 128 tokens in place; of
            smaller ones, which waste less memory, it copies 128 tokens at a time.

    Raises:
        ShapeError, DtypeError: naming the argument.

    Sequences of different lengths: append all of them padded on the right, let attention read them,
    and ``truncate`` to the true lengths.

    Example:
        >>> cache = KVCache(layers=1, batch=1, heads_kv=2, head_dim=4, max_tokens=8)
        >>> prompt = np.zeros((1, 2, 3, 4), np.float32)
        >>> cache.append(0, prompt, prompt)
        >>> cache.lengths
        array([3])

    Source: Kwon et al. 2023, PagedAttention (pages, sharing, copying on write).
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads_kv: int,
        head_dim: int,
        max_tokens: int,
        *,
        dtype: str = "bfloat16",
        page: int = 128,
    ) -> None:
        self._core = _core.KVCache(layers, batch, heads_kv, head_dim, max_tokens, dtype, page)
        self.layers, self.batch, self.dtype = layers, batch, dtype

    def append(self, layer: int, k: Any, v: Any) -> None:
        """Add tokens to a layer, after each sequence's own last one.

        Args:
            layer: 0 to layers - 1.
            k: (B, Hkv, T, D) float32, bfloat16 or float16, any strides.
            v: like k.

        Raises:
            ShapeError: a shape does not fit, or a sequence would exceed ``max_tokens``; then
                nothing is appended. DtypeError. DeviceError: k is not where the tokens before are.
        """
        k, v = unwrap(k, "KVCache.append: k"), unwrap(v, "KVCache.append: v")
        if (noted := current()) is not None:
            self._note(noted, k)
        with running_on(device_of(k), "KVCache.append"):
            self._core.append(layer, k, v)

    def _note(self, noted: Recording, k: Any) -> None:
        """Tell a recording how many tokens there are before it appends."""
        noted.runs_on(device_of(k))
        if not any(core is self._core for core, _ in noted.caches):
            noted.caches.append((self._core, self.lengths.tolist()))

    def layer(self, index: int) -> CacheLayer:
        """One layer, to pass to ``attention`` as k."""
        if not 0 <= index < self.layers:
            raise ShapeError(
                f"KVCache.layer: index must lie between 0 and {self.layers - 1}, got {index}"
            )
        return CacheLayer(self._core, index)

    @property
    def lengths(self) -> Any:
        """Tokens of each sequence, (B,) int64, that all layers have."""
        return np.min([self._core.lengths(i) for i in range(self.layers)], axis=0).astype(np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use, also of those that are shared with another cache."""
        return int(self._core.nbytes)

    def truncate(self, n: Any) -> None:
        """Forget the tokens from n on and free their pages; n is an int, or one for each sequence.

        n may be more than a sequence has. ``truncate(0)`` empties the cache.
        """
        refuse("KVCache.truncate", "call it outside of the step")
        keep = np.asarray(unwrap(n))
        integers = keep.dtype.kind in "iu" or keep.size == 0  # NumPy makes floats of []
        if not integers or keep.shape not in ((), (self.batch,)):
            raise ShapeError(
                f"KVCache.truncate: n must be an integer or {self.batch} of them, one for each "
                f"sequence, got {n!r}"
            )
        if keep.min(initial=0) < 0:
            raise ShapeError(f"KVCache.truncate: n must not be negative, got {n!r}")
        self._core.truncate(np.broadcast_to(keep, self.batch).tolist())

    def fork(self, i: int | Iterable[int] | None = None) -> KVCache:
        """A cache of the sequences i of this one, in that order; their pages are shared.

        Nothing is copied until one of the caches appends to a page that another one holds; then
        that page is. ``fork()`` takes all sequences; ``fork([0] * n)`` continues a prompt in n
        ways; ``fork(parents)`` is a step of beam search, and drops what is not listed. ``copy`` and
        ``deepcopy`` are ``fork()``.

        Args:
            i: a sequence, or some: any order, also repeated. By default all.
        """
        refuse("KVCache.fork", "call it outside of the step")
        chosen = range(self.batch) if i is None else np.atleast_1d(np.asarray(unwrap(i))).tolist()
        for b in chosen:
            if type(b) is not int or not 0 <= b < self.batch:
                raise ShapeError(
                    f"KVCache.fork: i must name sequences from 0 to {self.batch - 1}, got {b!r}"
                )
        made = object.__new__(KVCache)
        made._core = self._core.fork(list(chosen))
        made.layers, made.batch, made.dtype = self.layers, len(chosen), self.dtype
        return made

    def __copy__(self) -> KVCache:
        return self.fork()

    def __deepcopy__(self, memo: Any) -> KVCache:
        return self.fork()

    def __repr__(self) -> str:
        lengths = self.lengths.tolist()
        return (
            f"KVCache({self.layers} layers, {self.dtype}, lengths {lengths}, {self.nbytes} bytes)"
        )
