"""Dimensions that make no difference: points that differ in nothing else are one, for spaces, searches and samplers."""

from random import Random

import nncf
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nncf_ext import HillClimbingSampler, LinasSampler, Objective, SearchSampler, SearchSpace, search
from nncf_ext.exploration.domains import Domains
from tests.nncf_ext.searches import Network, keys

optuna.logging.set_verbosity(optuna.logging.WARNING)

SIZES = {"depth": (2, 1, 0), "block0": (8, 4), "block1": (8, 4, 2), "head": (6, 3)}
DISTINCT = 2 * (2 * 3 + 2 + 1)
"""Points of SIZES whose blocks that are skipped have the largest width: depth 2, 1 and 0, and both heads of each."""


def skipped(point: dict[str, int]) -> list[str]:
    return [f"block{block}" for block in range(point["depth"], 2)]


def kept(point: dict[str, int]) -> tuple[int, ...]:
    """What a point computes."""
    return point["head"], *(point[f"block{block}"] for block in range(point["depth"]))


SPACE = SearchSpace(SIZES, inactive=skipped)


def test_one_point_stands_for_all_that_are_one():
    points = [*SPACE.enumerate()]
    assert len({kept(point) for point in points}) == DISTINCT < SPACE.size == len(points)
    for point in points:
        same = SPACE.canonical(dict(reversed(point.items())))
        assert kept(same) == kept(point) and SPACE.canonical(same) == same and list(same) == list(SIZES)
        assert all(same[name] == SIZES[name][0] for name in skipped(point))
    canonical = {tuple(SPACE.canonical(point).values()) for point in points}
    assert len(canonical) == DISTINCT and tuple(SPACE.maximal().values()) in canonical


def test_spaces_without_inactive_dimensions_are_what_they_were():
    plain = SearchSpace(SIZES)
    point = SPACE.draw(1)
    assert plain.canonical(point) == point and plain.inactive is None
    assert plain == SearchSpace(SIZES) != SPACE == SearchSpace(SIZES, inactive=skipped)
    assert plain.to_dict() == SPACE.to_dict() and repr(plain) == repr(SPACE) and hash(plain) == hash(SPACE)
    assert plain.sample(Random(3)) == SPACE.sample(Random(3))


def test_inactive_dimensions_that_cannot_be():
    with pytest.raises(nncf.ValidationError, match=r"inactive names \['block7'\]; the 4 dimensions are \['depth'"):
        SearchSpace(SIZES, inactive=lambda point: ["block7"]).canonical(SPACE.minimal())
    cheat = SearchSpace({"a": (2, 1), "b": (2, 1)}, inactive=lambda point: ["a", "b"] if point["a"] == 1 else ["b"])
    with pytest.raises(nncf.ValidationError, match=r"names \['a', 'b'\] at .* but \['b'\] .* active dimensions only"):
        cheat.canonical({"a": 1, "b": 1})


def gain(point: dict[str, int]) -> float:
    head, *widths = kept(point)
    return head + sum(width**0.5 * (place + 1) for place, width in enumerate(widths))


def price(point: dict[str, int]) -> float:
    head, *widths = kept(point)
    return float(head * 2 + sum(widths))


def searched(sampler, several: bool = True, **settings):
    net = Network(SPACE)
    objectives = [Objective("gain", gain), *([Objective("price", price, maximize=False)] if several else [])]
    report = search(net, objectives, sampler=sampler, seed=2, **settings)
    measured, found = [tuple(point.values()) for point in net.activated[:-1]], keys(report.evaluations)
    assert found[len(found) - len(measured) :] == measured and len(set(found)) == len(found)
    assert all(SPACE.canonical(each.point) == each.point for each in report.evaluations)
    return report


@pytest.mark.parametrize("sampler", list(SearchSampler))
def test_no_search_measures_what_is_measured(sampler, monkeypatch):
    monkeypatch.setattr("nncf_ext.exploration.loop._REPEATS", 60)
    report = searched(sampler, sampler is not SearchSampler.HILL_CLIMBING, budget=SPACE.size)
    if sampler in (SearchSampler.RANDOM, SearchSampler.LINAS, SearchSampler.NEMO):
        assert len(report.evaluations) == DISTINCT
    if sampler is not SearchSampler.HEURISTIC:
        assert report.best == SPACE.maximal()


def test_a_score_chooses_among_what_is_new():
    class Width:
        name = "width"

        def bind(self, net):
            return lambda point: float(sum(point.values()))

    assert len(searched(SearchSampler.RANDOM, budget=12, prerank=Width()).evaluations) == 12


def test_a_search_continues_where_it_was(tmp_path):
    whole = searched(SearchSampler.LINAS, budget=16)
    parts = [searched(SearchSampler.LINAS, budget=count, storage=tmp_path / "search.log") for count in (11, 16)]
    assert parts[1].evaluations == whole.evaluations


@given(st.integers(0, 99), st.sets(st.integers(0, DISTINCT - 1)))
def test_what_is_new_is_found_to_the_last(seed, places):
    ranges = {name: optuna.distributions.IntDistribution(0, len(sizes) - 1) for name, sizes in SIZES.items()}

    def silent(params):
        return skipped({name: SIZES[name][place] for name, place in params.items()})

    domains = Domains(ranges, silent)
    every = sorted({domains.vector({name: SIZES[name].index(size) for name, size in point.items()})
                    for point in SPACE.enumerate()})  # fmt: skip
    assert len(every) == DISTINCT
    begun = {every[place] for place in places}
    found = domains.unseen(begun, Random(seed))
    assert found in every and (found not in begun or len(begun) == DISTINCT)


def silent(params):
    return {"width"} if params["depth"] == 0 else set()


def test_linas_in_any_study_walks_what_differs():
    sampler = LinasSampler(5, inner_evaluations=60, inactive=silent)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)

    def objective(trial):
        depth, width = trial.suggest_int("depth", 0, 3), trial.suggest_int("width", 0, 4)
        return float(depth * width), float(depth)

    study.optimize(objective, n_trials=16)
    assert len({(each.params["depth"], each.params["depth"] and each.params["width"]) for each in study.trials}) == 16


def test_hill_climbing_looks_for_neighbours_that_differ():
    study = optuna.create_study(sampler=HillClimbingSampler(inactive=silent))
    study.optimize(lambda trial: trial.suggest_int("depth", 0, 1) + 0 * trial.suggest_int("width", 0, 4), n_trials=4)
    assert study.trials[0].params == {"depth": 0, "width": 2} == study.best_params
    others = {(each.params["depth"], each.params["width"]) for each in study.trials[1:]}
    assert others == {(1, 1), (1, 2), (1, 3)}  # not (0, 1) and (0, 3), which are the first
