"""Converts a torch module or an ONNX model to ov.Model with its names and INT4 values; saves it without rounding."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import openvino as ov
from openvino import Node

from ov_ext import drafts
from ov_ext.noise import logging_as_it_was
from ov_ext.stand_in import stand_in

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("ov_ext")


@logging_as_it_was()
def convert_model(
    model: Any,
    *,
    example_input: Any = None,
    dynamic_shapes: Any = None,
    method: Literal["auto", "trace", "export"] = "auto",
) -> ov.Model:
    """Convert a model and keep its names, its zeros and NNCF's packed INT4 weights.

    Weights compressed by NNCF (``INT4SymmetricWeightsDecompressor`` and the like) become i4 and u4 constants with
    exactly the integers and scales of the torch model. A language model that generates text needs a stateful KV cache:
    use :func:`ov_ext.optimum.export` for it.

    :param model: torch.nn.Module, torch.export.ExportedProgram, path of an ONNX file, onnx.ModelProto, or an ov.Model,
        which is returned as it is.
    :param example_input: For a torch module: a tensor, a tuple of positional inputs, or a dict of named ones.
    :param dynamic_shapes: As for ``torch.export.export``; implies ``method="export"``. By default every axis that is
        longer than 1 in the example may vary.
    :param method: How to capture a torch module. ``"trace"`` keeps module paths in the names of all operations and
        leaves every axis dynamic. ``"export"`` can capture more models, such as the decoders of transformers.
        ``"auto"`` traces, and exports if tracing fails.
    :return: The model. A torch module stays as it was.
    :raises ValueError: The model is none of these, its file does not exist, or a torch module has no example_input,
        has weights that are not in memory, or holds something that cannot be copied.
    """
    if isinstance(model, ov.Model):
        return model
    if isinstance(model, (str, os.PathLike)):
        if not Path(model).is_file():
            raise ValueError(f"There is no file {model}. An ONNX file, a torch module or an ov.Model can be converted.")
        return ov.convert_model(Path(model))
    if hasattr(model, "SerializeToString"):  # onnx.ModelProto, without importing onnx
        return ov.Core().read_model(model.SerializeToString(), ov.Tensor(np.zeros(0, np.uint8)))
    if not type(model).__module__.startswith("torch") and not hasattr(model, "state_dict"):
        msg = f"Cannot convert {type(model).__name__}: a torch module, an ONNX file or proto, or an ov.Model is needed."
        raise ValueError(msg)
    import torch

    if isinstance(model, torch.export.ExportedProgram):
        return _convert_exported(model)
    if example_input is None:
        msg = f"Converting {type(model).__name__} needs example_input: a tensor, a tuple or a dict of its inputs."
        raise ValueError(msg)
    if method == "trace" or (method == "auto" and dynamic_shapes is None):
        try:
            if isinstance(model, torch.jit.ScriptModule):  # nothing of it is patched, only its mode is set
                return _convert_script(model, example_input)
            return ov.convert_model(stand_in(model), example_input=example_input)
        except Exception as error:  # tracing runs the user's code: any type may come out of it
            if method == "trace":
                raise
            logger.info("Tracing failed (%s); exporting instead.", str(error).strip().splitlines()[0])
    return _convert_exported(_export(stand_in(model), example_input, dynamic_shapes))


def save_model(model: ov.Model, path: str | os.PathLike[str]) -> None:
    """Save an IR bit for bit.

    ``openvino.save_model`` rounds f32 constants to f16 by default; this function never does. Each of the two files is
    written under another name and then renamed, so a model that was loaded from the old files stays valid. The pair is
    not replaced at one moment: who opens it in between gets the new .bin with the old .xml. Where this matters, write a
    new folder: ``ov-ext`` and :func:`ov_ext.optimum.export` do so.

    :param model: The model.
    :param path: The .xml file. The .bin file is written beside it.
    :raises ValueError: The path does not end in .xml.
    :raises OSError: The files cannot be written; of a full disk the message says what to do.
    """
    target = Path(os.path.realpath(path))
    if target.suffix != ".xml":
        raise ValueError(f"An IR is saved as NAME.xml, got {target.name}.")
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    with drafts.aside(target, size=sum(node.get_byte_size() for node in constants)) as place:
        draft = place / target.name
        ov.save_model(model, draft, compress_to_fp16=False)
        os.replace(draft.with_suffix(".bin"), target.with_suffix(".bin"))
        os.replace(draft, target)


def _convert_script(model: Any, example_input: Any) -> ov.Model:
    modes = [(module, module.training) for module in model.modules()]
    try:
        return ov.convert_model(model, example_input=example_input)
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


def _export(model: torch.nn.Module, example_input: Any, dynamic_shapes: Any) -> torch.export.ExportedProgram:
    import torch
    from torch.utils import _pytree as pytree

    args, kwargs = (), {}
    if isinstance(example_input, dict):
        kwargs = example_input
    else:
        args = tuple(example_input) if isinstance(example_input, (tuple, list)) else (example_input,)
    if dynamic_shapes is None:
        auto = torch.export.Dim.AUTO

        def axes(leaf: Any) -> dict[int, Any] | None:
            return dict.fromkeys(range(leaf.dim()), auto) if isinstance(leaf, torch.Tensor) else None

        dynamic_shapes = pytree.tree_map(axes, kwargs or args)
    with torch.no_grad():
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)


def _convert_exported(program: torch.export.ExportedProgram) -> ov.Model:
    from openvino.frontend.pytorch import ConversionExtension

    shift = ConversionExtension("aten.bitwise_right_shift.Tensor_Scalar", _right_shift)
    model = ov.convert_model(program, extension=[shift])
    _fold_packed_weights(model)
    _take_shapes(model, program)
    _take_names(model, program)
    model.validate_nodes_and_infer_types()
    return model


def _right_shift(context: Any) -> Any:
    """The one operation of NNCF's nibble unpacking that OpenVINO's frontend for exported programs lacks."""
    from openvino import opset15 as opset

    value, bits = context.get_input(0), context.get_input(1)
    return opset.bitwise_right_shift(value, opset.convert_like(bits, value)).outputs()


def _fold_packed_weights(model: ov.Model) -> None:
    """Evaluate integer expressions over constants, and put constants in their place.

    NNCF keeps two INT4 values in a byte, and the exported program unpacks them. What is unpacked so becomes an i4 or u4
    constant, any other expression an 8-bit one. OpenVINO does this by itself for traced modules. One expression is
    evaluated at a time, so that the extra memory is that of one weight.
    """
    core = ov.Core()
    for convert in model.get_ordered_ops():
        if convert.get_type_name() != "Convert" or not convert.get_output_element_type(0).is_real():
            continue
        source = convert.input_value(0).get_node()
        element = source.get_output_element_type(0).get_type_name()
        if source.get_type_name() == "Constant" or element not in ("i8", "u8"):
            continue
        operations = _constant_expression(source)
        if not operations:
            continue
        values = core.compile_model(ov.Model([source], [], "codes"), "CPU")()[0]
        low, high = (-8, 7) if element == "i8" else (0, 15)
        if "BitwiseRightShift" in operations and values.min() >= low and values.max() <= high:
            nibbles = np.zeros(values.size + values.size % 2, np.uint8)
            nibbles[: values.size] = values.reshape(-1).view(np.uint8) & 15
            tensor = ov.Tensor(nibbles[0::2] | nibbles[1::2] << 4, values.shape, ov.Type.i4 if low else ov.Type.u4)
        else:
            tensor = ov.Tensor(np.ascontiguousarray(values))
        constant = ov.op.Constant(tensor, shared_memory=False)
        constant.set_friendly_name(source.get_friendly_name())
        convert.input(0).replace_source_output(constant.output(0))


def _constant_expression(node: Node) -> set[str]:
    """:return: Operation types in an expression over constants. Empty if it reads an input or has more than 64."""
    pending, seen, types = [node], set(), set()
    while pending:
        node = pending.pop()
        if node.get_name() in seen:
            continue
        seen.add(node.get_name())
        types.add(node.get_type_name())
        inputs = [port.get_node() for port in node.input_values()]
        if len(seen) > 64 or not (inputs or node.get_type_name() == "Constant"):
            return set()
        pending += inputs
    return types


def _take_shapes(model: ov.Model, program: torch.export.ExportedProgram) -> None:
    """Give the inputs the shapes of the exported program. OpenVINO makes every axis dynamic; some are fixed."""
    user_inputs = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in user_inputs]
    shapes = [value.shape for value in values if hasattr(value, "shape")]
    if len(shapes) != len(model.inputs):
        return  # OpenVINO dropped unused inputs, so it is not known which shape belongs to which input
    static = [ov.PartialShape([d if isinstance(d, int) else -1 for d in shape]) for shape in shapes]
    for parameter, shape in zip(model.get_parameters(), static, strict=True):
        parameter.set_partial_shape(shape)


def _take_names(model: ov.Model, program: torch.export.ExportedProgram) -> None:
    """Name MatMuls by the path of their module, as tracing does. Exported programs number them (``linear_3/...``)."""
    paths = {}
    for node in program.graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        if node.op == "call_function" and stack and stack[-1][0]:
            paths[node.name] = stack[-1][0]
    for node in model.get_ops():
        call, _, rest = node.get_friendly_name().partition("/")
        if node.get_type_name() == "MatMul" and call in paths:
            node.set_friendly_name(f"__module.{paths[call]}/{rest}")
