"""A table of what operations cost in a compiled network, each by its type and shapes."""

from collections import defaultdict
from collections.abc import Callable, Hashable
from statistics import median
from typing import Any

_CALLS = 10


class OperatorTable:
    """
    Milliseconds of operations, as OpenVINO's own counters give them inside a network: an operation that is fused into
    another costs nothing. A network with an operation that is not in the table is profiled, and enters all of its own.

    :param profiled: Compiles an ``openvino.Model`` with performance counters: an inference request with inputs set.
    :param key: What the cost of an operation depends on.
    """

    def __init__(self, profiled: Callable[[Any], Any], key: Callable[[Any], Hashable]) -> None:
        self._profiled = profiled
        self._key = key
        self._costs: dict[Hashable, list[float]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._costs)

    def total(self, graph: Any) -> float:
        """
        :param graph: An ``openvino.Model``.
        :return: Milliseconds of all of its operations.
        """
        keys = {each.get_friendly_name(): self._key(each) for each in graph.get_ordered_ops() if _works(each)}
        if any(key not in self._costs for key in keys.values()):
            self._enter(graph, keys)
        return sum(median(self._costs[key]) for key in keys.values())

    def _enter(self, graph: Any, keys: dict[str, Hashable]) -> None:
        request = self._profiled(graph)
        calls: list[dict[str, float]] = []
        for _ in range(_CALLS):
            request.infer()
            calls.append({each.node_name: each.real_time.total_seconds() * 1000 for each in request.profiling_info})
        for name, key in keys.items():
            self._costs[key].append(median(call.get(name, 0.0) for call in calls))


def _works(operation: Any) -> bool:
    return operation.get_type_name() not in ("Constant", "Parameter", "Result")
