"""Evaluation mode for as long as something is tried."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """
    Puts every module into evaluation mode, and its own mode back afterwards.

    :param model: Any torch model.
    """
    training = [module for module in model.modules() if module.training]
    # The fast path of nn.TransformerEncoder runs none of its layers' modules, and makes nested tensors of padded text.
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in training:
            module.training = True
