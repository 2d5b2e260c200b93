"""The cost model: sizes against those of real blobs, times between measured ones, and what follows from them."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest

from ov_ext import runtime
from ov_ext.cpu_plugin.sparse_matmul import native
from ov_ext.sparse_weights import cost, tables
from ov_ext.sparse_weights.cost import CostTable, KindCosts
from ov_ext.sparse_weights.plan import decide
from ov_ext.sparse_weights.policy import SparsePolicy
from ov_ext.sparse_weights.survey import Candidate
from ov_ext.sparse_weights.workload import Expected, Workload
from tests.cpu_plugin.conftest import make_weight

KINDS = [("bf16", 0), ("int8", 0), ("int8", 128), ("int4", 64), ("int4", 128)]
TARGETS = sorted(tables.builtin())
TOKEN = Workload()


@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("kind, group", KINDS)
def test_bytes_are_those_of_real_weights(kind: str, group: int, zeros: float) -> None:
    weight = make_weight(kind, 1024, 2048, group=group, sparsity=zeros)
    blob = native.pack(weight, dense=zeros == 0)
    assert native.packed_bytes(weight, dense=zeros == 0) == blob.nbytes
    estimate = cost.bytes_per_weight(
        "dense" if zeros == 0 else "sparse", kind, float(np.mean(weight.values == 0)), group
    )
    assert blob.nbytes / (1024 * 2048) == pytest.approx(estimate, rel=0.03)
    bits = {"bf16": 16, "int8": 8, "int4": 4}[kind]
    stock = (1024 * 2048 * bits / 8 + (weight.scales.nbytes if group else 0)) / (1024 * 2048)
    assert cost.bytes_per_weight("stock", kind, zeros, group) == pytest.approx(stock)


COSTS = KindCosts((1, 4, 128), (0.0, 0.5), (10.0, 16.0, 264.0), (8.0, 20.0, 330.0), ((12.0, 24, 400), (6.0, 18, 400)))
TABLE = CostTable("a CPU", 2, {"int8": COSTS})


@pytest.mark.parametrize(
    "form, zeros, rows, expected",
    [
        ("stock", 0.9, 1, 10),
        ("stock", 0.0, 2, 12),  # a third of the way from 10 to 16
        ("dense", 0.5, 66, 175),  # half way from 20 to 330
        ("sparse", 0.25, 1, 9),  # half way from 12 to 6
        ("sparse", 0.8, 4, 18),  # more zeros than measured: no better
        ("stock", 0.0, 512, 1056),  # four times 128 rows
    ],
)
def test_times_between_measured_ones(form: Any, zeros: float, rows: int, expected: float) -> None:
    assert COSTS.picoseconds(form, zeros, rows) == pytest.approx(expected)


def test_few_measured_rows_tell_nothing_about_many() -> None:
    few = KindCosts((1,), (0.5,), (10.0,), (8.0,), ((6.0,),))
    assert few.picoseconds("stock", 0, 1) == 10 and few.picoseconds("stock", 0, 2) is None
    times = CostTable("a CPU", 2, {"int8": few}).expected("int8", 0.5, 0, 1000, Workload(prompt=64))
    assert times["sparse"] == Expected(pytest.approx(6e-9), None)
    assert not CostTable("a CPU", 2, {"int8": few}).expected("int8", 0.5, 0, 1000, Workload(prompt=64, generated=0))
    assert not CostTable("a CPU", 2, {"int8": few}).expected("int8", 0.5, 0, 1000, Workload(batch=2))
    assert not TABLE.expected("int4", 0.5, 128, 1000, TOKEN)


@pytest.mark.parametrize(
    "workload, form, speedup",
    [
        (Workload(), "sparse", 10 / 6),
        (Workload(batch=4), "stock", 16 / 18),
        (Workload(prompt=128, generated=0), "stock", 264 / 330),
        (Workload(prompt=128, generated=16), "stock", (264 + 160) / (330 + 128)),
        (Workload(prompt=128, generated=128), "sparse", (264 + 1280) / (400 + 768)),
        (Workload(prompt=32, generated=64, batch=4), "stock", (264 + 64 * 16) / (400 + 64 * 18)),
    ],
    ids=str,
)
def test_the_workload_weighs_prompts_and_tokens(workload: Workload, form: str, speedup: float) -> None:
    (decision,) = _decide(TABLE, SparsePolicy(target="avx512", workload=workload), _candidate()).values()
    assert decision.form == form and decision.speedup == pytest.approx(speedup)
    assert bool(decision.reason) == (form == "stock")


@pytest.mark.parametrize("wrong", [{"prompt": -1}, {"batch": 0}, {"prompt": 0, "generated": 0}], ids=str)
def test_a_workload_has_something_to_do(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least one of them"):
        Workload(**wrong)


def _candidate(**changes: Any) -> Candidate:
    sizes = {"dense": 101_000, "sparse": 63_500}
    fields = {"kind": "int8", "zeros": 0.5, "group": 0, "weights": 100_000, "freed": 100_000, "reader": "", "uses": 1}
    return Candidate(**fields | {"sizes": sizes} | changes)


def _decide(table: CostTable, policy: SparsePolicy, *candidates: Candidate) -> dict[str, Any]:
    named = {str(i): each for i, each in enumerate(candidates)}
    return decide(named, policy, table, sum(each.weights for each in candidates))


def test_ours_must_be_clearly_faster() -> None:
    for stock, form in ((6.5, "stock"), (6.7, "sparse")):
        costs = KindCosts((1,), (0.5,), (stock,), (8.0,), ((6.0,),))
        (decision,) = _decide(CostTable("", 1, {"int8": costs}), SparsePolicy(target="avx2"), _candidate()).values()
        assert decision.form == form


TIED = {"freed": 0, "reader": "embedding"}


def test_a_second_copy_is_paid_by_what_others_save() -> None:
    """It adds 63,500 bytes; each of the others saves 36,500."""
    policy = SparsePolicy(target="avx2", max_growth=0)
    enough = _decide(TABLE, policy, _candidate(), _candidate(), _candidate(**TIED))
    assert [each.form for each in enough.values()] == ["sparse", "sparse", "sparse"]
    assert [each.form for each in _decide(TABLE, policy, _candidate(), _candidate(**TIED)).values()] == [
        "sparse",
        "stock",
    ]


def test_a_model_does_not_grow_by_a_second_copy() -> None:
    policy = SparsePolicy(target="avx2")
    (decision,) = _decide(TABLE, policy, _candidate(**TIED)).values()
    assert decision.form == "stock" and decision.speedup == pytest.approx(10 / 6)
    assert decision.reason == (
        "embedding reads it too: packed, it would be stored twice, and the model may grow by 2% "
        "(SparsePolicy(max_growth=...))"
    )
    for allowed in (SparsePolicy(target="avx2", max_growth=0.64), SparsePolicy(target="avx2", max_growth=math.inf)):
        assert _decide(TABLE, allowed, _candidate(**TIED))["0"].form == "sparse"


def test_what_gains_least_for_its_bytes_stays() -> None:
    """Three layers without zeros would grow by 3 % each; two may. The third is the one with the smallest gain."""
    costs = KindCosts((1,), (0.0,), (20.0,), (10.0,), ((20.0,),))
    slower = KindCosts((1,), (0.0,), (20.0,), (17.0,), ((20.0,),))
    table = CostTable("", 1, {"int8": costs, "bf16": slower})
    large = {"zeros": 0.0, "sizes": {"dense": 103_000, "sparse": 113_000}}
    candidates = [_candidate(**large), _candidate(**large, kind="bf16"), _candidate(**large)]
    assert [d.form for d in _decide(table, SparsePolicy(target="avx2"), *candidates).values()] == [
        "dense",
        "stock",
        "dense",
    ]


def test_a_smaller_form_of_ours_comes_before_stock() -> None:
    """Dense is the fastest; the bitmap is still 1.25 times faster than stock, and smaller."""
    costs = KindCosts((1,), (0.5,), (20.0,), (10.0,), ((16.0,),))
    candidate = _candidate(sizes={"dense": 103_000, "sparse": 63_500})
    table = CostTable("", 1, {"int8": costs})
    assert _decide(table, SparsePolicy(target="avx2", max_growth=0.03), candidate)["0"].form == "dense"
    limited = _decide(table, SparsePolicy(target="avx2", max_growth=0.02), candidate)["0"]
    assert limited.form == "sparse" and limited.speedup == pytest.approx(1.25)


@pytest.mark.parametrize("target, kind_group", itertools.product(TARGETS, KINDS))
def test_more_zeros_never_lead_back_to_a_denser_form(target: str, kind_group: tuple[str, int]) -> None:
    order, forms, table = ["stock", "dense", "sparse"], [], tables.builtin()[target]
    for z in range(100):
        times = table.expected(kind_group[0], z / 100, kind_group[1], 1, TOKEN)
        best, ratio = cost.fastest(times, TOKEN)
        forms.append(order.index(best if ratio >= cost.MARGIN else "stock"))
    assert forms == sorted(forms)
    needed = cost.break_even(table, *kind_group, TOKEN)
    assert needed == next((z / 100 for z in range(100) if forms[z]), None)


@pytest.mark.parametrize("target, kind", itertools.product(["amx", "avx512"], ["bf16", "int8", "int4"]))
def test_half_the_weights_zero_pay_with_vbmi2(target: str, kind: str) -> None:
    times = tables.builtin()[target].expected(kind, 0.5, 128 if kind == "int4" else 0, 1, TOKEN)
    best, ratio = cost.fastest(times, TOKEN)
    assert best == "sparse" and ratio >= cost.MARGIN


def test_every_target_has_times_and_says_of_which_cpu() -> None:
    assert set(TARGETS) == set(runtime.TARGETS) - {"reference"}
    assert all(set(table.kinds) >= set(cost.KINDS) and table.cpu for table in tables.builtin().values())
    table, said = tables.costs(SparsePolicy(target="avx512"), ["int4"])
    assert table == tables.builtin()["avx512"] and said == f"built-in times of {table.cpu}"


def test_stock_is_that_of_the_cpu_where_our_kernels_are_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "this_cpu", lambda: "avx2")
    monkeypatch.setattr(runtime, "stock_cpu", lambda: "avx512")
    builtin, mixed = tables.builtin(), tables.similar()
    for kind in cost.KINDS:
        ours, theirs, both = (table.kinds[kind] for table in (builtin["avx2"], builtin["avx512"], mixed))
        assert both.sparse == ours.sparse and both.dense == ours.dense
        assert both.stock[0] / both.dense[0] == pytest.approx(theirs.stock[0] / theirs.dense[0])


@pytest.mark.parametrize(
    "kernels, variables, ours, stock",
    [
        (["avx2", "reference"], {}, "avx2", "avx2"),
        (["avx512_core", "avx2", "reference"], {}, "avx512_core", "avx512_core"),
        (["avx512_bf16", "avx512", "avx2"], {}, "avx512", "avx512"),
        (["avx512", "avx2"], {"OV_EXT_ISA": "avx2"}, "avx2", "avx512"),
        (["avx512", "avx2"], {"OV_EXT_ISA": "avx512_bf16"}, "avx512", "avx512"),
        (["avx512", "avx2"], {"ONEDNN_MAX_CPU_ISA": "avx512_core"}, "avx512", "avx512_core"),
        (["avx2"], {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "avx2", "avx2"),
        (["amx", "avx512"], {"ONEDNN_MAX_CPU_ISA": "ALL"}, "amx", "amx"),
    ],
)
def test_targets_of_cpus(
    kernels: list[str], variables: dict[str, str], ours: str, stock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = {"kernels": kernels, "override": variables.get("OV_EXT_ISA")}
    monkeypatch.setattr(runtime, "cpu_info", lambda: info)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (runtime.this_cpu(), runtime.stock_cpu()) == (ours, stock)


def _changed(path: str, value: Any) -> Any:
    data = json.loads(json.dumps(TABLE.to_dict()))
    *folders, last = path.split("/")
    place = data
    for name in folders:
        place = place[int(name) if isinstance(place, list) else name]
    if value is KeyError:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return data


def test_tables_survive_json() -> None:
    assert cost.read_table(json.loads(json.dumps(TABLE.to_dict()))) == TABLE


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        _changed("cpu", 3),
        _changed("threads", 0),
        _changed("threads", True),
        _changed("kinds", []),
        _changed("kinds/int8", KeyError),
        _changed("kinds/nf4", {}),
        _changed("kinds/int8/more", 1),
        _changed("kinds/int8/rows", [4, 1, 128]),
        _changed("kinds/int8/rows", [1, 4]),
        _changed("kinds/int8/rows/0", 1.5),
        _changed("kinds/int8/zeros", [0.0, 1.5]),
        _changed("kinds/int8/zeros/0", math.nan),
        _changed("kinds/int8/stock/0", -1.0),
        _changed("kinds/int8/stock/0", 0),
        _changed("kinds/int8/stock/0", math.nan),
        _changed("kinds/int8/stock/0", math.inf),
        _changed("kinds/int8/stock/0", 10**400),
        _changed("kinds/int8/stock/0", "10"),
        _changed("kinds/int8/stock/0", 1e30),
        _changed("kinds/int8/dense", [1.0] * 1000),
        _changed("kinds/int8/sparse", [[1.0, 1.0, 1.0]]),
        _changed("kinds/int8/sparse/1", 5),
        _changed("kinds/int8/error", 2),
    ],
    ids=str,
)
def test_what_is_no_table(data: Any) -> None:
    if isinstance(data, dict) and data.get("kinds") == {}:
        assert cost.read_table(data).kinds == {}  # nothing was measured: no error
        return
    with pytest.raises(ValueError):
        cost.read_table(data)
