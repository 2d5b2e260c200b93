"""Make a model smaller for real: cut weights, drop branches and layers, fix sizes and the indices into the cache."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import nncf
from torch import nn

from nncf_ext.standalone.gated_convolution import GatedConvMixer
from nncf_ext.standalone.skipping import Skipped, keep_ties, tied_names
from nncf_ext.structure.coupling import Coupling, Layout, layout_of
from nncf_ext.structure.plan import StructurePlan, check_plan
from nncf_ext.upstream import is_wrapped
from nncf_ext.weights.records import set_record

SSM = "ssm"
"""How configurations name the state space of a Mamba mixer, in a layer's ``"skip"``."""

_HEAD_COUNTS = ("num_heads", "num_attention_heads")
_KV_HEAD_COUNTS = ("num_key_value_heads",)

TModel = TypeVar("TModel", bound=nn.Module)


class LayerConfig:
    """
    The model's configuration as one attention sees it: the same, live, but for its own number of heads.

    :param base: The model's configuration.
    :param num_attention_heads: Query heads of this attention.
    """

    def __init__(self, base: Any, num_attention_heads: int) -> None:
        self.base = base
        self.num_attention_heads = num_attention_heads

    def __getattr__(self, name: str) -> Any:
        if name == "base" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.base, name)


def extract_structure(model: TModel, plan: StructurePlan) -> TModel:
    """
    Carries a plan out. The input is untouched; the result shares no tensor with it.

    Layers that lose both branches vanish. Where all layers come out alike, the result is an ordinary model of its
    class, configuration included; else :func:`nncf_ext.save_pretrained` writes what differs.

    :param model: The dense model, before compression to a grid.
    :param plan: What stays.
    :return: The smaller model: plain modules with smaller shapes on the device of the input.
    :raises nncf.ValidationError: The plan does not fit the model.
    :raises nncf.UnsupportedModelError: The model's structure is unknown, shared, or carries NNCF hooks.
    """
    if is_wrapped(model):
        msg = "Asked to cut a model that carries NNCF hooks. Extract the plain model first, then compress the result."
        raise nncf.UnsupportedModelError(msg)
    layout = layout_of(model)
    check_plan(model, plan, layout)
    # Weights that will be cut or dropped are not copied whole: slicing makes new ones.
    replaced: dict[int, Any] = {}
    for block, couplings, kept_units in zip(layout.blocks, layout.couplings, plan.layers, strict=True):
        for name, coupling in couplings.items():
            if kept_units[name] != tuple(range(coupling.units)):
                for path in coupling.stand_ins(kept_units[name]) or [cut.module for cut in coupling.cuts]:
                    replaced |= {id(each): each for each in block.get_submodule(path).parameters()}
    small = copy.deepcopy(model, replaced)
    cut_structure(small, plan.layers)
    return small


def cut_structure(model: nn.Module, layers: Sequence[Mapping[str, Sequence[int]]]) -> None:
    """
    Cuts a model in place, parameters on any device, meta included.

    :param model: The model, changed in place.
    :param layers: Kept units of each branch of each layer.
    """
    layout = layout_of(model)
    users = Counter(key for block in layout.blocks for key in {id(each) for each in block.parameters()})
    shared: dict[int, dict[int, nn.Parameter]] = {key: {} for key, count in users.items() if count > 1}
    dense = [block.state_dict(keep_vars=True) for block in layout.blocks] if shared else []  # no other gets their ids
    base = model.get_submodule(layout.path.rpartition(".")[0])
    ties = tied_names(base)
    for block, couplings, kept_units in zip(layout.blocks, layout.couplings, layers, strict=True):
        for name, coupling in couplings.items():
            _cut_branch(block, coupling, kept_units[name], shared)
    del dense
    keep_ties(base, ties)
    config: Any = model.config
    staying = [index for index, kept_units in enumerate(layers) if any(len(kept) for kept in kept_units.values())]
    if len(staying) < len(layers) and layout.family.renumbers:
        blocks = nn.ModuleList(layout.blocks[index] for index in staying)
        blocks.training = model.get_submodule(layout.path).training
        model.set_submodule(layout.path, blocks)
        config.num_hidden_layers = len(staying)
        if "attention" in layout.family.branches and getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[index] for index in staying]
    layout = layout_of(model)
    for block, slot in zip(layout.blocks, cache_slots(config, layout), strict=True):
        for module in indexed_modules(layout, block) if slot is not None else ():
            module.layer_idx = slot
    _fix_sizes(config, layout)


def cache_slots(
    config: Any, layout: Layout, layers: Sequence[Mapping[str, Sequence[int]]] | None = None
) -> list[int | None]:
    """
    Where in the cache each layer's keys and values, or states, go. Slots have kinds (full, sliding); each kind is
    filled from its first slot, because transformers reads lengths and masks from the first slot of each kind. Mamba's
    slots are filled to the last, because transformers asks the last one whether there is a state.

    :param config: The model's configuration, whose ``layer_types`` gives the kinds of slots.
    :param layout: The model's layout.
    :param layers: The units that stay, by layer and branch; None: those that are there.
    :return: A slot for each layer, None for a layer that needs none or keeps its own.
    """
    if not layout.family.renumbers:
        return [None] * len(layout.blocks)
    name = "mamba" if "mamba" in layout.family.branches else "attention"
    counts = [couplings[name].units for couplings in layout.couplings]
    if layers is not None:
        counts = [len(kept_units[name]) for kept_units in layers]
    kinds = getattr(config, "layer_types", None) if name == "attention" else None
    kinds = kinds or [""] * len(counts)
    places = {kind: [slot for slot, each in enumerate(kinds) if each == kind] for kind in set(kinds)}
    if name == "mamba":
        places[""] = places[""][counts.count(0) :]
    free = {kind: iter(slots) for kind, slots in places.items()}
    return [next(free[kind]) if count else None for kind, count in zip(kinds, counts, strict=True)]


def indexed_modules(layout: Layout, block: nn.Module) -> list[Any]:
    """
    :param layout: The model's layout.
    :param block: One of its blocks.
    :return: Modules of the block that know their layer's slot in the cache.
    """
    modules: list[Any] = [block] if "mamba" in layout.family.branches else []
    for name, branch in layout.family.branches.items():
        if name != "mlp":
            modules += [each for path, each in block.named_modules() if path == branch.core]
    return [each for each in modules if getattr(each, "layer_idx", None) is not None]


def layer_overrides(model: nn.Module) -> dict[str, dict[str, Any]]:
    """
    What the layers have that the configuration does not say, in the words of transformers' ``per_layer_config``.

    :param model: A model of a known family.
    :return: By index of the layer (as text): sizes that differ, and ``"skip"`` with the names of missing branches.
    """
    layout = layout_of(model)
    config: Any = model.config
    overrides: dict[str, dict[str, Any]] = {}
    for index, couplings in enumerate(layout.couplings):
        own = _sizes(layout, couplings)
        different = {key: value for key, value in own.items() if getattr(config, key) != value}
        skip = [name for name, coupling in couplings.items() if coupling.units == 0]
        skip += [SSM for coupling in couplings.values() if coupling.branch.without_ssm and coupling.units == 1]
        if different or skip:
            overrides[str(index)] = {**different, **({"skip": skip} if skip else {})}
    return overrides


def edits_from_config(model: nn.Module, stock: nn.Module) -> dict[str, Any]:
    """
    How the modules of a model differ from those that its configuration builds: what
    :mod:`nncf_ext.standalone.modeling_nncf_structured` carries out without knowing the family.

    :param model: A model of a known family.
    :param stock: What the model's class makes of its configuration; meta device will do.
    :return: Plain data.
    """
    layout = layout_of(model)
    stock_blocks: Any = stock.get_submodule(layout.path)
    layers = []
    for block, stock_block in zip(layout.blocks, stock_blocks, strict=True):
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
    return {"blocks": layout.path, "layers": layers}


def apply_overrides(model: nn.Module, overrides: Mapping[str, Mapping[str, Any]]) -> None:
    """
    The inverse of :func:`layer_overrides`: gives a model that its configuration built the shapes of the overrides.

    :param model: The model, changed in place; meta device will do.
    :param overrides: From :func:`layer_overrides`.
    :raises nncf.ValidationError: They do not fit the model.
    """
    layout = layout_of(model)
    layers = []
    for index, couplings in enumerate(layout.couplings):
        own = overrides.get(str(index), {})
        kept = {}
        for name, coupling in couplings.items():
            if name in own.get("skip", ()) or not coupling.cuts:
                without_ssm = bool(coupling.branch.without_ssm) and SSM in own.get("skip", ())
                kept[name] = range(0 if name in own.get("skip", ()) else 1 if without_ssm else coupling.units)
                continue
            key, per_unit = layout.family.width_key, 1
            if name == "attention":
                key, per_unit = "num_attention_heads", layout.group
            size = own.get(key, coupling.units * per_unit)
            if not isinstance(size, int) or size % per_unit or not 0 < size <= coupling.units * per_unit:
                msg = (
                    f"Layer {index} is said to have {size!r} {key}; a multiple of {per_unit} up to "
                    f"{coupling.units * per_unit} would fit the configuration."
                )
                raise nncf.ValidationError(msg)
            kept[name] = range(size // per_unit)
        layers.append(kept)
    unknown = set(overrides) - {str(index) for index in range(len(layers))}
    if unknown:
        msg = f"Structure is given for layers {sorted(unknown)}; the model has layers 0 to {len(layers) - 1}."
        raise nncf.ValidationError(msg)
    cut_structure(model, layers)


def _cut_branch(
    block: nn.Module, coupling: Coupling, kept: Sequence[int], shared: Mapping[int, dict[int, nn.Parameter]]
) -> None:
    """Cuts one branch; ``shared`` holds, by axis, what became of weights that several blocks share."""
    if list(kept) == list(range(coupling.units)):
        return
    if stand_ins := coupling.stand_ins(kept):
        for path, stand_in in stand_ins.items():
            replaced = block.get_submodule(path)
            replacement = stand_in.standing_for(replaced)
            for module in {*replacement.modules()} - {*replaced.modules()}:
                module.training = replaced.training
            for parameter in replacement.parameters():
                parameter.data = parameter.data.clone()
            block.set_submodule(path, replacement)
        return
    for cut in coupling.cuts:
        linear: Any = block.get_submodule(cut.module)
        indices = cut.indices(kept, linear.weight.device)
        linear.weight = _selected(linear.weight, cut.axis, indices, shared)
        if cut.axis == 0 and linear.bias is not None:
            linear.bias = _selected(linear.bias, 0, indices, shared)
        linear.out_features, linear.in_features = linear.weight.shape
        set_record(linear, None)


def _selected(
    parameter: nn.Parameter, axis: int, indices: Any, shared: Mapping[int, dict[int, nn.Parameter]]
) -> nn.Parameter:
    known = shared.get(id(parameter), {})
    if axis not in known:
        cut = parameter.detach().index_select(axis, indices)
        known[axis] = nn.Parameter(cut, requires_grad=parameter.requires_grad)
    return known[axis]


def _sizes(layout: Layout, couplings: Mapping[str, Coupling]) -> dict[str, int]:
    """Sizes of one layer by the configuration's names; branches that are gone have none."""
    sizes = {}
    if heads := _cut_units(couplings, "attention"):
        sizes["num_attention_heads"] = heads * layout.group
        if layout.family.head_dim_in_config:
            sizes["num_key_value_heads"] = heads
    if width := _cut_units(couplings, "mlp"):
        sizes[layout.family.width_key] = width
    return sizes


def _cut_units(couplings: Mapping[str, Coupling], name: str) -> int:
    """Units of a branch whose weights can be cut; 0 where there is none, or it goes as a whole only."""
    return couplings[name].units if name in couplings and couplings[name].cuts else 0


def _fix_sizes(config: Any, layout: Layout) -> None:
    """Writes sizes into the modules' attributes and, where all layers agree, into the configuration."""
    for block, couplings in zip(layout.blocks, layout.couplings, strict=True):
        heads, width = _cut_units(couplings, "attention"), _cut_units(couplings, "mlp")
        if heads:
            core: Any = block.get_submodule(couplings["attention"].branch.core)
            counts = {
                **dict.fromkeys(_HEAD_COUNTS, heads * layout.group),
                **dict.fromkeys(_KV_HEAD_COUNTS, heads),
                "all_head_size": heads * layout.group * layout.head_dim,
            }
            for name, count in counts.items():
                if isinstance(getattr(core, name, None), int):
                    setattr(core, name, count)
            if layout.family.heads_from_config:
                base = core.config.base if isinstance(core.config, LayerConfig) else core.config
                core.config = LayerConfig(base, heads * layout.group)
        if width:
            core = block.get_submodule(couplings["mlp"].branch.core)
            if isinstance(getattr(core, "intermediate_size", None), int):
                core.intermediate_size = width
    sizes = [_sizes(layout, couplings) for couplings in layout.couplings]
    for key in {key for each in sizes for key in each}:
        values = {each[key] for each in sizes if key in each}
        if len(values) == 1 and getattr(config, key) not in values:
            value = values.pop()
            if key in ("num_attention_heads", "num_key_value_heads"):
                # transformers refuses a configuration whose heads do not divide the hidden size.
                if not layout.family.head_dim_in_config or config.hidden_size % _heads(sizes):
                    continue
                config.head_dim = layout.head_dim
            setattr(config, key, value)


def _heads(sizes: Sequence[Mapping[str, int]]) -> int:
    """Query heads of the layers that have attention."""
    return max(each.get("num_attention_heads", 1) for each in sizes)
