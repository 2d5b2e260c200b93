"""A proxy by name, for a network or for the points of an elastic one."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.algorithms.zero_cost.classic import CLASSIC, NEED_LABELS, batch_statistics, logits_of
from nncf_ext.algorithms.zero_cost.programs import PUBLISHED, Program
from nncf_ext.algorithms.zero_cost.statistics import fresh_copy, layer_statistics
from nncf_ext.exploration.space import Elastic, Point


class Proxy:
    """
    How good will a network be, told from one batch in a forward and a backward or two? Higher = said to be better::

        proxy = nncf_ext.Proxy("synflow", images)
        proxy(model)
        nncf_ext.search(net, [accuracy], sampler=nncf_ext.SearchSampler.RANDOM, prerank=proxy)

    :param name: A classic proxy (``params``, ``macs``, ``grad_norm``, ``snip``, ``grasp``, ``fisher``, ``synflow``,
        ``jacob_cov``, ``naswot``, ``zen``, ``zico``), a published program (``eznas-a``, ..) or the text of one, which
        :func:`nncf_ext.evolve_proxy` may have found.
    :param inputs: A batch: a tensor or a dictionary of named ones. Only ``params`` does without.
    :param labels: ``[batch]`` int64, for proxies that look at the loss.
    :param fresh: Weights are drawn anew before (Kaiming's normal distribution): what the architecture is worth. Else
        the weights are those that are there: what this part of a trained super-network is worth.
    :param seed: Of weights and noise.
    :raises nncf.ParameterNotSupportedError: There is no proxy of that name, and it is no program.
    :raises nncf.ValidationError: It needs inputs or labels, or labels are not one for each input.
    """

    def __init__(
        self,
        name: str,
        inputs: Tensor | Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        *,
        fresh: bool = False,
        seed: int = 0,
    ) -> None:
        self.name = name
        self._program = None if name in CLASSIC else Program(name) if "(" in name or name in PUBLISHED else None
        if name not in CLASSIC and self._program is None:
            names = ", ".join([*CLASSIC, *PUBLISHED])
            msg = f"Unknown proxy {name!r}. There are {names}, and programs such as {PUBLISHED['eznas-a']!r}."
            raise nncf.ParameterNotSupportedError(msg)
        if inputs is None and name != "params":
            msg = f"{name} looks at a batch: give inputs=, what the network is called with."
            raise nncf.ValidationError(msg)
        if labels is None and name in NEED_LABELS:
            msg = f"{name} looks at the loss: give labels=, the class of each input."
            raise nncf.ValidationError(msg)
        rows = next(iter(inputs.values()), None) if isinstance(inputs, Mapping) else inputs
        if labels is not None and (rows is None or labels.shape != rows.shape[:1]):
            msg = f"labels must be one class for each input; got shape {tuple(labels.shape)}."
            raise nncf.ValidationError(msg)
        if name in ("jacob_cov", "naswot", "zico") and (rows is None or len(rows) < 2):
            msg = f"{name} compares samples with each other: give inputs of at least two samples."
            raise nncf.ValidationError(msg)
        if self._program is not None and not (isinstance(inputs, Tensor) and inputs.ndim == 4):
            msg = "Programs of EZNAS are about images [batch, channels, height, width]."
            raise nncf.ValidationError(msg)
        self._inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
        self._labels, self._fresh, self._seed = labels, fresh, seed

    def __call__(self, model: nn.Module) -> float:
        """
        :param model: A network; not changed.
        :return: Its score; minus infinity where there is none: a program that is invalid for it, a value that is not
            a number.
        :raises nncf.UnsupportedModelError: It has nothing that the proxy looks at.
        :raises nncf.ValidationError: The proxy needs inputs of real numbers, or labels that the network has no class
            for.
        """
        if self._program is not None:
            assert isinstance(self._inputs, Tensor)
            layers = layer_statistics(model, self._inputs, fresh=self._fresh, seed=self._seed)
            value = self._program.score(layers)
            return -math.inf if value is None else value
        own = fresh_copy(model, self._seed) if self._fresh else copy.deepcopy(model)
        own.requires_grad_(True)
        own.zero_grad()
        with torch.enable_grad(), batch_statistics(own):
            self._check_labels(own)
            value = CLASSIC[self.name](own, self._inputs, self._labels)
        return -math.inf if math.isnan(value) else value

    def bind(self, net: Elastic) -> Callable[[Point], float]:
        """
        :param net: An elastic network.
        :return: The score of a point of it, as extracted; minus infinity where it has none. What is known of a point is
            not computed again.
        """
        known: dict[tuple[int, ...], float] = {}

        def score(point: Point) -> float:
            places = net.space.encode(point)
            if places not in known:
                known[places] = self._count(net, point)
            return known[places]

        return score

    def _count(self, net: Any, point: Point) -> float:
        """Of some numbers an elastic network knows itself, without an extraction."""
        own = {"params": "parameter_count", "macs": "macs"}.get(self.name, "")
        if hasattr(net, own):
            return float(getattr(net, own)(point))
        try:
            return self(net.extract(point))
        except nncf.UnsupportedModelError:  # this point has nothing that the proxy looks at; others may
            return -math.inf

    def _check_labels(self, model: nn.Module) -> None:
        if self._labels is None or self.name not in NEED_LABELS:
            return
        with torch.no_grad():
            classes = logits_of(model, self._inputs).shape[-1]
        if int(self._labels.min()) < 0 or int(self._labels.max()) >= classes:
            msg = (
                f"The labels are {int(self._labels.min())} to {int(self._labels.max())}, and {type(model).__name__} "
                f"gives {classes} classes."
            )
            raise nncf.ValidationError(msg)
