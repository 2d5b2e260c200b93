"""How many weights do tokens not need?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nncf_ext.weights.activation_sparsity import activation_sparsity_of


class Skipped:
    """Counts weights that tokens do not need."""

    def __init__(self) -> None:
        self._skipped = self._all = 0

    @classmethod
    def inputs_of(cls, model: Any) -> Skipped:
        """
        :param model: A model whose layers have thresholds.
        :return: Counts the weights of these layers for the tokens that the model sees from now on.
        """
        made = cls()
        for layer in model.modules():
            known = activation_sparsity_of(layer)
            if known is not None:
                layer.register_forward_pre_hook(
                    lambda layer, args, known=known: made.add(known.replaced(args[0]), layer.out_features), prepend=True
                )
        return made

    def add(self, mask: Tensor, each: int) -> None:
        """
        :param mask: Bool ``[.., channels]``: which are left out, for each token.
        :param each: Weights of a channel.
        """
        self._skipped += int(mask.sum()) * each
        self._all += mask.numel() * each

    def share(self) -> float:
        """:return: Of the weights, 0..1, since the last call; 0 where nothing was counted."""
        found = self._skipped / max(1, self._all)
        self._skipped = self._all = 0
        return found
