"""Ways to a smaller network, each with the same number of steps: what comes out, as plain data and as folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import nncf_ext
from super_networks.digits import split
from super_networks.network import DENSE, SmallResNet, save, scaled, sizes_of
from super_networks.training import RATE, judge, shrink, train

EXAMPLE = 32
"""Images of the call whose time counts."""


@dataclass(frozen=True)
class Plan:
    """
    :param dense: Steps of the dense network.
    :param shrinking: Steps of the super-network, of three networks each.
    :param tuning: Steps of what was extracted, alone.
    :param budget: Points that the search measures.
    :param targets: Shares of the dense network's multiplications, the largest first.
    """

    dense: int = 200
    shrinking: int = 150
    tuning: int = 250
    budget: int = 30
    targets: tuple[float, ...] = (0.25,)

    @property
    def after(self) -> int:
        """Steps of every way to a smaller network after the dense one."""
        return self.shrinking + self.tuning


def macs_of(sizes: dict[str, Any]) -> int:
    """
    :param sizes: Sizes of a network.
    :return: Multiplications of one image in convolutions and head, counted by hand.
    """
    widths, total = sizes["widths"], 64 * sizes["kernel"] ** 2 * sizes["widths"][0]
    for stage, inner in enumerate(sizes["inner"]):
        pixels, outputs = (8 >> stage) ** 2, widths[stage + 1]
        for place, width in enumerate(inner):
            inputs = widths[stage] if place == 0 else outputs
            shortcut = inputs * outputs if SmallResNet.stride(stage, place) > 1 else 0
            total += pixels * (9 * width * (inputs + outputs) + shortcut)
    return int(total + widths[-1] * 10)


def nearest_scale(target: int) -> dict[str, Any]:
    """
    :param target: Multiplications.
    :return: Of all networks with equally scaled widths, the one whose multiplications are nearest.
    """
    return min((scaled(number / 200) for number in range(1, 201)), key=lambda sizes: abs(macs_of(sizes) - target))


class Run:
    """
    Everything that one seed says: parts of the data, a dense network, and what is made of it.

    :param seed: The seed.
    :param plan: Steps and targets.
    :param folder: For models and the search.
    """

    def __init__(self, seed: int, plan: Plan, folder: Path) -> None:
        self.seed, self.plan, self.folder = seed, plan, folder
        self.training, self.validation, self.test = split(seed)
        self._dense: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """:return: Of this seed, by arm and target: accuracy and loss on the test set, multiplications, sizes."""
        dense, searched = self._record(self.dense(), "dense"), self.searched()
        found: dict[str, Any] = {"dense": dense, "front": searched.pop("front")}
        for target, ours in searched.items():
            found[f"searched {target}"] = ours
            found[f"uniform {target}"] = self.uniform(ours["macs"])
            found[f"pruned {target}"] = self.pruned(ours["macs"])
        return found

    def dense(self) -> SmallResNet:
        """:return: The dense network, trained; a new copy."""
        if self._dense is None:
            self._dense = self._new(DENSE, self.plan.dense).state_dict()
        model = SmallResNet(DENSE)
        model.load_state_dict(self._dense)
        return model.eval()

    def searched(self) -> dict[str, Any]:
        """
        The super-network of the dense network, shrunk, and searched by loss, multiplications and time in OpenVINO.

        :return: A record of the chosen network for each target.
        """
        modes = nncf_ext.ElasticMode
        net = nncf_ext.make_elastic(
            self.dense(),
            modes.WIDTH | modes.DEPTH | modes.KERNEL,
            example_input=self.training.images[:1],
            advanced_parameters=nncf_ext.AdvancedBootstrapNasParameters(
                width_multipliers=[1, 0.75, 0.5], multiple=4, min_width=8
            ),
        )
        shrink(net, self.training, self.plan.shrinking, self.seed)
        whole = self.training.images

        def at(point: dict[str, int], measure: Callable[[], Any]) -> Any:
            net.activate(point)
            with nncf_ext.adapted_batch_norm(net.model, [whole]):
                return measure()

        share = self.plan.targets[0]
        report = nncf_ext.search(
            net,
            [
                nncf_ext.Objective(
                    "loss", lambda p: at(p, lambda: judge(net.model, self.validation)[1]), maximize=False
                ),
                nncf_ext.Objective("macs", net.macs, maximize=False),
                nncf_ext.latency("CPU", example_input=whole[:EXAMPLE], config={"INFERENCE_NUM_THREADS": 1}, rounds=5),
            ],
            # What is extracted learns alone afterwards, so it should have what it may have.
            constraints=(f"macs <= {100 * share:g}%", f"macs >= {60 * share:g}%"),
            sampler=nncf_ext.LinasSampler(10, resets=True, seed=self.seed),
            budget=self.plan.budget,
            storage=self.folder / "search.log",
            seed=self.seed,
        )
        report.plot(self.folder / "front.png")
        report.to_csv(self.folder / "points.csv")
        found: dict[str, Any] = {}
        for target in self.plan.targets:
            point = report.best if target == share else report.pick(macs=f"<= {100 * target:g}%").point
            model = at(point, lambda point=point: nncf_ext.extract(net, point))
            train(model, self.training, self.plan.tuning, self.seed + 2000, RATE / 2, self.dense())
            found[f"{target:g}"] = self._record(model, f"searched-{target:g}") | {"point": point}
            assert found[f"{target:g}"]["macs"] == net.macs(point)
        found["front"] = [each.values for each in report.evaluations]
        return found

    def uniform(self, target: int) -> dict[str, Any]:
        """:return: A record of a network with equally scaled widths, trained alone for as many steps in all."""
        return self._record(self._new(nearest_scale(target), self.plan.dense + self.plan.after), None)

    def pruned(self, target: int) -> dict[str, Any]:
        """:return: A record of the dense network without the channels of the smallest weights, fine-tuned."""
        sizes = nearest_scale(target)
        model = cut_by_magnitude(self.dense(), sizes, self.training.images[:1])
        train(model, self.training, self.plan.after, self.seed + 1000, RATE / 2)
        return self._record(model, None)

    def _new(self, sizes: dict[str, Any], steps: int) -> SmallResNet:
        torch.manual_seed(self.seed)
        model = SmallResNet(sizes)
        train(model, self.training, steps, self.seed)
        return model

    def _record(self, model: torch.nn.Module, name: str | None) -> dict[str, Any]:
        if name is not None:
            save(model, self.folder / name)
        accuracy, loss = judge(model, self.test)
        return {"accuracy": accuracy, "loss": loss, "macs": macs_of(sizes_of(model)), "sizes": sizes_of(model)}


def cut_by_magnitude(model: SmallResNet, sizes: dict[str, Any], example: torch.Tensor) -> SmallResNet:
    """
    :param model: A trained dense network.
    :param sizes: Widths that shall stay.
    :param example: ``[1, 1, 8, 8]``.
    :return: A network of those sizes with the channels whose weights have the largest sums of absolute values.
    """
    widths = {"stem": sizes["widths"][0]}
    widths |= {f"stages.{stage}.0.shortcut.0": width for stage, width in enumerate(sizes["widths"][1:]) if stage}
    for stage, inner in enumerate(sizes["inner"]):
        widths |= {f"stages.{stage}.{place}.conv1": width for place, width in enumerate(inner)}
    lists = {name: [model.get_submodule(name).out_channels, width] for name, width in widths.items()}
    net = nncf_ext.make_elastic(
        model,
        nncf_ext.ElasticMode.WIDTH,
        example_input=example,
        advanced_parameters=nncf_ext.AdvancedBootstrapNasParameters(widths=lists),
    )
    net.reorganize(nncf_ext.UnitImportance.L1)
    return nncf_ext.extract(net, net.minimal())
