"""What a packed layer holds, read from its bytes."""

import numpy as np
from torch import nn


def grid_of(model: nn.Module, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes -8..7 and scales of a packed layer, read from its bytes: low nibble first, codes shifted by 8."""
    (hook,) = [
        module
        for name, module in model.named_modules()
        if name == f"__nncf_hooks.post_hooks.{layer.replace('.', ':')}:weight__0.0"
    ]
    data = model.get_parameter(f"{layer}.weight").numpy().ravel()
    codes = np.stack([data & 15, data >> 4], axis=1).ravel().astype(np.int8) - 8
    return codes.reshape(tuple(hook.result_shape)), hook._scale.numpy().reshape(hook.result_shape[0], -1)
