"""What could go next, and what a plan is without it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nncf_ext.structure.dimensions import Dimensions
from nncf_ext.structure.plan import Step, StructurePlan


@dataclass(frozen=True)
class Removal:
    """
    One candidate.

    :param dimension: Name of the dimension that loses units.
    :param kept: Units of it that would stay, ascending; none removes the branch.
    :param others: Names of dimensions of later blocks that share the weights and lose the same.
    """

    dimension: str
    kept: tuple[int, ...]
    others: tuple[str, ...] = ()

    @property
    def dimensions(self) -> tuple[str, ...]:
        """:return: All dimensions that lose something, in order."""
        return (self.dimension, *self.others)

    def on(self, plan: StructurePlan) -> StructurePlan:
        """
        :param plan: Any plan of the model.
        :return: The plan with this removal carried out.
        """
        for name in self.dimensions:
            plan = plan.keep(name, self.kept)
        return plan

    def as_step(self, score: float | None = None, margin: float | None = None) -> Step:
        """:return: The removal as a decision that was taken."""
        return Step(self.dimension, len(self.kept), score, margin)


def branch_removals(dimensions: Dimensions, plan: StructurePlan, part: str) -> Iterator[Removal]:
    """
    :param dimensions: Of the dense model.
    :param plan: What is left.
    :param part: Which branch of a block.
    :return: Every such branch that is still there, as a whole.
    """
    return (Removal(each.name, ()) for each in dimensions.of_part(part) if plan.kept[each.name])


def width_removals(
    dimensions: Dimensions, plan: StructurePlan, part: str, size: int, order: Mapping[str, list[int]]
) -> Iterator[Removal]:
    """
    :param dimensions: Of the dense model.
    :param plan: What is left.
    :param part: A branch whose weights can be cut.
    :param size: Units that go together; a dimension keeps at least one.
    :param order: Units of each dimension, the most important first.
    :return: What could go next; dimensions that share their weights lose the same units.
    """
    for each in dimensions.of_part(part):
        count = len(plan.kept[each.name]) - size
        users = [name for name in dimensions.users(each.name) if plan.kept[name]] if count > 0 else []
        if users and users[0] == each.name:
            yield Removal(each.name, tuple(sorted(order[each.name][:count])), tuple(users[1:]))
