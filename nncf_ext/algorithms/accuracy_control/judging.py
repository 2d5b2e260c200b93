"""What a form costs in quality: divergence from the dense model on text, or what the user's own function says."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import nncf
from torch import nn

from nncf_ext.calibration.stream import call_model
from nncf_ext.importance.outputs import difference, read_output

_POSITIONS = 128  # of an item
_EQUAL = 1e-9  # two calls of a validation function may differ by this share


class Divergence:
    """
    How far the outputs of a model have moved from those of the dense model: for logits, the Kullback-Leibler divergence
    of the predicted distributions, nats; for others, the squared error relative to their size. The mean over items.

    :param dense: The dense model, in evaluation mode; its outputs are kept.
    :param items: Inputs.
    """

    def __init__(self, dense: nn.Module, items: Sequence[Any]) -> None:
        self._items = items
        self._dense = [read_output(call_model(dense, item), _POSITIONS) for item in items]

    def __call__(self, model: nn.Module) -> float:
        """
        :param model: A model, in evaluation mode.
        :return: The divergence.
        """
        pairs = zip(self._items, self._dense, strict=True)
        found = [difference(read_output(call_model(model, item), _POSITIONS), dense) for item, dense in pairs]
        return sum(found) / len(found)


class Drop:
    """
    By how much a model is worse than the dense one in the words of the user's function.

    :param dense: The dense model, which is judged twice.
    :param validation: Returns a number for a model; more is better.
    :raises nncf.ValidationError: The function raises, returns no finite number, or another one the second time.
    """

    def __init__(self, dense: nn.Module, validation: Callable[[Any], float]) -> None:
        self._validation = validation
        self.dense, again = self._value(dense), self._value(dense)
        if abs(self.dense - again) > _EQUAL * max(abs(self.dense), 1.0):
            msg = (
                f"validation_fn gave {self.dense:.9g} for the dense model, and {again:.9g} the second time: drops "
                "smaller than that mean nothing. Let it use the same data in the same order, without dropout or seeds."
            )
            raise nncf.ValidationError(msg)

    def __call__(self, model: nn.Module) -> float:
        """
        :param model: A model, in evaluation mode.
        :return: The dense model's value less that of this one.
        """
        return self.dense - self._value(model)

    def _value(self, model: nn.Module) -> float:
        try:
            value = float(self._validation(model))
        except (KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:
            msg = f"validation_fn raised {type(error).__name__}: {error}. It takes a model and returns a number."
            raise nncf.ValidationError(msg) from error
        if not math.isfinite(value):
            raise nncf.ValidationError(f"validation_fn returned {value}; a finite number is needed, more is better.")
        return value
