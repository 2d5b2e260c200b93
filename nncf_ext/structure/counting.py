"""What does a model cost, and what would it cost after a plan? From shapes alone: the meta device will do."""

from typing import Any

from torch import nn

from nncf_ext.structure.coupling import Coupling, layout_of
from nncf_ext.structure.plan import Costs, StructurePlan


def count_costs(model: nn.Module, plan: StructurePlan | None = None) -> Costs:
    """
    Counts without carrying the plan out; equal to counting the extracted model.

    :param model: A model of a known family, on any device.
    :param plan: What would stay; None: the model as it is.
    :return: Its costs.
    :raises nncf.UnsupportedModelError: The model's structure is unknown.
    """
    layout = layout_of(model)
    parameters = {id(each): each for each in model.parameters()}
    embeddings = {id(each) for module in _embeddings(model) for each in module.parameters()}
    outside = sum(each.numel() for key, each in parameters.items() if key in embeddings)
    total = sum(each.numel() for each in parameters.values())
    size = sum(each.nbytes for each in parameters.values())
    kv_heads = 0
    kv_type = next(layout.blocks[0].parameters(), next(model.parameters())).element_size()
    for index, (block, couplings) in enumerate(zip(layout.blocks, layout.couplings, strict=True)):
        for name, coupling in couplings.items():
            kept = coupling.units if plan is None else len(plan.layers[index][name])
            kv_heads += kept if name == "attention" else 0
            for parameter, numbers in _removed(block, coupling, kept):
                total -= numbers
                size -= numbers * parameter.element_size()
    kv_bytes = 2 * kv_heads * layout.head_dim * kv_type if layout.decodes else 0
    return Costs(total, total - outside, size, kv_bytes)


def _removed(block: nn.Module, coupling: Coupling, kept: int) -> list[tuple[nn.Parameter, int]]:
    """Parameters of a block that lose entries, and how many."""
    if coupling.units and not kept:
        return [
            (each, each.numel()) for path in coupling.branch.skip for each in block.get_submodule(path).parameters()
        ]
    removed = []
    for cut in coupling.cuts:
        linear: Any = block.get_submodule(cut.module)
        cut_parameters = [linear.weight, *([linear.bias] if cut.axis == 0 and linear.bias is not None else [])]
        removed += [(each, each.numel() // coupling.units * (coupling.units - kept)) for each in cut_parameters]
    return removed


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """Tables of embeddings, the output head included."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [*tables, *([head] if isinstance(head, nn.Module) else [])]
