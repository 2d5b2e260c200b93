"""
Progressive shrinking: a super-network is trained in stages, each of which may use smaller networks than the one before.

The loop is the user's. A stage says which points it draws from, for how many epochs, and at which learning rate.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import nncf

from nncf_ext.algorithms.bootstrap_nas.algorithm import SuperNetwork
from nncf_ext.algorithms.bootstrap_nas.batch_norm import adapt_batch_norm
from nncf_ext.exploration.space import Point, SearchSpace
from nncf_ext.parameters import ElasticMode, UnitImportance
from nncf_ext.structure.dimensions import DimensionKind

_MODES = {
    DimensionKind.WIDTH: ElasticMode.WIDTH,
    DimensionKind.DEPTH: ElasticMode.DEPTH,
    DimensionKind.KERNEL: ElasticMode.KERNEL,
    DimensionKind.RANK: ElasticMode.RANK,
}


@dataclass(frozen=True)
class ShrinkingStage:
    """
    :param mode: What changes its size in this stage; all else stays whole.
    :param epochs: How many epochs it lasts.
    :param depth: How many blocks at the end of each chain may be left out; None: all.
    :param width: From how many widths of each dimension is drawn, the largest ones; None: all.
    :param reorganize: The most important units are put first when the stage begins.
    :param adapt_batch_norm: Batch norms are estimated anew when the stage begins, for the whole network.
    :param learning_rate: Where the rate of the stage begins; None: the loop's own rate.
    :raises nncf.ValidationError: A number is not positive.
    """

    mode: ElasticMode
    epochs: int = 1
    depth: int | None = 1
    width: int | None = 1
    reorganize: bool = False
    adapt_batch_norm: bool = False
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "depth", "width"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                msg = f"{name} of a ShrinkingStage must be a positive integer or None; got {value!r}."
                raise nncf.ValidationError(msg)


_KERNEL, _DEPTH, _WIDTH = ElasticMode.KERNEL, ElasticMode.DEPTH, ElasticMode.WIDTH
BOOTSTRAP_NAS_STAGES = (
    ShrinkingStage(_KERNEL),
    ShrinkingStage(_KERNEL | _DEPTH),
    ShrinkingStage(_KERNEL | _DEPTH, depth=2),
    ShrinkingStage(_KERNEL | _DEPTH | _WIDTH, depth=2),
    ShrinkingStage(_KERNEL | _DEPTH | _WIDTH, depth=2, width=2, reorganize=True, adapt_batch_norm=True),
)
"""The default schedule of BootstrapNAS in NNCF up to 2.19: kernels, then depth, then width, an epoch each."""


def stage_space(net: SuperNetwork, stage: ShrinkingStage) -> SearchSpace:
    """
    :param net: The super-network.
    :param stage: A stage.
    :return: The points that the stage draws from: points of the network's own space.
    """
    found = {}
    for name, sizes in net.space.dimensions.items():
        kind = net.dimensions[name].kind
        most = {DimensionKind.DEPTH: stage.depth and stage.depth + 1, DimensionKind.WIDTH: stage.width}.get(kind)
        found[name] = sizes[:most] if _MODES[kind] in stage.mode else sizes[:1]
    return SearchSpace(found, inactive=net.space.inactive)


class StageNetwork:
    """
    A super-network in one stage: the same network with fewer points, for callbacks, losses and loops.

    :param net: The super-network.
    :param stage: The stage.
    :param number: Its place in the schedule, from 0.
    :param seed: Seed of the draws.
    """

    def __init__(self, net: SuperNetwork, stage: ShrinkingStage, number: int, seed: int) -> None:
        self.stage = stage
        self.number = number
        self.step = 0
        self._net = net
        self._space = stage_space(net, stage)
        self._seed = seed

    @property
    def space(self) -> SearchSpace:
        """The points of the stage."""
        return self._space

    def steps_left(self, steps_per_epoch: int) -> int:
        """
        :param steps_per_epoch: How many steps an epoch has; a step is a call of :meth:`next_point`.
        :return: How many steps the stage still has; after an interruption fewer than those of all its epochs.
        """
        return max(self.stage.epochs * steps_per_epoch - self.step, 0)

    @property
    def active(self) -> Point:
        """The active point."""
        return self._net.active

    def activate(self, point: Mapping[str, int]) -> None:
        """
        :param point: A point of the stage.
        :raises nncf.ValidationError: It is none.
        """
        self._net.activate(self._space.check(point))

    def extract(self, point: Mapping[str, int]) -> Any:
        """
        :param point: A point of the stage.
        :return: The network of that point alone.
        """
        return self._net.extract(self._space.check(point))

    def macs(self, point: Mapping[str, int]) -> int:
        """
        :param point: A point.
        :return: See :meth:`SuperNetwork.macs`.
        """
        return self._net.macs(point)

    def next_point(self, sample: Callable[["StageNetwork", int, int], Point] | None = None) -> Point:
        """
        Draws and activates the point of the next step. It depends on the seed, the stage and the step's number alone:
        the same in every process, and after every restart.

        :param sample: What draws, from this network, a seed and the step; None: uniformly.
        :return: The point.
        """
        seed = self._seed * 1000 + self.number
        point = self._space.draw(seed, self.step) if sample is None else sample(self, seed, self.step)
        self.step += 1
        self.activate(point)
        return point

    def learning_rate(self, done: float) -> float | None:
        """
        :param done: How much of the stage is over, from 0 to 1.
        :return: Half a cosine, from the stage's rate to 0; None where the stage has none.
        """
        rate = self.stage.learning_rate
        return None if rate is None else 0.5 * rate * (1 + math.cos(math.pi * done))


class Shrinking:
    """
    The stages of a training, one after the other; see :func:`shrinking_schedule`.

    :param net: The super-network.
    :param stages: The stages.
    :param seed: Seed of the draws.
    :param importance: What says which units come first where a stage reorganizes.
    :param data: Batches for stages that estimate batch norms anew.
    :param optimizer: The optimizer, whose momenta move along where a stage reorganizes.
    :param gradients: Runs a backward of the whole network, for first-order importance.
    """

    def __init__(
        self,
        net: SuperNetwork,
        stages: Sequence[ShrinkingStage],
        seed: int,
        importance: UnitImportance,
        data: Iterable[Any] | None,
        optimizer: Any,
        gradients: Callable[[], object] | None = None,
    ) -> None:
        self._net = net
        self._stages = tuple(stages)
        self._seed = seed
        self._importance = importance
        self._data = data
        self._optimizer = optimizer
        self._gradients = gradients
        self._number, self._step = 0, 0
        self._current: StageNetwork | None = None

    def __iter__(self) -> Iterator[StageNetwork]:
        while self._number < len(self._stages):
            stage = self._stages[self._number]
            current = self._current = StageNetwork(self._net, stage, self._number, self._seed)
            current.step, self._step = self._step, 0
            if not current.step:
                self._begin(stage)
            yield current
            self._net.activate(self._net.maximal())
            self._number += 1
            self._current = None

    def _begin(self, stage: ShrinkingStage) -> None:
        self._net.activate(self._net.maximal())
        if stage.reorganize:
            if self._gradients is not None:
                self._net.model.zero_grad()
                self._gradients()
            self._net.reorganize(self._importance, self._optimizer)
            if self._gradients is not None:
                self._net.model.zero_grad()
        if stage.adapt_batch_norm:
            assert self._data is not None, "checked when the schedule was made"
            adapt_batch_norm(self._net.model, self._data)

    def state_dict(self) -> dict[str, Any]:
        """
        :return: Where the training stands, as plain data for JSON. The weights are the model's to save.
        """
        step = self._step if self._current is None else self._current.step
        stages = [{**asdict(each), "mode": each.mode.value} for each in self._stages]
        return {"stage": self._number, "step": step, "seed": self._seed, "stages": stages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        The next iteration goes on in the middle of the stage: nothing is reorganized twice, and the draws go on.

        :param state: From :meth:`state_dict` of a schedule with the same stages and seed.
        :raises nncf.ValidationError: It is of other stages or another seed.
        """
        own = self.state_dict()
        for key in ("seed", "stages"):
            if state.get(key) != own[key]:
                msg = f"The state is of another schedule: its {key} is {state.get(key)}, this one's {own[key]}."
                raise nncf.ValidationError(msg)
        self._number, self._step = state["stage"], state["step"]


def shrinking_schedule(
    net: SuperNetwork,
    stages: Sequence[ShrinkingStage] = BOOTSTRAP_NAS_STAGES,
    *,
    seed: int = 0,
    importance: UnitImportance = UnitImportance.L1,
    data: Iterable[Any] | None = None,
    optimizer: Any = None,
    gradients: Callable[[], object] | None = None,
) -> Shrinking:
    """
    The stages of progressive shrinking, for a loop of your own::

        schedule = nncf_ext.shrinking_schedule(net, data=batches, optimizer=optimizer)
        for stage in schedule:
            while left := stage.steps_left(len(loader)):
                for images, labels in itertools.islice(loader, left):
                    stage.next_point()
                    loss(model(images), labels).backward()
                    ...

    When a stage begins, the whole network is active, and its weights are reorganized and its batch norms estimated
    anew where the stage says so. ``ElasticCallback(stage)`` draws for a transformers Trainer.

    :param net: The super-network.
    :param stages: The stages. Modes of which the network has no dimension are passed over.
    :param seed: Seed of the draws.
    :param importance: What says which units come first where a stage reorganizes.
    :param data: Batches for stages that estimate batch norms anew: what the model takes. Each such stage
        goes through them once.
    :param optimizer: The optimizer, whose momenta move along where a stage reorganizes.
    :param gradients: For first-order importance: runs a loss of the whole network and its backward on some batches. It
        is called when a stage reorganizes; gradients that are there before are dropped.
    :return: To be iterated over, with ``state_dict()`` and ``load_state_dict()`` for a training that is interrupted.
    :raises nncf.ValidationError: There are no stages; a stage lacks what an earlier one had; there are no data for
        batch norms, or they are over after one pass; no gradients for first-order importance.
    Source: Once-for-all, arXiv 1908.09791; BootstrapNAS, arXiv 2112.10878.
    """
    if not stages:
        msg = "A schedule needs at least one stage; got none."
        raise nncf.ValidationError(msg)
    for before, after in zip(stages, stages[1:], strict=False):
        if before.mode & ~after.mode:
            msg = f"Stages may only add to what changes: {before.mode} is followed by {after.mode}."
            raise nncf.ValidationError(msg)
    if data is None and any(each.adapt_batch_norm for each in stages):
        msg = "A stage estimates batch norms anew, and there are no data. Give data=: batches that the model takes."
        raise nncf.ValidationError(msg)
    if isinstance(data, Iterator) and any(each.adapt_batch_norm for each in stages):
        msg = f"data is a {type(data).__name__}, which is over after one pass. Give a list or a data loader."
        raise nncf.ValidationError(msg)
    reorganizes = any(each.reorganize for each in stages)
    if importance is UnitImportance.FIRST_ORDER and reorganizes and gradients is None:
        msg = (
            "First-order importance multiplies weights with gradients. Give gradients=: a function that runs a loss of "
            "the model and its backward on some batches."
        )
        raise nncf.ValidationError(msg)
    return Shrinking(net, stages, seed, importance, data, optimizer, gradients)
