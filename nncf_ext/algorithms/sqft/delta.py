"""
The product of inputs with a base weight plus its masked adapter, computed as the merged model will compute it.

The merged weight is ``W + s (B A) * M``; on a grid, the grid point nearest to it. In the backward, rounding counts as
the identity (straight-through estimator). No ``[out, in]`` matrix is kept for the backward: it is computed once more
from what a plain adapter keeps as well (inputs, A and B) and from the mask, one bit a weight.

Source: SQFT, arXiv 2410.03750, sections 3.2 (SparsePEFT) and 3.3 (QA-SparsePEFT).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from nncf_ext.weights.int4 import HIGHEST_CODE, LOWEST_CODE, dequantize, round_to_grid

# Elements of the pieces of [rows, in] matrices that are in work at a time.
_BLOCK_ON_CPU, _BLOCK_ELSEWHERE = 1 << 18, 1 << 24


def pack_mask(mask: Tensor) -> Tensor:
    """
    :param mask: Boolean ``[rows, columns]``.
    :return: The same, eight columns in a byte, ``[rows, ceil(columns / 8)]`` uint8.
    """
    padded = pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8))
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.reshape(mask.shape[0], -1, 8) * bits).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, columns: int) -> Tensor:
    """
    :param packed: From :func:`pack_mask`.
    :param columns: Number of columns.
    :return: Boolean ``[rows, columns]``.
    """
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> bits & 1).bool().flatten(1)[:, :columns]


@dataclass(frozen=True)
class MergedWeight:
    """
    A base weight, its adapter, and what becomes of both together.

    All arithmetic is float32 (float64 if A is), whatever autocast would choose; only ``B A`` is summed up in float64
    and then rounded. So the last bit of an entry does not depend on the shape of the matrix product, the number of
    threads or the device: merging finds the same codes as the forward.

    :param weight: W ``[out, in]``, floating.
    :param mask: M, packed, ``[out, ceil(in / 8)]`` uint8.
    :param lora_A: A ``[r, in]``.
    :param lora_B: B ``[out, r]``.
    :param scaling: s.
    :param scales: Scales of the grid ``[out, groups]``, used as float16; None without a grid.
    """

    weight: Tensor
    mask: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    scales: Tensor | None = None

    @property
    def precision(self) -> torch.dtype:
        """Type of the arithmetic."""
        return torch.float64 if self.lora_A.dtype == torch.float64 else torch.float32

    def blocks(self) -> Iterator[slice]:
        """
        :return: Runs of rows that are worked on one after the other.
        """
        rows, columns = self.weight.shape
        elements = _BLOCK_ON_CPU if self.weight.device.type == "cpu" else _BLOCK_ELSEWHERE
        step = max(1, elements // columns)
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def kept(self, rows: slice) -> Tensor:
        """
        :param rows: Some rows.
        :return: M, boolean ``[rows, in]``.
        """
        return unpack_mask(self.mask[rows], self.weight.shape[1])

    def delta(self, rows: slice) -> Tensor:
        """
        :param rows: Some rows.
        :return: ``s (B A) * M``, ``[rows, in]``.
        """
        product = (self.lora_B[rows].double() @ self.lora_A.double()).to(self.precision)
        return product.mul_(self.scaling).mul_(self.kept(rows))  # on CPUs six times as fast as masked_fill_

    def sum(self, rows: slice) -> Tensor:
        """
        :param rows: Some rows.
        :return: ``W + s (B A) * M`` before any rounding, ``[rows, in]``.
        """
        return self.weight[rows].to(self.precision) + self.delta(rows)

    def codes(self) -> Tensor:
        """
        :return: Codes of the merged weight on the grid, ``[out, in]`` int8.
        """
        return torch.cat([self._codes(rows) for rows in self.blocks()])

    def _codes(self, rows: slice) -> Tensor:
        assert self.scales is not None  # who asks for codes has a grid
        return round_to_grid(self.sum(rows).float(), self.scales[rows].half())

    def values(self, dtype: torch.dtype) -> Tensor:
        """
        :param dtype: Type of the result.
        :return: The weight that the merged model holds, ``[out, in]``: rounded to the grid, and to the type of W.
        """
        result = torch.empty_like(self.weight, dtype=dtype)
        for rows in self.blocks():
            if self.scales is None:
                merged = self.sum(rows)
            else:
                merged = dequantize(self._codes(rows), self.scales[rows].half())
            result[rows] = merged.to(self.weight.dtype)
        return result

    def deltas(self, dtype: torch.dtype) -> Tensor:
        """
        :param dtype: Type of the result.
        :return: ``s (B A) * M``, ``[out, in]``.
        """
        result = torch.empty_like(self.weight, dtype=dtype)
        for rows in self.blocks():
            result[rows] = self.delta(rows)
        return result

    def through_scales(self, rows: slice, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """
        The gradient on its way back through rounding to a grid whose scales are trained.

        With w the weight before rounding and c its code, the rounded weight is ``c * scale``, where
        ``c = clamp(round(w / scale))``. Inside of the grid, with the derivative of round() taken as 1, its derivative
        by w is 1, and by the scale ``c - w / scale``. Outside, c is constant: 0 by w, and c by the scale.

        :param rows: Some rows.
        :param gradient: Gradient of the rounded weight ``[rows, in]``.
        :return: Gradient of the weight before rounding ``[rows, in]`` and of the scales ``[rows, groups]``.

        Source: Esser et al., Learned Step Size Quantization (arXiv 1902.08153), section 2.1.
        """
        assert self.scales is not None
        scales = self.scales[rows].half().to(self.precision).unsqueeze(-1)
        position = self.sum(rows).reshape(*scales.shape[:2], -1) / scales
        codes = position.round().clamp(LOWEST_CODE, HIGHEST_CODE)
        inside = (position >= LOWEST_CODE - 0.5) & (position <= HIGHEST_CODE + 0.5)
        grouped = gradient.reshape(position.shape)
        slope = torch.where(inside, codes - position, codes)
        return (grouped * inside).reshape(gradient.shape), (grouped * slope).sum(-1)


class MergedLinear(torch.autograd.Function):
    """
    ``x V^T + b``, V being the merged weight; with dropout, ``x V^T + (dropout(x) - x) D^T + b``, D being its delta.

    Dropout is for the adapter's part alone, as in LoRA: ``x W^T + dropout(x) D^T``. On a grid there is no such part,
    since W and D are rounded together; so what dropout changes is added to the whole product. Without a grid both
    are the same.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scales: Tensor | None,
        weight: Tensor,
        mask: Tensor,
        bias: Tensor | None,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        """
        :param ctx: Autograd context.
        :param x: Inputs ``[.., in]``.
        :param lora_A: A ``[r, in]``.
        :param lora_B: B ``[out, r]``.
        :param scales: Scales ``[out, groups]`` or None. If they take a gradient, that of A and B is zero where the sum
            of base and delta lies outside of the grid.
        :param weight: W ``[out, in]``, no gradient.
        :param mask: M, packed.
        :param bias: b ``[out]`` in the type of x, or None.
        :param scaling: s.
        :param dropout: Fraction of inputs that the delta does not see, 0..1.
        :return: ``[.., out]``, in the type of x.
        """
        merged = MergedWeight(weight, mask, lora_A, lora_B, scaling, scales)
        kept = None
        result = linear(x, merged.values(x.dtype), bias)
        if dropout > 0:
            kept = pack_mask(torch.rand(x.shape[:-1].numel(), x.shape[-1], device=x.device) >= dropout)
            result += (x * _excess(kept, dropout, x)) @ merged.deltas(x.dtype).T
        ctx.save_for_backward(x, lora_A, lora_B, scales, weight, mask, kept)
        ctx.scaling, ctx.dropout = scaling, dropout
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """
        :param ctx: Autograd context.
        :param grad: Gradient of the outputs ``[.., out]``.
        :return: Gradients of x, A, B, the scales and b.
        """
        x, lora_A, lora_B, scales, weight, mask, kept = ctx.saved_tensors
        merged = MergedWeight(weight, mask, lora_A, lora_B, ctx.scaling, scales)
        excess = None if kept is None else _excess(kept, ctx.dropout, x)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ merged.values(x.dtype)
            if excess is not None:
                grad_x += (grad @ merged.deltas(x.dtype)) * excess
        trained = ctx.needs_input_grad[3]
        grad_A = torch.zeros_like(lora_A, dtype=merged.precision)
        grad_B = torch.zeros_like(lora_B, dtype=merged.precision)
        grad_scales = torch.zeros_like(scales) if trained else None
        outputs, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        # With G the gradient of the outputs, that of V is G^T x, and D has G^T (dropout(x) - x) besides. V is W + D up
        # to rounding, which counts as the identity: together G^T dropout(x), one product. Where scales are trained,
        # only the part of V goes back through rounding, so the two are computed one by one.
        seen = inputs if excess is None or trained else (x * (1 + excess)).reshape(inputs.shape)
        unseen = (x * excess).reshape(inputs.shape) if excess is not None and trained else None
        for rows in merged.blocks():
            part = outputs[:, rows].T
            of_sum = (part @ seen).to(merged.precision)
            if grad_scales is not None:
                of_sum, grad_scales[rows] = merged.through_scales(rows, of_sum)
            if unseen is not None:
                of_sum += (part @ unseen).to(merged.precision)
            # D = s (B A) * M, so B A has s M * of_sum, and of that B gets the product with A^T, and A that with B^T.
            of_delta = of_sum.mul_(merged.kept(rows)).mul_(ctx.scaling)
            grad_B[rows] = of_delta @ lora_A.to(merged.precision).T
            grad_A += lora_B[rows].to(merged.precision).T @ of_delta
        grad_bias = outputs.sum(0) if ctx.needs_input_grad[6] else None
        return (
            grad_x,
            grad_A.to(lora_A.dtype),
            grad_B.to(lora_B.dtype),
            grad_scales,
            None,
            None,
            grad_bias,
            None,
            None,
        )


def _excess(kept: Tensor, dropout: float, x: Tensor) -> Tensor:
    """``dropout(x) / x - 1``, in the shape of x: -1 where an input was dropped, elsewhere what it is scaled up by."""
    seen = unpack_mask(kept, x.shape[-1]).to(x.dtype).div_(max(1 - dropout, 1e-9))
    return seen.sub_(1).reshape(x.shape)
