"""The enums users type. This file needs nothing but the standard library."""

from enum import Flag, StrEnum


class CompressMode(StrEnum):
    """
    The one-shot compression methods of :func:`nncf_ext.compress`.

    :param SPARSE_MAGNITUDE: Zeros the smallest weights of every output row. Needs no data.
    :param SPARSE_WANDA: Zeros the weights of every output row with the smallest product of weight magnitude and
        input norm. Weights that stay are not changed. https://arxiv.org/abs/2306.11695
    :param SPARSE_GPT: Zeros the weights whose removal costs least in the layer's output, block of columns by block of
        columns, and corrects the weights that stay. https://arxiv.org/abs/2301.00774
    :param MULTIPRUNER: Removes whole attention and MLP branches, then MLP channels, then attention heads, by the loss
        of the whole model on calibration text. Nothing is trained. https://arxiv.org/abs/2501.09949
    :param MAMBA_SHEDDER: Removes Mamba blocks or their state spaces, in hybrids also attention and MLPs, in the same
        way. https://arxiv.org/abs/2501.17088
    """

    SPARSE_MAGNITUDE = "sparse_magnitude"
    SPARSE_WANDA = "sparse_wanda"
    SPARSE_GPT = "sparse_gpt"
    MULTIPRUNER = "multipruner"
    MAMBA_SHEDDER = "mamba_shedder"


class ElasticMode(Flag):
    """
    What of a network can change its size after :func:`nncf_ext.make_elastic`.

    :param RANK: Ranks of low-rank adapters: leading rows of A and columns of B, with the scaling of the full rank.
        https://arxiv.org/abs/2404.10934
    """

    RANK = 1


class SearchSampler(StrEnum):
    """
    How :func:`nncf_ext.search` chooses the next point.

    :param HEURISTIC: The middle size of every dimension; one evaluation.
    :param HILL_CLIMBING: From the best point so far to neighbours, until none of several is better. One objective.
    :param RANDOM: Uniformly, every point once.
    :param NSGA2: Optuna's NSGA-II; any number of objectives.
    """

    HEURISTIC = "heuristic"
    HILL_CLIMBING = "hill_climbing"
    RANDOM = "random"
    NSGA2 = "nsga2"


class MergeMode(StrEnum):
    """
    What merging an adapter must not lose (:func:`nncf_ext.make_mergeable`, :func:`nncf_ext.merge`).

    :param SPARSE: The zeros of the base weight. Source: SQFT, arXiv 2410.03750, section 3.2 (SparsePEFT).
    :param QUANT_AWARE: Its zeros and its INT4 grid. Source: the same, section 3.3 (QA-SparsePEFT).
    """

    SPARSE = "sparse"
    QUANT_AWARE = "quant_aware"
