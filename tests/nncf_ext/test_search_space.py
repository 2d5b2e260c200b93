"""SearchSpace: points, places and draws."""

import itertools
import math
from random import Random

import nncf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nncf_ext import SearchSpace

SPACES = st.dictionaries(
    st.text(min_size=1, max_size=4),
    st.sets(st.integers(0, 99), min_size=1, max_size=4).map(lambda sizes: sorted(sizes, reverse=True)),
    min_size=1,
    max_size=4,
).map(SearchSpace)


@given(SPACES, st.integers(0, 99))
def test_points_and_places_are_inverse(space, seed):
    point = space.sample(Random(seed))
    assert list(point) == list(space.dimensions)
    assert all(size in space.dimensions[name] for name, size in point.items())
    assert space.decode(space.encode(point)) == point
    backwards = dict(reversed(point.items()))
    assert space.check(backwards) == point and list(space.check(backwards)) == list(point)
    assert space.encode(backwards) == space.encode(point)
    assert space.encode(space.maximal()) == (0,) * len(point)


@given(SPACES)
def test_enumeration_is_every_point_once(space):
    points = [tuple(point.values()) for point in space.enumerate()]
    assert points == list(itertools.product(*space.dimensions.values()))
    assert len(set(points)) == space.size == math.prod(map(len, space.dimensions.values()))
    assert points[0] == tuple(space.maximal().values()) and points[-1] == tuple(space.minimal().values())


@given(SPACES, st.lists(st.floats(-10, 200), min_size=4, max_size=4))
def test_clip_finds_the_nearest(space, numbers):
    wanted = dict(zip(space.dimensions, numbers, strict=False))
    for name, size in space.clip(wanted).items():
        distances = {other: abs(other - wanted[name]) for other in space.dimensions[name]}
        assert size == max(other for other in distances if distances[other] == min(distances.values()))
    assert space.clip(space.heuristic()) == space.heuristic()


@given(SPACES)
def test_plain_data_and_back(space):
    again = SearchSpace(space.to_dict())
    assert again == space and hash(again) == hash(space) and repr(again) == repr(space)
    assert space != SearchSpace({**space.to_dict(), "another one": [1]})


@pytest.mark.parametrize(
    ("sizes", "middle"),
    [([32, 24, 16], 24), ([32, 28, 24, 20, 16], 24), ([16, 12, 8], 12), ([32, 28], 32), ([8], 8), ([8, 6, 4, 2], 6)],
)
def test_heuristic(sizes, middle):
    assert SearchSpace({"a": sizes}).heuristic() == {"a": middle}


def test_order_of_dimensions_matters():
    assert SearchSpace({"a": [2, 1], "b": [2]}) != SearchSpace({"b": [2], "a": [2, 1]})


def test_draws_are_uniform_and_fixed():
    space = SearchSpace({"a": [3, 2, 1], "b": [8, 4]})
    draws = [space.draw(5, step) for step in range(3000)]
    for point in space.enumerate():
        # Expected 500, standard deviation 20.
        assert abs(draws.count(point) - 500) < 100
    # The same for ever, on every machine and version.
    first = [tuple(space.draw(0, step).values()) for step in range(6)]
    assert first == [(2, 4), (3, 8), (3, 8), (1, 8), (1, 4), (2, 8)]


@pytest.mark.parametrize(
    ("dimensions", "text"),
    [
        ({}, "at least one dimension"),
        ({"a": []}, "Sizes of a .*got"),
        ({"a": [1, 2]}, "largest first"),
        ({"a": [2, 2]}, "distinct"),
        ({"a": [2, -1]}, "from 0"),
        ({"a": [2.5]}, "integers"),
        ({"a": [True]}, "integers"),
    ],
)
def test_bad_dimensions(dimensions, text):
    with pytest.raises(nncf.ValidationError, match=text):
        SearchSpace(dimensions)


def test_bad_points():
    space = SearchSpace({"a": [3, 2], "b": [8, 4]})
    with pytest.raises(nncf.ValidationError, match=r"a = 4; its sizes are \[3, 2\]"):
        space.check({"a": 4, "b": 8})
    with pytest.raises(nncf.ValidationError, match=r"misses \['b'\].*2 dimensions"):
        space.clip({"a": 3})
    with pytest.raises(nncf.ValidationError, match=r"unknown dimensions \['c'\]"):
        space.encode({"a": 3, "b": 8, "c": 1})
    for places in ([0], [0, 0, 0], [2, 0], [-1, 0]):
        with pytest.raises(nncf.ValidationError, match=r"decode .* have \[2, 2\] sizes"):
            space.decode(places)
