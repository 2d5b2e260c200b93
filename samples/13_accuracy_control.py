"""How small and fast can a language model be within a loss that one accepts, and what does a choice by layer gain?

NNCF compresses the model as it does for everybody: INT8, INT4, and mixtures of both by its sensitivity metrics. For the
loss of each of these, `nncf_ext.compress_with_accuracy_control` looks for the fewest bytes with bits and zeros of each
layer's own. Both run in OpenVINO, stock and packed. Prints, for each mixture, divergences on held-out text, bytes and
milliseconds of a token (interleaved, one thread); draws divergence over bytes. What is finished is kept.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from evidence.show import quiet, table

SAMPLES = Path(__file__).parent
sys.path.append(str(SAMPLES.parent))
GROUP = 64  # columns of INT4: 576 are no multiple of 128
SHARES = (1.0, 0.8, 0.5)  # of the weights on INT4, the others on INT8


def main(
    model: Annotated[Path, typer.Option(help="A Hugging Face folder of a language model.")] = (
        SAMPLES / "assets" / "tiny_lm"
    ),
    quick: Annotated[bool, typer.Option(help="INT8 and INT4 alone, little text: a minute.")] = False,
    budget: Annotated[int, typer.Option(help="Combinations tried for each loss.")] = 30,
    windows: Annotated[int, typer.Option(help="Of text; the last quarter is held out.")] = 32,
    out: Annotated[Path, typer.Option(help="Folder of what is finished.")] = SAMPLES / "out" / "13",
) -> None:
    """Compresses in both ways, then prints."""
    quiet()
    import nncf
    import torch
    from evidence.text import python
    from evidence.text import windows as windows_of
    from transformers import AutoTokenizer

    import nncf_ext
    from nncf_ext.algorithms.accuracy_control.judging import Divergence
    from samples.real_models.texts import english

    torch.set_num_threads(1)
    folder = out / f"{model.resolve().name}{'-quick' if quick else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    shares, budget, windows, length = ((1.0,), 6, 8, 64) if quick else (SHARES, budget, windows, 512)
    tokenizer, dense = AutoTokenizer.from_pretrained(model), nncf_ext.load_pretrained(model, dtype=torch.float32).eval()
    length = min(length, getattr(dense.config, "max_position_embeddings", length))
    texts = [windows_of(tokenizer, text, length, windows // 2) for text in (english()[0], python("calibration"))]
    items = [{"input_ids": row[None]} for pair in zip(*texts, strict=True) for row in pair]
    held_out = items[-max(1, round(len(items) / 4)) :]  # as compress_with_accuracy_control does
    data, calibration = nncf.Dataset(items), items[: -len(held_out)]
    with torch.no_grad():
        judge = Divergence(dense, held_out)
    irs: dict[str, Callable[[], Any]] = {}
    rows: dict[str, list[float]] = {}
    for share in ("int8", *shares):
        name = "INT8" if share == "int8" else f"{share:.0%} INT4"
        stock = by_nncf(dense, None if share == "int8" else float(share), calibration)
        with torch.no_grad():
            drop = judge(stock)
        irs[f"NNCF {name}"] = ir_of(stock, folder / f"nncf-{share}.xml", stock=True)
        found = nncf_ext.compress_with_accuracy_control(
            dense,
            data,
            max_drop=drop,
            objective=nncf_ext.packed_bytes(),
            budget=budget,
            storage=folder / "control",
        )
        found.plan.save(folder / f"forms-{share}.json")
        irs[f"ours, {name}"] = ir_of(found.model, folder / f"ours-{share}.xml")
        rows |= {f"NNCF {name}": [drop], f"ours, {name}": [found.report.chosen.drop]}
        print(found.report, flush=True)
    compiled = {name: make() for name, make in irs.items()}
    taken = times({name: each[0] for name, each in compiled.items()}, 3 if quick else 31)
    for name, each in rows.items():
        each += [compiled[name][1], taken[name]]
    (folder / "record.json").write_text(json.dumps(rows))
    show(rows)
    draw(rows, folder / "front.png")


def by_nncf(dense: Any, share: float | None, calibration: list[Any]) -> Any:
    """:return: The model with so much of it on INT4 and the rest on INT8, or all on INT8, by stock NNCF."""
    import nncf

    data = nncf.Dataset(calibration)
    if share is None:
        return nncf.compress_weights(copy.deepcopy(dense), mode=nncf.CompressWeightsMode.INT8_SYM, dataset=data)
    return nncf.compress_weights(
        copy.deepcopy(dense),
        mode=nncf.CompressWeightsMode.INT4_SYM,
        ratio=share,
        group_size=GROUP,
        backup_mode=nncf.BackupMode.INT8_SYM,
        dataset=data,
        sensitivity_metric=nncf.SensitivityMetric.HESSIAN_INPUT_ACTIVATION if share < 1 else None,
    )


def ir_of(model: Any, file: Path, stock: bool = False) -> Callable[[], Any]:
    """:return: What gives a request for one token, and megabytes of the IR."""
    import openvino
    import torch

    import ov_ext

    ir = ov_ext.convert_packed(model, {"input_ids": torch.tensor([[1]])})
    ov_ext.save_model(ov_ext.unpack_sparse_weights(ir) if stock else ir, file)

    def make() -> tuple[Any, float]:
        core = ov_ext.add_extension(openvino.Core())
        settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
        request = core.compile_model(core.read_model(file), "CPU", settings).create_infer_request()
        request.infer({0: [[1]]})
        return request, file.with_suffix(".bin").stat().st_size / 1e6

    return make


def times(requests: Mapping[str, Any], rounds: int) -> dict[str, float]:
    """:return: Median milliseconds of a token by name, all in turns."""
    found: dict[str, list[float]] = {name: [] for name in requests}
    for _ in range(rounds):
        for name, request in requests.items():
            request.infer()
            begin = time.perf_counter()
            request.infer()
            found[name].append((time.perf_counter() - begin) * 1000)
    return {name: median(each) for name, each in found.items()}


def show(rows: Mapping[str, list[float]]) -> None:
    """Prints divergences, bytes and times."""
    table(
        "Divergence from the dense model on held-out text; bytes and a token in OpenVINO, one thread",
        ["", "nats", "MB", "ms"],
        [[name, f"{drop:.4f}", f"{size:.1f}", f"{taken:.2f}"] for name, (drop, size, taken) in rows.items()],
    )


def draw(rows: Mapping[str, list[float]], file: Path) -> None:
    """Draws divergence over bytes, a curve for each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="MB", ylabel="nats above dense", yscale="log")
    for who in ("NNCF", "ours"):
        points = sorted((row[1], row[0]) for name, row in rows.items() if name.startswith(who))
        axes.plot(*zip(*points, strict=True), "o-", label=who)
    axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    typer.run(main)
