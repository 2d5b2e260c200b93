"""Which weights does a model hold, which of them stand in its repeated blocks, and why is a weight left alone?"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import nncf
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nncf_ext.structure.records import blocks_path
from nncf_ext.structure.wrappers import reparametrization
from nncf_ext.upstream import HOOKS_PREFIX
from nncf_ext.weights.records import LayerRecord, record_of, set_record
from nncf_ext.weights.sharing import names_of_parameters

OUTPUT_HEAD = "output head: stays in full precision"
IGNORED = "ignored scope"
ROUTER = "router or gate of experts: few weights on which much depends; `include` treats it all the same"

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class BlockList:
    """
    A list of modules that the model runs one after the other.

    :param name: Path of the list, such as ``"model.layers"``.
    :param blocks: The blocks by their paths, in order.
    """

    name: str
    blocks: Mapping[str, nn.Module]


@dataclass(frozen=True)
class Weight:
    """
    One parameter with at least two axes.

    :param name: Path of the parameter.
    :param module_name: Path of the module that holds it.
    :param module: That module.
    :param parameter: The parameter as stored: packed codes where the weight is on a grid.
    :param untouched: Why compression leaves it alone; None for a linear weight that can be compressed.
    :param hidden: Whether a linear layer could be compressed if its weight were a parameter of its own.
    """

    name: str
    module_name: str
    module: nn.Module
    parameter: Tensor
    untouched: str | None
    hidden: bool = False


@dataclass(frozen=True)
class Survey:
    """
    :param block_lists: Repeated blocks; empty if none were found.
    :param weights: Every weight of the model.
    """

    block_lists: tuple[BlockList, ...]
    weights: tuple[Weight, ...]

    @property
    def targets(self) -> dict[str, nn.Linear]:
        """The layers that can be compressed, by path, in the model's order."""
        return {
            weight.module_name: weight.module
            for weight in self.weights
            if weight.untouched is None and isinstance(weight.module, nn.Linear)
        }

    def including(self, patterns: Sequence[str]) -> "Survey":
        """
        :param patterns: Regular expressions that match paths of routers and gates, from the start.
        :return: The same survey, in which these can be compressed.
        :raises nncf.ValidationError: A pattern matches none.
        """
        routers = [weight.module_name for weight in self.weights if weight.untouched == ROUTER]
        wanted = {name for name in routers if any(re.match(pattern, name) for pattern in patterns)}
        idle = [pattern for pattern in patterns if not any(re.match(pattern, name) for name in wanted)]
        if idle:
            msg = (
                f"Asked to include {idle}, which match no router or gate of experts. The model has "
                f"{', '.join(routers[:4]) or 'none'}; patterns must match from the start."
            )
            raise nncf.ValidationError(msg)
        return replace(
            self,
            weights=tuple(
                replace(weight, untouched=None) if weight.module_name in wanted else weight for weight in self.weights
            ),
        )


def note_untouched(survey: Survey) -> None:
    """
    Keeps on each layer why it is left alone, for the report.

    :param survey: The model's weights.
    """
    for weight in survey.weights:
        earlier = record_of(weight.module)
        if weight.untouched is not None and (earlier is None or earlier.mode is None):
            set_record(weight.module, LayerRecord(untouched=weight.untouched, bytes_before=weight.parameter.nbytes))


def survey(model: nn.Module, ignored_scope: nncf.IgnoredScope | None = None) -> Survey:
    """
    Lists every weight of a model. In a model with repeated blocks only layers inside them can be compressed.

    :param model: Any torch model.
    :param ignored_scope: Layers the user keeps out: `names` and `patterns` are compared with the module's path, its
        weight's path and NNCF's node name (``model/layers/0/mlp/up_proj/linear/0``), `types` with the class name and
        NNCF's operator type (``linear``).
    :return: Blocks and weights.
    :raises nncf.ValidationError: A rule of the ignored scope matches nothing.
    :raises nncf.ParameterNotSupportedError: The ignored scope holds subgraphs.
    """
    lists = tuple(find_block_lists(model))
    in_blocks = {id(module) for each in lists for block in each.blocks.values() for module in block.modules()}
    head = _output_head(model)
    ignored = ignored_modules(model, ignored_scope) if ignored_scope is not None else set()
    names = names_of_parameters(model)

    weights = []
    routers: set[int] = set()
    for module_name, module in model.named_modules():
        if not lists or id(module) in in_blocks:
            routers |= {id(each) for each in _routers(module)}
        owner = module_name.partition(".parametrizations.")[0]
        for own_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{own_name}" if module_name else own_name
            if parameter.dim() < 2 or name.startswith(HOOKS_PREFIX):
                continue
            shared = next((other for other in names[id(parameter)] if other != name), None)
            computes = reparametrization(module, own_name)
            reason = None if computes is not None else _unsupported(module, own_name, parameter)
            if reason is None and module is head:
                reason = OUTPUT_HEAD
            if reason is None and shared is not None:
                reason = f"weight shared with {shared}"
            if reason is None and lists and id(module) not in in_blocks:
                reason = "outside the repeated blocks"
            if reason is None and owner in ignored:
                reason = IGNORED
            if reason is None and id(module) in routers:
                reason = ROUTER
            hidden = reason is None and computes is not None and isinstance(model.get_submodule(owner), nn.Linear)
            weights.append(Weight(name, module_name, module, parameter, reason or computes, hidden))
    return Survey(lists, tuple(weights))


def find_block_lists(model: nn.Module) -> Iterator[BlockList]:
    """
    Finds the outermost lists of blocks: by the architecture's record, else every ModuleList (or Sequential of modules
    of one class) with at least two members that all hold linear layers.

    :param model: Any torch model.
    :return: Block lists, in the model's order.
    """
    known = blocks_path(model)
    if known is not None:
        yield _block_list(known, model.get_submodule(known))
        return
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if _is_block_list(module):
            inside = (*inside, f"{name}." if name else "")
            yield _block_list(name, module)


def _is_block_list(module: nn.Module) -> bool:
    members = list(module.children())
    if len(members) < 2 or not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    if isinstance(module, nn.Sequential) and len({type(member) for member in members}) > 1:
        return False
    return all(map(_holds_linear, members))


def _holds_linear(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Linear) for part in module.modules())


def _block_list(name: str, module: nn.Module) -> BlockList:
    prefix = f"{name}." if name else ""
    return BlockList(name, {f"{prefix}{key}": block for key, block in module.named_children()})


def _routers(module: nn.Module) -> Iterator[nn.Linear]:
    """
    The linear layers that tell a module's experts, or an expert that is shared, how much they count: found by their
    place beside the experts and by what they give, one number for each expert, or one in all.
    """
    experts: set[int] = set()
    for child in module.children():
        for part in (child, *child.children()):
            if isinstance(part, nn.ModuleList | nn.ModuleDict):
                experts.add(sum(1 for member in part.children() if _holds_linear(member)))
            elif not isinstance(part, _CONVOLUTIONS):
                experts |= {each.shape[0] for each in part.parameters(recurse=False) if each.dim() == 3}
    experts.discard(0)
    for child in module.children() if experts else ():
        linears = [each for each in child.modules() if isinstance(each, nn.Linear)]
        if len(linears) == 1 and linears[0].out_features in {1, *experts}:
            yield linears[0]


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _unsupported(module: nn.Module, own_name: str, parameter: Tensor) -> str | None:
    """Why the kind of this weight cannot be compressed; None for the weight of a linear layer."""
    if isinstance(module, nn.Linear) and own_name == "weight":
        return None
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, _CONVOLUTIONS):
        return "convolution"
    kind = type(module).__name__
    if parameter.dim() == 3:
        return f"3-D parameter of {kind} (one tensor for {parameter.shape[0]} experts): not supported"
    if kind == "Conv1D":
        return "Conv1D holds its weight transposed: not supported"
    return f"{parameter.dim()}-D parameter of {kind}, which is not torch.nn.Linear: not supported"


def ignored_modules(model: nn.Module, scope: nncf.IgnoredScope) -> set[str]:
    """
    :param model: Any torch model.
    :param scope: What the user keeps out; see :func:`survey`.
    :return: Paths of the modules that it names.
    :raises nncf.ValidationError: A rule matches nothing.
    :raises nncf.ParameterNotSupportedError: It holds subgraphs.
    """
    if scope.subgraphs:
        msg = (
            "Asked to ignore subgraphs. Layers are found without tracing the model, so there is no graph to cut. "
            "Use names, patterns or types of nncf.IgnoredScope."
        )
        raise nncf.ParameterNotSupportedError(msg)
    ignored: set[str] = set()
    matched: set[str] = set()
    for module_name, module in model.named_modules():
        holds = any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))
        if not holds and not parametrize.is_parametrized(module):
            continue
        kinds = {type(module).__name__}
        spellings = {module_name, f"{module_name}.weight"}
        operator = {nn.Linear: "linear", nn.Embedding: "embedding"}.get(type(module))
        if operator:
            kinds.add(operator)
            spellings.add(f"{module_name.replace('.', '/')}/{operator}/0")
        rules = {name for name in scope.names if name in spellings}
        rules |= {pattern for pattern in scope.patterns if any(re.match(pattern, text) for text in spellings)}
        rules |= kinds.intersection(scope.types)
        if rules:
            matched |= rules
            ignored.add(module_name)
    unmatched = [rule for rule in (*scope.names, *scope.patterns, *scope.types) if rule not in matched]
    if unmatched and scope.validate:
        msg = (
            f"The ignored scope asks for {unmatched}, which match no layer with parameters. Names look like "
            f"{next(iter(_weight_holders(model)), 'model.layers.0.mlp.up_proj')!r}; patterns must match from the start."
        )
        raise nncf.ValidationError(msg)
    return ignored


def _weight_holders(model: nn.Module) -> Iterator[str]:
    return (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
