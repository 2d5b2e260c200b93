"""One forward, followed operation by operation: labels of every tensor, and what each module was given and gave."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from nncf_ext.structure.tracing.labels import Axis, Labels
from nncf_ext.structure.tracing.rules import bind, keeps_numbers, outputs_of, rule_of, tensors_of
from nncf_ext.upstream import TorchDispatchMode
from nncf_ext.weights.sharing import place_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class Known:
    """
    What is known of a tensor.

    :param axes: The labels along each axis.
    :param birth: Number of the operation that gave it; 0: it was there before.
    :param origin: The parameter or buffer whose numbers it holds, all or a part of them, by path.
    """

    axes: list[Axis]
    birth: int = 0
    origin: str = ""


@dataclass
class Call:
    """
    One run of a module.

    :param path: Its path.
    :param given: The first tensor that it was given: birth, shape, type, labels.
    :param gave: The first tensor that it gave, likewise.
    :param start: Number of the last operation before it.
    :param end: Number of its last operation.
    :param outputs: How many values it gave; 0: a single tensor, not in a tuple.
    """

    path: str
    given: "Place | None"
    gave: "Place | None" = None
    start: int = 0
    end: int = 0
    outputs: int = 0


@dataclass
class Place:
    """A tensor at one moment."""

    birth: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: list[Axis]


@dataclass
class Site:
    """
    A place where several axes could carry what is removed, and one was chosen.

    :param number: How many such places came before.
    :param options: How many axes there were.
    :param labels: What went together by the choice.
    """

    number: int
    options: int
    labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


class Run(TorchDispatchMode):
    """
    Follows one forward of a model.

    :param model: The model.
    :param choices: By the number of a site, which of its axes to choose; the first where none is named.
    """

    def __init__(self, model: nn.Module, choices: Mapping[int, int]) -> None:
        super().__init__()
        self.labels = Labels()
        self.tensors: dict[str, list[Axis]] = {}
        self.written: list[tuple[str, Axis]] = []
        self.scopes: dict[str, str] = {}
        self.products: list[tuple[str, float]] = []
        self.calls: list[Call] = []
        self.uses: list[tuple[int, int]] = []
        self.sites: list[Site] = []
        self.reshaped: list[tuple[str, Axis, tuple[int, ...]]] = []
        self._known: Any = WeakTensorKeyDictionary()
        self.choices = choices
        self._now = 0
        self._open: list[Call] = []
        self._model = model
        self._paths: dict[int, list[str]] = {}
        places: dict[Any, str] = {}
        for path, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
            self._paths.setdefault(id(tensor), []).append(path)
            first = places.setdefault(place_of(tensor), path)
            if first != path and tensor.is_floating_point():
                self.tensors[path] = self.tensors[first]
            else:
                # Windows of convolutions do not get smaller by indices.
                most = 2 if isinstance(model.get_submodule(path.rpartition(".")[0]), _CONVOLUTIONS) else tensor.ndim
                most = most if tensor.is_floating_point() else 0
                sizes = enumerate(tensor.shape)
                self.tensors[path] = [self.labels.new(size) if axis < most else None for axis, size in sizes]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """
        :param args: What the model is called with.
        :param kwargs: The same, by name.
        :return: What the model gives. Its labels must stay.
        """
        hooks = []
        for path, module in self._model.named_modules():
            opened, closed = self._opening(path), self._closing(path)
            hooks.append(module.register_forward_pre_hook(opened, with_kwargs=True, prepend=True))
            hooks.append(module.register_forward_hook(closed, with_kwargs=True))
        try:
            with torch.no_grad(), self:
                result = self._model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        for tensor in outputs_of(result):
            for axis in self.axes(tensor):
                self.labels.fix(axis, "reaches an output of the model")
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self.compute(func, args, kwargs)
        self._now += 1
        bound = bind(func, args, kwargs)
        inputs, results = tensors_of(list(bound.values())), tensors_of(result)
        for tensor in inputs:
            self._used(tensor)
        if inputs and results:
            name, rule = rule_of(func)
            bound["move"] = lambda other: func(other, *args[1:], **kwargs)
            found = rule(self, name, bound, results)
            # What is computed from one weight alone is that weight still, such as a standardized one.
            origins = {self._origin(inputs[0])} if keeps_numbers(rule) else {self._origin(each) for each in inputs}
            origin = origins.pop() if len(origins) == 1 else ""
            for tensor, axes in zip(results, found, strict=True):
                self._known[tensor] = Known(list(axes), self._now, origin)
                if not keeps_numbers(rule):
                    self.finish(tensor, list(axes))
        return result

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """:return: What an operation gives."""
        return func(*args, **kwargs)

    def finish(self, result: Tensor, axes: list[Axis]) -> None:
        """What is to be done with a result that is no view of something else, in place."""

    # What rules ask for

    def axes(self, tensor: Tensor) -> list[Axis]:
        known = self._known.get(tensor)
        if known is not None:
            return list(known.axes)
        paths = self._paths.get(id(tensor))
        return [None] * tensor.ndim if paths is None else list(self.tensors[paths[0]])

    def choose(self, options: Sequence[int], shape: Sequence[int]) -> int:
        site = Site(len(self.sites), len(options))
        self.sites.append(site)
        return options[min(self.choices.get(site.number, 0), len(options) - 1)]

    def chosen(self, labels: Axis) -> None:
        self.sites[-1].labels = np.zeros(0, np.int64) if labels is None else labels

    def placed(self, one: Axis, shape: Sequence[int]) -> None:
        if self._open:
            self.reshaped.append((self._open[-1].path, one, tuple(shape)))

    def multiplied(self, weight: Tensor, positions: int, gives: Axis) -> None:
        if origin := self._origin(weight):
            numbers = self._tensor(origin).numel()
            self.products.append((self._running_name(origin), positions * weight.numel() / numbers))
            self.written.append((origin, gives))

    # Its own

    def _origin(self, tensor: Tensor) -> str:
        known = self._known.get(tensor)
        return known.origin if known is not None else self._paths.get(id(tensor), [""])[0]

    def _running_name(self, path: str) -> str:
        """Of the names of a tensor, that inside of what runs: a block that shares it has its own name for it."""
        names, running = self._paths[id(self._tensor(path))], ""
        nested = [running]
        for call in self._open:
            if _holds(running, call.path):
                running = call.path
                nested.append(running)
        inside = (name for scope in reversed(nested) for name in names if _holds(scope, name.rpartition(".")[0]))
        return next(inside, path)

    def _tensor(self, path: str) -> Tensor:
        owner, _, name = path.rpartition(".")
        return getattr(self._model.get_submodule(owner), name)

    def _used(self, tensor: Tensor) -> None:
        known = self._known.get(tensor)
        if known is not None:
            self.uses.append((known.birth, self._now))
            return
        paths = self._paths.get(id(tensor), [])
        for path in paths:
            owner = path.rpartition(".")[0]
            running = [each.path for each in self._open if _holds(each.path, owner)]
            if owner in running or len(paths) == 1:
                scope = max(running, key=len, default="")
                # All of them hold the owner, so that one holds the other.
                self.scopes[path] = min(self.scopes.get(path, scope), scope, key=len)

    def _opening(self, path: str) -> Any:
        def opened(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = tensors_of([args, kwargs])
            if tensors and isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm) and module.weight is None:
                first = 1 if isinstance(module, nn.GroupNorm) else tensors[0].ndim - len(module.normalized_shape)
                for axis in self.axes(tensors[0])[first:]:
                    self.labels.fix(axis, f"is normalized by {path}, which has no weight that could be cut")
            self._open.append(Call(path, self._place(tensors[0]) if tensors else None, start=self._now))

        return opened

    def _closing(self, path: str) -> Any:
        def closed(_module: nn.Module, _args: Any, _kwargs: Any, result: Any) -> None:
            call = self._open.pop()
            tensors = tensors_of(result)
            call.end, call.gave = self._now, self._place(tensors[0]) if tensors else None
            call.outputs = 0 if isinstance(result, Tensor) else len(result) if isinstance(result, list | tuple) else -1
            self.calls.append(call)

        return closed

    def _place(self, tensor: Tensor) -> Place:
        known = self._known.get(tensor)
        return Place(0 if known is None else known.birth, tuple(tensor.shape), tensor.dtype, self.axes(tensor))


def _holds(outer: str, inner: str) -> bool:
    return not outer or inner == outer or inner.startswith(f"{outer}.")
