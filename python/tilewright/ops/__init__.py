"""The ops, one file each; importing this package fills the registry."""

from tilewright.ops.activations import gelu, gelu_tanh, relu, sigmoid, silu, tanh
from tilewright.ops.attention import attention
from tilewright.ops.attention_varlen import attention_varlen
from tilewright.ops.cross_entropy import cross_entropy
from tilewright.ops.dequantize import dequantize
from tilewright.ops.dropout import dropout
from tilewright.ops.embedding import embedding
from tilewright.ops.int8_matmul import int8_matmul
from tilewright.ops.layernorm import layernorm
from tilewright.ops.log_softmax import log_softmax
from tilewright.ops.matmul import matmul
from tilewright.ops.mse import mse
from tilewright.ops.qmatmul import qmatmul
from tilewright.ops.quantize import quantize
from tilewright.ops.rmsnorm import rmsnorm
from tilewright.ops.rope import rope
from tilewright.ops.softmax import softmax

__all__ = [
    "attention",
    "attention_varlen",
    "cross_entropy",
    "dequantize",
    "dropout",
    "embedding",
    "gelu",
    "gelu_tanh",
    "int8_matmul",
    "layernorm",
    "log_softmax",
    "matmul",
    "mse",
    "qmatmul",
    "quantize",
    "relu",
    "rmsnorm",
    "rope",
    "sigmoid",
    "silu",
    "softmax",
    "tanh",
]
