"""ONNX Runtime as a peer: one session for each case, its inputs and outputs bound once.

Binding spares it the allocation and copy of results: what is timed is the graph alone. Operands
given as ``constants`` are packed when the session is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

OPSET = 21
FUSED = "com.microsoft"  # the domain of its own fused ops


class Ort:
    """Makes calls of small graphs, all with the same number of threads."""

    def __init__(self, threads: int) -> None:
        """Raises ImportError, naming what is missing."""
        self.runtime = importlib.import_module("onnxruntime")
        self.onnx = importlib.import_module("onnx")
        self.threads = threads

    @property
    def version(self) -> str:
        """Of ONNX Runtime."""
        return str(self.runtime.__version__)

    def node(self, op: str, inputs: str, outputs: str, domain: str = "", **attributes: Any) -> Any:
        """One node; names are separated by blanks, ``-`` leaves an optional one out."""
        names = [["" if n == "-" else n for n in text.split()] for text in (inputs, outputs)]
        return self.onnx.helper.make_node(op, *names, domain=domain, **attributes)

    def call(
        self,
        nodes: Sequence[Any],
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        constants: Mapping[str, Any] | None = None,
    ) -> Callable[[], list[Any]]:
        """A call that runs the nodes from ``inputs`` into ``outputs``, arrays both.

        The arrays are contiguous. Whoever wants results in place gives one array as both.
        """
        session = self._session(nodes, inputs, outputs, constants or {})
        binding = session.io_binding()
        for name, x in inputs.items():
            binding.bind_input(name, "cpu", 0, x.dtype, x.shape, x.ctypes.data)
        for name, y in outputs.items():
            binding.bind_output(name, "cpu", 0, y.dtype, y.shape, y.ctypes.data)
        kept = dict(inputs), list(outputs.values())  # the binding holds addresses only

        def call() -> list[Any]:
            session.run_with_iobinding(binding)
            return kept[1]

        return call

    def _session(
        self,
        nodes: Sequence[Any],
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        constants: Mapping[str, Any],
    ) -> Any:
        helper = self.onnx.helper

        def described(arrays: Mapping[str, Any]) -> list[Any]:
            return [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
                for n, x in arrays.items()
            ]

        stored = [self.onnx.numpy_helper.from_array(x, n) for n, x in constants.items()]
        graph = helper.make_graph(nodes, "case", described(inputs), described(outputs), stored)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(FUSED, 1)]
        model = helper.make_model(graph, opset_imports=opsets)
        model.ir_version = 10  # of that opset; the package's own may be newer than the runtime
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        return self.runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
