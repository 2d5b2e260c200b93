"""A language model made sparse and INT4, exported, packed, and run in OpenVINO.

Proves that the whole path works on any x86-64 CPU: half of the weights become zero (by ADMM), the others go onto an
INT4 grid (GPTQ that keeps the zeros), the model is exported to OpenVINO IR, its weights are packed for the sparse
kernels, and Optimum-Intel generates text from it. Prints one table: dense bf16, stock INT8, stock INT4, sparse INT4.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from evidence.show import quiet

ASSETS = Path(__file__).parent / "assets"
PROMPT = "def read_file(path):\n    "
WINDOW = 256  # tokens
VARIANTS = ("dense-bf16", "stock-int8", "stock-int4", "sparse-int4")  # folders that this script makes, and replaces


def token_windows(tokenizer: Any, part: str, limit: int) -> Any:
    """[windows, WINDOW] token ids of the committed text, spread evenly over it."""
    from evidence import text

    return text.windows(tokenizer, text.python(part), WINDOW, limit)


def measure(folder: Path, windows: int) -> dict[str, Any]:
    """What a user of the folder gets. Runs in a process of its own, so that the memory is this model's."""
    import optimum.intel.openvino  # noqa: F401  imported before the memory is read: its own size is not the model's
    from evidence import scores

    import ov_ext
    import ov_ext.optimum

    def resident_mib() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    before = resident_mib()
    model = ov_ext.optimum.load(folder)
    tokenizer = ov_ext.optimum.load_tokenizer(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=48, do_sample=False)[0])
    after = resident_mib()

    speeds = []
    for _ in range(3):
        start = time.perf_counter()
        model.generate(**prompt, min_new_tokens=128, max_new_tokens=128, do_sample=False)
        speeds.append(128 / (time.perf_counter() - start))

    losses = scores.losses(model, token_windows(tokenizer, "heldout", windows), batch=1)
    packed = "SparseMatMul" in {op.get_type_name() for op in model.model.get_ops()}
    return {
        "disk_mib": sum((folder / name).stat().st_size for name in ("openvino_model.bin", "openvino_model.xml"))
        / 2**20,
        "resident_mib": after - before,
        "perplexity": math.exp(losses.mean()),
        "tokens_per_s": sorted(speeds)[1],
        "kernel": f"ours, {ov_ext.cpu_info()['selected']}" if packed else "OpenVINO",
        "text": text,
    }


def build(out: Path, windows: int) -> dict[str, Path]:
    """Writes the four models: folders by variant name."""
    import nncf
    import openvino as ov
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import nncf_ext
    import ov_ext
    import ov_ext.optimum

    torch.manual_seed(0)
    source = ASSETS / "tiny_lm"
    tokenizer = AutoTokenizer.from_pretrained(source)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    core = ov_ext.add_extension(ov.Core())

    folders = {name: out / name for name in VARIANTS}
    ov_ext.optimum.export(dense, tokenizer, folders["dense-bf16"])
    for name, mode in (
        ("stock-int8", nncf.CompressWeightsMode.INT8_SYM),
        ("stock-int4", nncf.CompressWeightsMode.INT4_SYM),
    ):
        shutil.copytree(folders["dense-bf16"], folders[name], ignore=shutil.ignore_patterns("openvino_model.*"))
        options: dict[str, Any] = {}
        if "int4" in name:
            options = {"group_size": 128, "ratio": 1.0, "backup_mode": nncf.BackupMode.INT8_SYM}
        ir = nncf.compress_weights(core.read_model(folders["dense-bf16"] / "openvino_model.xml"), mode=mode, **options)
        ov_ext.save_model(ir, folders[name] / "openvino_model.xml")

    # The three steps of this project: compress, export, pack.
    items = [{"input_ids": ids[None]} for ids in token_windows(tokenizer, "calibration", windows)]
    model = nncf_ext.compress(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        nncf_ext.CompressMode.SPARSE_ADMM,
        ratio=0.5,
        dataset=nncf.Dataset(items),
        subset_size=len(items),
        advanced_parameters=nncf_ext.AdvancedSparseWeightsParameters(quantization=nncf.CompressWeightsMode.INT4_SYM),
    )
    print(nncf_ext.compression_report(model))
    ov_ext.optimum.export(model, tokenizer, folders["sparse-int4"])
    ir = core.read_model(folders["sparse-int4"] / "openvino_model.xml")
    # Embeddings and head, as the backup mode does in the stock INT4 model.
    ir = nncf.compress_weights(ir, mode=nncf.CompressWeightsMode.INT8_SYM)
    ir, report = ov_ext.pack_sparse_weights(ir)
    print(report)
    ov_ext.save_model(ir, folders["sparse-int4"] / "openvino_model.xml")
    return folders


def main(
    out: Annotated[Path, typer.Option(help="Folder for the four models; those of an earlier run go.")] = Path(
        __file__
    ).parent
    / "out"
    / "01",
    quick: Annotated[bool, typer.Option(help="Fewer calibration and evaluation windows.")] = False,
    measure_only: Annotated[Path | None, typer.Option("--measure", hidden=True)] = None,
) -> None:
    from rich.console import Console
    from rich.table import Table

    quiet()
    if measure_only:
        print(json.dumps(measure(measure_only, 16 if quick else 96)))
        return
    for name in VARIANTS:
        shutil.rmtree(out / name, ignore_errors=True)
    table = Table(title="Held-out perplexity and speed in OpenVINO")
    for heading in ("model", "disk MiB", "resident MiB", "perplexity", "tokens/s", "kernel"):
        table.add_column(heading, justify="left" if heading in ("model", "kernel") else "right")
    text = ""
    for name, folder in build(out, 16 if quick else 128).items():
        command = [sys.executable, __file__, "--measure", str(folder)] + (["--quick"] if quick else [])
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        values = (
            f"{row['disk_mib']:.1f}",
            f"{row['resident_mib']:.0f}",
            f"{row['perplexity']:.2f}",
            f"{row['tokens_per_s']:.0f}",
        )
        table.add_row(name, *values, row["kernel"])
        text = row["text"]
    console = Console(width=110)
    console.print("\nText by sparse-int4, greedy:\n", style="bold")
    console.print(text, markup=False, highlight=False)
    console.print(table)
    console.print(
        "This model is so small that it lives in the CPU's cache, where decoding does not wait for memory and sparsity "
        "cannot pay. The speed at the size of a real language model: python -m benchmarks.decode"
    )


if __name__ == "__main__":
    typer.run(main)
