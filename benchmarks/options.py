"""Command line options that the benchmarks share."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.weights import KINDS


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Add what every benchmark has."""
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="value kinds of the weights")
    parser.add_argument("--json", type=Path, help="file for the records")
    parser.add_argument("--threads", type=positive, default=0, help="default: all CPUs of this process")
    parser.add_argument(
        "--precision",
        choices=("", "bf16", "f32"),
        default="",
        help="OpenVINO's precision hint; default: the faster one",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: shows only that it works")


def add_work_dir(parser: argparse.ArgumentParser) -> None:
    """Add where whole models are kept."""
    folder = Path(tempfile.gettempdir()) / "ov_ext_benchmarks"
    parser.add_argument("--work-dir", type=Path, default=folder, help="folder that keeps models between runs (11 GB)")


def fraction(text: str) -> float:
    """:return: A number from 0 to below 1."""
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"a fraction from 0 to below 1 is needed, got {text}")
    return value


def positive(text: str) -> int:
    """:return: A whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"a positive number is needed, got {text}")
    return value
