"""
Products with a masked low-rank delta, and with a weight that is rounded to a grid after the delta was added.

Neither keeps an ``[out, in]`` matrix for the backward: it is computed once more, some output rows at a time, from what
a plain adapter keeps as well (inputs, A and B) and the mask, one bit a weight.

Source: SQFT, arXiv 2410.03750, sections 3.2 (SparsePEFT) and 3.3 (QA-SparsePEFT).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nncf_ext.structure.grid import HIGHEST_CODE, LOWEST_CODE, dequantize, round_to_grid

_BLOCK_ELEMENTS = 1 << 20  # of [rows, in] matrices: 4 MiB in float32


def pack_mask(mask: Tensor) -> Tensor:
    """
    :param mask: Boolean ``[out, in]``.
    :return: The same, eight columns in a byte, ``[out, ceil(in / 8)]`` uint8.
    """
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8))
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.reshape(mask.shape[0], -1, 8) * bits).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, columns: int) -> Tensor:
    """
    :param packed: From :func:`pack_mask`.
    :param columns: in.
    :return: Boolean ``[out, in]``.
    """
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> bits & 1).bool().flatten(1)[:, :columns]


def masked_delta(lora_A: Tensor, lora_B: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """
    :param lora_A: A ``[r, in]``.
    :param lora_B: B ``[out, r]``, or some of its rows.
    :param mask: Packed mask of the same rows.
    :param scaling: s.
    :return: ``s (B A) * M``, ``[out, in]`` in the type of A.
    """
    return (lora_B @ lora_A).mul_(scaling).masked_fill_(~unpack_mask(mask, lora_A.shape[1]), 0.0)


def merged_codes(
    weight: Tensor, scales: Tensor, lora_A: Tensor, lora_B: Tensor, mask: Tensor, scaling: float
) -> Tensor:
    """
    The codes of a base weight with its delta, as forward and backward compute them: in float32 whatever the types are,
    and by the same blocks of rows, because the last bit of a matrix product may depend on its shape.

    :param weight: Base weight ``[out, in]``.
    :param scales: Scales ``[out, groups]``, float16.
    :param lora_A: A ``[r, in]``.
    :param lora_B: B ``[out, r]``.
    :param mask: Packed mask.
    :param scaling: s.
    :return: Codes ``[out, in]``, int8.
    """
    blocks = _row_blocks(*weight.shape)
    return torch.cat([_codes(weight[rows], scales[rows], lora_A, lora_B[rows], mask[rows], scaling) for rows in blocks])


def _codes(weight: Tensor, scales: Tensor, lora_A: Tensor, lora_B: Tensor, mask: Tensor, scaling: float) -> Tensor:
    return round_to_grid(_merged(weight, lora_A, lora_B, mask, scaling), scales)


def _merged(weight: Tensor, lora_A: Tensor, lora_B: Tensor, mask: Tensor, scaling: float) -> Tensor:
    return weight.float() + masked_delta(lora_A.float(), lora_B.float(), mask, scaling)


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class MaskedLinear(torch.autograd.Function):
    """``x D^T`` with ``D = s (B A) * M``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, mask: Tensor, scaling: float) -> Tensor:
        """
        :param ctx: Autograd context.
        :param x: Inputs ``[.., in]``, in the type of A.
        :param lora_A: A ``[r, in]``.
        :param lora_B: B ``[out, r]``.
        :param mask: Packed mask, no gradient.
        :param scaling: s.
        :return: ``[.., out]``.
        """
        ctx.save_for_backward(x, lora_A, lora_B)
        ctx.mask, ctx.scaling = mask, scaling
        result = x.new_empty(*x.shape[:-1], lora_B.shape[0])
        for rows in _row_blocks(lora_B.shape[0], lora_A.shape[1]):
            result[..., rows] = x @ masked_delta(lora_A, lora_B[rows], mask[rows], scaling).T
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """
        :param ctx: Autograd context.
        :param grad: Gradient of the outputs ``[.., out]``.
        :return: Gradients of x, A and B.
        """
        x, lora_A, lora_B = ctx.saved_tensors

        def delta(rows: slice) -> Tensor:
            return masked_delta(lora_A, lora_B[rows], ctx.mask[rows], ctx.scaling)

        return *_gradients(ctx, grad, x, lora_A, lora_B, delta), None, None


class QuantizedLinear(torch.autograd.Function):
    """``x Q^T``, ``Q`` being the grid points nearest to ``W + s (B A) * M``; gradients pass the rounding straight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scales: Tensor,
        weight: Tensor,
        mask: Tensor,
        scaling: float,
    ) -> Tensor:
        """
        :param ctx: Autograd context.
        :param x: Inputs ``[.., in]``.
        :param lora_A: A ``[r, in]``.
        :param lora_B: B ``[out, r]``.
        :param scales: Scales ``[out, groups]``; rounded to float16. If they take a gradient, that of A and B is zero
            where the merged weight lies outside of the grid.
        :param weight: Base weight ``[out, in]``, no gradient.
        :param mask: Packed mask, no gradient.
        :param scaling: s.
        :return: ``[.., out]``, in the type of x.
        """
        ctx.save_for_backward(x, lora_A, lora_B, scales)
        ctx.weight, ctx.mask, ctx.scaling = weight, mask, scaling
        result = x.new_empty(*x.shape[:-1], lora_B.shape[0])
        for rows in _row_blocks(lora_B.shape[0], lora_A.shape[1]):
            steps = scales[rows].half()
            codes = _codes(weight[rows], steps, lora_A, lora_B[rows], mask[rows], scaling)
            result[..., rows] = x @ dequantize(codes, steps).to(x.dtype).T
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """
        :param ctx: Autograd context.
        :param grad: Gradient of the outputs ``[.., out]``.
        :return: Gradients of x, A, B and the scales.
        """
        x, lora_A, lora_B, scales = ctx.saved_tensors
        grad_scales = torch.zeros_like(scales) if ctx.needs_input_grad[3] else None

        def rounded(rows: slice) -> Tensor:
            steps = scales[rows].half()
            codes = _codes(ctx.weight[rows], steps, lora_A, lora_B[rows], ctx.mask[rows], ctx.scaling)
            return dequantize(codes, steps).to(x.dtype)

        def through_scales(rows: slice, gradient: Tensor) -> Tensor:
            """Adds to the gradient of the scales; returns the gradient of the merged weight."""
            if grad_scales is None:
                return gradient
            merged = _merged(ctx.weight[rows], lora_A, lora_B[rows], ctx.mask[rows], ctx.scaling)
            groups = scales.shape[1]
            grouped = merged.reshape(merged.shape[0], groups, -1) / scales[rows].half().float().unsqueeze(-1)
            codes = grouped.round().clamp(LOWEST_CODE, HIGHEST_CODE)
            inside = (grouped >= LOWEST_CODE - 0.5) & (grouped <= HIGHEST_CODE + 0.5)
            by_group = gradient.reshape(grouped.shape)
            # d(code * scale) / d(scale): the code, less what rounding would have followed the scale inside the grid.
            slope = torch.where(inside, codes - grouped, codes)
            grad_scales[rows] = (by_group * slope).sum(-1).to(scales.dtype)
            return (by_group * inside).reshape(gradient.shape)

        gradients = _gradients(ctx, grad, x, lora_A, lora_B, rounded, through_scales)
        return *gradients, grad_scales, None, None, None


def _gradients(
    ctx: Any, grad: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, weight: Any, through: Any = None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x, A and B of ``x weight(A, B)^T``, where the weight's gradient reaches ``s (B A) * M``."""
    grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
    grad_A, grad_B = torch.zeros_like(lora_A), torch.empty_like(lora_B)
    inputs = x.reshape(-1, x.shape[-1])
    for rows in _row_blocks(lora_B.shape[0], lora_A.shape[1]):
        part = grad[..., rows]
        if grad_x is not None:
            grad_x += part @ weight(rows)
        of_weight = (part.reshape(inputs.shape[0], -1).T @ inputs).to(lora_A.dtype)
        if through is not None:
            of_weight = through(rows, of_weight)
        of_delta = of_weight.masked_fill(~unpack_mask(ctx.mask[rows], lora_A.shape[1]), 0.0).mul_(ctx.scaling)
        grad_B[rows] = of_delta @ lora_A.T
        grad_A += lora_B[rows].T @ of_delta
    return grad_x, grad_A, grad_B
