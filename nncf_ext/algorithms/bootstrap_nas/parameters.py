"""What can be asked of a super-network: which sizes there are to choose from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import nncf


@dataclass(frozen=True)
class AdvancedBootstrapNasParameters:
    """
    Widths are counted in channels. By default they fall from the whole width in steps: 64, 32 of 64. Where a unit is
    several channels (heads, groups), a width that is no whole number of units is rounded down to one.

    :param min_width: No width is smaller, channels.
    :param width_step: From one width to the next, channels.
    :param width_multipliers: Fractions of the whole width to use in place of steps, such as ``[1, 0.75, 0.5]``.
    :param multiple: Widths of multipliers are rounded down to a multiple of this, which kernels like, channels.
    :param max_num_widths: How many widths a dimension has at most, the largest ones; None: all.
    :param widths: The widths of some dimensions, by name, in place of all rules: channels, the whole width first. The
        last one may be 0 where a branch can be left out as a whole: in encoders that have a record.
    :param max_num_kernels: How many sizes a kernel has at most, the largest ones; None: all.
    :raises nncf.ValidationError: A number is not positive, or multipliers are not in (0, 1].
    """

    min_width: int = 32
    width_step: int = 32
    width_multipliers: Sequence[float] | None = None
    multiple: int = 8
    max_num_widths: int | None = None
    widths: Mapping[str, Sequence[int]] = field(default_factory=dict)
    max_num_kernels: int | None = None

    def __post_init__(self) -> None:
        for name in ("min_width", "width_step", "multiple", "max_num_widths", "max_num_kernels"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                msg = f"{name} must be a positive integer; got {value!r}."
                raise nncf.ValidationError(msg)
        if self.width_multipliers is not None:
            if not self.width_multipliers or not all(0 < each <= 1 for each in self.width_multipliers):
                msg = f"width_multipliers must be fractions above 0 and up to 1; got {self.width_multipliers!r}."
                raise nncf.ValidationError(msg)


def width_list(width: int, parameters: AdvancedBootstrapNasParameters) -> list[int]:
    """
    :param width: The whole width, channels.
    :param parameters: The rules.
    :return: The widths to choose from, the whole first, channels.
    Source: BootstrapNAS, arXiv 2112.10878; its rules in NNCF up to 2.19.
    """
    if width <= parameters.min_width:
        return [width]
    if parameters.width_multipliers is None:
        found = list(range(width, parameters.min_width - 1, -parameters.width_step))
    else:
        scaled = (int(width * each) for each in sorted(parameters.width_multipliers, reverse=True) if each < 1)
        rounded = [max(each - each % parameters.multiple, parameters.min_width) for each in scaled]
        found = list(dict.fromkeys([width, *(each for each in rounded if each < width)]))
    return found[: parameters.max_num_widths]


def unit_list(
    name: str, size: int, granularity: int, parameters: AdvancedBootstrapNasParameters, can_go: bool = False
) -> list[int]:
    """
    :param name: Name of a dimension.
    :param size: Its units.
    :param granularity: Channels of a unit.
    :param parameters: The rules.
    :param can_go: It can be left out as a whole.
    :return: The numbers of units to choose from, all of them first.
    :raises nncf.ValidationError: The widths given for it do not begin with the whole, rise, or are not whole units.
    """
    width = size * granularity
    if name not in parameters.widths:
        return list(dict.fromkeys(max(each // granularity, 1) for each in width_list(width, parameters)))
    given = list(parameters.widths[name])
    falls = given and given[0] == width and sorted({*given}, reverse=True) == given
    sound = falls and given[-1] >= (0 if can_go else 1)
    if not sound or any(each % granularity for each in given):
        msg = (
            f"widths of {name} must fall from {width} in multiples of {granularity}, in channels; got {given}. "
            f"Its unit is {granularity} channels{', and 0 leaves it out' if can_go else ''}."
        )
        raise nncf.ValidationError(msg)
    return [each // granularity for each in given]


def kernel_list(kernel: int, padding: int, parameters: AdvancedBootstrapNasParameters) -> list[int]:
    """
    :param kernel: Size of a square kernel, odd.
    :param padding: Its padding.
    :return: The sizes to choose from, the largest first: the output keeps its size, so each step takes one from the
        padding, and 3 is the smallest.
    """
    return list(range(kernel, max(kernel - 2 * padding, 3) - 1, -2))[: parameters.max_num_kernels] or [kernel]
