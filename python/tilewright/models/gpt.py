"""GPT: a decoder-only Transformer (Radford et al. 2019), trained and sampled with our kernels.

    x = token[ids] + position
    each block:   x += proj(attention(qkv(ln1(x))))         pre-norm; heads are views of one product
                  x += down(gelu(up(ln2(x))))
    logits = ln(x) @ token^T                                the table is tied

The sums x += ... are fused into the layernorm that reads them next: it returns the sum beside the
normalised rows, and its backward adds both gradients up.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from tilewright import random
from tilewright.autograd import no_grad, unwrap
from tilewright.device import Device, as_array, device_of, empty, moved
from tilewright.errors import FormatError, ShapeError
from tilewright.io import load as load_arrays
from tilewright.io import load_metadata, save
from tilewright.models import sampling
from tilewright.nn import init
from tilewright.nn.attention import self_attention, split_heads
from tilewright.nn.container import ModuleList
from tilewright.nn.dropout import Dropout
from tilewright.nn.embedding import Embedding
from tilewright.nn.linear import Linear
from tilewright.nn.module import Module, tw
from tilewright.nn.norm import LayerNorm
from tilewright.nn.quantized import quantize_linears
from tilewright.program import compile

_FORMAT = "tilewright.gpt/1"


@functools.lru_cache(maxsize=64)
def _ascending(count: int, device: Device | None) -> Any:
    """0 to count - 1: one array each, since a compiled step reads it in place."""
    return moved(np.arange(count), device)


@functools.lru_cache(maxsize=64)
def _zero(device: Device | None) -> Any:
    return moved(np.zeros(1, np.float32), device)


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT.

    Attributes:
        vocab_size: number of tokens.
        context: positions that it was made for.
        layers: blocks.
        heads: attention heads; divides width.
        width: of the residual stream.
        dropout: probability, on the embedding and on both branches of a block.
    """

    vocab_size: int = 256
    context: int = 128
    layers: int = 4
    heads: int = 4
    width: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "heads", "width"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"GPTConfig: {name} must be a positive integer, got {value!r}")
        if self.width % self.heads:
            raise ValueError(
                f"GPTConfig: heads must divide width {self.width}, got {self.heads} heads"
            )
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"GPTConfig: dropout must be in [0, 1], got {self.dropout!r}")


class Block(Module):
    """One block: attention and a two-layer perceptron, each after a layernorm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.width
        self.heads = config.heads
        self.ln1 = LayerNorm(C)
        self.qkv = Linear(C, 3 * C)
        self.proj = Linear(C, C)
        self.ln2 = LayerNorm(C)
        self.up = Linear(C, 4 * C)
        self.down = Linear(4 * C, C)
        for layer in (self.qkv, self.proj, self.up, self.down):
            layer.prefer = "latency"
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Any, s: Any, cache: Any = None, layer: int = 0) -> tuple[Any, Any]:
        """(branch before, stream) -> (branch, stream): their sum is the residual stream."""
        h, s = self.ln1(x, residual=s)
        qkv = self.qkv(h)
        if cache is None:
            # As packed weights, and as a cache: the tokens of a prompt have the bits of decoding.
            prefer = "throughput" if self.training else "latency"
            y = self_attention(qkv, self.heads, causal=True, prefer=prefer)
        else:
            y = _cached_attention(unwrap(qkv), self.heads, cache, layer)
        x = self.dropout(self.proj(y))
        h, s = self.ln2(x, residual=s)
        return self.dropout(self.down(self.up(h, activation="gelu_tanh"))), s


def _cached_attention(qkv: Any, heads: int, cache: Any, layer: int) -> Any:
    """Attention of new tokens to those of the cache and to themselves: (B, T, 3C) -> (B, T, C)."""
    q, k, v = split_heads(qkv, 3, heads)
    cache.append(layer, k, v)
    y = empty((*qkv.shape[:2], qkv.shape[2] // 3), qkv.dtype, device_of(qkv))
    tw.attention(q, cache.layer(layer), causal=True, out=split_heads(y, 1, heads)[0])
    return tw.Tensor(y)


class GPT(Module):
    """A GPT with learned positions and the token table tied to the output.

    Weights are normal with deviation d = 1 / sqrt(3 * width), which is GPT-2's 0.02 at its width
    of 768 (a fixed 0.02 leaves narrow models on a plateau), those that end a branch d / sqrt(2 *
    layers).

    Args:
        config: its sizes.
        seed: of the initial weights; by default they are drawn from ``tw.random``'s state.
    """

    def __init__(self, config: GPTConfig, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.quantized: dict[str, Any] | None = None  # how, once it is
        with random.seeded(seed):
            self.token = Embedding(config.vocab_size, config.width)
            self.position = Embedding(config.context, config.width)
            self.dropout = Dropout(config.dropout)
            self.blocks = ModuleList(Block(config) for _ in range(config.layers))
            self.ln = LayerNorm(config.width)
            self._initialise()

    def _initialise(self) -> None:
        deviation = 1.0 / math.sqrt(3 * self.config.width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                ends_branch = name.endswith(("proj.weight", "down.weight"))
                share = math.sqrt(2 * self.config.layers) if ends_branch else 1.0
                init.normal_(parameter, 0.0, deviation / share)
            elif name.endswith("bias"):
                init.constant_(parameter, 0.0)

    def forward(self, ids: Any) -> Any:
        """Logits (B, T, vocab_size) of the token after each of ids (B, T), T <= context."""
        return self._head(self._trunk(ids))

    def loss(self, ids: Any, targets: Any) -> Any:
        """Mean cross entropy of targets (B, T), in nats; a target of -100 does not count."""
        return tw.cross_entropy(self.forward(ids), targets)

    def _trunk(self, ids: Any, cache: Any = None, positions: Any = None) -> Any:
        """The last layernorm's rows (B, T, width) of tokens, by default at the first positions."""
        ids = as_array(unwrap(ids))
        if ids.ndim != 2 or ids.shape[1] > self.config.context:
            raise ShapeError(
                f"GPT: ids must have shape (B, T), T at most the context {self.config.context}, "
                f"got {ids.shape}"
            )
        if positions is None:
            first = _ascending(self.config.context, device_of(ids))[: ids.shape[1]]
            positions = np.broadcast_to(first, ids.shape)
        x, s = self.token(ids), self.position(positions)
        if self.training and self.config.dropout:  # it drops of the sum
            x = self.dropout(x + s)
            s = tw.Tensor(np.broadcast_to(_zero(device_of(x.data)), x.shape))
        for layer, block in enumerate(self.blocks):
            x, s = block(x, s, cache, layer)
        return self.ln(x, residual=s)[0]

    def _head(self, h: Any) -> Any:
        return tw.matmul(h, self.token.weight.T)

    # Generation -------------------------------------------------------------------------------

    def generate(
        self,
        prompt_ids: Any,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Continue a prompt, a token at a time.

        Keys and values are kept in a cache. Of a prompt longer than the context its end is read;
        when the context is full, the second half of it is read again as a new beginning, so that
        each token has at least half a context before it.

        Args:
            prompt_ids: tokens, at least one.
            max_new_tokens: how many to generate.
            temperature: divides the logits; 0 always takes the likeliest.
            top_k: choose among the k likeliest.
            top_p: choose among the likeliest that together reach this probability.
            seed: of the choices; by default they are drawn from ``tw.random``'s state.

        Returns:
            An iterator of ints. The model is in eval mode until the iterator ends.
        """
        sampling.check(temperature, top_k, top_p)
        prompt = moved(as_array(unwrap(prompt_ids)), None)
        if prompt.ndim != 1 or prompt.size == 0 or prompt.dtype.kind not in "iu":
            raise ShapeError(
                "generate: prompt_ids must be one or more token ids in one axis, "
                f"got {prompt.dtype} {prompt.shape}"
            )
        rng = random.generator() if seed is None else random.keyed(seed)
        choice = (rng, temperature, top_k, top_p)
        return self._stream(prompt.astype(np.int64).tolist(), max_new_tokens, choice)

    def _stream(self, tokens: list[int], count: int, choice: tuple[Any, ...]) -> Iterator[int]:
        c, device = self.config, device_of(self.token.weight.data)
        cache = tw.KVCache(c.layers, 1, c.heads, c.width // c.heads, c.context, dtype="float32")
        was_training = self.training
        if was_training:
            self.eval()
        unread, filled = tokens[-c.context :], 0

        def read(ids: Any, positions: Any) -> Any:
            with no_grad():
                return self._head(self._trunk(ids, cache, positions)[:, -1:])

        read_one = compile(read)
        try:
            for _ in range(count):
                if filled + len(unread) > c.context:
                    unread, filled = tokens[-max(1, c.context // 2) :], 0
                    cache.truncate(0)
                positions = np.arange(filled, filled + len(unread))
                given = [moved(np.array([some]), device) for some in (unread, positions)]
                found = (read_one if len(unread) == 1 else read)(*given)
                logits = moved(found.data, None).reshape(-1)
                filled += len(unread)
                token = sampling.choose(logits, *choice)
                tokens.append(token)
                unread = [token]
                yield token
        finally:
            if was_training:
                self.train()

    # Files ------------------------------------------------------------------------------------

    def quantize(
        self, *, bits: int = 8, group_size: int | None = None, symmetric: bool = True
    ) -> GPT:
        """A copy in eval mode whose Linears have quantized weights; the token table stays float32.

        Args:
            bits: of a weight: 8 or 4.
            group_size: how many neighbours share a scale; None: all of an output channel.
            symmetric: without offsets.
        """
        if self.quantized:
            raise ValueError("GPT: the model is quantized already")
        made = GPT(self.config, seed=0)
        made.load_state_dict(self.state_dict())
        made.to(self.token.weight.device)
        made._quantize_linears({"bits": bits, "group_size": group_size, "symmetric": symmetric})
        return made.eval()

    def _quantize_linears(self, options: dict[str, Any]) -> None:
        quantize_linears(self, **options)
        self.quantized = options

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and config to a safetensors file, for ``tw.models.load``."""
        metadata = {"format": _FORMAT, "weights": "float32"}
        metadata["config"] = json.dumps(dataclasses.asdict(self.config))
        if self.quantized:
            metadata["weights"] = f"int{self.quantized['bits']}"
            metadata["quantized"] = json.dumps(self.quantized)
        save(self.state_dict(), path, metadata)


def load(path: str | os.PathLike[str]) -> GPT:
    """Read a model that ``GPT.save`` wrote, float32 or quantized; it is in eval mode.

    Raises:
        FormatError: the file is damaged, or no such model; ShapeError, DtypeError: a tensor does
            not fit the config. The message names the file or the tensor.
    """
    name, metadata = os.fspath(path), load_metadata(path)
    if metadata.get("format") != _FORMAT:
        raise FormatError(
            f"{name}: must be a model of format {_FORMAT}, got {metadata.get('format')!r}"
        )
    arrays = load_arrays(path)
    model = GPT(checked_config(name, _json(name, metadata), arrays), seed=0)
    if metadata.get("weights") in ("int8", "int4"):
        model._quantize_linears(_quantization(name, metadata))
    model.load_state_dict(arrays)
    return model.eval()


def _quantization(name: str, metadata: dict[str, str]) -> dict[str, Any]:
    """The options that the weights were quantized with; of older files: int8 by channel."""
    options: Any = {"bits": 8, "group_size": None, "symmetric": True}
    try:
        given = json.loads(metadata.get("quantized", "{}"))
        options |= given
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"{name}: the metadata's quantized is no JSON object: {error}") from None
    group, bits = options["group_size"], options["bits"]
    if (
        len(options) != 3
        or type(bits) is not int
        or f"int{bits}" != metadata["weights"]
        or not (group is None or (type(group) is int and group > 0))
        or type(options["symmetric"]) is not bool
    ):
        raise FormatError(
            f"{name}: the metadata's quantized must hold bits as in weights, group_size and "
            f"symmetric, got {str(given)[:80]}"
        )
    return dict(options)


def _json(name: str, metadata: dict[str, str]) -> Any:
    try:
        return json.loads(metadata["config"])
    except (KeyError, ValueError, RecursionError) as error:
        raise FormatError(f"{name}: the config in the metadata is no JSON: {error}") from None


def checked_config(name: str, fields: Any, arrays: dict[str, Any]) -> GPTConfig:
    """Return the config of a file, believed only as far as the file's own tensors bear it out.

    What it allows needs memory in proportion to the file, whoever wrote it.

    Args:
        name: of the file, for messages.
        fields: what GPTConfig takes, as JSON gave it.
        arrays: the model's tensors by name.

    Raises:
        FormatError, ShapeError: naming the field or the tensor.
    """
    try:
        config = GPTConfig(**fields)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{name}: the config in the metadata is no GPTConfig: {error}") from None
    for key, shape in {
        "token.weight": (config.vocab_size, config.width),
        "position.weight": (config.context, config.width),
    }.items():
        if key not in arrays:
            raise FormatError(f"{name}: tensor {key!r} is missing")
        if arrays[key].shape != shape:
            raise ShapeError(
                f"{name}: {key} must have shape {shape} by its config, got {arrays[key].shape}"
            )
    layers = {key.split(".")[1] for key in arrays if key.startswith("blocks.")}
    if len(layers) != config.layers:
        raise FormatError(f"{name}: the config has {config.layers} layers, the file {len(layers)}")
    need = 12 * config.layers * config.width**2  # weights of the blocks; 4 bits are two an element
    have = sum(math.prod(array.shape) for array in arrays.values())
    if need > 2 * have:
        raise FormatError(
            f"{name}: a config of {config.layers} layers and width {config.width} has {need} "
            f"weights in its blocks, the whole file {have} elements"
        )
    return config
