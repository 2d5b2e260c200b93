"""Are these the weights that something was calibrated on?"""

import hashlib

import torch
from torch import Tensor, nn

_SAMPLE = 64  # entries of each weight; fine-tuning changes the sign of some of all of them


def weights_digest(model: nn.Module) -> str:
    """
    Tells the weights of one model from those of another, without reading much of them: names, shapes, and the signs
    of some entries, which rounding to another floating type leaves alone. Of integer weights (codes on a grid) the
    entries themselves count. A factor that is moved from one floating weight into another does not show.

    :param model: Any model without shells around it, on any device; wrapped by NNCF or not.
    :return: 16 hexadecimal digits, the same in float32, bfloat16 and float16.
    """
    sha = hashlib.sha256()
    for name, weight in sorted(model.named_parameters(), key=lambda row: row[0]):
        sha.update(f"{name}{tuple(weight.shape)}".encode())
        sha.update(_sample(weight.detach()).cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def _sample(weight: Tensor) -> Tensor:
    """``[entries]``: bool, whether they are negative; int64 of integer weights."""
    flat = weight.flatten()
    places = torch.linspace(0, max(len(flat) - 1, 0), min(_SAMPLE, len(flat)), dtype=torch.float64).long()
    entries = flat[places.to(flat.device)]
    return entries < 0 if entries.is_floating_point() else entries.long()
