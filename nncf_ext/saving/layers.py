"""
What the layers of a cut model have that its configuration does not say, in the words of transformers' configurations.

Two forms: ``per_layer_config`` (sizes and missing parts), which this package reads, and edits of modules, which
:mod:`nncf_ext.standalone.modeling_nncf_structured` carries out without knowing the architecture.
"""

from collections.abc import Mapping
from typing import Any

import nncf
from torch import nn

from nncf_ext.standalone.gated_convolution import GatedConvMixer
from nncf_ext.standalone.skipping import Skipped
from nncf_ext.structure.dimensions import Dimension
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.records.record import LayerConfig, sizes_of
from nncf_ext.structure.surgery import cut_structure


def layer_overrides(model: nn.Module) -> dict[str, dict[str, Any]]:
    """
    What the layers have that the configuration does not say, in the words of transformers' ``per_layer_config``.

    :param model: A model of a known architecture.
    :return: By index of the layer (as text): sizes that differ, and ``"skip"`` with the names of missing parts.
    """
    config: Any = model.config
    overrides: dict[str, dict[str, Any]] = {}
    for index, parts in enumerate(dimensions_of(model).by_block):
        different = {key: value for key, value in sizes_of(parts).items() if getattr(config, key) != value}
        skip = [each.gone for each in parts if each.gone is not None]
        if different or skip:
            overrides[str(index)] = {**different, **({"skip": skip} if skip else {})}
    return overrides


def apply_overrides(model: nn.Module, overrides: Mapping[str, Mapping[str, Any]]) -> None:
    """
    The inverse of :func:`layer_overrides`: gives a model that its configuration built the shapes of the overrides.

    :param model: The model, changed in place; meta device will do.
    :param overrides: From :func:`layer_overrides`.
    :raises nncf.ValidationError: They do not fit the model.
    """
    dimensions = dimensions_of(model)
    kept = {name: range(_units(each, overrides.get(str(each.block), {}))) for name, each in dimensions.items()}
    layers = len(dimensions.by_block)
    unknown = set(overrides) - {str(index) for index in range(layers)}
    if unknown:
        msg = f"Structure is given for layers {sorted(unknown)}; the model has layers 0 to {layers - 1}."
        raise nncf.ValidationError(msg)
    cut_structure(model, kept, dimensions)


def _units(dimension: Dimension, own: Mapping[str, Any]) -> int:
    """How many units the overrides of a dimension's layer leave."""
    for count, part in enumerate(dimension.parts):
        if part in own.get("skip", ()):
            return count
    if not dimension.config_keys:
        return dimension.size
    key, per_unit = next(iter(dimension.config_keys.items()))
    size = own.get(key, dimension.size * per_unit)
    if not isinstance(size, int) or size % per_unit or not 0 < size <= dimension.size * per_unit:
        msg = (
            f"Layer {dimension.block} is said to have {size!r} {key}; a multiple of {per_unit} up to "
            f"{dimension.size * per_unit} would fit the configuration."
        )
        raise nncf.ValidationError(msg)
    return size // per_unit


def edits_from_config(model: nn.Module, stock: nn.Module) -> dict[str, Any]:
    """
    How the modules of a model differ from those that its configuration builds.

    :param model: A model of a known architecture.
    :param stock: What the model's class makes of its configuration; meta device will do.
    :return: Plain data.
    """
    place = dimensions_of(model).blocks
    blocks: Any = model.get_submodule(place)
    stock_blocks: Any = stock.get_submodule(place)
    layers = []
    for block, stock_block in zip(blocks, stock_blocks, strict=True):
        theirs = dict(stock_block.named_modules())
        found: dict[str, dict[str, Any]] = {"skip": {}, "linear": {}, "numbers": {}, "config": {}}
        for path, module in block.named_modules():
            if isinstance(module, Skipped | GatedConvMixer):
                found["skip"][path] = type(module).__name__
                continue
            if any(path.startswith(f"{gone}.") for gone in found["skip"]):
                continue
            other: Any = theirs[path]
            if isinstance(module, nn.Linear):
                if module.weight.shape != other.weight.shape:
                    found["linear"][path] = list(module.weight.shape)
                continue
            numbers = {key: value for key, value in vars(module).items() if type(value) is int}
            numbers = {key: value for key, value in numbers.items() if getattr(other, key, None) != value}
            if numbers:
                found["numbers"][path] = numbers
            config = getattr(module, "config", None)
            if isinstance(config, LayerConfig):
                found["config"][path] = {"num_attention_heads": config.num_attention_heads}
        layers.append({kind: entries for kind, entries in found.items() if entries})
    return {"blocks": place, "layers": layers}
