"""The table of arms. A further one is a line: a name, who runs it, the kind of its weights, and what writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from side_by_side import gguf_files, ours, stock
from side_by_side.subject import Subject

STOCK, OURS, LLAMA_CPP = "stock OpenVINO", "ours", "llama.cpp"
DENSE = "dense-bf16"
"""The arm that others are held against."""


@dataclass(frozen=True)
class Arm:
    """
    :param name: For tables, folders and ``--arms``.
    :param engine: :data:`STOCK`, :data:`OURS` or :data:`LLAMA_CPP`.
    :param kind: Of most weights: ``"bf16"``, ``"int8"`` or ``"int4"``. OpenVINO's settings depend on it.
    :param write: Writes an OpenVINO folder or a GGUF file into an empty folder.
    """

    name: str
    engine: str
    kind: str
    write: Callable[[Subject, Path], None]


def _stock() -> Iterator[Arm]:
    yield Arm(DENSE, STOCK, "bf16", stock.dense)
    yield Arm("stock-int8", STOCK, "int8", stock.int8)
    both = {"awq": True, "scale_estimation": True}
    yield Arm("stock-int4", STOCK, "int4", stock.int4)
    yield Arm("stock-int4-awq", STOCK, "int4", partial(stock.int4, awq=True))
    yield Arm("stock-int4-scales", STOCK, "int4", partial(stock.int4, scale_estimation=True))
    yield Arm("stock-int4-awq-scales", STOCK, "int4", partial(stock.int4, **both))
    yield Arm("stock-int4-gptq", STOCK, "int4", partial(stock.int4, gptq=True))
    yield Arm("stock-int4-asym", STOCK, "int4", partial(stock.int4, asymmetric=True))
    yield Arm("stock-int4-asym-awq-scales", STOCK, "int4", partial(stock.int4, asymmetric=True, **both))


def _llama_cpp() -> Iterator[Arm]:
    for kind in gguf_files.KINDS:
        yield Arm(f"llamacpp-{kind.lower()}", LLAMA_CPP, "gguf", partial(gguf_files.quantized, kind=kind))


def _ours() -> Iterator[Arm]:
    def packed(name: str, kind: str, model: ours.Recipe, **options: Any) -> Arm:
        return Arm(f"ours-{name}", OURS, kind, partial(ours.packed, model=model, **options))

    yield Arm("ours-bf16", OURS, "bf16", partial(ours.repacked, stock=stock.dense))
    yield Arm("ours-int8", OURS, "int8", partial(ours.repacked, stock=stock.int8))
    yield packed("int4", "int4", partial(ours.sparse, ratio=0.0, int4=True))
    yield packed("int4-all", "int4", partial(ours.sparse, ratio=0.0, int4=True), rest="int4")
    for percent in (30, 50):
        sparse = partial(ours.sparse, ratio=percent / 100)
        yield packed(f"sparse{percent}-bf16", "bf16", sparse)
        yield packed(f"sparse{percent}-int8", "int8", sparse, int8=True)
        yield packed(f"sparse{percent}-int4", "int4", partial(sparse, int4=True))
        yield packed(f"sparse{percent}-int4-all", "int4", partial(sparse, int4=True), rest="int4")
        uniform = partial(sparse, int4=True, allocation="uniform")
        yield packed(f"sparse{percent}-int4-uniform", "int4", uniform)
        yield packed(f"sparse{percent}-int4-trained", "int4", partial(sparse, int4=True, epochs=4))
        yield packed(f"sparse{percent}-int4-trained-all", "int4", partial(sparse, int4=True, epochs=4), rest="int4")
        yield packed(f"sparse{percent}-bf16-recovered", "bf16", partial(ours.recovered, ratio=percent / 100))
        yield packed(f"sparse{percent}-int4-recovered", "int4", partial(ours.recovered, ratio=percent / 100, int4=True))
        on_grid = partial(ours.recovered_on_grid, ratio=percent / 100)
        yield packed(f"sparse{percent}-int4-recovered-on-grid", "int4", on_grid)
        twice = partial(on_grid, steps=320, base=partial(ours.recovered, ratio=percent / 100))
        yield packed(f"sparse{percent}-int4-recovered-twice", "int4", twice)
    pruned = partial(ours.pruned, ratio=0.1)
    yield packed("pruned10-bf16", "bf16", pruned)
    yield packed("pruned10-int4", "int4", partial(ours.sparse, ratio=0.0, int4=True, base=pruned))
    yield packed("pruned20-bf16", "bf16", partial(ours.pruned, ratio=0.2))


ARMS = {arm.name: arm for arm in (*_stock(), *_llama_cpp(), *_ours())}
QUICK = (DENSE, "stock-int8", "stock-int4", "llamacpp-q8_0", "llamacpp-q4_0", "ours-int8", "ours-sparse50-int4")
