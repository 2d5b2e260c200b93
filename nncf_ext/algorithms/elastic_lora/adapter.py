"""
The elastic rank of one PEFT adapter: how many of its leading rows of A and columns of B take part.

The state is one number on a forward hook of the adapter's A. Nothing is drawn and nothing depends on the order of
calls, so the recomputation of gradient checkpointing sees what the forward saw, as long as nobody changes the number
between a forward and its backward.
"""

import operator

import nncf
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

_ATTRIBUTE = "nncf_ext_elastic_rank"


class ElasticRank:
    """
    Forward hook of ``lora_A[adapter]``: zeroes its outputs from the active rank on.

    With outputs ``x A^T`` of shape ``[.., r]`` (or ``[batch, r, ..]`` of a convolution) this is the sub-adapter
    ``B[:, :active] A[:active, :]`` of ``B A``; rows and columns beyond the active rank get zero gradients. The
    adapter's scaling does not follow the active rank.

    :param lora_A: The first module of an adapter, ``Linear`` or a convolution with r outputs.
    :raises nncf.UnsupportedModelError: It is neither.
    Source: Shears, arXiv 2404.10934 (nested ranks, constant scaling).
    """

    def __init__(self, lora_A: nn.Module) -> None:
        self.maximum, self._axis = _rank_and_axis(lora_A)
        self._active = self.maximum
        setattr(lora_A, _ATTRIBUTE, self)
        self._handle: RemovableHandle = lora_A.register_forward_hook(self)

    @property
    def active(self) -> int:
        """The active rank, ``1 <= active <= maximum``."""
        return self._active

    @active.setter
    def active(self, rank: int) -> None:
        rank = operator.index(rank)
        if not 1 <= rank <= self.maximum:
            msg = f"Asked for active rank {rank} of an adapter of rank {self.maximum}: use 1 to {self.maximum}."
            raise nncf.ValidationError(msg)
        self._active = rank

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """
        :param module: The module hooked; unused.
        :param inputs: Its inputs; unused.
        :param output: Its output, floating, with `maximum` entries along the axis of ranks.
        :return: The output with zeros from the active rank on; the very same tensor at the maximal rank.
        """
        if self._active == self.maximum:
            return output
        # Cut and padded rather than multiplied by a mask: what an inactive row holds, even NaN, has no influence. The
        # list of pad() begins with the last axis, two entries for each: all zero up to the axis of ranks.
        kept = output.narrow(self._axis, 0, self._active)
        return pad(kept, (0, 0) * (-1 - self._axis) + (0, self.maximum - self._active))

    def remove(self) -> None:
        """Takes the hook off; the adapter has its maximal rank again."""
        self._handle.remove()


def attach_rank(lora_A: nn.Module) -> ElasticRank:
    """
    Makes the rank of an adapter elastic; at first all of it is active.

    :param lora_A: ``layer.lora_A[adapter]`` of a PEFT layer.
    :return: Its hook; the one that is there already, if any.
    """
    return elastic_rank(lora_A) or ElasticRank(lora_A)


def detach_rank(lora_A: nn.Module) -> None:
    """
    Takes the elastic rank off an adapter, if it has one.

    :param lora_A: ``layer.lora_A[adapter]`` of a PEFT layer.
    """
    hook = elastic_rank(lora_A)
    if hook is not None:
        hook.remove()
        delattr(lora_A, _ATTRIBUTE)


def elastic_rank(lora_A: nn.Module) -> ElasticRank | None:
    """
    :param lora_A: ``layer.lora_A[adapter]`` of a PEFT layer, or of a copy of one.
    :return: The hook that makes its rank elastic, or None.
    """
    return getattr(lora_A, _ATTRIBUTE, None)


def active_rank(lora_A: nn.Module) -> int:
    """
    :param lora_A: ``layer.lora_A[adapter]`` of a PEFT layer.
    :return: How many leading rows of A and columns of B take part: all of them where no elastic rank is attached.
    """
    hook = elastic_rank(lora_A)
    return maximum_rank(lora_A) if hook is None else hook.active


def maximum_rank(lora_A: nn.Module) -> int:
    """
    :param lora_A: ``layer.lora_A[adapter]`` of a PEFT layer: ``Linear`` or a convolution.
    :return: The number of rows of A.
    :raises nncf.UnsupportedModelError: It is neither.
    """
    return _rank_and_axis(lora_A)[0]


def _rank_and_axis(lora_A: nn.Module) -> tuple[int, int]:
    """The number of rows of A and their axis in its output, counted from the end."""
    # Read from the module, not from the weight: a sharded parameter has no shape of its own.
    if isinstance(lora_A, nn.Linear):
        return lora_A.out_features, -1
    if isinstance(lora_A, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return lora_A.out_channels, -1 - len(lora_A.kernel_size)
    msg = f"The rank of a {type(lora_A).__name__} cannot be elastic; it can be of Linear and of convolutions."
    raise nncf.UnsupportedModelError(msg)
