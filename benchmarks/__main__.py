"""Everything in one table, a JSON file and a picture: ``make bench``, or ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import decode, matmul
from benchmarks.comparison import COLUMNS, OURS, rows_of_table
from benchmarks.llama import LLAMA_1B
from benchmarks.options import add_shared, add_work_dir, positive
from benchmarks.plot import roofline
from benchmarks.results import Record, show, write_json
from benchmarks.weights import LABELS

# The first share of zeros is the one that peers are compared at.
_SPARSITIES = ["0.5", "0", "0.6", "0.7", "0.8", "0.9"]
_ROWS = ["1", "4", "16", "64"]


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Run the benchmarks of linear layers and of whole models; show, write and draw them.

    :param arguments: Command line without the program; None: the process's own.
    :return: The records.
    """
    options = _parser().parse_args(arguments)
    shared = ["--kinds", *options.kinds, "--seed", str(options.seed), "--depth", str(options.depth)]
    shared += ["--precision", options.precision] + ["--quick"] * options.quick
    shared += ["--threads", str(options.threads)] if options.threads else []
    linears = matmul.measure(
        matmul.parser().parse_args([*shared, "--rounds", "8", "--rows", *_ROWS, "--sparsity", *_SPARSITIES])
    )
    write_json(options.out / "linears.json", linears)
    models = decode.measure(decode.parser().parse_args([*shared, "--work-dir", str(options.work_dir)]))
    records = [r | {"what": "linear layers"} for r in linears] + [r | {"what": "whole model"} for r in models]
    write_json(options.json or options.out / "bench.json", records)
    roofline(linears, options.out / "roofline.png")
    decoding = [r for r in records if r["rows"] == 1 and (r["engine"] != OURS or r["sparsity"] in (0.0, 0.5))]
    show(f"One token at a time. {matmul.title(linears)}", rows_of_table(decoding), {"what": "what"} | _columns())
    for sentence in findings(linears):
        print(sentence)
    print(f"Records and picture are in {options.out}.")
    return records


def _columns() -> dict[str, str]:
    return {key: heading for key, heading in COLUMNS.items() if key != "rows"}


def findings(records: Sequence[Record]) -> Iterator[str]:
    """Say in words where zeros help and where they do not.

    :param records: Those of the linear layers, at several rows and shares of zeros.
    :return: Sentences; each follows from measured medians only.
    """
    ours = {(r["kind"], r["rows"], r["sparsity"]): r for r in records if r["engine"] == OURS and r["fastest"]}
    for kind in dict.fromkeys(kind for kind, _, _ in ours):
        shares = sorted(s for k, rows, s in ours if k == kind and rows == 1)
        rates = ", ".join(f"{ours[kind, 1, s]['weights_per_ns']:.0f} at {s:.0%}" for s in shares)
        yield f"{LABELS[kind]}: G weights a second at one token, by zeros: {rates}."
        for rows in sorted({rows for k, rows, _ in ours if k == kind}):
            faster = [s for s in shares if ours[kind, rows, s]["ratio"] > 1]
            against_stock = f"faster than stock at {_shares(faster, shares)}"
            dense = ours.get((kind, rows, 0.0))
            gains = [s for s in shares if dense and s and ours[kind, rows, s]["ms"] < dense["ms"]]
            against_dense = (
                f"; zeros gain time over our own dense kernel at {_shares(gains, shares[1:])}" if dense else ""
            )
            yield f"  {rows} {'token' if rows == 1 else 'tokens'} at a time: {against_stock}{against_dense}."


def _shares(chosen: Sequence[float], measured: Sequence[float]) -> str:
    """:return: Which of the measured shares of zeros, in words."""
    if not chosen:
        return "no measured share of zeros"
    if len(chosen) == len(measured):
        return "every measured share of zeros"
    if list(chosen) == list(measured[-len(chosen) :]):
        return f"{chosen[0]:.0%} zeros and more, not below"
    return ", ".join(f"{s:.0%}" for s in chosen) + " zeros only"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder of the results")
    parser.add_argument("--depth", type=positive, default=LLAMA_1B.layers, help="decoder layers")
    add_work_dir(parser)
    add_shared(parser)
    return parser


if __name__ == "__main__":
    main()
