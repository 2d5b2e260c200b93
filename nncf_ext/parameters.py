"""
The enums users type, and the table of one-shot methods.

This file needs nothing but the standard library: the command line reads it where torch is not installed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, Flag, StrEnum
from typing import Any, Self, TypeVar

TChoice = TypeVar("TChoice", bound=Enum)


@dataclass(frozen=True)
class OneShotMethod:
    """
    What :func:`nncf_ext.compress` knows of a method before it imports it. Places are ``"module:class"``, the module
    below ``nncf_ext.algorithms``.

    :param home: The method, an :class:`nncf_ext.method.Method`.
    :param parameters: The class of its advanced parameters; ``parameters()`` are the defaults.
    :param ratio: What the ratio is a fraction of, for messages and help: "ratio is the fraction of ...".
    :param least: The smallest ratio.
    :param below: Ratios are smaller than this.
    """

    home: str
    parameters: str
    ratio: str
    least: float = 0.0
    below: float = 1.0


_SPARSE_WEIGHTS = OneShotMethod(
    "sparse_weights.algorithm:SparseWeights",
    "sparse_weights.parameters:AdvancedSparseWeightsParameters",
    ratio="each layer's weights to zero",
)


class CompressMode(StrEnum):
    """
    The one-shot compression methods of :func:`nncf_ext.compress`.

    :param SPARSE_MAGNITUDE: Zeros the smallest weights of every output row. Needs no data.
    :param SPARSE_WANDA: Zeros the weights of every output row with the smallest product of weight magnitude and
        input norm. Weights that stay are not changed. https://arxiv.org/abs/2306.11695
    :param SPARSE_GPT: Zeros the weights whose removal costs least in the layer's output, block of columns by block of
        columns, and corrects the weights that stay. https://arxiv.org/abs/2301.00774
    :param SPARSE_ADMM: Finds zeros and weights together by taking turns between the best weights and the nearest sparse
        ones. The smallest error of the four, and the longest time. https://arxiv.org/abs/2401.02938
    :param MULTIPRUNER: Removes whole attention and MLP branches, then MLP channels, then attention heads, by the loss
        of the whole model on calibration text. Nothing is trained. https://arxiv.org/abs/2501.09949
    :param MAMBA_SHEDDER: Removes Mamba blocks or their state spaces, in hybrids also attention and MLPs, in the same
        way. https://arxiv.org/abs/2501.17088
    :param ACTIVATION_SPARSITY: Replaces inputs of linear layers that are near a centre by it, so that a decoder can
        skip the channels of the weight that they meet. The weights stay. https://arxiv.org/abs/2412.07174
    """

    method: OneShotMethod
    """Where the method lives."""

    def __new__(cls, value: str, method: OneShotMethod) -> Self:
        mode = str.__new__(cls, value)
        mode._value_ = value
        mode.method = method
        return mode

    SPARSE_MAGNITUDE = "sparse_magnitude", _SPARSE_WEIGHTS
    SPARSE_WANDA = "sparse_wanda", _SPARSE_WEIGHTS
    SPARSE_GPT = "sparse_gpt", _SPARSE_WEIGHTS
    SPARSE_ADMM = "sparse_admm", _SPARSE_WEIGHTS
    MULTIPRUNER = (
        "multipruner",
        OneShotMethod(
            "multipruner.algorithm:MultiPruner",
            "multipruner.parameters:AdvancedMultiPrunerParameters",
            ratio="all parameters (or of joint_cost) to remove",
        ),
    )
    MAMBA_SHEDDER = (
        "mamba_shedder",
        OneShotMethod(
            "mamba_shedder.algorithm:MambaShedder",
            "mamba_shedder.parameters:AdvancedMambaShedderParameters",
            ratio="all parameters to remove",
        ),
    )
    ACTIVATION_SPARSITY = (
        "activation_sparsity",
        OneShotMethod(
            "activation_sparsity.algorithm:ActivationSparsityMethod",
            "activation_sparsity.parameters:AdvancedActivationSparsityParameters",
            ratio="each layer's inputs to replace",
        ),
    )


class ElasticMode(Flag):
    """
    What of a network can change its size after :func:`nncf_ext.make_elastic`.

    :param RANK: Ranks of low-rank adapters: leading rows of A and columns of B, with the scaling of the full rank.
        https://arxiv.org/abs/2404.10934
    :param WIDTH: Channels and heads: leading parts of every tensor that they touch. https://arxiv.org/abs/2112.10878
    :param DEPTH: How many blocks of each chain of blocks run.
    :param KERNEL: Sizes of the kernels of convolutions: the centre of the whole one, times a learned matrix.
    """

    RANK = 1
    WIDTH = 2
    DEPTH = 4
    KERNEL = 8


class UnitImportance(StrEnum):
    """
    What says which units of a width matter most (:meth:`SuperNetwork.reorganize`).

    :param L1: Sum of the absolute weights that write into the unit.
    :param L2: Sum over these weights of the root of the sum of squares.
    :param FIRST_ORDER: Sum of absolute products of weight and gradient.
    """

    L1 = "l1"
    L2 = "l2"
    FIRST_ORDER = "first_order"


class SearchSampler(StrEnum):
    """
    How :func:`nncf_ext.search` chooses the next point.

    :param HEURISTIC: The middle size of every dimension; one evaluation.
    :param HILL_CLIMBING: From the best point so far to neighbours, until none of several is better. One objective.
    :param RANDOM: Uniformly, every point once.
    :param TPE: Optuna's tree-structured Parzen estimator; any number of objectives.
    :param NSGA2: Optuna's NSGA-II; any number of objectives.
    :param LINAS: NSGA-II on predictors that learn from the points measured so far: the fewest measurements for several
        objectives. https://arxiv.org/abs/2202.12954
    :param NEMO: Populations of several kinds of genomes, one of them small graph networks, that grow by what they add
        to the front; for many dimensions of which neighbours want alike sizes. https://arxiv.org/abs/2106.07611
    """

    HEURISTIC = "heuristic"
    HILL_CLIMBING = "hill_climbing"
    RANDOM = "random"
    TPE = "tpe"
    NSGA2 = "nsga2"
    LINAS = "linas"
    NEMO = "nemo"


class SparsityAllocation(StrEnum):
    """
    How many zeros each layer gets, where a ratio is asked for (``AdvancedSparseWeightsParameters.allocation``).

    :param UNIFORM: Every layer as many as asked for.
    :param OUTLIERS: Fewer where more inputs stand out, block by block. OWL, https://arxiv.org/abs/2310.05175
    :param SENSITIVITY: Fewer where the model's output suffers more, as measured part by part; the same sum of zeros.
    """

    UNIFORM = "uniform"
    OUTLIERS = "outliers"
    SENSITIVITY = "sensitivity"


class ActivationCentering(StrEnum):
    """
    Where inputs of a layer are taken to be densest (``AdvancedActivationSparsityParameters.centering``).

    :param ZERO: At zero: right behind norms and gated activations.
    :param MEDIAN: At their median.
    :param MODE: At the peak of their density: of GELU and its like, which pile up below zero.
    """

    ZERO = "zero"
    MEDIAN = "median"
    MODE = "mode"


class ActivationAllocation(StrEnum):
    """
    Which layer replaces how many of its inputs (``AdvancedActivationSparsityParameters.allocation``).

    :param UNIFORM: As many as its target says.
    :param GREEDY: Layers of a block with the same target share it, by what the block's output bears.
    """

    UNIFORM = "uniform"
    GREEDY = "greedy"


class MergeMode(StrEnum):
    """
    What merging an adapter must not lose (:func:`nncf_ext.make_mergeable`, :func:`nncf_ext.merge`).

    :param SPARSE: The zeros of the base weight. Source: SQFT, arXiv 2410.03750, section 3.2 (SparsePEFT).
    :param QUANT_AWARE: Its zeros and its INT4 grid. Source: the same, section 3.3 (QA-SparsePEFT).
    """

    SPARSE = "sparse"
    QUANT_AWARE = "quant_aware"


def parse_choice(value: Any, choices: Iterable[TChoice], what: str = "mode", otherwise: str = "") -> TChoice:
    """
    :param value: What a user gave: a member, or the text of one.
    :param choices: An enum, or some of its members.
    :param what: What is chosen, for the message.
    :param otherwise: What could be given beside the choices, for the message.
    :return: The member.
    :raises nncf.ParameterNotSupportedError: It is none of the choices.
    """
    for choice in choices:
        if value == choice:
            return choice
    import nncf

    names = [f"{type(choice).__name__}.{choice.name}" for choice in choices]
    msg = f"Unknown {what} {value!r}. There {'is' if len(names) == 1 else 'are'} {', '.join(names)}{otherwise}."
    raise nncf.ParameterNotSupportedError(msg)
