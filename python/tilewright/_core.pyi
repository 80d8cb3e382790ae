"""
tilewright's compiled kernels: thin functions over libtilewright, called by the op files.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence

from numpy.typing import NDArray

# None where the argument may be absent; the op's own checks say where it may.
_Array = NDArray[typing.Any] | None

class ShapeError(ValueError):
    """
    An argument's shape, strides or memory does not fit; a ValueError.
    """

class DtypeError(TypeError):
    """
    An argument has a dtype or type that the op does not take; a TypeError.
    """

class DeviceError(RuntimeError):
    """
    A device is absent or failed; a RuntimeError.
    """

class UnsupportedError(NotImplementedError):
    """
    A combination that has no kernel; a NotImplementedError.
    """

class Options:
    """
    what a context of tw.options says
    """

class PackedMatrix:
    """
    A right-hand side (K, N) in the panels of one ISA level
    """
    def __copy__(self) -> typing.Any: ...
    def __deepcopy__(self, arg0: typing.Any) -> typing.Any: ...
    @property
    def bits(self) -> int:
        """
        of a quantized matrix: 8 or 4; of others 0
        """
    @property
    def dtype(self) -> str: ...
    @property
    def isa(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def shape(self) -> tuple[int, int]: ...

class KVLayer:
    """
    A layer of a KVCache, for attention's k
    """

class KVCache:
    """
    Keys and values of past tokens, in pages
    """
    def __init__(
        self,
        layers: int,
        batch: int,
        heads_kv: int,
        head_dim: int,
        max_tokens: int,
        dtype: str,
        page: int,
    ) -> None: ...
    def append(self, layer: int, k: _Array, v: _Array) -> None: ...
    def fork(self, sequences: Sequence[int]) -> KVCache: ...
    def layer(self, index: int) -> KVLayer: ...
    def lengths(self, layer: int) -> list[int]: ...
    def truncate(self, n: Sequence[int]) -> None: ...
    @property
    def nbytes(self) -> int: ...

class Program:
    """
    A step's kernel calls, recorded to be run again
    """
    def __init__(self, inputs: list[typing.Any]) -> None: ...
    def assign(self, step: int, numbers: Sequence[float]) -> None: ...
    def captured(self) -> list[typing.Any]: ...
    def difference(self, before: Program) -> str: ...
    def escaping(self) -> list[typing.Any]: ...
    def finish(self) -> None: ...
    def locate(self, array: typing.Any) -> int: ...
    def poison(self) -> None: ...
    def prove(self, inputs: list[typing.Any]) -> None:
        """
        run, over the state that the recorded call began with
        """
    def reseed(self, values: Sequence[int]) -> None: ...
    def run(self, inputs: list[typing.Any]) -> None: ...
    def seed(self, value: int) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def vary(self, step: int) -> None: ...
    @property
    def arena_bytes(self) -> int: ...
    @property
    def done(self) -> int: ...
    @property
    def gpu_arena(self) -> typing.Any: ...
    @property
    def size(self) -> int: ...

def activation_backward(x: _Array, dy: _Array, dx: _Array, kind: str) -> None: ...
def activation_forward(x: _Array, y: _Array, kind: str) -> None: ...
def active_isa() -> str:
    """
    name of the active level
    """

def adam_step(
    params: Sequence[_Array],
    grads: Sequence[_Array],
    m: Sequence[_Array],
    v: Sequence[_Array],
    largest: Sequence[_Array],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    decoupled: bool = True,
    grad_scale: float = 1.0,
) -> None: ...
def attention_backward(
    q: _Array,
    k: _Array,
    v: _Array,
    mask: _Array,
    kv_lengths: _Array,
    causal: bool,
    scale: float,
    out: _Array,
    lse: _Array,
    dout: _Array,
    dlse: _Array,
    dq: _Array,
    dk: _Array,
    dv: _Array,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: _Array = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    latency: bool = False,
) -> None: ...
def attention_forward(
    q: _Array,
    k: typing.Any,
    v: _Array,
    mask: _Array,
    kv_lengths: _Array,
    causal: bool,
    scale: float,
    out: _Array,
    lse: _Array,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: _Array = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    latency: bool = False,
) -> None: ...
def attention_varlen_backward(
    q: _Array,
    k: _Array,
    v: _Array,
    cu_seqlens_q: _Array,
    cu_seqlens_k: _Array,
    causal: bool,
    scale: float,
    out: _Array,
    lse: _Array,
    dout: _Array,
    dlse: _Array,
    dq: _Array,
    dk: _Array,
    dv: _Array,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: _Array = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    max_seqlen_q: int = -1,
    max_seqlen_k: int = -1,
) -> None: ...
def attention_varlen_forward(
    q: _Array,
    k: _Array,
    v: _Array,
    cu_seqlens_q: _Array,
    cu_seqlens_k: _Array,
    causal: bool,
    scale: float,
    out: _Array,
    lse: _Array,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: _Array = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    max_seqlen_q: int = -1,
    max_seqlen_k: int = -1,
) -> None: ...
def build_info() -> dict[str, typing.Any]: ...
def call_counts() -> list[typing.Any]:
    """
    (op, kernel, isa, count)
    """

def clip_norm(tensors: Sequence[_Array], max_norm: float, norm: _Array) -> None: ...
def count_recording(again: bool) -> None: ...
def cross_entropy_backward(
    logits: _Array,
    target: _Array,
    weight: _Array,
    label_smoothing: float,
    ignore_index: int,
    lse: _Array,
    dloss: _Array,
    scale: _Array,
    dlogits: _Array,
) -> None: ...
def cross_entropy_forward(
    logits: _Array,
    target: _Array,
    weight: _Array,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    loss: _Array,
    lse: _Array,
    scale: _Array,
) -> None: ...
def dequantize(
    data: _Array,
    scale: _Array,
    offset: _Array,
    axis: int,
    out: _Array,
    bits: int = 8,
    group: int = 0,
    along: int = -1,
) -> None: ...
def dropout(x: _Array, p: float, seed: int, y: _Array) -> None: ...
def effective_options() -> dict[str, typing.Any]:
    """
    precision, threads, isa, batch_invariant
    """

def embedding_backward(ids: _Array, dy: _Array, dtable: _Array) -> None: ...
def embedding_forward(ids: _Array, table: _Array, y: _Array) -> None: ...
def empty(*args: typing.Any) -> typing.Any:
    """
    empty(shape, dtype): as np.empty, large ones in recycled memory
    """

def empty_like(*args: typing.Any) -> typing.Any:
    """
    empty_like(x): as np.empty_like, large ones in recycled memory
    """

def enter_options(
    threads: int | None, isa: str | None, precision: str | None, batch_invariant: bool | None
) -> typing.Any:
    """
    a token for leave_options
    """

def environment() -> list[typing.Any]:
    """
    (name, value, meaning) of every variable that is read
    """

def fallback_counts() -> list[typing.Any]:
    """
    (op, reason, "", count)
    """

def from_dlpack(capsule: typing.Any, what: str) -> typing.Any:
    """
    an array over a DLPack capsule's memory; `what` starts the messages
    """

def get_num_threads() -> int: ...
def int8_matmul(a: _Array, b: typing.Any, out: typing.Any) -> typing.Any: ...
def isa_levels() -> list[typing.Any]:
    """
    (name, compiled, supported, active) of every level
    """

def layernorm_backward(
    s: _Array,
    gamma: _Array,
    mean: _Array,
    rstd: _Array,
    dy: _Array,
    ds: _Array,
    dx: _Array,
    dgamma: _Array,
    dbeta: _Array,
) -> None: ...
def layernorm_forward(
    x: _Array,
    gamma: _Array,
    beta: _Array,
    residual: _Array,
    eps: float,
    y: _Array,
    s: _Array,
    mean: _Array,
    rstd: _Array,
) -> None: ...
def leave_options(token: typing.Any) -> None: ...
def matmul(*args: typing.Any) -> typing.Any: ...
def memory_stats() -> tuple[int, int, int, int]: ...
def mse_backward(x: _Array, y: _Array, dloss: _Array, scale: float, dx: _Array) -> None: ...
def mse_forward(x: _Array, y: _Array, reduction: str, loss: _Array) -> None: ...
def options_key() -> tuple[str, int, bool]:
    """
    what a program's kernels depend on beside their arguments
    """

def overlap(a: _Array, b: _Array) -> int:
    """
    0: no memory is shared; 2: it is the same array; 1: else
    """

def pack(b: _Array, latency: bool = False) -> PackedMatrix: ...
def pack_quantized(qb: typing.Any) -> PackedMatrix: ...
def qmatmul(
    a: _Array,
    scale_a: _Array,
    offset_a: _Array,
    qb: typing.Any,
    bias: _Array,
    activation: typing.Any,
    residual: _Array,
    floats: bool,
    out: typing.Any,
) -> typing.Any: ...
def quantize(
    x: _Array,
    axis: int,
    data: _Array,
    scale: _Array,
    offset: _Array = None,
    bits: int = 8,
    group: int = 0,
    along: int = -1,
) -> None: ...
def record_calls(run: typing.Any) -> list[typing.Any]:
    """
    the kernel calls that run() makes
    """

def result_dtype(*args: typing.Any) -> typing.Any:
    """
    result_dtype(*arrays): the dtype of what these operands make together
    """

def rmsnorm_backward(
    s: _Array, gamma: _Array, rstd: _Array, dy: _Array, ds: _Array, dx: _Array, dgamma: _Array
) -> None: ...
def rmsnorm_forward(
    x: _Array, gamma: _Array, residual: _Array, eps: float, y: _Array, s: _Array, rstd: _Array
) -> None: ...
def rmsprop_step(
    params: Sequence[_Array],
    grads: Sequence[_Array],
    square: Sequence[_Array],
    mean: Sequence[_Array],
    velocity: Sequence[_Array],
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    grad_scale: float = 1.0,
) -> None: ...
def roofline_copy(x: _Array, y: _Array, tasks: int, repeats: int) -> float:
    """
    bytes read and written
    """

def roofline_copy_streaming(x: _Array, y: _Array, tasks: int, repeats: int) -> float:
    """
    bytes read and written
    """

def roofline_multiply_add(tasks: int, steps: int) -> float:
    """
    floating-point operations done
    """

def roofline_multiply_add_bf16(tasks: int, steps: int) -> float:
    """
    floating-point operations done; 0 without instructions for them
    """

def roofline_multiply_add_int8(tasks: int, steps: int) -> float:
    """
    integer operations done
    """

def roofline_read(x: _Array, tasks: int, repeats: int) -> float:
    """
    bytes read
    """

def rope(
    x: _Array, cos: _Array, sin: _Array, interleaved: bool, inverse: bool, y: _Array
) -> None: ...
def scale_tensors(tensors: Sequence[_Array], factor: float) -> None: ...
def set_isa(name: str) -> None: ...
def set_num_threads(n: int) -> None: ...
def set_options(
    threads: int | None, isa: str | None, precision: str | None, batch_invariant: bool | None
) -> None: ...
def sgd_step(
    params: Sequence[_Array],
    grads: Sequence[_Array],
    velocity: Sequence[_Array],
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    dampening: float = 0.0,
    grad_scale: float = 1.0,
) -> None: ...
def softmax_backward(y: _Array, dy: _Array, dx: _Array, log: bool) -> None: ...
def softmax_forward(x: _Array, y: _Array, log: bool) -> None: ...
def sum(a: _Array, b: _Array, out: _Array) -> None: ...
def sum_rows(x: _Array, out: _Array) -> None: ...
def sum_squares(tensors: Sequence[_Array]) -> float: ...
def thread_limits(root: str = "") -> list[typing.Any]:
    """
    (source, cores) of what bounds the default; the cgroup's below `root`
    """

def time_gemm(a: _Array, b: _Array, out: _Array, repeats: int) -> float:
    """
    seconds of one a @ b by the kernel alone
    """

def to_dlpack(array: typing.Any, versioned: bool, copied: bool) -> typing.Any:
    """
    a DLPack capsule of an array
    """

def trim() -> None: ...
def unpack_floats(b: PackedMatrix, out: _Array) -> None: ...
