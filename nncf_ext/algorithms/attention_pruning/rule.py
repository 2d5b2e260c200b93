"""What is left of keys and values that were pruned and packed: the rule of ``SparseKVAttention``, in torch."""

import math
from typing import Literal, get_args

import nncf
import torch
from torch import Tensor

Values = Literal["int8", "int4"]
PAGE = 64  # tokens that are packed together
MOST_PRUNED = 0.9
_SMALLEST = 2.0**-120  # a token whose largest magnitude is below becomes zero


def check_rule(level: float, values: str, sink: int, recent: int) -> None:
    """
    :param level: As for :func:`prune_tokens`, like the others.
    :param values: How the rest is stored.
    :param sink: First tokens that stay.
    :param recent: Last tokens that stay.
    :raises nncf.ValidationError: One of them is out of range.
    """
    if values not in get_args(Values):
        raise nncf.ValidationError(f"values must be int8 or int4, got {values!r}.")
    if not 0 <= level <= MOST_PRUNED or sink < 0 or recent < 0:
        msg = (
            f"A level is a fraction between 0 and {MOST_PRUNED}, sink and recent are numbers of tokens; got {level}, "
            f"{sink} and {recent}."
        )
        raise nncf.ValidationError(msg)


def packed_tokens(tokens: int, sink: int, recent: int) -> slice:
    """
    :param tokens: Length of a sequence.
    :param sink: First tokens that stay dense.
    :param recent: Last tokens that stay dense; up to 63 more do.
    :return: Which tokens are pruned and packed.
    """
    return slice(sink, sink + max(0, tokens - sink - recent) // PAGE * PAGE)


def prune_tokens(x: Tensor, level: float, *, values: Values = "int8", sink: int = 4, recent: int = 64) -> Tensor:
    """
    Of each token's key, or value, the elements of the largest magnitude stay, rounded to 8 or 4 bits with one scale for
    each token and head. Magnitudes are compared as bfloat16, cut off; among equals the lower index stays.

    :param x: ``[sequences, heads, tokens, head_dim]``, keys or values.
    :param level: Fraction of each token that is pruned, 0..0.9.
    :param values: How the rest is stored.
    :param sink: First tokens that stay as they are.
    :param recent: Last tokens that stay as they are; up to 63 more do.
    :return: What attention sees of them, in the type of ``x``; a token with what is not finite becomes NaN.
    :raises nncf.ValidationError: A value is out of range.
    """
    check_rule(level, values, sink, recent)
    packed = packed_tokens(x.shape[2], sink, recent)
    part = x[:, :, packed].float()
    magnitude = part.contiguous().view(torch.int32) >> 16 & 0x7FFF
    order = magnitude.argsort(dim=-1, descending=True, stable=True)
    dropped = order[..., x.shape[-1] - math.floor(x.shape[-1] * level) :]
    peak = part.abs().amax(-1, keepdim=True)
    step = peak / (127 if values == "int8" else 8)
    codes = (part / step).round()
    if values == "int4":  # there is no level 0
        codes = torch.where(codes == 0, torch.where(part < 0, -1.0, 1.0), codes)
    codes.scatter_(-1, dropped, 0.0)
    result = x.clone()
    result[:, :, packed] = torch.where(peak < _SMALLEST, 0.0, codes * step).to(x.dtype)
    return result
