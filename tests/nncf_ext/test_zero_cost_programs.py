"""EZNAS: the statistics of layers, primitives and programs beside naive versions, and the evolution of programs."""

import itertools
import math
import random
from pathlib import Path

import nncf
import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor, nn

import nncf_ext
from nncf_ext import AdvancedEznasParameters, ProxyTask, StatisticsCache
from nncf_ext.algorithms.zero_cost.evolution import INVALID, _Breeding
from nncf_ext.algorithms.zero_cost.primitives import BINARY, PRIMITIVES, UNARY
from nncf_ext.algorithms.zero_cost.programs import PUBLISHED, Program
from nncf_ext.algorithms.zero_cost.statistics import STATISTICS, fresh_copy, layer_statistics, read_statistics

IMAGES = torch.randn(2, 2, 6, 5, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """A stem, and a block whose first ReLU is read by two convolutions; functions in place of modules beside."""

    def __init__(self, width: int = 4, kernel: int = 3) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv1, self.norm1 = nn.Conv2d(width, 3, kernel, padding=kernel // 2), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(5)
        self.shortcut, self.norm3 = nn.Conv2d(width, 5, 1, stride=1, bias=False), nn.BatchNorm2d(5)
        self.plain = nn.Conv2d(5, 5, 1)  # no batch norm behind it
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm0(self.stem(x)))
        y = torch.relu(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.conv2(y)) + self.norm3(self.shortcut(x)))
        return self.head(self.plain(y).mean((2, 3)))


def network(**sizes: int) -> Residual:
    torch.manual_seed(1)
    return Residual(**sizes).eval()


# Statistics


def naive(model: Residual, x: Tensor) -> list[dict[str, Tensor]]:
    """The three layers, written out for this very network."""
    kept: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> Tensor:
        value.retain_grad()
        kept[name] = value
        return value

    norm = {}
    for name in ("norm0", "norm1", "norm2", "norm3"):
        norm[name] = lambda value, name=name: nn.functional.batch_norm(
            value, None, None, getattr(model, name).weight, getattr(model, name).bias, training=True
        )
    a = keep("a", norm["norm0"](model.stem(x)))
    b = keep("b", torch.relu(a))
    c = keep("c", norm["norm1"](model.conv1(b)))
    d = keep("d", torch.relu(c))
    e = keep("e", norm["norm2"](model.conv2(d)))
    f = keep("f", norm["norm3"](model.shortcut(b)))
    logits = model.head(model.plain(torch.relu(e + f)).mean((2, 3)))
    logits.backward(torch.ones_like(logits))
    found = []
    for t1, t2, weight, t4 in (
        ("a", "b", model.conv1, "c"),
        ("c", "d", model.conv2, "e"),
        ("a", "b", model.shortcut, "f"),
    ):
        tensors = {"t1": kept[t1], "t2": kept[t2], "weight": weight.weight, "t4": kept[t4]}
        found.append(
            {name: each.detach().clone() for name, each in tensors.items()}
            | {f"{name}_grad": each.grad.clone() for name, each in tensors.items()}
        )
    model.zero_grad()
    return found


@pytest.mark.parametrize("fresh", [False, True])
def test_the_22_statistics(fresh) -> None:
    assert len(STATISTICS) == 22
    model = network()
    before = {key: each.clone() for key, each in model.state_dict().items()}
    layers = layer_statistics(model, IMAGES, fresh=fresh, seed=3)
    assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())
    own = fresh_copy(model, 3) if fresh else model
    draw = torch.Generator().manual_seed(4)
    noise = torch.randn(IMAGES.shape, generator=draw)
    perturbed = IMAGES + math.sqrt(0.01) * torch.randn(IMAGES.shape, generator=draw)
    data, random_, changed = (naive(own, each) for each in (IMAGES, noise, perturbed))
    assert len(layers) == 3
    for layer, one, other, third in zip(layers, data, random_, changed, strict=True):
        assert tuple(layer) == STATISTICS
        for name in STATISTICS:
            tensor, _, kind = name.rpartition("_")
            if name == "weight":
                wanted = one["weight"]
            elif kind == "change":
                wanted = third[tensor] - one[tensor]
            else:
                wanted = (one if kind == "data" else other)[tensor]
            torch.testing.assert_close(layer[name], wanted, rtol=1e-4, atol=1e-5)


class Shortcut(nn.Module):
    """A block whose sum is made in place, or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.in_place = in_place
        self.stem, self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        before = self.stem(x)
        after = self.norm(self.conv(torch.relu(before)))
        if self.in_place:
            after += before
        else:
            after = after + before
        return after.square().mean((2, 3))


def test_what_is_changed_in_place_later_does_not_count() -> None:
    one, other = (layer_statistics(Shortcut(each), IMAGES)[0] for each in (True, False))
    for name in STATISTICS:
        torch.testing.assert_close(one[name], other[name])


def test_networks_without_such_layers_are_refused() -> None:
    for model in (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()),
        nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1)),
    ):
        with pytest.raises(nncf.UnsupportedModelError, match="no ReLU whose output a convolution reads"):
            layer_statistics(model, IMAGES)


def test_the_cache_is_of_one_network(tmp_path) -> None:
    cache = StatisticsCache(tmp_path)
    file = cache.add("one", network(), IMAGES, seed=3)
    stamp = file.stat().st_mtime_ns
    for layer, again in zip(layer_statistics(network(), IMAGES, seed=3), read_statistics(file), strict=True):
        assert all(torch.equal(layer[name], again[name]) for name in STATISTICS)
    assert cache.add("one", network(), IMAGES, seed=3) == file and file.stat().st_mtime_ns == stamp
    for model, images, seed in ((network(width=5), IMAGES, 3), (network(), IMAGES + 1, 3), (network(), IMAGES, 4)):
        with pytest.raises(nncf.ValidationError, match="of another network, other images or another seed"):
            cache.add("one", model, images, seed=seed)
    trained = network()
    cache.add("trained", trained, IMAGES, fresh=False)
    trained.stem.weight.data[0, 0, 0, 0] += 1
    cache.add("forward", Shortcut(True), IMAGES)
    other = Shortcut(True)
    other.forward = lambda x: nn.Module.__call__(Shortcut(True), x) * 2  # type: ignore[method-assign]
    with pytest.raises(nncf.ValidationError, match="of another network"):
        cache.add("forward", other, IMAGES)
    with pytest.raises(nncf.ValidationError, match="of another network"):
        cache.add("trained", trained, IMAGES, fresh=False)
    for damage in (file.read_bytes()[:-30], b"", b"nonsense"):
        (tmp_path / "damaged.npz").write_bytes(damage)
        with pytest.raises(nncf.ValidationError, match="holds no statistics"):
            list(read_statistics(tmp_path / "damaged.npz"))


# Primitives, beside numpy

X = np.array([[[[1.5, -2.0, 0.0], [0.25, 3.0, -1.0], [2.0, 0.5, 1.0]]] * 2] * 2) * np.array([1.0, 2.0]).reshape(
    1, 2, 1, 1
)
Y = np.where(np.arange(X.size).reshape(X.shape) % 3, X[::-1] * 0.5 + 0.25, X)


def positive(x):
    return np.log(np.where(x > 0, x, 1.0))


def each_matrix(function):
    def over(x):
        found = np.array([function(each) for each in x.reshape(-1, *x.shape[-2:])])
        return found.reshape(x.shape[:-2])

    return over


def logdet(x):
    sign, value = np.linalg.slogdet(x)
    return value if sign > 0 else (-np.inf if sign == 0 else 0.0)


def gram_ratio(x):
    rows = x.reshape(len(x), -1)
    values = np.linalg.eigvalsh(2 * rows @ rows.T)
    return values[-1] / values[0]


def eigen_ratio(x):
    sizes = np.abs(np.linalg.eigvals(x))
    return sizes.max() / sizes.min()


ORACLES = {
    "log": positive,
    "absolute_log": lambda x: np.abs(positive(x)),
    "absolute": np.abs,
    "square": lambda x: x * x,
    "exponential": np.exp,
    "normalize": lambda x: (x - x.mean()) / x.std(ddof=1),
    "relu": lambda x: np.maximum(x, 0),
    "sign": np.sign,
    "heaviside": lambda x: np.heaviside(x, 0.0),
    "reciprocal": lambda x: 1 / x,
    "softmax": lambda x: special.softmax(x, axis=-1),
    "sigmoid": special.expit,
    "ones_like": np.ones_like,
    "zeros_like": np.zeros_like,
    "above_zero": lambda x: 1.0 * (x > 0),
    "below_zero": lambda x: 1.0 * (x < 0),
    "frobenius_norm": lambda x: np.sqrt((x * x).sum()),
    "determinant": each_matrix(np.linalg.det),
    "logdet": each_matrix(logdet),
    "gram_eigenvalue_ratio": gram_ratio,
    "eigenvalue_ratio": each_matrix(eigen_ratio),
    "mean": np.mean,
    "mean_absolute": lambda x: np.abs(x).mean(),
    "element_count": np.size,
    "add": lambda x, y: x + y,
    "multiply": lambda x, y: x * y,
    "matmul": lambda x, y: np.einsum("abij,abjk->abik", x, y),
    "less_than": lambda x, y: 1.0 * (x < y),
    "greater_than": lambda x, y: 1.0 * (x > y),
    "equal_to": lambda x, y: 1.0 * (x == y),
    "hamming_distance": lambda x, y: sum((a > 0) != (b > 0) for a, b in zip(x.flat, y.flat, strict=True)),
    "kl_divergence": lambda x, y: (special.xlogy(y, y) - y * x).sum() / len(x),
    "cosine_similarity": lambda x, y: ((x * y).sum(1) / np.sqrt((x * x).sum(1)) / np.sqrt((y * y).sum(1))).sum(),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitives_are_those_of_numpy(name) -> None:
    x, y = X.copy(), Y.copy()
    if name in ("reciprocal", "cosine_similarity", "gram_eigenvalue_ratio"):
        x = x + 0.125 + np.arange(x.size).reshape(x.shape) % 5
    if name == "kl_divergence":
        y = np.abs(y)  # of what is below zero there is no divergence
    given = [torch.from_numpy(each.copy()) for each in ((x, y) if name in BINARY else (x,))]
    copies = [each.clone() for each in given]
    with np.errstate(all="ignore"):
        wanted = torch.as_tensor(np.asarray(ORACLES[name](*[each.numpy() for each in given]), dtype=np.float64))
    count, function = PRIMITIVES[name]
    assert count == len(given)
    torch.testing.assert_close(function(*given).double(), wanted, rtol=1e-7, atol=1e-9)
    assert all(torch.equal(one, other) for one, other in zip(given, copies, strict=True))


def test_there_are_33_primitives_each_with_an_oracle() -> None:
    assert len(BINARY) == 9 and len(UNARY) == 24 and {*ORACLES} == {*PRIMITIVES}


def test_what_no_number_is() -> None:
    constant = torch.full((2, 3), 4.0)
    assert UNARY["normalize"](constant).tolist() == [[0.0] * 3] * 2  # 0 / 0
    assert UNARY["log"](torch.tensor([-1.0, 0.0, 1.0])).tolist() == [0.0, 0.0, 0.0]
    assert UNARY["logdet"](torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])).tolist() == [
        0.0,
        -math.inf,
    ]
    assert math.isnan(BINARY["kl_divergence"](constant, -constant))
    for name in ("gram_eigenvalue_ratio", "eigenvalue_ratio", "determinant", "frobenius_norm"):
        assert not torch.isfinite(UNARY[name](torch.full((3, 3), math.nan))).any()


# Programs


def a_of(size: int) -> float:
    """``sqrt(E[sigmoid(logdet)^2])`` over all matrices of signs, by counting them."""
    total = 0.0
    for signs in itertools.product((-1.0, 1.0), repeat=size * size):
        determinant = round(np.linalg.det(np.reshape(signs, (size, size))))
        total += (0.5 if determinant < 0 else determinant / (1 + determinant)) ** 2
    return math.sqrt(total / 2 ** (size * size))


def test_eznas_a_counts_channels() -> None:
    assert a_of(1) == 0.5 and math.isclose(a_of(3) ** 2, 0.166875)
    draw = torch.Generator().manual_seed(0)
    for kernel, (outputs, inputs) in ((1, (40, 50)), (3, (30, 60))):
        gradient = torch.randn(outputs, inputs, kernel, kernel, generator=draw)
        score = Program("eznas-a").score([{"weight_grad_noise": gradient}])
        assert math.isclose(score, a_of(kernel) * math.sqrt(inputs * outputs), rel_tol=0.02)


def test_published_programs_of_numbers_one_can_check() -> None:
    draw = torch.Generator().manual_seed(1)
    layer = {name: torch.randn(2, 3, 3, 3, generator=draw) for name in STATISTICS}
    numbers = {name: each.double().numpy() for name, each in layer.items()}

    def norm(x):
        return np.sqrt((x * x).sum())

    def z(x):
        return (x - x.mean()) / x.std(ddof=1)

    t4, data = numbers["t4_change"], numbers["t4_grad_data"]
    inner = positive(special.expit(positive(special.expit(t4))))
    wanted = {
        "eznas-top": norm(numbers["t2_noise"]) ** 2,
        "eznas-enas": 1 / (norm(t4) + np.exp(norm(inner))),
        "eznas-pnas": -((data > 0) * z(z(z(numbers["t4_grad_change"])))).sum() / 2,
        "eznas-nasnet": norm(1.0 * (positive(positive(t4) + numbers["t1_noise"]) < 0)),
        "eznas-a-prime": norm(special.expit(each_matrix(logdet)(np.sign(numbers["t1_grad_data"])))),
        "eznas-a": norm(special.expit(each_matrix(logdet)(np.sign(numbers["weight_grad_noise"])))),
    }
    assert {*wanted} == {*PUBLISHED}
    for name, value in wanted.items():
        assert math.isclose(Program(name).score([layer]), value, rel_tol=1e-4), name
        assert math.isclose(Program(str(Program(name))).score([layer, layer]), value, rel_tol=1e-4)


def test_what_makes_a_program_invalid() -> None:
    ones = {name: torch.ones(2, 3, 4, 5) for name in STATISTICS} | {"weight": torch.ones(2, 2, 3, 3)}
    square = {name: torch.ones(2, 3, 3, 3) for name in STATISTICS}
    assert Program("determinant(t1_data)").score([ones]) is None  # no layer fits
    assert Program("determinant(t1_data)").score([ones, square]) == 0.0  # one does
    assert Program("reciprocal(zeros_like(weight))").score([ones]) is None  # infinite
    assert Program("mean(weight)").score([]) is None
    assert Program("mean(weight)").score([ones], seconds=0.0) is None  # time is over
    large = {"weight": torch.ones(1), "t1_data": torch.ones(1, 1, 5000, 1), "t2_data": torch.ones(1, 1, 1, 5000)}
    assert Program("add(t1_data, t2_data)").score([large]) is None
    assert Program("matmul(t1_data, t2_data)").score([large]) is None
    assert Program("mean(matmul(t2_data, t1_data))").score([large]) == 5000.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic(weight)", "has 'magic'.*primitives are add"),
        ("mean(t9_data)", "has 't9_data'"),
        ("mean()", "has '\\)'"),
        ("mean(weight, weight)", "mean takes 1 argument.*got 2"),
        ("add(weight)", "add takes 2 argument.*got 1"),
        ("mean(weight", "mean takes 1"),
        ("mean(weight))", "ends before '\\)'"),
        ("__import__('os')", "has '__import__'|names, parentheses"),
        ("", "has ''"),
        ("abs(" * 70 + "weight" + ")" * 70, "has 'abs'"),
        ("mean(" * 70 + "weight" + ")" * 70, "deeper than 60"),
    ],
)
def test_programs_that_are_none(text, message) -> None:
    with pytest.raises(nncf.ValidationError, match=message):
        Program(text)


def test_a_proxy_by_program() -> None:
    model = network()
    layers = layer_statistics(model, IMAGES, fresh=True, seed=2)
    text = "mean(absolute(multiply(weight, weight_grad_data)))"
    wanted = sum(float((each["weight"] * each["weight_grad_data"]).abs().mean()) for each in layers) / 3
    assert math.isclose(nncf_ext.Proxy(text, IMAGES, fresh=True, seed=2)(model), wanted, rel_tol=1e-6)
    assert nncf_ext.Proxy("reciprocal(zeros_like(weight))", IMAGES)(model) == -math.inf


# Evolution

PLANTED = "mean_absolute(t2_noise)"
SMALL = AdvancedEznasParameters(generations=6, parents=12, children=60, networks=20, smallest=1, deepest=2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[ProxyTask]:
    """Two tasks of networks of random numbers, whose accuracies a program tells, each at a scale of its own."""
    folder, found = tmp_path_factory.mktemp("statistics"), []
    draw = torch.Generator().manual_seed(7)
    for name in ("one", "other"):
        files, accuracies = [], []
        for number in range(20):
            scales = torch.rand(len(STATISTICS), generator=draw) * 3
            layers = [
                {
                    each: scale * torch.randn(3, 3, 2, 2, generator=draw)
                    for each, scale in zip(STATISTICS, scales, strict=True)
                }
                for _ in range(2)
            ]
            file = folder / f"{name}{number}.npz"
            arrays = {f"{at}.{key}": each.numpy() for at, layer in enumerate(layers) for key, each in layer.items()}
            about = np.frombuffer(b'{"version": 1, "source": "made up"}', np.uint8)
            np.savez(file, about=about, **arrays)
            files.append(file)
            accuracies.append(math.tanh(Program(PLANTED).score(layers)))
        found.append(ProxyTask(name, files, accuracies))
    return found


@pytest.mark.slow
def test_a_planted_program_is_found_again(tasks) -> None:
    random.seed(5)
    state = random.getstate()
    found = nncf_ext.evolve_proxy(tasks, seed=1, advanced_parameters=SMALL)
    assert random.getstate() == state
    assert found[0].fitness > 0.95 and len(found) == SMALL.hall
    for evolved in found:
        for task in tasks:
            scores = [Program(evolved.program).score(read_statistics(file)) for file in task.statistics]
            assert math.isclose(evolved.taus[task.name], stats.kendalltau(scores, task.accuracies).statistic)
        assert evolved.fitness == min(evolved.taus.values())


@pytest.mark.slow
def test_workers_change_nothing(tasks) -> None:
    few = AdvancedEznasParameters(generations=2, parents=5, children=10, networks=4, smallest=1, deepest=4)
    alone = nncf_ext.evolve_proxy(tasks, advanced_parameters=few)
    assert nncf_ext.evolve_proxy(tasks, workers=2, advanced_parameters=few) == alone
    assert nncf_ext.evolve_proxy(tasks, seed=1, advanced_parameters=few) != alone


def test_children_are_not_too_deep_and_parents_stay() -> None:
    few = AdvancedEznasParameters(children=20, smallest=2, deepest=4)
    state = random.getstate()
    random.seed(0)
    try:
        breeding = _Breeding(few)
        parents = [breeding.new() for _ in range(25)]
        before = [str(each) for each in parents]
        assert max(breeding._child(parents, few).height for _ in range(500)) == 4
        assert [str(each) for each in parents] == before
    finally:
        random.setstate(state)


def test_programs_that_are_invalid_do_not_live(tasks, monkeypatch) -> None:
    """Nothing comes back where nothing is valid, however long it evolves."""
    monkeypatch.setattr("nncf_ext.algorithms.zero_cost.evolution._scores", lambda job: [None] * len(job[1]))
    few = AdvancedEznasParameters(generations=3, parents=5, children=10, networks=4, smallest=1, deepest=3)
    assert nncf_ext.evolve_proxy(tasks, advanced_parameters=few) == []


def test_bad_tasks_and_parameters(tasks) -> None:
    files = tasks[0].statistics
    for statistics, accuracies in (
        (files, [1.0]),
        (files[:2], [1.0, 2.0]),
        (files[:3], [1.0] * 3),
        (files[:3], [1.0, 2.0, math.nan]),
    ):
        with pytest.raises(nncf.ValidationError, match="at least three networks that differ"):
            ProxyTask("one", statistics, accuracies)
    for given in ([], [tasks[0], tasks[0]]):
        with pytest.raises(nncf.ValidationError, match="names of their own"):
            nncf_ext.evolve_proxy(given)
    for settings in ({"generations": 0}, {"crossover": 0.8}, {"smallest": 7, "deepest": 5}, {"networks": 2}):
        with pytest.raises(nncf.ValidationError):
            AdvancedEznasParameters(**settings)
    missing = ProxyTask("missing", [Path("nowhere.npz")] * 3, [1.0, 2.0, 3.0])
    with pytest.raises(nncf.ValidationError, match="nowhere.npz holds no statistics"):
        nncf_ext.evolve_proxy([missing], advanced_parameters=SMALL)
    assert INVALID < -1
