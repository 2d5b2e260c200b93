"""What a form costs in quality: divergence from the dense model on text, or what the user's own function says."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import nncf
from torch import nn

from nncf_ext.calibration.stream import call_model
from nncf_ext.importance.outputs import Output, difference, read_output

_POSITIONS = 128  # of an item
_BROKEN = 1e6  # of a model that computes NaN
_EQUAL = 1e-9  # two calls of a validation function may differ by this share


class Divergence:
    """
    How far the outputs of a model have moved from those of the dense model: for logits, the Kullback-Leibler divergence
    of the predicted distributions, nats; for others, the squared error relative to their size. Of each item up to 128
    positions are looked at, spread evenly, padding left out; then the mean over items.

    :param dense: The dense model, in evaluation mode; its outputs there are kept, float32.
    :param items: Inputs.
    :raises nncf.ValidationError: The dense model gives what is not finite.
    """

    def __init__(self, dense: nn.Module, items: Sequence[Any]) -> None:
        self._items = items
        self._dense = [self._output(dense, item) for item in items]
        if not all(bool(each.values.isfinite().all()) for each in self._dense):
            msg = "The dense model's outputs are not finite on the data, so that nothing can be compared with them."
            raise nncf.ValidationError(msg)

    def __call__(self, model: nn.Module) -> float:
        """
        :param model: A model, in evaluation mode.
        :return: The divergence; a large number where the model gives what is not finite.
        """
        pairs = zip(self._items, self._dense, strict=True)
        found = [difference(self._output(model, item), dense) for item, dense in pairs]
        total = sum(found) / len(found)
        return total if math.isfinite(total) else _BROKEN

    def _output(self, model: nn.Module, item: Any) -> Output:
        mask = item.get("attention_mask") if isinstance(item, Mapping) else None
        return read_output(call_model(model, item), _POSITIONS, mask)


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
