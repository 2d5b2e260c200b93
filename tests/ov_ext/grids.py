"""INT4 codes and scales, read independently from an IR and from NNCF's torch form."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov


def grid(model: ov.Model) -> dict[str, tuple[str, np.ndarray, np.ndarray]]:
    """Per MatMul, by its module's name: element type, codes and scales of the IR, read nibble by nibble."""
    found = {}
    for matmul in model.get_ops():
        if matmul.get_type_name() != "MatMul":
            continue
        node, scale = matmul.input_value(1).get_node(), np.zeros(0)
        while node.get_type_name() != "Constant" and node.get_input_size():
            if node.get_type_name() == "Multiply":
                scale = node.input_value(1).get_node().get_data()
            node = node.input_value(0).get_node()
        if node.get_type_name() != "Constant":
            continue  # the right operand is an activation
        element = node.get_output_element_type(0).get_type_name()
        packed = node.get_data().reshape(-1).view(np.uint8).astype(np.int64)
        codes = np.stack([packed % 16, packed // 16], axis=1).reshape(-1)
        codes = np.where(codes > 7, codes - 16, codes) if element == "i4" else codes
        name = matmul.get_friendly_name().removeprefix("__module.").split("/")[0]
        found[name] = (element, codes.reshape(tuple(node.shape)), scale)
    return found


def torch_grid(model: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The same from NNCF's hooks: low nibble first, offset 8 for signed codes."""
    from nncf.torch.function_hook import get_hook_storage

    parameters, found = dict(model.named_parameters()), {}
    for key, hook in get_hook_storage(model).named_hooks():
        name = key.removeprefix("post_hooks.").split(":weight")[0].replace(":", ".")
        packed = parameters[f"{name}.weight"].detach().numpy().reshape(-1).astype(np.int64)
        codes = np.stack([packed % 16, packed // 16], axis=1).reshape(hook.compressed_weight_shape)
        signed = type(hook).__name__ == "INT4SymmetricWeightsDecompressor"
        found[name] = (codes - 8 if signed else codes, hook._scale.numpy())
    return found
