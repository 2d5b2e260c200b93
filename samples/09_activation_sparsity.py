"""How many inputs of a model's MLPs can be left out, one-shot, and what does it cost?

Compares, on a language model and by the share of MLP weights that need not be read: CATS (one mask from the gate for up
and down), NNCF's thresholds, SCAP (exact ones, for the inputs of each layer), and what this package adds to it. Prints
the loss against the dense model, paired over held-out windows of two texts, with the share that was reached there, and
the share within 1 % of the dense loss; draws it. What was measured is kept, so an interrupted run goes on. On an
encoder with GELU, such as MiniLM, it compares centres instead, in minutes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from evidence.show import plot, quiet, table

SAMPLES = Path(__file__).parent
sys.path.insert(0, str(SAMPLES.parent))
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
LEAST, MOST = 0.1, 0.75  # without allocation, gate and up take 0.1 less, and down 0.2 more
CATS_MOST = 0.66  # of three matrices, it leaves out inputs of two


def main(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder; see python -m samples.real_models.")] = SAMPLES
    / "assets/tiny_lm",
    out: Annotated[Path, typer.Option(help="Folder for what was measured.")] = SAMPLES / "out" / "09",
    windows: Annotated[int, typer.Option(help="Windows of each text to calibrate on.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    held_out: Annotated[int, typer.Option(help="Windows of each text to measure on.")] = 12,
    share: Annotated[list[float] | None, typer.Option(help="Of MLP weights to skip; repeatable.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Only this one, by its name in the table; repeatable.")] = None,
) -> None:
    quiet()
    shares = sorted(share or SHARES)
    if not (LEAST <= shares[0] and shares[-1] <= MOST):
        _refuse(f"shares are {LEAST} to {MOST}, where all methods but CATS can have them; got {shares}.")
    from transformers import AutoConfig

    out.mkdir(parents=True, exist_ok=True)
    if any("CausalLM" in each for each in AutoConfig.from_pretrained(model).architectures or ()):
        decoder(model, out, windows, length, held_out, shares, arm)
    else:
        encoder(model, out, shares, arm)


def decoder(
    model: Path, out: Path, windows: int, length: int, held_out: int, shares: list[float], arm: list[str] | None
) -> None:
    """Loss over the share of MLP weights, by arm."""
    import numpy as np
    import torch
    from evidence.scores import losses
    from evidence.text import python
    from evidence.text import windows as cut
    from skipped_inputs.counting import Skipped
    from skipped_inputs.decoders import CATS, GREEDY, NNCF, SCAP, WAYS, cats, scap
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from samples.real_models.texts import english

    arms = _chosen(arm, [CATS, *WAYS], [CATS, NNCF, SCAP, GREEDY])
    weights = b"".join(hashlib.sha256(part.read_bytes()).digest() for part in sorted(model.glob("*.safetensors")))
    of = hashlib.sha256(weights).hexdigest()  # results are kept for these weights only
    tokenizer = AutoTokenizer.from_pretrained(model)
    calibration = torch.cat([cut(tokenizer, text, length, windows) for text in (english()[0], python("calibration"))])
    texts = {"English": english()[1], "Python": python("heldout")}
    ids = {name: cut(tokenizer, text, length, held_out) for name, text in texts.items()}

    def measured(name: str, share: float) -> dict[str, Any]:
        """Losses of windows, and the share that was reached, by text."""
        setting = f"{of[:8]} {model.name} {windows} {length} {held_out} {name} {share:g}"
        file = out / f"{''.join(letter if letter.isalnum() else '-' for letter in setting)}.json"
        if not file.is_file():
            made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
            skipped = Skipped()
            if name == CATS:
                skipped = cats(made, calibration, share)
            elif share:
                skipped = scap(made, calibration, share, name)
            content = {
                text: {"losses": losses(made, rows, 2).tolist(), "share": skipped.share()} for text, rows in ids.items()
            }
            file.with_suffix(".part").write_text(json.dumps(content))
            file.with_suffix(".part").replace(file)
        return dict(json.loads(file.read_text()))

    dense = {text: np.array(each["losses"]) for text, each in measured("dense", 0.0).items()}
    found: dict[str, dict[float, dict[str, Any]]] = {}
    for name in arms:
        found[name] = {level: measured(name, level) for level in shares if name != CATS or level <= CATS_MOST}
        for text, base in dense.items():
            rows = []
            for each, levels in found.items():
                points = [(0.0, 0.0)]
                cells = []
                for row in levels.values():
                    lost = np.array(row[text]["losses"]) - base
                    half = 1.96 * lost.std(ddof=1) / len(lost) ** 0.5
                    cells.append(f"{lost.mean():+.3f} ±{half:.3f} at {row[text]['share']:.1%}")
                    points.append((row[text]["share"], float(lost.mean())))
                cells += [""] * (len(shares) - len(cells))
                rows.append([each, *cells, f"{within(points, 0.01 * base.mean()):.0%}"])
            headings = ["", *(f"{level:.0%}" for level in shares), "within 1 %"]
            title = f"{model.name}, {text}: nats a token above {base.mean():.3f}, by share of MLP weights"
            table(title, headings, rows, 200)
    for text, base in dense.items():
        lines = {
            name: [(row[text]["share"], float(np.mean(row[text]["losses"]) - base.mean())) for row in levels.values()]
            for name, levels in found.items()
        }
        axes = "share of MLP weights that are not read", "nats a token above the dense model"
        plot(out / f"{text}.png", lines, axes)
    print(f"Pictures: {', '.join(str(out / f'{text}.png') for text in dense)}")


def encoder(model: Path, out: Path, shares: list[float], arm: list[str] | None) -> None:
    """Errors of embeddings over the share of weights behind GELU, by centre."""
    from skipped_inputs.encoders import CENTRES, ZERO, Encoder

    arms = _chosen(arm, list(CENTRES), list(CENTRES))
    made = Encoder(model, 64, 64, 256)
    rows, lines = [], {}
    found = {(name, level): made.measured(name, level) for name in {ZERO: 0, **dict.fromkeys(arms)} for level in shares}
    for name in arms:
        cells = []
        for level in shares:
            each = found[name, level]
            gain = found[ZERO, level].errors - each.errors
            half = 1.96 * gain.std(ddof=1) / len(gain) ** 0.5
            less = "" if name == ZERO else f", {gain.mean():.4f} ±{half:.4f} less"
            cells.append(f"{each.errors.mean():.4f}{less}; {each.same:.0%} at {each.share:.1%}")
        rows.append([name, *cells])
        lines[name] = [(found[name, level].share, float(found[name, level].errors.mean())) for level in shares]
    headings = ["centre", *(f"{level:.0%}" for level in shares)]
    title = f"{model.name}: 1 less the cosine to the dense embedding, and passages with the same nearest one"
    table(title, headings, rows, 200)
    plot(out / "centres.png", lines, ("share of the weights behind GELU that are not read", "1 less the cosine"))
    print(f"Picture: {out / 'centres.png'}")


def within(points: list[tuple[float, float]], limit: float) -> float:
    """:return: The largest share whose loss is below a limit, linear between those measured."""
    import numpy as np

    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if high > limit:
            return float(np.interp(limit, (low, high), (left, right))) if high > low else left
    return points[-1][0]


def _chosen(arm: list[str] | None, known: list[str], otherwise: list[str]) -> list[str]:
    if unknown := sorted({*(arm or ())} - {*known}):
        _refuse(f"there is no arm {unknown}. There are: {'; '.join(known)}.")
    return arm or otherwise


def _refuse(text: str) -> NoReturn:
    typer.secho(f"Error: {text}", err=True, fg="red")
    raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(main)
