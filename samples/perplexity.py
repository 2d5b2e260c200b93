"""
Perplexity of OpenVINO models, packed or not, on a text, by the lm-eval harness:

``python samples/perplexity.py stock packed --text heldout.txt`` prints a table with a row for each folder.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from adapters import harness
from rich.console import Console
from rich.table import Table

HELDOUT = Path(__file__).parent / "assets" / "heldout.txt"
METRICS = {"bits per byte": "bits_per_byte", "of a byte": "byte_perplexity", "of a word": "word_perplexity"}


def documents(text: str, length: int, count: int) -> list[str]:
    """
    :param text: Any text.
    :param length: Characters of a document.
    :param count: How many documents at most.
    :return: Documents that begin evenly spread over the text, in its order.
    """
    starts = range(0, max(len(text) - length, 0) + 1, length)
    step = max(1, -(-len(starts) // count))
    return [text[start : start + length] for start in starts[::step]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="Folders of OpenVINO language models.")
    parser.add_argument("--text", type=Path, default=HELDOUT, help="UTF-8 text; default: the committed held-out text.")
    parser.add_argument("--length", type=int, default=4000, help="Characters of a document.")
    parser.add_argument("--documents", type=int, default=32, help="How many, spread over the text.")
    options = parser.parse_args()
    parts = documents(options.text.read_text(encoding="utf-8"), options.length, options.documents)
    table = Table(title=f"Perplexity on {options.text.name}: {len(parts)} documents")
    table.add_column("model")
    for heading in METRICS:
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory() as place:
        tasks = harness.write_text(parts, Path(place), "text")
        for folder in options.folders:
            found = harness.score(folder, tasks, "text", batch=1)
            table.add_row(str(folder), *(f"{found[f'{name},none']:.4g}" for name in METRICS.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
