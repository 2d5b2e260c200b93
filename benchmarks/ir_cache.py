"""The IRs of the decode benchmark on disk: built once, a stock one and its packed twins."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import openvino as ov

from benchmarks import llama as graphs
from benchmarks import weights
from benchmarks.arms import core, pack
from benchmarks.llama import RandomLlama, decoder
from ov_ext.cpu_plugin.sparse_matmul import pack as spw1

STOCK, SPARSE, SPARSE_HEAD = "stock", "sparse", "sparse+head"


@dataclass(frozen=True)
class ModelFiles:
    """IRs with equal weights.

    :param paths: By arm.
    :param weight_bytes: Bytes of all linear layers and lm_head, by arm: what decoding a token reads.
    """

    paths: dict[str, Path]
    weight_bytes: dict[str, int]


def model_files(llama: RandomLlama, work_dir: Path, on_build: Callable[[], None] = lambda: None) -> ModelFiles:
    """Find the IRs of a model, or write them.

    A folder appears only when it is complete. Its name depends on the weights, on the source of the graphs and on the
    packed format; folders of other versions stay until they are deleted by hand.

    :param llama: The weights.
    :param work_dir: Where the folders lie; a 1B bf16 model takes 2.6 GB.
    :param on_build: Called before a long build.
    """
    arms = [STOCK, SPARSE, *([SPARSE_HEAD] if llama.sparse_head else [])]
    folder = work_dir / f"{llama.kind}-{_fingerprint(llama)}"
    if not folder.is_dir():
        on_build()
        work_dir.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=work_dir, prefix=".building-"))
        try:
            _build(llama, aside, arms)
            os.replace(aside, folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    sizes = (line.split() for line in (folder / "weight_bytes").read_text().splitlines())
    return ModelFiles({arm: folder / f"{arm}.xml" for arm in arms}, {arm: int(size) for arm, size in sizes})


def _build(llama: RandomLlama, folder: Path, arms: list[str]) -> None:
    path = folder / f"{STOCK}.xml"
    ov.save_model(decoder(llama), path, compress_to_fp16=False)
    sizes: dict[str, int] = {}
    for arm in arms[1:]:
        model = core().read_model(path)  # mapped from the file: packing holds one layer at a time
        report = pack(model, sparse_head=arm == SPARSE_HEAD)
        sizes |= {STOCK: report.bytes_before, arm: report.bytes_after}
        ov.save_model(model, folder / f"{arm}.xml", compress_to_fp16=False)
    (folder / "weight_bytes").write_text("".join(f"{arm} {size}\n" for arm, size in sizes.items()))


def _fingerprint(llama: RandomLlama) -> str:
    sources = [Path(str(module.__file__)).read_bytes() for module in (graphs, weights)]
    text = f"{llama} SPW1 {spw1.VERSION} OpenVINO {ov.get_version()}"
    return hashlib.sha256(b"".join([text.encode(), *sources])).hexdigest()[:16]
