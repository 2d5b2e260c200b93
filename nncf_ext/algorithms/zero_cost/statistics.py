"""
What EZNAS looks at: 22 tensors for each ReLU-convolution-batch norm of a network, of one forward and backward each for
data, for noise, and for data with a little noise. No labels, no loss: the backward begins with ones.
"""

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nncf_ext.files import digest, write_whole

_INPUTS = ("data", "noise", "change")
STATISTICS = (
    "weight",
    *(f"weight_grad_{each}" for each in _INPUTS),
    *(f"{name}_{each}" for tensor in ("t1", "t2", "t4") for name in (tensor, f"{tensor}_grad") for each in _INPUTS),
)
"""
Of a layer: its weight and the gradient of it; the inputs of ReLU (``t1``) and convolution (``t2``), the output of the
batch norm (``t4``), and their gradients. ``data`` and ``noise`` say which input the network had; ``change`` is what a
little noise on the data changes.
"""

LayerStatistics = Mapping[str, Tensor]
"""By name of a statistic, float32: ``weight`` ``[d, c, k, k]``, ``t1`` and ``t2`` ``[batch, c, h, w]``, ``t4``
``[batch, d, h, w]``."""

_VERSION = 1


def fresh_copy(model: nn.Module, seed: int) -> nn.Module:
    """
    :param model: A network.
    :param seed: Seed.
    :return: A copy as before any training: convolutions by Kaiming's normal distribution (fan out, ReLU), batch norms
        1 and 0, linear layers with a deviation of 0.01, no biases.
    """
    model = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in model.modules():
            if isinstance(each, nn.Conv2d):
                nn.init.kaiming_normal_(each.weight, mode="fan_out", nonlinearity="relu", generator=draw)
            elif isinstance(each, nn.Linear):
                nn.init.normal_(each.weight, 0.0, 0.01, generator=draw)
            elif isinstance(each, nn.modules.batchnorm._BatchNorm):
                each.reset_parameters()
            else:
                continue
            if each.bias is not None:
                each.bias.zero_()
    return model


def layer_statistics(model: nn.Module, images: Tensor, *, fresh: bool = True, seed: int = 0) -> list[LayerStatistics]:
    """
    :param model: A network; not changed.
    :param images: ``[batch, channels, height, width]``, floating.
    :param fresh: Weights are drawn anew (:func:`fresh_copy`); else statistics are of those that are there.
    :param seed: Of weights and noise.
    :return: The statistics of every ReLU whose output is read by a convolution whose output a batch norm reads, in the
        order in which they run. Batch norms use the statistics of the batch.
    :raises nncf.UnsupportedModelError: There are none.
    """
    own = fresh_copy(model, seed) if fresh else copy.deepcopy(model)
    own.eval()
    for each in own.modules():
        each.training = isinstance(each, nn.modules.batchnorm._BatchNorm)
    own.requires_grad_(True)
    draw = torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(images.shape, generator=draw, dtype=images.dtype)
    perturbed = images + 0.1 * torch.randn(images.shape, generator=draw, dtype=images.dtype)
    data, random, changed = (_pass(own, each) for each in (images, noise, perturbed))
    if not data or not len(data) == len(random) == len(changed):
        msg = (
            f"{type(model).__name__} has no ReLU whose output a convolution reads, with a batch norm behind it. The "
            "programs of EZNAS are about these; the classic proxies need none."
        )
        raise nncf.UnsupportedModelError(msg)
    layers: list[LayerStatistics] = []
    for one, other, third in zip(data, random, changed, strict=True):
        layer = {"weight": one["weight"]}
        for name in one:
            if name != "weight":
                layer |= {f"{name}_data": one[name], f"{name}_noise": other[name]}
                layer[f"{name}_change"] = third[name] - one[name]
        layers.append({name: layer[name] for name in STATISTICS})
    return layers


class _Watch(TorchFunctionMode):
    """Notes the tensors of every ReLU, convolution and batch norm in a row."""

    def __init__(self) -> None:
        super().__init__()
        self._inputs: dict[int, Tensor] = {}  # of a ReLU, by its output
        self._convolved: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # ReLU's input, own input and weight, by output
        self.found: list[dict[str, Tensor]] = []
        self.values: dict[int, Tensor] = {}  # as they were when they were seen
        self._alive: list[Tensor] = []  # or numbers of tensors would be used twice

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "relu" and "inplace" in named:
            named["inplace"] = False  # what it reads is looked at later
        output = func(*args, **named)
        if name == "relu":
            self._inputs[id(output)] = args[0]
            self._note(args[0], output)
        elif name == "conv2d" and id(args[0]) in self._inputs:
            weight = args[1] if len(args) > 1 else named["weight"]
            self._convolved[id(output)] = (self._inputs[id(args[0])], args[0], weight)
            self._note(output, weight)
        elif name == "batch_norm" and id(args[0]) in self._convolved:
            t1, t2, weight = self._convolved[id(args[0])]
            # What follows may change it in place (``+=`` of a shortcut): gradients are of what stands before that.
            before, output = output, output.clone()
            self._note(before, output)
            self.found.append({"t1": t1, "t2": t2, "weight": weight, "t4": before})
        return output

    def _note(self, *tensors: Tensor) -> None:
        for each in tensors:
            self._alive.append(each)
            self.values.setdefault(id(each), each.detach().clone())


def _pass(model: nn.Module, images: Tensor) -> list[dict[str, Tensor]]:
    with torch.enable_grad(), _Watch() as watch:
        output = model(images.detach().requires_grad_(True))
    tensors = [each[name] for each in watch.found for name in ("weight", "t1", "t2", "t4")]
    logits = getattr(output, "logits", output)
    if not tensors:
        return []
    gradients = torch.autograd.grad(logits, tensors, torch.ones_like(logits), allow_unused=True)
    by_tensor = {id(each): gradient for each, gradient in zip(tensors, gradients, strict=True)}
    found = []
    for each in watch.found:
        layer = {}
        for name in ("weight", "t1", "t2", "t4"):
            gradient = by_tensor[id(each[name])]
            layer[name] = watch.values[id(each[name])].float()
            layer[f"{name}_grad"] = torch.zeros_like(layer[name]) if gradient is None else gradient.detach().float()
        found.append(layer)
    return found


class StatisticsCache:
    """
    Statistics of networks, one file for each: a search reads one network at a time, whatever the number of networks.

    :param folder: Where the files lie.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)

    def add(self, name: str, model: nn.Module, images: Tensor, *, fresh: bool = True, seed: int = 0) -> Path:
        """
        Computes the statistics of a network and writes them, unless they are there.

        :param name: Name of the network, for the file.
        :param model: See :func:`layer_statistics`.
        :param images: See there.
        :param fresh: See there.
        :param seed: See there.
        :return: The file.
        :raises nncf.ValidationError: The file of that name is of another network, other images or another seed.
        """
        file = self._folder / f"{name}.npz"
        source = _fingerprint(model, images, fresh, seed)
        if file.is_file():
            if (found := _source_of(file)) != source:
                msg = (
                    f"{file} has the statistics of another network, other images or another seed ({found}); these are "
                    f"{source}. Name another folder, or delete the file."
                )
                raise nncf.ValidationError(msg)
            return file
        layers = layer_statistics(model, images, fresh=fresh, seed=seed)
        arrays = {f"{at}.{key}": each.numpy() for at, layer in enumerate(layers) for key, each in layer.items()}
        about = np.frombuffer(json.dumps({"version": _VERSION, "source": source}).encode(), np.uint8)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda aside: _write(aside, {"about": about, **arrays}))
        return file


def read_statistics(file: str | os.PathLike[str]) -> Iterator[LayerStatistics]:
    """
    :param file: From :meth:`StatisticsCache.add`.
    :return: The statistics of one layer after the other.
    :raises nncf.ValidationError: It is no such file, or not all of one.
    """
    _source_of(file)
    with np.load(file, allow_pickle=False) as arrays:
        count = (len(arrays.files) - 1) // len(STATISTICS)
        for at in range(count):
            yield {name: torch.from_numpy(arrays[f"{at}.{name}"]) for name in STATISTICS}


def check_statistics(file: str | os.PathLike[str]) -> None:
    """
    :param file: From :meth:`StatisticsCache.add`.
    :raises nncf.ValidationError: It is no such file, or not all of one.
    """
    _source_of(file)


def _write(file: Path, arrays: Mapping[str, Any]) -> None:
    with file.open("wb") as stream:
        np.savez(stream, **arrays)


def _source_of(file: str | os.PathLike[str]) -> str:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            names = {name for name in arrays.files if name != "about"}
            complete = len(names) % len(STATISTICS) == 0 and names
        if about["version"] != _VERSION or not complete:
            raise ValueError(about)
        return str(about["source"])
    except Exception as error:  # whatever a damaged archive makes of numpy
        msg = (
            f"{os.fspath(file)} holds no statistics of a network ({type(error).__name__}). Delete it, and add it anew."
        )
        raise nncf.ValidationError(msg) from error


def _fingerprint(model: nn.Module, images: Tensor, fresh: bool, seed: int) -> str:
    """Of what statistics depend on: modules, weights, what they compute, images, seed."""
    own = fresh_copy(model, seed) if fresh else copy.deepcopy(model)
    with torch.no_grad():
        output = own.eval()(images)
    # Two networks may have the same modules and another forward: what they give tells.
    return digest([str(model), own.state_dict(), getattr(output, "logits", output), images, fresh, seed])
