"""A torch model as it will be run, in one call: to time candidates of a search, or to compile without a folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import openvino as ov

from ov_ext.convert import convert_model
from ov_ext.leftovers import narrow_constants, quantize_rest
from ov_ext.sparse_weights.passes import pack_sparse_weights


def convert_packed(model: Any, example_input: Mapping[str, Any], *, rest: str | None = "int8") -> ov.Model:
    """Convert a torch model with the shapes of an example, and do what an exported folder gets: embedding and head
    quantized where other weights are, 16-bit values in 16 bits, weights packed where that is expected to be faster.

    A language model is converted without its cache of keys and values: with a single token, it takes as long as the
    weights take in decoding. For generating text use :func:`ov_ext.optimum.export`.

    :param model: A torch module; in float32 if it has weights on INT4. Stays as it was.
    :param example_input: Its inputs by name: tensors, whose shapes the model will have.
    :param rest: See :func:`ov_ext.optimum.export`.
    :return: The model, for a core with :func:`ov_ext.add_extension`.
    :raises ValueError: See :func:`ov_ext.convert_model`.
    """
    config: Any = getattr(model, "config", None)
    caches = bool(getattr(config, "use_cache", False))
    try:
        if caches:
            config.use_cache = False
        ir = convert_model(model, example_input=dict(example_input))
    finally:
        if caches:
            config.use_cache = True
    values = [*example_input.values()]
    shapes = {}
    for place, port in enumerate(ir.inputs):  # the input of a port's name, or the one in its place
        name = next((each for each in port.get_names() if each in example_input), None)
        shapes[port] = ov.PartialShape(list((values[place] if name is None else example_input[name]).shape))
    ir.reshape(shapes)
    if rest is not None:
        quantize_rest(ir, rest)
    narrow_constants(ir)
    return pack_sparse_weights(ir)[0]
