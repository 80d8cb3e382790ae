"""tilewright: hand-written kernels for NumPy arrays, and a thin layer that trains with them."""

from tilewright import _extension as _extension  # before anything that needs _core
from tilewright import arithmetic as arithmetic
from tilewright import models, nn, optim, random
from tilewright._core import build_info as _build_info
from tilewright.arithmetic import concatenate, split, stack, where
from tilewright.autograd import Tensor, no_grad
from tilewright.cpp import get_cmake_dir, get_include
from tilewright.errors import (
    DeviceError,
    DtypeError,
    FormatError,
    ShapeError,
    UnsupportedError,
)
from tilewright.explanation import explain, stats
from tilewright.io import load, load_metadata, save
from tilewright.kvcache import KVCache
from tilewright.ops import (
    attention,
    attention_varlen,
    cross_entropy,
    dequantize,
    dropout,
    embedding,
    gelu,
    gelu_tanh,
    int8_matmul,
    layernorm,
    log_softmax,
    matmul,
    mse,
    qmatmul,
    quantize,
    relu,
    rmsnorm,
    rope,
    sigmoid,
    silu,
    softmax,
    tanh,
)
from tilewright.packed import pack
from tilewright.program import compile
from tilewright.quantized import QuantizedArray
from tilewright.random import manual_seed
from tilewright.runtime import (
    get_num_threads,
    isas,
    memory_stats,
    options,
    set_isa,
    set_matmul_precision,
    set_num_threads,
    set_options,
    trim,
)
from tilewright.tensor import tensor

__version__: str = _build_info()["version"]

__all__ = [
    "DeviceError",
    "DtypeError",
    "FormatError",
    "KVCache",
    "QuantizedArray",
    "ShapeError",
    "Tensor",
    "UnsupportedError",
    "attention",
    "attention_varlen",
    "compile",
    "concatenate",
    "cross_entropy",
    "dequantize",
    "dropout",
    "embedding",
    "explain",
    "gelu",
    "gelu_tanh",
    "get_cmake_dir",
    "get_include",
    "get_num_threads",
    "int8_matmul",
    "isas",
    "layernorm",
    "load",
    "load_metadata",
    "log_softmax",
    "manual_seed",
    "matmul",
    "memory_stats",
    "models",
    "mse",
    "nn",
    "no_grad",
    "optim",
    "options",
    "pack",
    "qmatmul",
    "quantize",
    "random",
    "relu",
    "rmsnorm",
    "rope",
    "save",
    "set_isa",
    "set_matmul_precision",
    "set_num_threads",
    "set_options",
    "sigmoid",
    "silu",
    "softmax",
    "split",
    "stack",
    "stats",
    "tanh",
    "tensor",
    "trim",
    "where",
]
