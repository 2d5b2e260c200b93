"""Whole models on disk, built once: a stock IR, its packed twin, and a GGUF file with the same weights."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import openvino as ov

import ov_ext
from benchmarks import gguf_file, weights
from benchmarks import llama as graphs
from benchmarks.arms import core, pack, pack_by_default
from benchmarks.llama import RandomLlama, decoder
from ov_ext.cpu_plugin.sparse_matmul import pack as spw1
from ov_ext.sparse_weights import packed, stock
from ov_ext.sparse_weights.report import PackReport

STOCK, SPARSE, DEFAULT, GGUF = "stock", "sparse", "default", "gguf"


@dataclass(frozen=True)
class ModelFiles:
    """Files with equal weights.

    :param paths: By arm.
    :param weight_bytes: Bytes of all linear layers and lm_head, by arm: what decoding a token reads.
    """

    paths: dict[str, Path]
    weight_bytes: dict[str, int]


def model_files(llama: RandomLlama, work_dir: Path, on_build: Callable[[], None] = lambda: None) -> ModelFiles:
    """Find the IRs of a model, or write them.

    :param llama: The weights.
    :param work_dir: Where they lie; a 1B bf16 model takes 2.6 GB.
    :param on_build: Called before a long build.
    """
    text = f"{llama} SPW1 {spw1.VERSION} OpenVINO {ov.get_version()}"
    folder = work_dir / f"{llama.kind}-{_fingerprint(text, graphs, weights, packed, stock)}"
    sizes = _kept(folder, partial(_build, llama), on_build)
    return ModelFiles({arm: folder / f"{arm}.xml" for arm in (STOCK, SPARSE)}, sizes)


def packed_by_default(files: ModelFiles) -> tuple[ModelFiles, PackReport]:
    """Pack the stock IR as `ov-ext pack` would without options. It is done anew each time: the result depends on what
    was measured on this CPU.

    :param files: What :func:`model_files` gives.
    :return: The same files and the new one, as arm :data:`DEFAULT`; the report.
    """
    model = core().read_model(files.paths[STOCK])
    report = pack_by_default(model)
    path = files.paths[STOCK].with_name(f"{DEFAULT}.xml")
    ov_ext.save_model(model, path)
    sizes = files.weight_bytes | {DEFAULT: report.bytes_after}
    return ModelFiles(files.paths | {DEFAULT: path}, sizes), report


def gguf_files(llama: RandomLlama, work_dir: Path, on_build: Callable[[], None] = lambda: None) -> ModelFiles:
    """The same for llama.cpp; the arm is :data:`GGUF`."""
    folder = work_dir / f"gguf-{llama.kind}-{_fingerprint(str(llama), gguf_file, graphs, weights)}"
    sizes = _kept(folder, lambda aside: {GGUF: gguf_file.write(llama, aside / "model.gguf")}, on_build)
    return ModelFiles({GGUF: folder / "model.gguf"}, sizes)


def _kept(folder: Path, build: Callable[[Path], dict[str, int]], on_build: Callable[[], None]) -> dict[str, int]:
    """Build a folder unless it is there. It appears only when it is complete; folders of other versions stay until they
    are deleted by hand.

    :param folder: Named after everything it depends on.
    :param build: Fills a folder.
    :param on_build: Called before.
    :return: What ``build`` returned: bytes by arm.
    """
    if not folder.is_dir():
        on_build()
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
        try:
            (aside / "weight_bytes").write_text("".join(f"{arm} {size}\n" for arm, size in build(aside).items()))
            os.replace(aside, folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    sizes = (line.split() for line in (folder / "weight_bytes").read_text().splitlines())
    return {arm: int(size) for arm, size in sizes}


def _build(llama: RandomLlama, folder: Path) -> dict[str, int]:
    path = folder / f"{STOCK}.xml"
    ov.save_model(decoder(llama), path, compress_to_fp16=False)
    model = core().read_model(path)  # mapped from the file: packing holds one layer at a time
    report = pack(model)
    ov.save_model(model, folder / f"{SPARSE}.xml", compress_to_fp16=False)
    return {STOCK: report.bytes_before, SPARSE: report.bytes_after}


def _fingerprint(text: str, *sources: ModuleType) -> str:
    code = [Path(str(module.__file__)).read_bytes() for module in sources]
    return hashlib.sha256(b"".join([text.encode(), *code])).hexdigest()[:16]
