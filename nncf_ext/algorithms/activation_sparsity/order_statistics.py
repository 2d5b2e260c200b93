"""
Exact quantiles, and the peak of a density, of values that come in pieces and are not kept.

The values are read several times. A float32 number, as bits, sorts like an integer: the first reading counts the upper
halves of these integers, the second the lower halves of those that share the upper half of the one sought. So the
result is a value that occurs, whatever the order of the pieces, in memory that does not depend on their number.
"""

from collections.abc import Callable, Iterator, Sequence

import nncf
import torch
from torch import Tensor
from torch.nn.functional import conv1d

Reading = Callable[[Callable[[Tensor], None]], None]
"""Calls what it is given with each piece of the values, in any shape; the same values every time it is called."""

_HALF = 1 << 16
_PIECE = 1 << 22  # values that are looked at together: 30 bytes each
_BINS = 4096
_BANDWIDTH_SAMPLES = 100_000  # the published density is that of so many values
_NARROW = 0.5  # of Scott's bandwidth, as published


def quantiles(read: Reading, fractions: Sequence[float]) -> list[float]:
    """
    :param read: Gives the values.
    :param fractions: From 0 to 1.
    :return: For each fraction q, what stands at place ``q * (count - 1)`` of the sorted values, linear between two of
        them, as :func:`numpy.quantile` has it.
    :raises nncf.ValidationError: There are no values, or some are not finite.
    """
    upper = torch.zeros(_HALF, dtype=torch.int64)

    def count_upper(values: Tensor) -> None:
        for keys in _keys(values):
            upper.add_(torch.bincount(keys >> 16, minlength=_HALF).cpu())

    read(count_upper)
    ends = upper.cumsum(0)
    count = int(ends[-1])
    if not count:
        raise nncf.ValidationError("There are no values to take a quantile of.")
    places = [fraction * (count - 1) for fraction in fractions]
    ranks = sorted({rank for place in places for rank in (int(place), min(int(place) + 1, count - 1))})
    buckets = {rank: int(torch.searchsorted(ends, rank, right=True)) for rank in ranks}
    lower = {bucket: torch.zeros(_HALF, dtype=torch.int64) for bucket in buckets.values()}

    def count_lower(values: Tensor) -> None:
        for keys in _keys(values):
            halves = keys >> 16
            for bucket, counts in lower.items():
                counts.add_(torch.bincount(keys[halves == bucket] & (_HALF - 1), minlength=_HALF).cpu())

    read(count_lower)
    found = {}
    for rank, bucket in buckets.items():
        before = int(ends[bucket - 1]) if bucket else 0
        low = int(torch.searchsorted(lower[bucket].cumsum(0), rank - before, right=True))
        found[rank] = _value((bucket << 16) | low)
    result = []
    for place in places:
        rank = int(place)
        left, right = found[rank], found[min(rank + 1, count - 1)]
        result.append(left + (place - rank) * (right - left))
    return result


def density_peak(read: Reading) -> float:
    """
    :param read: Gives the values.
    :return: Where they are densest: the peak of a histogram of what lies between their quantiles 0.0005 and 0.9995,
        smoothed by half of Scott's bandwidth. Source: SCAP, arXiv 2412.07174, section 3.2.
    :raises nncf.ValidationError: There are no values, or some are not finite.
    """
    low, high = quantiles(read, (0.0005, 0.9995))
    if not low < high:
        return low
    counts = torch.zeros(_BINS, dtype=torch.float64)
    moments = torch.zeros(3, dtype=torch.float64)

    def note(values: Tensor) -> None:
        inside = values.detach().float().flatten()
        inside = inside[(inside >= low) & (inside <= high)]
        counts.add_(torch.histc(inside, _BINS, low, high).double().cpu())
        wide = inside.double()
        moments.add_(torch.stack([torch.ones_like(wide).sum(), wide.sum(), wide.square().sum()]).cpu())

    read(note)
    count, total, squares = moments.tolist()
    deviation = max(squares / count - (total / count) ** 2, 0.0) ** 0.5
    width = (high - low) / _BINS
    bandwidth = _NARROW * deviation * min(count, _BANDWIDTH_SAMPLES) ** -0.2
    reach = min(_BINS - 1, max(1, int(4 * bandwidth / width)))
    steps = torch.arange(-reach, reach + 1, dtype=torch.float64) * width
    kernel = torch.exp(-0.5 * (steps / max(bandwidth, width)) ** 2)
    density = conv1d(counts[None, None], kernel[None, None], padding=reach)[0, 0]
    peak = int(density.argmax())
    left, top, right = (float(density[min(max(peak + step, 0), _BINS - 1)]) for step in (-1, 0, 1))
    bend = left - 2 * top + right  # of the parabola through the three
    shift = 0.5 * (left - right) / bend if bend else 0.0
    return low + (peak + 0.5 + max(-0.5, min(shift, 0.5))) * width


def _keys(values: Tensor) -> Iterator[Tensor]:
    """Pieces of int64 ``[count]``, 0 to 2^32 - 1, in the order of the values."""
    for part in values.detach().flatten().split(_PIECE):
        flat = part.float()
        if not bool(flat.isfinite().all()):
            msg = "Values are not finite: the model overflows on its calibration data. Use float32."
            raise nncf.ValidationError(msg)
        bits = (flat + 0.0).view(torch.int32)  # -0.0 becomes 0.0
        yield (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() + (1 << 31)


def _value(key: int) -> float:
    bits = key - (1 << 31)
    if bits < 0:
        bits = bits ^ 0x7FFFFFFF
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
