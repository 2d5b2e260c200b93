"""What does a model cost, and what would it cost after a plan? From shapes alone: the meta device will do."""

from collections import Counter
from collections.abc import Collection, Sequence
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
    config: Any = model.config
    parameters = {id(each): each for each in model.parameters()}
    embeddings = {id(each) for module in _embeddings(model) for each in module.parameters()}
    outside = sum(each.numel() for key, each in parameters.items() if key in embeddings)
    total = sum(each.numel() for each in parameters.values())
    size = sum(each.nbytes for each in parameters.values())
    kv_heads, states = 0, 0
    cache_type = next(layout.blocks[0].parameters(), next(model.parameters())).element_size()
    removed: dict[int, list[int]] = {}  # from each user of a parameter
    for index, (block, couplings) in enumerate(zip(layout.blocks, layout.couplings, strict=True)):
        for name, coupling in couplings.items():
            kept = coupling.units if plan is None else len(plan.layers[index][name])
            if name == "attention":
                kv_heads += kept if coupling.cuts or not kept else config.num_key_value_heads
            elif name == "mamba":
                states += _states(block.get_submodule(coupling.branch.core), kept) if kept else 0
            for parameter, lost in _removed(block, coupling, kept):
                removed.setdefault(id(parameter), []).append(lost)
    users = _users(layout.blocks, removed)
    for key, numbers in removed.items():
        # A weight that several layers share goes when the last of them goes.
        least = min(numbers) if len(numbers) == users[key] else 0
        total -= least
        size -= least * parameters[key].element_size()
    kv_bytes = 2 * kv_heads * layout.head_dim * cache_type if layout.decodes else 0
    return Costs(total, total - outside, size, kv_bytes, states * cache_type)


def _users(blocks: Sequence[nn.Module], keys: Collection[int]) -> Counter[int]:
    """In how many blocks each of some parameters stands."""
    return Counter(key for block in blocks for key in {id(each) for each in block.parameters()} if key in keys)


def _states(mixer: Any, kept: int) -> int:
    """Numbers that a Mamba mixer keeps from token to token, for one sequence."""
    if kept == 1:
        return mixer.intermediate_size * mixer.conv_kernel_size
    return mixer.conv1d.in_channels * mixer.conv_kernel_size + mixer.intermediate_size * mixer.ssm_state_size


def _removed(block: nn.Module, coupling: Coupling, kept: int) -> list[tuple[nn.Parameter, int]]:
    """Parameters of a block that lose entries, and how many."""
    removed = []
    if stand_ins := coupling.stand_ins(range(kept)):
        for path, stand_in in stand_ins.items():
            module = block.get_submodule(path)
            left = {name: each.numel() for name, each in stand_in.standing_for(module).named_parameters()}
            removed += [(each, each.numel() - left.get(name, 0)) for name, each in module.named_parameters()]
        return removed
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
