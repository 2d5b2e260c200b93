"""What can be elastic in a model, and at which sizes? From its record where it has one, else from one forward."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import nncf
from torch import nn

from nncf_ext.algorithms.bootstrap_nas.kernel import why_not
from nncf_ext.algorithms.bootstrap_nas.parameters import AdvancedBootstrapNasParameters, kernel_list, unit_list
from nncf_ext.parameters import ElasticMode
from nncf_ext.standalone.skipping import SkippedBlock, SkippedBlockInTuple
from nncf_ext.structure.blocks import ignored_modules
from nncf_ext.structure.dimensions import Dimension, DimensionKind, Dimensions, StandIn
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.records import record_of
from nncf_ext.structure.slicing import sliced
from nncf_ext.structure.tracing.chains import Chain
from nncf_ext.structure.tracing.example import Example, evaluated
from nncf_ext.structure.tracing.front import Traced, trace
from nncf_ext.weights.sharing import names_of_parameters


@dataclass(frozen=True)
class Found:
    """
    :param dimensions: What each dimension cuts or leaves out; widths first, then kernels, then chains.
    :param sizes: The sizes to choose from, the largest first, of dimensions that have more than one.
    :param refused: What cannot change, by module, and why.
    :param products: For each weight, how many products each of its numbers takes part in.
    :param has_record: A record of the architecture says how a cut model is finished.
    """

    dimensions: Dimensions
    sizes: Mapping[str, list[int]]
    refused: Mapping[str, str]
    products: Mapping[str, float]
    has_record: bool


def find(
    model: nn.Module,
    mode: ElasticMode,
    example_input: Any,
    ignored_scope: nncf.IgnoredScope | None,
    parameters: AdvancedBootstrapNasParameters,
) -> Found:
    """
    :param model: The model.
    :param mode: What becomes elastic.
    :param example_input: What it is called with.
    :param ignored_scope: What keeps its shape.
    :param parameters: Which sizes there are.
    :return: Its dimensions.
    :raises nncf.ValidationError: The model does not run with the example, a rule of the ignored scope or a name in
        ``widths`` matches nothing.
    :raises nncf.UnsupportedModelError: Nothing can be elastic.
    """
    ignored = set() if ignored_scope is None else ignored_modules(model, ignored_scope)
    traced = trace(model, example_input, sorted(ignored))
    known = _known(model)
    refused: dict[str, str] = {}
    widths: list[Dimension] = []
    if ElasticMode.WIDTH in mode:
        widths = _widths(traced) if known is None else _confirmed(traced, known, refused)
        widths = [each for each in widths if not any(cut.module in ignored for cut in each.cuts)]
        refused |= traced.refused
    kernels = _kernels(model, traced, ignored, refused) if ElasticMode.KERNEL in mode else []
    chains = _chains(model, traced, known, mode, ignored, refused) if ElasticMode.DEPTH in mode else []
    record = None if known is None else known.record
    blocks = "" if known is None else known.blocks
    dimensions = Dimensions([*widths, *kernels, *chains], blocks, record, scopes=traced.dimensions.scopes)
    chains = _that_run(model, dimensions, example_input, chains, refused)
    dimensions = Dimensions([*widths, *kernels, *chains], blocks, record, scopes=traced.dimensions.scopes)
    sizes: dict[str, list[int]] = {}
    for name, each in dimensions.items():
        if each.kind is DimensionKind.WIDTH:
            can_go = can_be_left_out(model, dimensions, name)
            sizes[name] = unit_list(name, each.size, each.granularity, parameters, can_go)
        elif each.kind is DimensionKind.DEPTH:
            # Architectures with a record must keep one of their blocks.
            sizes[name] = list(range(each.size, 0 if known is None else 1, -1))
        else:
            convolution: Any = model.get_submodule(name.removesuffix(".kernel"))
            sizes[name] = kernel_list(each.size, convolution.padding[0], parameters)
    if unknown := [name for name in parameters.widths if name not in dimensions]:
        msg = f"widths names {unknown}; the dimensions are {', '.join(list(dimensions)[:8])}, ..."
        raise nncf.ValidationError(msg)
    refused |= {name: "there is one size to choose from" for name, each in sizes.items() if len(each) < 2}
    sizes = {name: each for name, each in sizes.items() if len(each) > 1}
    if not sizes:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:6])
        msg = f"Nothing of {type(model).__name__} can be elastic with {mode}. {reasons or 'It has no such part.'}"
        raise nncf.UnsupportedModelError(msg)
    return Found(dimensions, sizes, refused, traced.products, known is not None)


def can_be_left_out(model: nn.Module, dimensions: Dimensions, name: str) -> bool:
    """
    :param model: The model.
    :param dimensions: Its dimensions.
    :param name: One of them, a width.
    :return: Whether its branch can be left out as a whole: a record says how, and no cache tells positions by it.
    """
    return 0 in dimensions[name].replacements and not dimensions.record.uses_cache(model)


def _known(model: nn.Module) -> Dimensions | None:
    """Dimensions of a record, where there is one that fits."""
    try:
        return None if record_of(model) is None else dimensions_of(model)
    except nncf.UnsupportedModelError:
        return None  # such as with adapters beside its layers


def _widths(traced: Traced) -> list[Dimension]:
    """Ranks of adapters have a mode of their own."""
    return [each for each in traced.dimensions.values() if not all(".lora_" in cut.tensor for cut in each.cuts)]


def _confirmed(traced: Traced, known: Dimensions, refused: dict[str, str]) -> list[Dimension]:
    """Widths of a record that the forward confirms, with the numbers that modules keep about them."""
    by_cuts = {frozenset(each.cuts): each for each in traced.dimensions.values()}
    found = []
    for name, each in known.items():
        if each.kind is DimensionKind.WIDTH and each.cuts:
            if (same := by_cuts.get(frozenset(each.cuts))) is None:
                refused[name] = "the model does not run with a part of it"
            else:
                found.append(replace(each, numbers=same.numbers))
    return found


def _kernels(model: nn.Module, traced: Traced, ignored: set[str], refused: dict[str, str]) -> list[Dimension]:
    found, names = [], names_of_parameters(model)
    for path, module in model.named_modules():
        sizes = getattr(module, "kernel_size", None)
        multiplies = f"{path}.weight" in traced.products
        if not multiplies or not isinstance(sizes, tuple) or max(sizes) <= 3 or path in ignored:
            continue
        if (reason := why_not(module)) is not None:
            refused[f"{path}.kernel"] = reason
        elif len(several := names.get(id(module.weight), [])) > 1:
            refused[f"{path}.kernel"] = f"its weight has several names: {', '.join(several)}"
        else:
            unit = "A size is that of the kernel, on both sides"
            found.append(Dimension(f"{path}.kernel", DimensionKind.KERNEL, sizes[0], unit=unit))
    return found


def _chains(
    model: nn.Module,
    traced: Traced,
    known: Dimensions | None,
    mode: ElasticMode,
    ignored: set[str],
    refused: dict[str, str],
) -> list[Dimension]:
    found = []
    for chain in traced.chains:
        name = f"{chain.name}.depth"
        if ElasticMode.WIDTH in mode and not chain.same_widths:
            refused[name] = (
                "a block's input and output have widths of their own, so it cannot be left out at all widths"
            )
        elif any(f"{each}.".startswith(f"{path}.") for path in chain.blocks for each in ignored):
            refused[name] = "a part of a block is in the ignored scope"
        else:
            found.append(_chain(chain, name, known))
    return found


def _chain(chain: Chain, name: str, known: Dimensions | None) -> Dimension:
    """Only the last blocks of a chain are left out, one after the other."""
    stand_ins = [_stand_ins(path, chain, known) for path in chain.blocks]
    replacements = {
        1 + count: {path: each for block in stand_ins[count:] for path, each in block.items()}
        for count in range(len(chain.blocks))
    }
    unit = "The first unit is what the chain begins with, each other one a block"
    return Dimension(name, DimensionKind.DEPTH, 1 + len(chain.blocks), replacements=replacements, unit=unit)


def _stand_ins(path: str, chain: Chain, known: Dimensions | None) -> Mapping[str, StandIn]:
    if known is not None and path.rpartition(".")[0] == known.blocks:
        index = int(path.rpartition(".")[2])
        return {own: each for branch in known.by_block[index] for own, each in branch.replacements[0].items()}
    return {path: SkippedBlockInTuple if chain.outputs else SkippedBlock}


def _that_run(
    model: nn.Module, dimensions: Dimensions, example_input: Any, chains: list[Dimension], refused: dict[str, str]
) -> list[Dimension]:
    example, found = Example(example_input), []
    for each in chains:
        try:
            with evaluated(model), sliced(model, dimensions, {each.name: range(1)}):
                example.run(model)
            found.append(each)
        except Exception as error:
            refused[each.name] = f"the model does not run without its blocks ({type(error).__name__}: {error})"
    return found
