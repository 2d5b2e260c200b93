"""How many inputs of a model's MLPs can be left out, one-shot, and what does it cost?

Compares, on one model and at the same share of skipped MLP weights: CATS (one mask from the gate for up and down), SCAP
(thresholds for the inputs of each layer), and what this package adds to it. Prints the loss against the dense model for
each share, paired over held-out windows of two texts, and the share within 1 % of the dense loss; draws it. What was
measured is kept, so an interrupted run goes on.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from evidence.show import plot, quiet, table

SAMPLES = Path(__file__).parent
sys.path.insert(0, str(SAMPLES.parent))
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)
LEAST, MOST = 0.1, 0.66  # gate and up take 0.1 less; two thirds are all that CATS can skip
CATS, SCAP = "CATS", "SCAP"
MORE: dict[str, dict[str, Any]] = {
    SCAP: {},
    "SCAP, calibrated on dense inputs": {"sequential": False},
    "SCAP, centres by density": {"centering": "mode"},
    "with column norms": {"weight_norms": True},
    "with means": {"mean_replacement": True},
    "with column norms and means": {"weight_norms": True, "mean_replacement": True},
}


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
    arms = arm or [CATS, *MORE]
    if unknown := sorted({*arms} - {CATS, *MORE}):
        typer.secho(f"Error: there is no arm {unknown}. There are: {', '.join([CATS, *MORE])}.", err=True, fg="red")
        raise typer.Exit(2)
    shares = sorted(share or SHARES)
    if not (LEAST <= shares[0] and shares[-1] <= MOST):
        text = f"Error: shares are {LEAST} to {MOST}, where all methods can have them; got {shares}."
        typer.secho(text, err=True, fg="red")
        raise typer.Exit(2)
    import numpy as np
    import torch
    from evidence.scores import losses
    from evidence.text import python
    from evidence.text import windows as cut
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from samples.real_models.texts import english

    weights = b"".join(hashlib.sha256(part.read_bytes()).digest() for part in sorted(model.glob("*.safetensors")))
    of = hashlib.sha256(weights).hexdigest()  # results are kept for these weights only
    tokenizer = AutoTokenizer.from_pretrained(model)
    calibration = torch.cat([cut(tokenizer, text, length, windows) for text in (english()[0], python("calibration"))])
    texts = {"English": english()[1], "Python": python("heldout")}
    ids = {name: cut(tokenizer, text, length, held_out) for name, text in texts.items()}

    def measured(name: str, share: float) -> dict[str, list[float]]:
        setting = f"{model.name} {of[:8]} {windows} {length} {held_out} {name} {share:g}"
        file = out / f"{''.join(letter if letter.isalnum() else '-' for letter in setting)}.json"
        if not file.is_file():
            made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
            if name == CATS:
                cats(made, calibration, share)
            elif share:
                scap(made, calibration, share, MORE[name])
            content = {text: losses(made, rows, 2).tolist() for text, rows in ids.items()}
            out.mkdir(parents=True, exist_ok=True)
            file.with_suffix(".part").write_text(json.dumps(content))
            file.with_suffix(".part").replace(file)
        return dict(json.loads(file.read_text()))

    dense = {name: np.array(each) for name, each in measured("dense", 0.0).items()}
    found: dict[str, list[dict[str, Any]]] = {}
    for name in arms:
        found[name] = [
            {text: np.array(each) - dense[text] for text, each in measured(name, level).items()} for level in shares
        ]
        for text, base in dense.items():
            rows = [
                [
                    each,
                    *(
                        f"{row[text].mean():+.3f} ±{1.96 * row[text].std(ddof=1) / len(base) ** 0.5:.3f}"
                        for row in rows
                    ),
                    f"{within(shares, [row[text].mean() for row in rows], 0.01 * base.mean()):.0%}",
                ]
                for each, rows in found.items()
            ]
            headings = ["", *(f"{level:.0%}" for level in shares), "within 1 %"]
            table(
                f"{model.name}, {text}: nats a token above {base.mean():.3f}, by share of MLP weights", headings, rows
            )
    for text in dense:
        lines = {
            name: [(level, float(row[text].mean())) for level, row in zip(shares, rows, strict=True)]
            for name, rows in found.items()
        }
        plot(
            out / f"{text}.png", lines, ("share of MLP weights that are skipped", "nats a token above the dense model")
        )
    print(f"Pictures: {', '.join(str(out / f'{text}.png') for text in dense)}")


def scap(model: Any, calibration: Any, share: float, options: dict[str, Any]) -> None:
    """
    Thresholds for the inputs of all three layers, more for the one that is peaked most, as published.

    :param model: Changed in place.
    :param calibration: ``[windows, tokens]``.
    :param share: Of MLP weights.
    :param options: Advanced parameters.
    """
    import nncf
    from evidence.text import batches

    import nncf_ext

    targets = {r".*\.(gate|up)_proj": max(0.0, share - 0.1), r".*\.down_proj": min(0.95, share + 0.2)}
    nncf_ext.compress(
        model,
        nncf_ext.CompressMode.ACTIVATION_SPARSITY,
        ratio=0.0,
        dataset=nncf.Dataset(batches(calibration, 1)),
        subset_size=len(calibration),
        advanced_parameters=nncf_ext.AdvancedActivationSparsityParameters(targets=targets, **options),
    )


def cats(model: Any, calibration: Any, share: float) -> None:
    """
    Channels whose activated gate is small are left out of up and down; the gate itself is dense. Source: CATS,
    arXiv 2404.08763.

    :param model: With gated MLPs of the names that Llama has; changed in place.
    :param calibration: ``[windows, tokens]``.
    :param share: Of MLP weights: two of three matrices are sparse.
    """
    import torch

    mlps = [module for module in model.modules() if hasattr(module, "gate_proj") and hasattr(module, "down_proj")]
    seen: list[list[Any]] = [[] for _ in mlps]
    hooks = [
        mlp.gate_proj.register_forward_hook(
            lambda _, __, output, kept=kept, mlp=mlp: kept.append(mlp.act_fn(output).abs().flatten())
        )
        for mlp, kept in zip(mlps, seen, strict=True)
    ]
    with torch.no_grad():
        for row in calibration:
            model(input_ids=row[None])
    for hook in hooks:
        hook.remove()

    def forward(mlp: Any, threshold: Any, x: Any) -> Any:
        gate = mlp.act_fn(mlp.gate_proj(x))
        return mlp.down_proj(torch.where(gate.abs() > threshold, gate * mlp.up_proj(x), torch.zeros_like(gate)))

    for mlp, kept in zip(mlps, seen, strict=True):
        values = torch.cat(kept)
        threshold = values.kthvalue(max(1, round(min(1.0, 1.5 * share) * len(values)))).values
        mlp.forward = partial(forward, mlp, threshold)


def within(shares: list[float], losses: list[float], limit: float) -> float:
    """:return: The largest share whose loss is below a limit, linear between those measured."""
    import numpy as np

    points = [(0.0, 0.0), *zip(shares, losses, strict=True)]
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if high > limit:
            return float(np.interp(limit, (low, high), (left, right))) if high > low else left
    return points[-1][0]


if __name__ == "__main__":
    typer.run(main)
