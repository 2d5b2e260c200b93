"""Estimates the time of one token in a linear layer, in each form that the layer can have. Packing takes the fastest.

Decoding reads every weight once for each token. So the time of a form is the bytes it reads divided by the bandwidth
that its kernel reaches; or, where expanding the bitmap is slower than reading, the time of those instructions. Both are
stored as fractions of the machine's read bandwidth, measured by ``python -m benchmarks.matmul --sparsity 0 0.5 0.8``.
Only ratios between forms are used, and these hardly depend on the speed of the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Form = Literal["stock", "dense", "sparse"]


class Choice(NamedTuple):
    """The form that a layer gets.

    :param form: ``"stock"``: it stays as it is; ``"dense"``, ``"sparse"``: our operation without or with a bitmap.
    :param speedup: Expected time of stock / time of our best form at one token; None where nothing was estimated.
    :param reason: Why it stays stock; "" when it does not.
    """

    form: Form
    speedup: float | None
    reason: str


@dataclass(frozen=True)
class Rates:
    """Speed of the three forms of a layer at one token.

    :param stock: Fraction of the read bandwidth that stock OpenVINO reaches.
    :param dense: The same for our kernels on weights without a bitmap.
    :param sparse: The same for our kernels on weights with a bitmap.
    :param slowest_bytes: The least that one weight costs with a bitmap, because of the instructions that expand it:
        as the number of bytes that the machine reads in that time at full bandwidth.
    """

    stock: float
    dense: float
    sparse: float
    slowest_bytes: float


# By instruction set and value kind. AMX: two cores of a Xeon with AMX, where single tokens run on the AVX-512 kernels.
# AVX-512: two cores of Zen 4.
_AMX = {
    "bf16": Rates(stock=0.87, dense=0.95, sparse=0.80, slowest_bytes=0.54),
    "int8": Rates(stock=0.85, dense=0.87, sparse=0.80, slowest_bytes=0.20),
    "int4": Rates(stock=0.65, dense=0.87, sparse=0.80, slowest_bytes=0.20),
}
_AVX512 = {
    "bf16": Rates(stock=0.80, dense=1.00, sparse=0.97, slowest_bytes=0.50),
    "int8": Rates(stock=0.70, dense=0.93, sparse=0.70, slowest_bytes=0.58),
    "int4": Rates(stock=0.60, dense=0.79, sparse=0.73, slowest_bytes=0.51),
}
# Expanding a bitmap without AVX-512 takes three times the instructions. Stock is measured with oneDNN limited to the
# same instructions (``--isa avx2``, ``--isa avx2_vnni``); with AVX-VNNI its INT4 kernel is as fast as ours.
_AVX2 = {
    "bf16": Rates(stock=0.71, dense=0.90, sparse=0.80, slowest_bytes=0.87),
    "int8": Rates(stock=0.50, dense=0.87, sparse=0.80, slowest_bytes=0.60),
    "int4": Rates(stock=0.64, dense=0.87, sparse=0.80, slowest_bytes=0.60),
}
_AVX2_VNNI = {
    "bf16": _AVX2["bf16"],
    "int8": Rates(stock=0.97, dense=0.87, sparse=0.80, slowest_bytes=0.55),
    "int4": Rates(stock=0.95, dense=0.87, sparse=0.80, slowest_bytes=0.60),
}
RATES = {"amx": _AMX, "avx512": _AVX512, "avx2_vnni": _AVX2_VNNI, "avx2": _AVX2}

# One of our forms must be faster than stock by this factor at one token: a stock layer is as fast for prompts, and it
# needs no extension.
MARGIN = 1.1


def bytes_per_weight(form: Form, kind: str, zeros: float, group: int) -> float:
    """Bytes that one token reads.

    :param form: ``"stock"``, ``"dense"`` or ``"sparse"``.
    :param kind: ``"bf16"``, ``"int8"`` or ``"int4"``.
    :param zeros: Fraction of zeros, 0..1.
    :param group: Inputs that share a scale; 0 for one scale per output.
    :return: Bytes a weight, with scales (2 bytes) and, in a blob, compensation (2 bytes in each 64 or 128 inputs).
    """
    value = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}[kind]
    scales = 2 / group if group else 0.0
    if form == "stock":
        return value + scales
    compensation = 0.0 if kind == "bf16" else 2 / (group or 128)
    mask = 1 / 8 if form == "sparse" else 0.0
    return mask + value * (1 - (zeros if form == "sparse" else 0.0)) + scales + compensation


def costs(target: str, kind: str, zeros: float, group: int) -> dict[Form, float]:
    """Time of one token.

    :param target: Key of :data:`RATES`.
    :param kind: ``"bf16"``, ``"int8"`` or ``"int4"``.
    :param zeros: Fraction of zeros, 0..1.
    :param group: Inputs that share a scale; 0 for one scale per output.
    :return: For each form the time of one weight, as bytes that the machine reads meanwhile at full bandwidth.
    """
    rates = RATES[target][kind]
    time: dict[Form, float] = {
        "stock": bytes_per_weight("stock", kind, zeros, group) / rates.stock,
        "dense": bytes_per_weight("dense", kind, zeros, group) / rates.dense,
        "sparse": max(bytes_per_weight("sparse", kind, zeros, group) / rates.sparse, rates.slowest_bytes),
    }
    return time


def cheapest(target: str, kind: str, zeros: float, group: int) -> Choice:
    """Choose a form.

    :param target: Instruction set that will run the layer.
    :param kind: ``"bf16"``, ``"int8"`` or ``"int4"``.
    :param zeros: Fraction of zeros, 0..1.
    :param group: Inputs that share a scale; 0 for one scale per output.
    :return: The form, and why stock when it is stock.
    """
    if target not in RATES:
        return Choice("stock", None, f"there are no fast kernels for {target}")
    time = costs(target, kind, zeros, group)
    ours: Form = "sparse" if time["sparse"] < time["dense"] else "dense"
    ratio = time["stock"] / time[ours]
    if ratio >= MARGIN:
        return Choice(ours, ratio, "")
    needed = break_even(target, kind, group)
    hint = "no share of zeros helps" if needed is None else f"from {needed:.0%} zeros on ours is faster"
    return Choice("stock", ratio, f"{zeros:.0%} zeros would give {ratio:.2f}x stock, {hint} on {target}")


def break_even(target: str, kind: str, group: int) -> float | None:
    """:return: The smallest share of zeros, in whole percents, from which our kernel is used; None if there is none."""
    for percent in range(100):
        time = costs(target, kind, percent / 100, group)
        if time["stock"] / min(time["sparse"], time["dense"]) >= MARGIN:
            return percent / 100
    return None
