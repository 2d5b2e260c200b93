"""The linear layers of a decoder in each framework: what `benchmarks.matmul` and `benchmarks.prefill` time.

Every engine computes :func:`benchmarks.llama.network` from equal weights and is compared with numpy before it is timed.
"""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from benchmarks.arms import Settings, check_compressed, compile_model, pack, properties
from benchmarks.check import check_network
from benchmarks.llama import ALL, RandomLlama, matmul_names, matrices, network, stack
from benchmarks.weights import stock_bytes

_CHECKED_ROWS = 4
_WARMUP_CALLS = 1  # the engine was stopped: threads sleep, caches belong to others


class Linears(ABC):
    """A loaded engine.

    :param llama: Its weights.
    :param part: Which layers, see :func:`benchmarks.llama.network`.
    """

    def __init__(self, llama: RandomLlama, part: str) -> None:
        self.llama, self.part = llama, part
        self.names = matrices(llama.shape, part)
        self.inputs = llama.shape.linears[self.names[0][1]][1]
        self.weight_bytes = 0  # what a call reads
        rng = np.random.default_rng(llama.seed)
        self._checked = rng.standard_normal((_CHECKED_ROWS, self.inputs), np.float32)
        self._expected: list[np.ndarray] | None = None

    @abstractmethod
    def run(self, x: np.ndarray) -> list[np.ndarray]:
        """:return: Outputs ``[1, rows, N]`` in the order of :func:`network`, of float32 ``x [1, rows, K]``."""

    def about(self) -> dict[str, Any]:
        """:return: Fields of the record."""
        weights = sum(int(np.prod(self.llama.shape.linears[name])) for _, name in self.names)
        return {"weight_count": weights, "weight_bytes": self.weight_bytes}

    def check(self, rows: int) -> None:
        """Compare some rows of a call with numpy.

        :param rows: Rows of the call.
        :raises WrongResult: The engine computes something else.
        """
        if self._expected is None:
            self._expected = _with_numpy(self.llama, self.part, self._checked)
        x, at = self._activations(rows)
        linears = len(self.names) if self.part == ALL else 1
        for expected, y in zip(self._expected, self.run(x), strict=True):
            name = f"{type(self).__name__}, {self.llama.kind}, {self.part}, {rows} rows"
            check_network(name, expected[: len(at)], y[0, at], linears)

    def seconds(self, rows: int, calls: int) -> list[float]:
        """:return: Wall times of calls; untimed ones come first."""
        x, times = self._activations(rows)[0], []
        for _ in range(_WARMUP_CALLS + calls):
            start = time.perf_counter()
            self.run(x)
            times.append(time.perf_counter() - start)
        return times[_WARMUP_CALLS:]

    def _activations(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """:return: ``x [1, rows, K]``, and where in it the rows lie whose outputs are known."""
        x = np.random.default_rng([self.llama.seed, rows]).standard_normal((1, rows, self.inputs), np.float32)
        at = np.unique(np.linspace(0, rows - 1, _CHECKED_ROWS).astype(int))
        x[0, at] = self._checked[: len(at)]
        return x, at


class OpenVinoLinears(Linears):
    """OpenVINO, stock or packed.

    :param settings: OpenVINO's.
    :param packed: Whether our operations replace the stock layers.
    :raises UnfairComparison: The pass left a layer out.
    """

    def __init__(self, llama: RandomLlama, part: str, settings: Settings, packed: bool) -> None:
        super().__init__(llama, part)
        self._packed = packed
        model = stack(llama, part)
        if packed:
            self.weight_bytes = pack(model).bytes_after
        else:
            self.weight_bytes = sum(stock_bytes(llama.kind, *llama.shape.linears[name]) for _, name in self.names)
        self._compiled = compile_model(model, settings)
        self._request = self._compiled.create_infer_request()
        del model
        gc.collect()  # a compiled model holds the weights in its own form

    def run(self, x: np.ndarray) -> list[np.ndarray]:
        result = self._request.infer([x], share_inputs=True, share_outputs=True)
        return [result[port] for port in self._compiled.outputs]

    def about(self) -> dict[str, Any]:
        return super().about() | properties(self._compiled)

    def check(self, rows: int) -> None:
        super().check(rows)
        if not self._packed:  # primitives are known after the first call
            check_compressed(self._compiled, self.llama.kind, matmul_names(self.llama.shape, self.part))


class TorchLinears(Linears):
    """PyTorch in bf16, eager mode.

    :param threads: For torch.set_num_threads.
    """

    def __init__(self, llama: RandomLlama, part: str, threads: int) -> None:
        super().__init__(llama, part)
        import torch

        torch.set_num_threads(threads)
        self._torch = torch
        self._weights = {at: torch.from_numpy(llama.weight(*at).values).view(torch.bfloat16) for at in self.names}
        self.weight_bytes = sum(weight.nbytes for weight in self._weights.values())

    def run(self, x: np.ndarray) -> list[np.ndarray]:
        torch, functional = self._torch, self._torch.nn.functional
        with torch.inference_mode():
            outputs = network(
                *(self.llama.shape, self.part, torch.from_numpy(x).bfloat16()),
                linear=lambda h, i, name: functional.linear(h, self._weights[i, name]),
                add=torch.add,
                gated=lambda gate, up: functional.silu(gate) * up,
            )
            return [y.float().numpy() for y in outputs]


class OnnxLinears(Linears):
    """ONNX Runtime: MatMulNBits, 4 bits in blocks of 128, accuracy level 4 (activations in 8 bits).

    :param threads: Of its pool.
    """

    def __init__(self, llama: RandomLlama, part: str, threads: int) -> None:
        super().__init__(llama, part)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        model, self.weight_bytes = _onnx_model(llama, part)
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(self, x: np.ndarray) -> list[np.ndarray]:
        return self._session.run(None, {"x": x})


def _onnx_model(llama: RandomLlama, part: str) -> tuple[bytes, int]:
    """:return: A serialized model of int4 weights, and the bytes of codes and scales in it."""
    from onnx import TensorProto, helper

    nodes: list[Any] = []
    tensors: list[Any] = []

    def node(kind: str, *inputs: str, **attributes: Any) -> str:
        output = f"y{len(nodes)}"
        domain = "com.microsoft" if kind == "MatMulNBits" else ""
        nodes.append(helper.make_node(kind, list(inputs), [output], domain=domain, **attributes))
        return output

    def linear(x: str, layer: int, name: str) -> str:
        weight, at = llama.weight(layer, name), f"{layer}.{name}"
        assert weight.scales is not None
        n, k = weight.shape
        # Two codes a byte, low first, offset by 8: [N, blocks, bytes of a block].
        codes = (weight.values + 8).astype(np.uint8)
        packed = (codes[:, 0::2] | codes[:, 1::2] << 4).tobytes()
        scales = weight.scales.astype(np.float32)
        shape = [n, k // weight.group, weight.group // 2]
        tensors.append(helper.make_tensor(f"{at}.codes", TensorProto.UINT8, shape, packed, raw=True))
        tensors.append(helper.make_tensor(f"{at}.scales", TensorProto.FLOAT, scales.shape, scales.tobytes(), raw=True))
        attributes = {"N": n, "K": k, "bits": 4, "block_size": weight.group, "accuracy_level": 4}
        return node("MatMulNBits", x, f"{at}.codes", f"{at}.scales", **attributes)

    outputs = network(
        *(llama.shape, part, "x", linear),
        add=lambda a, b: node("Add", a, b),
        gated=lambda gate, up: node("Mul", node("Mul", gate, node("Sigmoid", gate)), up),
    )
    inputs = llama.shape.linears[matrices(llama.shape, part)[0][1]][1]
    graph = helper.make_graph(
        nodes,
        "linears",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "rows", inputs])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "rows", None]) for name in outputs],
        tensors,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return model.SerializeToString(), sum(len(tensor.raw_data) for tensor in tensors)


def _with_numpy(llama: RandomLlama, part: str, x: np.ndarray) -> list[np.ndarray]:
    """:return: Outputs ``[rows, N]`` of the network in float32."""
    return network(
        *(llama.shape, part, x),
        linear=lambda h, i, name: h @ llama.weight(i, name).dequantize().T,
        add=np.add,
        gated=lambda gate, up: gate / (1 + np.exp(-gate)) * up,
    )
