"""What a one-shot method is: the request that it is made with, and what compress() calls."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import nncf
from torch import nn

from nncf_ext.parameters import CompressMode
from nncf_ext.structure.blocks import Survey

TParameters = TypeVar("TParameters", covariant=True)


@dataclass(frozen=True)
class Request(Generic[TParameters]):
    """
    What the user asked of :func:`nncf_ext.compress`.

    :param mode: The mode; several modes may share one method.
    :param ratio: Fraction of what the mode's row says, in the range that it says.
    :param dataset: Calibration data, or None.
    :param subset_size: Number of calibration items to use, at least 1.
    :param resume: Folder of a journal, or None.
    :param parameters: Everything else, in the method's own class.
    """

    mode: CompressMode
    ratio: float
    dataset: nncf.Dataset | None
    subset_size: int
    resume: Path | None
    parameters: TParameters


class Method(Protocol):
    """
    One run of a method. Nothing of the model changes before :meth:`apply`.

    :param request: What was asked for. The constructor refuses what is wrong with any model.
    :raises nncf.ValidationError: A parameter is out of range, parameters contradict each other, or data is missing.
    :raises nncf.ParameterNotSupportedError: A parameter is not supported.
    """

    def __init__(self, request: Request[Any]) -> None: ...

    def check(self, model: nn.Module, survey: Survey) -> None:
        """
        Refuses what cannot work with this model.

        :param model: The model.
        :param survey: Its weights, with those that the ignored scope keeps out.
        :raises nncf.ValidationError: The model's state, or a setting, does not fit.
        :raises nncf.UnsupportedModelError: The model is of another kind.
        """

    def apply(self, model: nn.Module, survey: Survey) -> None:
        """
        Does the work, in place, and notes on the model what was done (:mod:`nncf_ext.weights.records`).

        :param model: The model that was checked, or a copy of it.
        :param survey: Its weights.
        :raises nncf.ValidationError: The journal is another run's.
        """
