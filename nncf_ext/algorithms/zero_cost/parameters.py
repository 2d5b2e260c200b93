"""What can be asked of the evolution of proxies."""

from dataclasses import dataclass

import nncf


@dataclass(frozen=True)
class AdvancedEznasParameters:
    """
    The defaults are the published ones.

    :param generations: Rounds of evolution.
    :param parents: Programs that survive a round.
    :param children: Programs that are made in a round, half of them from parents and half of them new; as many begin.
    :param tournament: Programs of which the best becomes a parent of the next child.
    :param crossover: Chance of a child to be a mix of two parents.
    :param mutation: Chance to be a parent with a new part; what is left are copies.
    :param smallest: Least depth of a new program.
    :param deepest: Greatest depth of a new program, and of any.
    :param tasks: Tasks that a program is judged by in a round, at most.
    :param networks: Networks of each task that it is judged by, at most.
    :param seconds: How long a program may take for a network. A program that takes longer is invalid.
    :param hall: Best programs of all rounds that are kept, and judged by all networks of all tasks at the end.
    :raises nncf.ValidationError: A number is out of range.
    Source: EZNAS, arXiv 2209.07413.
    """

    generations: int = 15
    parents: int = 25
    children: int = 50
    tournament: int = 4
    crossover: float = 0.4
    mutation: float = 0.4
    smallest: int = 2
    deepest: int = 10
    tasks: int = 4
    networks: int = 20
    seconds: float = 10.0
    hall: int = 5

    def __post_init__(self) -> None:
        for name in ("generations", "parents", "children", "tournament", "smallest", "deepest", "tasks", "hall"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                msg = f"{name} must be a positive integer; got {getattr(self, name)!r}."
                raise nncf.ValidationError(msg)
        shares = self.crossover >= 0 and self.mutation >= 0 and self.crossover + self.mutation <= 1
        if not shares or self.smallest > self.deepest or self.networks < 3 or self.seconds <= 0:
            msg = (
                "crossover and mutation are chances that add up to at most 1, smallest is at most deepest, networks at "
                f"least 3, seconds above 0; got {self}."
            )
            raise nncf.ValidationError(msg)
