"""NEMO: genomes, shares and lineages against their definitions; studies that are cut off after every trial."""

import itertools
import json

import nncf
import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nncf_ext import NemoSampler, search
from nncf_ext.exploration.fronts import exclusive
from nncf_ext.exploration.populations import Past, Pool, reference_of, shared, worth
from nncf_ext.exploration.species import Boltzmann, Direct, Graph
from tests.nncf_ext.searches import ACCURACY, COST, Network, SearchSpace, accuracy, cost, keys, pairs
from tests.nncf_ext.searches import hypervolume as area

optuna.logging.set_verbosity(optuna.logging.WARNING)

COUNTS = np.array([4, 2, 3, 4, 1])
EDGES = np.array([[0, 1], [1, 2], [2, 3], [0, 4]])


def kinds():
    features = np.random.default_rng(0).normal(size=(5, 3))
    return [Direct(COUNTS, [True, True, False, True, True]), Boltzmann(COUNTS), Graph(COUNTS, features, EDGES)]


# Genomes


@settings(max_examples=30)
@given(st.integers(0, 2), st.integers(0, 99))
def test_genomes_give_points_of_the_space(which, seed):
    kind, rng = kinds()[which], np.random.default_rng(seed)
    parents = [kind.founder(rng), kind.founder(rng)]
    child = kind.crossed(*parents, rng)
    assert ((child == parents[0]) | (child == parents[1])).all()
    for _ in range(5):
        child = kind.mutated(child, rng)
        places = kind.places(child, rng)
        assert places.shape == (5,) and ((places >= 0) & (places < COUNTS)).all()


def test_direct_mutations_are_steps_or_any_other_place():
    kind, rng = kinds()[0], np.random.default_rng(0)
    start = np.array([1.0, 0.0, 1.0, 3.0, 0.0])
    mutants = [kind.mutated(start, rng) for _ in range(3000)]
    changes = np.array([mutant != start for mutant in mutants])
    assert np.abs(changes[:, [0, 1, 2, 3]].mean(axis=0) - 1 / 5).max() < 0.03 and not changes[:, 4].any()
    moved = np.array([mutant[0] for mutant in mutants if mutant[0] != 1])
    # Half of the changes are steps to 0 or 2, the other half go to 0, 2 or 3.
    assert abs((moved == 3).mean() - 1 / 6) < 0.05 and abs((moved == 0).mean() - 5 / 12) < 0.06


def test_a_distribution_draws_as_its_softmax_says():
    kind, rng = kinds()[1], np.random.default_rng(1)
    genome = kind.founder(rng)
    genome[:, -1] = np.log([0.5, 1.0, 2.0, 1.0, 1.0])
    draws = np.array([kind.places(genome, rng) for _ in range(4000)])
    for gene, count in enumerate(COUNTS):
        logits = genome[gene, :count] / np.exp(genome[gene, -1])
        expected = np.exp(logits) / np.exp(logits).sum()
        assert np.abs(np.bincount(draws[:, gene], minlength=count) / 4000 - expected).max() < 0.04


def test_what_another_species_found_can_be_read():
    point = np.array([2, 1, 0, 3, 0])
    direct, boltzmann, graph = kinds()
    rng = np.random.default_rng(2)
    assert direct.places(direct.imprint(point), rng).tolist() == point.tolist()
    draws = np.array([boltzmann.places(boltzmann.imprint(point), rng) for _ in range(200)])
    assert ((draws == point).mean(axis=0) > 0.85).all()
    assert graph.imprint(point) is None


def test_the_graph_network_is_that_of_its_equations():
    """Node by node, neighbour by neighbour."""
    features = np.random.default_rng(3).normal(size=(5, 3))
    kind = Graph(COUNTS, features, EDGES)
    genome = kind.founder(np.random.default_rng(4)) + 0.1
    seen = (features - features.mean(axis=0)) / features.std(axis=0)
    near = [{node} | {int(b if a == node else a) for a, b in EDGES if node in (a, b)} for node in range(5)]
    weights, start = [], 0
    for rows, inputs in ((32, 3), (32, 32), (4, 32)):
        weights.append(genome[start : start + rows * (inputs + 1)].reshape(rows, inputs + 1))
        start += rows * (inputs + 1)
    assert start == len(genome)
    for matrix in weights[:2]:
        mixed = [sum(seen[o] / np.sqrt(len(near[node]) * len(near[o])) for o in near[node]) for node in range(5)]
        seen = np.array([np.maximum(matrix[:, :-1] @ each + matrix[:, -1], 0) for each in mixed])
    expected = seen @ weights[2][:, :-1].T + weights[2][:, -1]
    assert np.allclose(kind.logits(genome), expected, atol=1e-12)
    places = [int(np.argmax(row[:count])) for row, count in zip(expected, COUNTS, strict=True)]
    assert kind.places(genome, np.random.default_rng(0)).tolist() == places


@given(st.permutations(range(5)), st.integers(0, 9))
def test_nodes_in_another_order_give_the_same_in_that_order(order, seed):
    order, features = np.array(order), np.random.default_rng(seed).normal(size=(5, 3))
    kind, other = Graph(COUNTS, features, EDGES), Graph(COUNTS[order], features[order], np.argsort(order)[EDGES])
    genome = kind.founder(np.random.default_rng(seed))
    assert np.allclose(other.logits(genome), kind.logits(genome)[order], atol=1e-6)


# Shares


@settings(deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(1, 9), st.integers(1, 3)), elements=st.integers(0, 4).map(float)))
def test_what_only_one_point_adds_is_counted_cell_by_cell(losses):
    side = losses.shape[1]
    cells = [np.array(cell) for cell in itertools.product(range(4), repeat=side)]
    beaten = np.array([[(one <= cell).all() for cell in cells] for one in losses])
    beaten[[any((one <= each).all() and (one < each).any() for one in losses) for each in losses]] = False
    alone = [int((row & ~np.delete(beaten, place, axis=0).any(axis=0)).sum()) for place, row in enumerate(beaten)]
    assert exclusive(losses, np.full(side, 4.0)).tolist() == alone


def test_credit_goes_to_the_first_and_to_what_is_on_the_front():
    losses = np.array([[1.0, 3.0], [3.0, 1.0], [1.0, 3.0], [3.5, 3.5], [2.0, 2.0], [0.0, 0.0]])
    violations = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    past = Past(np.array([5, 6, 7, 8, 9, 10]), np.array([0, 1, 1, 2, -1, 2]), losses, violations)
    found = worth(past, 3, np.array([4.0, 4.0]))
    assert found.credits.tolist() == [1.0, 1.0, 0.0] and found.best.tolist() == [5, 6, -1]


def test_the_reference_lies_a_tenth_beyond_the_worst():
    assert reference_of(np.array([[-5.0, 2.0], [5.0, 2.0]])).tolist() == [6.0, 3.0]


@given(
    st.integers(1, 3).flatmap(
        lambda species: st.tuples(
            st.just(species),
            st.integers(1, 4),
            st.integers(0, 30),
            st.lists(arrays(np.float64, species, elements=st.floats(0, 1e6, allow_subnormal=False)), max_size=6),
        )
    )
)
def test_shares_add_up(case):
    species, smallest, more, credits = case
    sizes = shared(credits, species, species * smallest + more, smallest)
    assert sizes.sum() == species * smallest + more and (sizes >= smallest).all()
    still = [*credits, np.zeros(species)]
    assert not credits or shared(still, species, sizes.sum(), smallest).sum() == sizes.sum()


def test_shares_by_hand():
    assert shared([], 3, 20, 2).tolist() == [7, 7, 6]
    assert shared([np.zeros(3)] * 2, 3, 20, 2).tolist() == [7, 7, 6]  # nobody has found anything: as they were
    first = np.array([6.0, 1.0, 0.0])
    assert shared([first], 3, 20, 2).tolist() == [14, 4, 2]
    # The mean is (1.5, 0.25, 3.5): 14 places in these proportions are 4, 0.67 and 9.33.
    assert shared([first, np.array([0.0, 0.0, 7.0])], 3, 20, 2).tolist() == [6, 3, 11]


def test_parents_win_by_rank_then_by_room():
    losses = np.array([[0.0, 4.0], [1.0, 2.0], [3.0, 1.0], [4.0, 0.0], [9.0, 9.0]])
    past = Past(np.arange(5), np.zeros(5, np.int64), losses, np.zeros(5))
    pool = Pool.of(past, 5)
    wins = np.bincount([pool.winner(np.random.default_rng(seed)) for seed in range(2000)], minlength=5) / 2000
    assert wins[4] == pytest.approx(1 / 25, abs=0.02)  # only against itself
    assert wins[[0, 3]].min() > wins[1] > wins[2] > wins[4]
    assert Pool.of(past, 2).numbers.tolist() == [0, 3]


# The sampler


def ask_and_tell(sampler, count=45, study=None):
    study = study or optuna.create_study(directions=["minimize"] * 2)
    for _ in range(count):
        study.sampler = sampler()
        trial = study.ask({f"x{place}": optuna.distributions.IntDistribution(0, 3) for place in range(5)})
        point = [*trial.params.values()]
        study.tell(trial, [float(sum(point)), float(sum((3 - x) ** 2 * (1 + i) for i, x in enumerate(point)))])
    return [tuple(each.params.values()) for each in study.trials]


def test_a_sampler_made_anew_for_each_trial_goes_on_as_if_it_had_never_stopped():
    """Over generations in which genomes have ancestors, and after a migration."""
    study = optuna.create_study(directions=["minimize"] * 2)
    lasting = NemoSampler(6, smallest=1, seed=4)
    whole = ask_and_tell(lambda: lasting, study=study)
    assert len(set(whole)) == 45
    assert ask_and_tell(lambda: NemoSampler(6, smallest=1, seed=4)) == whole
    assert ask_and_tell(lambda: NemoSampler(6, smallest=1, seed=5)) != whole
    shares = lasting.shares(study)
    assert len(shares) == 45 // 6 + 1 and all(sum(each.values()) == 6 and min(each.values()) >= 1 for each in shares)
    notes = [each.system_attrs.get("nemo", {}) for each in study.trials]
    assert {note["species"] for note in notes if note} == {"direct", "boltzmann", "graph"}
    assert all(parent < number for number, note in enumerate(notes) for parent in note.get("parents", []))
    assert max(len(json.dumps(note)) for note in notes) < 120
    by_generation = [note.get("species") for note in notes[12:18]]
    assert all(by_generation.count(name) <= count for name, count in shares[2].items())


def test_a_study_of_anyone_is_walked_without_a_repeat():
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=NemoSampler(8, seed=3))

    def objective(trial):
        kind = trial.suggest_categorical("kind", ["a", "b", None])
        layers = trial.suggest_int("layers", 2, 8, step=3)
        rate = trial.suggest_float("rate", 0.1, 0.4, step=0.1)
        return layers * (2 if kind == "b" else 1) - rate, layers + rate

    study.optimize(objective, n_trials=36)
    values = [(trial.params["kind"], trial.params["layers"], round(trial.params["rate"], 6)) for trial in study.trials]
    assert len(set(values)) == 3 * 3 * 4 == len(values)


@pytest.mark.parametrize(("sampler", "least"), [("linas", 0.99), ("nemo", 0.96)])
def test_most_of_the_front_of_81_points_is_found_in_60_percent_of_them(sampler, least):
    net = Network(SearchSpace({f"d{number}": (32, 24, 16) for number in range(4)}))
    values = pairs(net.space)
    worst = (min(gain for gain, _ in values.values()), max(price for _, price in values.values()))

    def share(seed):
        report = search(net, [ACCURACY, COST], sampler=sampler, budget=48, seed=seed)
        return area([values[key] for key in keys(report.evaluations)], worst) / area(values.values(), worst)

    assert sum(map(share, range(3))) / 3 >= least


def test_nemo_finds_more_than_chance():
    net = Network(SearchSpace({f"d{number}": (32, 24, 16, 8) for number in range(8)}))
    worst = (-1.0, 256.0)

    def volume(sampler, seed):
        report = search(net, [ACCURACY, COST], sampler=sampler, budget=100, seed=seed)
        measured = keys(report.evaluations)
        assert len(set(measured)) == 100
        points = [dict(zip(net.space.dimensions, key, strict=True)) for key in measured]
        return area([(accuracy(point), cost(point)) for point in points], worst)

    assert min(volume("nemo", seed) for seed in range(2)) > max(volume("random", seed) for seed in range(2))


def asked(**settings):
    study = optuna.create_study(sampler=NemoSampler(**settings))
    study.optimize(lambda trial: trial.suggest_int("x", 0, 3) + trial.suggest_int("y", 0, 3), n_trials=2)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: NemoSampler(4), "population of at least 5.*got 4, 1 and 0"),
        (lambda: NemoSampler(8, smallest=3), "each of 3 species.*got 8, 3 and 0"),
        (lambda: NemoSampler(smallest=0), "got 20, 0 and 0"),
        (lambda: NemoSampler(seed=-1), "seed of at least 0; got 20, 2 and -1"),
        (lambda: NemoSampler(species=[]), r"species are some of .*got \[\]"),
        (lambda: NemoSampler(species=["direct", "direct"]), "each once"),
        (lambda: NemoSampler(species=["lstm"]), "'graph'.*got .'lstm'"),
        (lambda: NemoSampler(features={"x": [1.0], "y": []}), "equally many numbers for each parameter"),
        (lambda: asked(features={"x": [1.0]}), r"features lack \['y'\]; the parameters are \['x', 'y'\]"),
        (lambda: asked(edges=[("x", "z")]), r"edges hold \[\('x', 'z'\)\]; the parameters are"),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(nncf.ValidationError, match=text):
        call()
