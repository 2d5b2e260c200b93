"""A real language model, compressed by this project and by what else there is, side by side.

Takes SmolLM2-135M-Instruct (from a package of the Python index, see `real_models`) and makes it smaller in every way at
hand: stock OpenVINO with NNCF's methods, llama.cpp with its quantizer, and ours. Measures all of them on the same
windows of English and of Python: loss, with paired intervals to the dense model; bytes, memory, milliseconds a token
and of a prompt, interleaved; an answer. What needs calibration gets the same in all arms: English, Python and
conversations. Prints tables, and draws loss against speed and loss against size. All parts are kept in
`samples/out/05`: an interrupted run goes on, and a further arm costs only itself.

Its weights were quantized once before they got into the package (4 bits, asymmetric, groups of 32), so the dense model
is what that left of the published one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from evidence.show import quiet

SAMPLES = Path(__file__).parent
sys.path.append(str(SAMPLES.parent))  # benchmarks, whose engines stop while others run; samples.real_models


def main(
    out: Annotated[Path, typer.Option(help="Folder of models and results.")] = SAMPLES / "out" / "05",
    arms: Annotated[
        list[str] | None, typer.Option("--arms", help="Arms to measure, with the dense one; repeatable. Default: all.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Few arms, little text: minutes.")] = False,
    windows: Annotated[int, typer.Option(help="Held-out windows of each text.")] = 24,
    rounds: Annotated[int, typer.Option(help="In which every arm is timed.")] = 7,
    wheel: Annotated[Path | None, typer.Option(help="The package with the model, for work without a network.")] = None,
) -> None:
    quiet()
    from evidence import text
    from rich.console import Console
    from rich.progress import Progress
    from side_by_side import arms as table
    from side_by_side import measuring, report
    from side_by_side.subject import Subject

    from samples.real_models.packages import UnavailableError
    from samples.real_models.texts import english

    taken = chosen(arms or (table.QUICK if quick else tuple(table.ARMS)))
    console = Console(width=160)
    subject = Subject(out / "quick" if quick else out, *((9, 128) if quick else (48, 512)), wheel)
    try:
        subject.source  # noqa: B018  the download comes first
    except (UnavailableError, ValueError) as error:
        typer.secho(f"Error: {error}", err=True, fg="red")
        raise typer.Exit(2) from error
    count, length = (4, 128) if quick else (windows, 512)
    held_out = {"English": english()[1], "Python": text.python("heldout")}
    texts = {name: text.windows(subject.tokenizer, each, length, count) for name, each in held_out.items()}
    found = {}
    with Progress(console=Console(stderr=True)) as progress:
        whole = progress.add_task("arms", total=len(taken))
        task = progress.add_task("", total=None)

        def say(what: str, done: int, of: int) -> None:
            progress.update(task, description=what, completed=done, total=of or None)

        for arm in taken:
            found[arm.name] = measuring.quality(
                subject, arm, texts, lambda what, done, of, name=arm.name: say(f"{name}: {what}", done, of)
            )
            progress.advance(whole)
        times = measuring.speed(subject, taken, found, 2 if quick else rounds, say)

    sizes = {name: (length, text.byte_counts(subject.tokenizer, ids)) for name, ids in texts.items()}
    report.print_tables(taken, found, times, sizes)
    for name in texts:
        if stock := report.best(taken, found, "stock-int4", name):
            console.print(f"Best stock INT4 on {name}: {stock}", highlight=False)
    console.print(f"\n{measuring.QUESTION}", style="bold")
    for arm in taken:
        console.print(f"{arm.name}: {found[arm.name]['answer']!r}", markup=False, highlight=False)
    ms = {arm.name: times["arms"][arm.name]["ms"] for arm in taken}
    size = {arm.name: found[arm.name]["bytes"] / 1e6 for arm in taken}
    report.draw(subject.out / "loss-speed.png", taken, found, ms, "ms a token")
    report.draw(subject.out / "loss-size.png", taken, found, size, "MB on disk")
    console.print(f"Pictures: {subject.out / 'loss-speed.png'}, {subject.out / 'loss-size.png'}", highlight=False)
    (subject.out / "record.json").write_text(json.dumps({"quality": found, "speed": times}, indent=1))


def chosen(names: Sequence[str]) -> list:
    """:return: The arms of these names, and the dense one first; without those of engines that are not installed."""
    from side_by_side.arms import ARMS, DENSE, LLAMA_CPP

    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: no such arm. There are {', '.join(ARMS)}.")
    arms = [ARMS[name] for name in dict.fromkeys((DENSE, *names))]
    if find_spec("llama_cpp") is None and any(arm.engine == LLAMA_CPP for arm in arms):
        typer.echo("llama.cpp is not installed, so its arms are left out: pip install 'nncf-ext[llama-cpp]'", err=True)
        arms = [arm for arm in arms if arm.engine != LLAMA_CPP]
    return arms


if __name__ == "__main__":
    typer.run(main)
