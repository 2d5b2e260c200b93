"""What is a point judged by?"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nncf

from nncf_ext.exploration.space import Elastic, Point


class Measured(float):
    """
    A value with its spread: what a function of an objective may return instead of a float.

    :param value: The value.
    :param spread: How far repeated measurements lie from it, in the same unit.
    """

    spread: float

    def __new__(cls, value: float, spread: float) -> "Measured":
        self = float.__new__(cls, value)
        self.spread = float(spread)
        return self


@dataclass(frozen=True)
class Objective:
    """
    One number to maximize or to minimize.

    :param name: Its name in reports and storage.
    :param function: Called with a point, which is active in the network at that time; returns a finite number. It may
        measure the network and ignore the point: ``Objective("accuracy", lambda point: accuracy(model))``.
    :param maximize: Whether more is better.
    :param conditions: What values depend on beside the point, such as the CPU: a storage holds values of the same
        conditions only.
    :param note: Called at the end of a search; returns a line for its report, or None.
    """

    name: str
    function: Callable[[Point], float]
    maximize: bool = True
    conditions: str = ""
    note: Callable[[], str | None] | None = None

    def __call__(self, point: Point) -> float:
        """
        :param point: The active point.
        :return: Its value.
        :raises nncf.ValidationError: The value is not a finite number.
        """
        value = self.function(point)
        if not math.isfinite(value):
            msg = f"{self.name} is {value} at {point}. Return a finite number; a large one for a failed point."
            raise nncf.ValidationError(msg)
        return value if isinstance(value, Measured) else float(value)

    def bind(self, net: Elastic) -> "Objective":
        """
        :param net: The network to search.
        :return: The objective for it.
        """
        return self


@dataclass(frozen=True)
class NetworkObjective:
    """
    An objective that has to know the network, which ``search`` tells it.

    :param name: See :class:`Objective`.
    :param make: Returns the objective for a network.
    """

    name: str
    make: Callable[[Elastic], Objective]

    def bind(self, net: Elastic) -> Objective:
        """
        :param net: The network to search.
        :return: The objective for it.
        """
        return self.make(net)


def macs(example_input: Any = None) -> NetworkObjective:
    """
    Multiplications and additions of the network of a point, to minimize, under the name "macs": those of matrix
    multiplications, convolutions and attention, of the whole batch.

    :param example_input: Input of the network: a tensor, a tuple of positional or a dictionary of named arguments. None
        for ``net.example_input``.
    :return: The objective.
    :raises nncf.ValidationError: When the search begins: there is no example.
    """

    def make(net: Elastic) -> Objective:
        arguments = call_arguments(net, example_input, "macs")
        return Objective("macs", lambda point: count_macs(net.extract(point), *arguments), maximize=False)

    return NetworkObjective("macs", make)


def parameter_count() -> NetworkObjective:
    """
    Parameters of the network of a point, to minimize, under the name "parameters"; shared ones count once.

    :return: The objective.
    """

    def make(net: Elastic) -> Objective:
        def count(point: Point) -> float:
            return sum(each.numel() for each in net.extract(point).parameters())

        return Objective("parameters", count, maximize=False)

    return NetworkObjective("parameters", make)


def weight_bytes() -> NetworkObjective:
    """
    Bytes of the parameters and buffers of the network of a point, to minimize, under the name "bytes"; shared ones
    count once.

    :return: The objective.
    """

    def make(net: Elastic) -> Objective:
        def count(point: Point) -> float:
            model = net.extract(point)
            return sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))

        return Objective("bytes", count, maximize=False)

    return NetworkObjective("bytes", make)


def call_arguments(net: Elastic, example_input: Any, what: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """
    :param net: An elastic network.
    :param example_input: What the user gave as example; None for that of the network.
    :param what: The objective, for the message.
    :return: Positional and named arguments of a call of the network.
    :raises nncf.ValidationError: There is no example.
    """
    example = getattr(net, "example_input", None) if example_input is None else example_input
    if example is None:
        msg = f"The objective {what!r} runs the network: give it an example_input (a tensor, a tuple or a dictionary)."
        raise nncf.ValidationError(msg)
    if isinstance(example, dict):
        return (), dict(example)
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


def count_macs(model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> float:
    """
    :param model: A model.
    :param arguments: Arguments of a call of it.
    :param named: Named ones.
    :return: Multiplications of that call: of matrix multiplications, convolutions and attention.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The fused attention of CPUs is not counted; its plain form is two batched multiplications.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*arguments, **named)
    return counter.get_total_flops() / 2
