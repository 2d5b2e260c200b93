"""How a weight can be stored: bits, zeros, or not at all."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import nncf

_SCALE_BITS = 16  # of one float16 scale
_BITS = (16, 8, 4)
_NAME = re.compile(r"(?P<bits>float16|int8|int4)(-g(?P<group>\d{1,4}))?(-s(?P<zeros>\d{1,2}(\.\d+)?))?")
REMOVED = 0
"""The size of what is not there."""


@dataclass(frozen=True)
class WeightForm:
    """
    :param bits: Of a weight: 16 (as the model has it, floating), 8 (INT8, one scale a row) or 4 (INT4 with groups).
    :param sparsity: Fraction of zeros, 0..0.95; where there are any, one more bit a weight says where.
    :param group_size: Input columns of INT4 that share a scale, 64 or 128.
    :raises nncf.ValidationError: There is no such form.
    """

    bits: int
    sparsity: float = 0.0
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.bits not in _BITS or not 0 <= self.sparsity <= 0.95 or self.group_size not in (64, 128):
            msg = (
                f"A form has 16, 8 or 4 bits, a fraction of zeros from 0 to 0.95, and groups of 64 or 128 columns; "
                f"got {self.bits}, {self.sparsity} and {self.group_size}."
            )
            raise nncf.ValidationError(msg)

    @property
    def size(self) -> int:
        """Thousandths of a bit that one weight takes: the form's size in a search space. Row scales are left out."""
        kept = self.bits * (1 - self.sparsity)
        return round(1000 * (kept + (self.sparsity > 0) + (_SCALE_BITS / self.group_size if self.bits == 4 else 0)))

    def __str__(self) -> str:
        kind = {16: "float16", 8: "int8", 4: f"int4-g{self.group_size}"}[self.bits]
        return f"{kind}-s{100 * self.sparsity:g}" if self.sparsity else kind

    @staticmethod
    def parse(text: str) -> "WeightForm":
        """
        :param text: As ``str(form)`` gives it: ``"float16"``, ``"int8-s50"``, ``"int4-g64-s30"``; also ``"int4"``.
        :return: The form.
        :raises nncf.ValidationError: It names none.
        """
        found = _NAME.fullmatch(text.strip())
        if found is None or (found["group"] and found["bits"] != "int4"):
            msg = f"A form is named as float16, int8, int8-s50, int4-g64 or int4-g64-s30; got {text!r}."
            raise nncf.ValidationError(msg)
        bits = {"float16": 16, "int8": 8, "int4": 4}[found["bits"]]
        return WeightForm(bits, float(found["zeros"] or 0) / 100, int(found["group"] or 64))


DENSE = WeightForm(16)
"""A weight as it was."""
FORMS = (
    DENSE,
    WeightForm(8),
    WeightForm(8, 0.5),
    WeightForm(4),
    WeightForm(4, 0.3),
    WeightForm(4, 0.5),
)
"""What is tried by default."""


def by_size(forms: Iterable[WeightForm]) -> dict[int, WeightForm]:
    """
    :param forms: Forms.
    :return: They by their sizes, largest first.
    :raises nncf.ValidationError: There is none, or two take the same number of bits.
    """
    found: dict[int, WeightForm] = {}
    for form in sorted(forms, key=lambda each: each.size, reverse=True):
        if form.size in found:
            msg = f"{form} and {found[form.size]} take {form.size / 1000:g} bits a weight, both. Leave out one of them."
            raise nncf.ValidationError(msg)
        found[form.size] = form
    if not found:
        raise nncf.ValidationError("There is no form to choose from.")
    return found
