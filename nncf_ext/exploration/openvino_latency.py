"""How long does the network of a point take in OpenVINO?"""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import nncf
import numpy as np

from nncf_ext.exploration.objectives import Measured, NetworkObjective, Objective, call_arguments
from nncf_ext.exploration.operator_table import OperatorTable
from nncf_ext.exploration.space import Elastic, Point
from nncf_ext.noise import logging_as_it_was

logger = logging.getLogger("nncf_ext")

_TURN = 0.004
"""Seconds of one turn: small networks run several times in it."""
_WARM_UP = 3
_ATTEMPTS = 3
_BUSY = 0.1
"""A machine whose repeated timings differ by this share (median absolute deviation) is busy with something else."""
_FIRST, _EVERY = 4, 8
"""With a table: so many networks are timed whole at first, and then one of so many."""


def latency(
    device: str = "CPU",
    *,
    example_input: Any = None,
    config: Mapping[str, Any] | None = None,
    convert: Callable[[Any], Any] | None = None,
    rounds: int = 15,
    table: bool = False,
) -> NetworkObjective:
    """
    Milliseconds of one call of the extracted network in OpenVINO, to minimize, under the name "latency".

    Each network is timed in turns with the full one. Its time is the median ratio of neighbouring turns, times what
    the full network took at the beginning, so that a clock that drifts does not matter; the spread is the median
    absolute deviation. If the machine seems busy, there are up to three times as many rounds; if it stays so, a warning
    and the report say it. Networks of the same operations and shapes are timed once.

    :param device: OpenVINO's name of the device.
    :param example_input: Input of the network, which fixes all shapes: a tensor, a tuple of positional or a dictionary
        of named arguments. None for ``net.example_input``.
    :param config: Properties for ``compile_model``, such as ``{"INFERENCE_NUM_THREADS": 1}``. The performance hint is
        LATENCY unless it is among them.
    :param convert: Makes an ``openvino.Model`` of an extracted network, such as one that also quantizes. None for
        ``openvino.convert_model`` with the example.
    :param rounds: Turns of each network, at least 3.
    :param table: Predict the time of most networks: the sum of what their operations took, each shape profiled once,
        plus what calls take beside. The first networks and one of eight later ones are timed whole; the report tells
        by how much predictions were off.
    :return: The objective.
    :raises nncf.ValidationError: There are too few rounds; when the search begins: there is no example, or no such
        device.
    :raises nncf.UnsupportedModelError: While measuring: a network cannot be converted.
    """
    if rounds < 3:
        msg = f"The median of a timing takes at least 3 rounds; got {rounds}."
        raise nncf.ValidationError(msg)

    def make(net: Elastic) -> Objective:
        timer = _Timer(net, device, example_input, {"PERFORMANCE_HINT": "LATENCY", **(config or {})}, convert, rounds)
        function = _Predicted(timer) if table else timer
        return Objective("latency", function, maximize=False, conditions=timer.conditions, note=function.note)

    return NetworkObjective("latency", make)


class _Timer:
    """Times whole networks against the full one."""

    def __init__(
        self,
        net: Elastic,
        device: str,
        example_input: Any,
        config: dict[str, Any],
        convert: Callable[[Any], Any] | None,
        rounds: int,
    ) -> None:
        import openvino

        self._net, self._device, self._config, self._rounds = net, device, config, rounds
        self._convert = convert
        self._arguments, self._named = call_arguments(net, example_input, "latency")
        self._core = openvino.Core()
        try:
            name = self._core.get_property(device, "FULL_DEVICE_NAME")
        except RuntimeError as error:
            msg = f"OpenVINO has no device {device!r} here; there are {self._core.available_devices}."
            raise nncf.ValidationError(msg) from error
        shapes = [tuple(each.shape) for each in self._tensors().values()]
        made = "" if convert is None else f", made by {getattr(convert, '__qualname__', type(convert).__name__)}"
        self.conditions = f"{name}, OpenVINO {openvino.__version__}, {config}, inputs {shapes}{made}"
        self._found: dict[str, Measured] = {}
        self._reference: Callable[[], float] | None = None
        self._baseline = 0.0
        self._busy = 0

    def __call__(self, point: Point) -> float:
        return self.timed(self.graph(point))

    def note(self) -> str | None:
        if not self._busy:
            return None
        return (
            f"latency: the machine was busy. Repeated timings of {self._busy} of {len(self._found)} networks differ "
            f"by more than {_BUSY:.0%}"
        )

    def graph(self, point: Point) -> Any:
        """
        :return: The network of a point as an ``openvino.Model`` with the shapes of the example.
        """
        import openvino

        model = self._net.extract(point)
        try:
            if self._convert is not None:
                return self._convert(model)
            model.eval()
            with logging_as_it_was():
                graph = openvino.convert_model(model, example_input=self._named or self._arguments)
            tensors = self._tensors()
            shapes = {port: list(tensors[_key(port, place, tensors)].shape) for place, port in enumerate(graph.inputs)}
            graph.reshape({port: openvino.PartialShape(shape) for port, shape in shapes.items()})
            return graph
        except Exception as error:
            msg = (
                f"The network of {point} cannot be converted to OpenVINO ({type(error).__name__}: {error}). Give "
                "latency() a function convert= that makes an openvino.Model of it."
            )
            raise nncf.UnsupportedModelError(msg) from error

    def timed(self, graph: Any) -> Measured:
        """
        :return: Milliseconds of a network, measured once for each signature.
        """
        key = signature(graph)
        if key not in self._found:
            if self._reference is None:
                self._reference = self._turn(self.compiled(self.graph(self._net.space.maximal())))
                self._baseline = median(self._reference() for _ in range(self._rounds))
            self._found[key] = self._against_reference(self._turn(self.compiled(graph)), self._reference)
        return self._found[key]

    def known(self, graph: Any) -> bool:
        """
        :return: Whether a network like this one has been timed.
        """
        return signature(graph) in self._found

    def compiled(self, graph: Any, **more: Any) -> Any:
        """
        :return: An inference request with its inputs set.
        """
        request = self._core.compile_model(graph, self._device, {**self._config, **more}).create_infer_request()
        tensors = self._tensors()
        for place, port in enumerate(graph.inputs):
            given = tensors[_key(port, place, tensors)]
            request.get_input_tensor(place).data[:] = given
        return request

    def _against_reference(self, candidate: Callable[[], float], reference: Callable[[], float]) -> Measured:
        ratios: list[float] = []
        for _ in range(_ATTEMPTS):
            for number in range(self._rounds):
                if number % 2:
                    mine, full = candidate(), reference()
                else:
                    full, mine = reference(), candidate()
                ratios.append(mine / full)
            middle = median(ratios)
            spread = median(abs(ratio - middle) for ratio in ratios)
            if spread <= _BUSY * middle:
                break
        else:
            self._busy += 1
            if self._busy == 1:
                logger.warning(
                    "Repeated timings differ by %.0f %%: this machine is busy with something else.",
                    100 * spread / middle,
                )
        return Measured(middle * self._baseline, spread * self._baseline)

    def _turn(self, request: Any) -> Callable[[], float]:
        """Milliseconds of a call, the mean over one turn."""
        for _ in range(_WARM_UP):
            request.infer()
        begin = time.perf_counter()
        request.infer()
        calls = max(1, round(_TURN / (time.perf_counter() - begin)))

        def turn() -> float:
            begin = time.perf_counter()
            for _ in range(calls):
                request.infer()
            return (time.perf_counter() - begin) / calls * 1000

        return turn

    def _tensors(self) -> dict[Any, np.ndarray]:
        """Arrays of the example by place or name."""
        given: dict[Any, Any] = {**self._named, **dict(enumerate(self._arguments))}
        return {key: np.asarray(value) for key, value in given.items() if hasattr(value, "shape")}


class _Predicted:
    """Predicts most networks from a table of operations, times the others, and keeps account of the difference."""

    def __init__(self, timer: _Timer) -> None:
        self._timer = timer
        self._table = OperatorTable(lambda graph: timer.compiled(graph, PERF_COUNT=True), operation_key)
        self._values: dict[str, Measured] = {}
        self._timed: list[tuple[float, float]] = []  # sum of operations, whole network
        self._errors: list[float] = []
        self._predictions = 0

    def __call__(self, point: Point) -> float:
        graph = self._timer.graph(point)
        key = signature(graph)
        if key not in self._values:
            number = len(self._values)
            total = self._table.total(graph)
            predicted = self._whole(total)
            if number < _FIRST or number % _EVERY == 0:
                whole = self._timer.timed(graph)
                if number >= _FIRST:
                    self._errors.append(abs(predicted / whole - 1))
                self._timed.append((total, float(whole)))
                self._values[key] = whole
            else:
                self._predictions += 1
                off = median(self._errors) if self._errors else 0.0
                self._values[key] = Measured(predicted, off * predicted)
        return self._values[key]

    def _whole(self, total: float) -> float:
        """The time of a network whose operations sum to a total: what comes on top is the same for all of them."""
        if not self._timed:
            return total
        besides = median(whole - operations for operations, whole in self._timed)
        if besides >= 0:
            return total + besides
        # Operations timed one by one took longer than all in a row; a difference could come out below zero.
        return total * median(whole / operations for operations, whole in self._timed)

    def note(self) -> str:
        count, total = self._predictions, len(self._values)
        text = f"latency: {count} of {total} networks predicted from {len(self._table)} operations"
        if self._errors:
            text += (
                f"; {len(self._errors)} others, timed whole to check, were off by {median(self._errors):.1%} in the "
                f"median, {max(self._errors):.1%} at most"
            )
        else:
            text += "; too few networks to check it"
        busy = self._timer.note()
        return f"{text}\n{busy}" if busy else text


def signature(graph: Any) -> str:
    """
    :param graph: An ``openvino.Model``.
    :return: A digest of its operations, their attributes and shapes and how they are connected. Constants count by
        their shapes, names not at all.
    """
    numbers: dict[str, int] = {}
    sha = hashlib.sha256()
    for number, operation in enumerate(graph.get_ordered_ops()):
        numbers[operation.get_name()] = number
        sources = [each.get_source_output() for each in operation.inputs()]
        origin = [(numbers[each.get_node().get_name()], each.get_index()) for each in sources]
        sha.update(repr((operation_key(operation), origin)).encode())
    return sha.hexdigest()


def operation_key(operation: Any) -> tuple[Any, ...]:
    """
    :param operation: An operation of an ``openvino.Model``.
    :return: What its time depends on: type, attributes, types and shapes of inputs and outputs.
    """
    ports = (*operation.inputs(), *operation.outputs())
    shapes = tuple((str(port.get_element_type()), str(port.get_partial_shape())) for port in ports)
    kind = operation.get_type_name()
    # A constant's attributes hold its values; those of inputs are names and layouts.
    attributes = {} if kind in ("Constant", "Parameter", "Result") else operation.get_attributes()
    return kind, str(sorted((name, str(value)) for name, value in attributes.items())), shapes


def _key(port: Any, place: int, tensors: Mapping[Any, Any]) -> Any:
    """Which array of the example goes to an input: the one of its name, else the one in its place."""
    return next((name for name in port.get_names() if name in tensors), place)
