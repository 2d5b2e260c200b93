"""The checks pass on what rounding does and fail on everything else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from benchmarks.arms import Settings, compile_model, pack
from benchmarks.check import WrongResult, check_linear, check_network
from benchmarks.comparison import OURS, STOCK, Entrant
from benchmarks.decode import Models, check
from benchmarks.decoders import Generator, OpenVinoDecoder
from benchmarks.engines import EngineDied
from benchmarks.llama import TINY, RandomLlama, decoder, linear_model
from benchmarks.weights import KINDS, random_weight
from ov_ext.cpu_plugin.support.weight import Weight

SETTINGS = Settings(threads=1)


@pytest.fixture(params=KINDS)
def weight(request: pytest.FixtureRequest) -> Weight:
    return random_weight(request.param, 200, 384, 0.5, np.random.default_rng(1))


def run(weight: Weight, x: np.ndarray, packed: bool) -> np.ndarray:
    model = linear_model(weight, "layer")
    if packed:
        pack(model)
    return compile_model(model, SETTINGS)(x[None])[0][0]


@pytest.mark.parametrize("packed", [False, True], ids=["stock", "packed"])
def test_both_arms_pass(weight: Weight, packed: bool) -> None:
    x = np.random.default_rng(2).standard_normal((5, 384)).astype(np.float32)
    check_linear("layer", x, weight, run(weight, x, packed))


@pytest.mark.parametrize("packed", [False, True], ids=["stock", "packed"])
def test_another_weight_fails(weight: Weight, packed: bool) -> None:
    x = np.random.default_rng(2).standard_normal((5, 384)).astype(np.float32)
    other = random_weight(weight.kind, 200, 384, 0.5, np.random.default_rng(9))
    with pytest.raises(WrongResult, match="times its tolerance"):
        check_linear("layer", x, weight, run(other, x, packed))


def test_scales_of_the_wrong_group_fail() -> None:
    weight = random_weight("int4", 200, 384, 0.5, np.random.default_rng(1))
    assert weight.scales is not None
    x = np.random.default_rng(2).standard_normal((5, 384)).astype(np.float32)
    with pytest.raises(WrongResult):
        check_linear("layer", x, weight, run(replace(weight, scales=weight.scales[:, ::-1].copy()), x, True))


def test_one_wrong_output_fails(weight: Weight) -> None:
    x = np.random.default_rng(2).standard_normal((2, 384)).astype(np.float32)
    y = run(weight, x, True).copy()
    y[1, 77] += 0.5 * np.abs(y).max()
    with pytest.raises(WrongResult):
        check_linear("layer", x, weight, y)


def test_nan_fails(weight: Weight) -> None:
    x = np.random.default_rng(2).standard_normal((1, 384)).astype(np.float32)
    y = run(weight, x, False).copy()
    y[0, 3] = np.nan
    with pytest.raises(WrongResult):
        check_linear("layer", x, weight, y)
    with pytest.raises(WrongResult):
        check_network("network", np.ones(3), np.array([1, np.nan, 1]), 1)


class Local:
    """An engine in this process, which may be gone when it is needed."""

    def __init__(self, model: ov.Model, alive: bool = True) -> None:
        self.generator = Generator(lambda: OpenVinoDecoder(compile_model(model, SETTINGS)), TINY.vocab)
        self.alive = alive

    def call(self, method: str, *arguments):
        if not self.alive:
            raise EngineDied("its process ended")
        return getattr(self.generator, method)(*arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_models_are_compared(kind: str, tmp_path: Path) -> None:
    llama = RandomLlama(TINY, kind, 0.5)
    sparse, other = decoder(llama), decoder(replace(llama, seed=1))
    pack(sparse)
    pack(other)
    models = Models(TINY, False, 0, tmp_path, lambda text: None)
    stock = {Entrant(STOCK, kind, 0.5): Local(decoder(llama))}
    assert check(stock | {Entrant(OURS, kind, 0.5): Local(sparse)}, models, 32) == []
    with pytest.raises(WrongResult, match="ours"):
        check(stock | {Entrant(OURS, kind, 0.5): Local(other)}, models, 32)


def test_other_shares_of_zeros_have_their_own_reference(tmp_path: Path) -> None:
    models = Models(TINY, False, 0, tmp_path, lambda text: None)
    sparse, other = decoder(RandomLlama(TINY, "int4", 0.7)), decoder(RandomLlama(TINY, "int4", 0.5))
    pack(sparse)
    check({Entrant(OURS, "int4", 0.7): Local(sparse)}, models, 5)
    with pytest.raises(WrongResult):
        check({Entrant(OURS, "int4", 0.7): Local(other)}, models, 5)


def test_only_engines_of_others_may_crash(tmp_path: Path) -> None:
    models = Models(TINY, False, 0, tmp_path, lambda text: None)
    model = decoder(RandomLlama(TINY, "int4", 0.5))
    engines = {Entrant(STOCK, "int4", 0.5): Local(model), Entrant("llama.cpp", "int4", 0.5): Local(model, alive=False)}
    [record] = check(engines, models, 5)
    assert [entrant.engine for entrant in engines] == [STOCK]
    assert record["engine"] == "llama.cpp" and "crashed" in record["setting"] and record["fastest"]
    with pytest.raises(EngineDied):
        check({Entrant(OURS, "int4", 0.5): Local(model, alive=False)}, models, 5)
