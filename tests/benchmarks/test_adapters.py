"""What adapters keep for their backward is known to the byte; mergeable ones keep hardly more than plain LoRA."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.adapters import (
    ENTRANTS,
    NAIVE_QUANT_AWARE,
    NAIVE_SPARSE,
    PLAIN,
    QUANT_AWARE,
    SPARSE,
    Shape,
    Training,
    main,
)

pytestmark = pytest.mark.slow

HIDDEN, LAYERS, TOKENS, RANK = 1024, 2, 1024, 16


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_bytes_kept_for_the_backward() -> None:
    shape = Shape(HIDDEN, LAYERS, TOKENS, RANK, 0.5)
    found = {entrant: Training(entrant, shape, 1, 0).saved() * 2**20 for entrant in ENTRANTS}
    # Each layer's input; plain LoRA also keeps x A^T, ours the mask.
    inputs, masks, matrices = (4 * LAYERS * TOKENS * HIDDEN, LAYERS * HIDDEN**2 // 8, 4 * LAYERS * HIDDEN**2)
    assert found[PLAIN] == inputs + 4 * LAYERS * TOKENS * RANK
    assert found[SPARSE] == found[QUANT_AWARE] == inputs + masks
    assert found[SPARSE] <= 1.15 * found[PLAIN]
    # Naively, a matrix as well wherever the input needs a gradient: in all layers but the first.
    more = matrices * (LAYERS - 1) // LAYERS
    assert found[NAIVE_SPARSE] >= inputs + more and found[NAIVE_QUANT_AWARE] >= inputs + more


def test_peaks_in_processes_of_their_own(tmp_path: Path) -> None:
    sizes = {"--hidden": HIDDEN, "--layers": LAYERS, "--tokens": TOKENS, "--rank": RANK}
    options = [str(word) for pair in sizes.items() for word in pair]
    records = main([*options, "--adapters", PLAIN, SPARSE, NAIVE_SPARSE, "--json", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == records
    plain, ours, naive = records
    assert [record["adapter"] for record in records] == [PLAIN, SPARSE, NAIVE_SPARSE]
    # At least what is kept must show; the naive form moreover keeps a delta and a mask for each layer.
    assert all(record["peak_mib"] >= record["saved_mib"] - 4 * TOKENS * HIDDEN / 2**20 for record in records)
    assert plain["peak_ratio"] == 1 and naive["peak_mib"] > ours["peak_mib"] + 4


@pytest.mark.parametrize("arguments", [["--hidden", "1000"], ["--tokens", "0"], ["--sparsity", "1"]])
def test_sizes_that_make_no_sense_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert arguments[0] in capsys.readouterr().err
