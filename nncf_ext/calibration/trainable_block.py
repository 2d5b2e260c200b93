"""A block of a model that can be trained by itself: its inputs, and what it should give."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class TrainableBlock:
    """
    A block on every calibration sample, with other weights in place of its own.

    :param module: The block.
    :param wanted: For each sample the hidden state behind the block while no block of its list is compressed,
        ``[.., hidden]``.
    :param call: Calls something in place of the block with what the block is given for a sample: the number of the
        sample, what to call. Returns the hidden state.
    """

    module: nn.Module
    wanted: Sequence[Tensor]
    call: Callable[[int, Callable[..., Any]], Tensor]

    def output(self, sample: int, weights: Mapping[int, Tensor]) -> Tensor:
        """
        :param sample: Number of a calibration sample.
        :param weights: Weights by the ``id`` of the parameters in whose place they stand.
        :return: The hidden state behind the block ``[.., hidden]``; gradients reach `weights`.
        """
        swapped = {name: weights[id(own)] for name, own in self.module.named_parameters() if id(own) in weights}
        return self.call(sample, lambda *args, **kwargs: functional_call(self.module, swapped, args, kwargs))
