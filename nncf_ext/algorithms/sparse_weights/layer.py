"""One layer: from its weight and what is known of its inputs to the new weight."""

from dataclasses import dataclass, replace
from functools import cached_property

import nncf
import torch
from torch import Tensor

from nncf_ext.algorithms.sparse_weights.admm import admm
from nncf_ext.algorithms.sparse_weights.least_squares import fit_kept
from nncf_ext.algorithms.sparse_weights.parameters import AdvancedSparseWeightsParameters
from nncf_ext.algorithms.sparse_weights.rounding import descend, fit_scales, search_scales
from nncf_ext.algorithms.sparse_weights.solver import (
    AdaptiveMask,
    FixedMask,
    Solution,
    inverse_factor,
    revive,
    solve,
)
from nncf_ext.calibration.statistics import InputStatistics
from nncf_ext.importance.weights import magnitude_score, pattern_mask, smallest_mask, wanda_score
from nncf_ext.parameters import CompressMode
from nncf_ext.weights.int4 import dequantize, group_scale


@dataclass(frozen=True)
class Curvature:
    """
    What layers with the same inputs share: the Hessian, and what is derived from it.

    :param statistic: Of the inputs, with all products.
    :param damping: Part of the mean diagonal added to the diagonal.
    """

    statistic: InputStatistics
    damping: float

    @cached_property
    def hessian(self) -> Tensor:
        """Damped, ``[in_features, in_features]``, float32."""
        hessian = self.statistic.hessian
        mean = revive(hessian)
        hessian.diagonal().add_(self.damping * mean)
        return hessian

    @cached_property
    def dead(self) -> Tensor:
        """Inputs that were always zero ``[in_features]``, bool."""
        return self.statistic.mean_square == 0

    @cached_property
    def factor(self) -> Tensor:
        """Of the inverse, ``[in_features, in_features]``."""
        return inverse_factor(self.statistic.hessian, self.damping)

    @cached_property
    def order(self) -> Tensor:
        """Inputs from the most to the least active ``[in_features]``, int64."""
        return self.statistic.mean_square.argsort(descending=True, stable=True)

    @cached_property
    def ordered_factor(self) -> Tensor:
        """Of the inverse, with inputs in :attr:`order`."""
        return inverse_factor(self.statistic.hessian[self.order][:, self.order], self.damping)


@dataclass(frozen=True)
class LayerSolver:
    """
    :param mode: Where zeros are put.
    :param ratio: Fraction of weights to zero.
    :param parameters: Everything else.
    """

    mode: CompressMode
    ratio: float
    parameters: AdvancedSparseWeightsParameters

    @property
    def corrects(self) -> bool:
        """Whether weights that stay make up for those that go, without rounding, too."""
        return self.mode in (CompressMode.SPARSE_GPT, CompressMode.SPARSE_ADMM)

    def solve(self, weight: Tensor, statistic: InputStatistics | None, curvature: Curvature | None) -> Solution:
        """
        :param weight: The layer's weight ``[out_features, in_features]``, any floating type.
        :param statistic: Of its inputs; None only for magnitudes.
        :param curvature: Of the same; None only where weights are neither corrected nor rounded.
        :return: The new weight, float32, with codes and scales where it is quantized.
        """
        weight = weight.detach().float().clone()
        group_size = self.parameters.group_of(weight.shape[1])
        if group_size is None and not self.corrects:
            return Solution(weight.masked_fill_(self._row_mask(weight, statistic), 0.0))
        if curvature is None:
            msg = f"{self.mode} reached the correction of weights without the Hessian of their inputs."
            raise nncf.InternalError(msg)
        chosen = None if self.corrects else self._row_mask(weight, statistic)
        weight[:, curvature.dead] = 0.0
        if self.mode is not CompressMode.SPARSE_ADMM and not self.parameters.refines(group_size):
            return self._walk(weight, chosen, curvature, group_size)
        sparse, zeros = self._sparse(weight, chosen, curvature)
        return Solution(sparse) if group_size is None else self._rounded(weight, sparse, zeros, curvature, group_size)

    def floating(self) -> "LayerSolver":
        """:return: The same without quantization."""
        return replace(self, parameters=replace(self.parameters, quantization=None, keep_prerounding=False))

    def round(self, solution: Solution, curvature: Curvature | None) -> Solution:
        """
        :param solution: A floating weight.
        :param curvature: Of the layer's inputs.
        :return: The same on the grid, with its zeros and with `prerounding`; unchanged if no group fits.
        """
        weight = solution.weight
        group_size = self.parameters.group_of(weight.shape[1])
        if group_size is None or curvature is None:
            return solution
        solver = replace(self, parameters=replace(self.parameters, keep_prerounding=True))
        return solver._rounded(weight, weight, weight == 0, curvature, group_size)

    def _row_mask(self, weight: Tensor, statistic: InputStatistics | None) -> Tensor:
        if self.mode is CompressMode.SPARSE_WANDA and statistic is not None:
            scores = wanda_score(weight, statistic.mean_square)
        else:
            scores = magnitude_score(weight)
        if self.parameters.keep_and_run is not None:
            return pattern_mask(scores, *self.parameters.keep_and_run)
        return smallest_mask(scores, int(weight.shape[1] * self.ratio))

    def _walk(
        self, weight: Tensor, chosen: Tensor | None, curvature: Curvature, group_size: int | None = None
    ) -> Solution:
        """The walk of SparseGPT and GPTQ: zeros, and with a group size rounding, in one."""
        zeros = weight == 0
        choose: AdaptiveMask | FixedMask
        if chosen is not None:
            choose = FixedMask(chosen | zeros)
        else:
            choose = AdaptiveMask(zeros, self.ratio, *(self.parameters.keep_and_run or (0, None)))
        return solve(
            weight,
            curvature.factor,
            choose,
            block_size=self.parameters.block_size,
            group_size=group_size,
            keep_prerounding=self.parameters.keep_prerounding and group_size is not None,
        )

    def _sparse(self, weight: Tensor, chosen: Tensor | None, curvature: Curvature) -> tuple[Tensor, Tensor]:
        """The weight with its zeros, not rounded, and where these are."""
        before, pattern = weight == 0, self.parameters.keep_and_run
        if self.ratio == 0 and pattern is None:
            return weight, before
        if self.mode is CompressMode.SPARSE_ADMM:
            start, zeros = admm(weight, curvature.hessian, before, self.ratio, pattern)
        else:
            start = self._walk(weight, chosen, curvature).weight
            zeros = start == 0
        return fit_kept(start, weight, curvature.hessian, zeros, self.parameters.least_squares_steps), zeros

    def _rounded(
        self, weight: Tensor, sparse: Tensor, zeros: Tensor, curvature: Curvature, group_size: int
    ) -> Solution:
        """The sparse weight on the grid; what its error is measured against is the weight before."""
        parameters, hessian = self.parameters, curvature.hessian
        if parameters.scale_search:
            scales = search_scales(sparse, hessian.diagonal(), group_size)
        else:
            scales = torch.cat([group_scale(group) for group in sparse.split(group_size, dim=1)], dim=1)
        order = curvature.order if parameters.activation_order else torch.arange(len(hessian), device=weight.device)
        walked = solve(
            sparse[:, order],
            curvature.ordered_factor if parameters.activation_order else curvature.factor,
            FixedMask(zeros[:, order]),
            block_size=parameters.block_size,
            column_scales=scales[:, order // group_size],
            keep_prerounding=parameters.keep_prerounding,
        )
        back = order.argsort()
        if walked.codes is None:
            msg = "A walk with scales gave no codes."
            raise nncf.InternalError(msg)
        codes = walked.codes[:, back]
        prerounding = None if walked.prerounding is None else walked.prerounding[:, back]
        for _ in range(parameters.rounding_passes):
            scales = fit_scales(codes, scales, weight, hessian)
            codes, prerounding = descend(codes, scales, weight, hessian, zeros)
        return Solution(dequantize(codes, scales), codes, scales, prerounding if parameters.keep_prerounding else None)
