"""What each step from SparseGPT to a good sparse INT4 model gains, on one model.

Proves which options of the sparse modes are worth their time: the published methods, the least-squares fit, zeros by
ADMM, better rounding, zeros shared out over layers, and blocks trained to give what the dense ones gave. Prints one
table: losses on two held-out texts against the dense model, paired, and minutes. What was measured is kept, so an
interrupted run goes on.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from evidence.show import quiet, table

sys.path.insert(0, str(Path(__file__).parents[1]))
PUBLISHED = {"least_squares_steps": 0, "activation_order": False, "scale_search": False, "rounding_passes": 0}
TRAINED = {"reconstruction_epochs": 4}
OUTLIERS, SENSITIVITY = {"allocation": "outliers"}, {"allocation": "sensitivity"}
STEPS: dict[str, tuple[str, bool, bool, dict[str, Any]]] = {
    # name: mode, zeros, INT4, options
    "magnitude": ("SPARSE_MAGNITUDE", True, False, {}),
    "Wanda": ("SPARSE_WANDA", True, False, {}),
    "SparseGPT, as published": ("SPARSE_GPT", True, False, PUBLISHED),
    "SparseGPT, fitted": ("SPARSE_GPT", True, False, {}),
    "ADMM, fitted": ("SPARSE_ADMM", True, False, {}),
    "ADMM, fitted, zeros by outliers": ("SPARSE_ADMM", True, False, OUTLIERS),
    "ADMM, fitted, zeros by sensitivity": ("SPARSE_ADMM", True, False, SENSITIVITY),
    "ADMM, fitted, trained by blocks": ("SPARSE_ADMM", True, False, TRAINED),
    "SparseGPT and GPTQ, as published": ("SPARSE_GPT", True, True, PUBLISHED),
    "ADMM, INT4": ("SPARSE_ADMM", True, True, {}),
    "ADMM, INT4, zeros by sensitivity": ("SPARSE_ADMM", True, True, SENSITIVITY),
    "ADMM, INT4, trained by blocks": ("SPARSE_ADMM", True, True, TRAINED),
    "ADMM, INT4, zeros by sensitivity, trained by blocks": ("SPARSE_ADMM", True, True, SENSITIVITY | TRAINED),
    "INT4 without zeros: GPTQ, as published": ("SPARSE_GPT", False, True, PUBLISHED),
    "INT4 without zeros: better rounding": ("SPARSE_GPT", False, True, {}),
    "INT4 without zeros, trained by blocks": ("SPARSE_GPT", False, True, TRAINED),
}


def main(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder; see python -m samples.real_models.")] = Path(
        __file__
    ).parent
    / "assets/tiny_lm",
    out: Annotated[Path, typer.Option(help="Folder for what was measured.")] = Path("samples/out/06"),
    text: Annotated[str, typer.Option(help="What to calibrate on: english or python.")] = "english",
    ratio: Annotated[float, typer.Option(help="Share of zeros.")] = 0.5,
    windows: Annotated[int, typer.Option(help="Windows to calibrate on.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    held_out: Annotated[int, typer.Option(help="Windows of each text to measure on.")] = 24,
    step: Annotated[
        list[str] | None, typer.Option(help="Only this step, by its name in the table; repeatable.")
    ] = None,
) -> None:
    """Measures the steps one after the other."""
    quiet()
    import nncf
    import torch
    from evidence.scores import losses
    from evidence.text import batches, python
    from evidence.text import windows as cut
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import nncf_ext
    from samples.real_models.texts import english

    if unknown := set(step or ()) - set(STEPS):
        raise typer.BadParameter(f"There is no step {unknown.pop()!r}, but: {', '.join(STEPS)}.")
    tokenizer = AutoTokenizer.from_pretrained(model)
    calibration = cut(tokenizer, english()[0] if text == "english" else python("calibration"), length, windows)
    texts = [cut(tokenizer, each, length, held_out) for each in (english()[1], python("heldout"))]

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def measured(name: str, make: Any) -> dict[str, Any]:
        setting = f"{model.name} {text} {ratio} {windows} {length} {held_out} {name}"
        file = out / f"{''.join(letter if letter.isalnum() else '-' for letter in setting)}.json"
        if not file.is_file():
            start = time.perf_counter()
            made = make()
            seconds = time.perf_counter() - start
            content = {"seconds": seconds, "losses": [losses(made, ids, 2).tolist() for ids in texts]}
            out.mkdir(parents=True, exist_ok=True)
            file.with_suffix(".part").write_text(json.dumps(content))
            file.with_suffix(".part").replace(file)
        return dict(json.loads(file.read_text()))

    def compressed(mode: str, zeros: bool, int4: bool, options: dict[str, Any]) -> Any:
        grid = {"quantization": nncf.CompressWeightsMode.INT4_SYM, "group_size": 64} if int4 else {}
        return nncf_ext.compress(
            load(),
            nncf_ext.CompressMode[mode],
            ratio=ratio if zeros else 0.0,
            dataset=nncf.Dataset(batches(calibration, 1)),
            subset_size=len(calibration),
            advanced_parameters=nncf_ext.AdvancedSparseWeightsParameters(**grid, **options),
        )

    dense = measured("dense", load)
    rows = []
    for name, recipe in STEPS.items():
        if step and name not in step:
            continue
        result = measured(name, lambda recipe=recipe: compressed(*recipe))
        cells = [_difference(*pair) for pair in zip(result["losses"], dense["losses"], strict=True)]
        rows.append([name, *cells, f"{result['seconds'] / 60:.1f}"])
        table(f"{model.name}, {ratio:.0%} zeros, calibrated on {text}", ["", "English", "Python", "minutes"], rows)


def _difference(one: list[float], other: list[float]) -> str:
    """Nats a token, with the paired 95 % interval."""
    import numpy as np
    from evidence.scores import difference, interval

    value, low, high = interval(difference, np.array(one), np.array(other))
    return f"{value:+.3f} ({low:+.3f} – {high:+.3f})"


if __name__ == "__main__":
    typer.run(main)
