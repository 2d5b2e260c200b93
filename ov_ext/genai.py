"""OpenVINO GenAI: a text generation pipeline that can read packed IRs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_ext import runtime
from ov_ext.extension import extension_path

if TYPE_CHECKING:
    from openvino_genai import LLMPipeline


def pipeline(folder: str | os.PathLike[str], device: str = "CPU", **properties: Any) -> LLMPipeline:
    """Make an ``openvino_genai.LLMPipeline`` that knows the operations of this package.

    :param folder: Model folder with openvino_model.xml and the tokenizer IRs.
    :param device: OpenVINO device; packed weights run on CPU.
    :param properties: Pipeline and OpenVINO properties, such as ``ATTENTION_BACKEND="SDPA"`` or ``scheduler_config``.
        Your own ``extensions`` are kept, and the one of this package is added.
    :return: The pipeline.
    :raises ValueError: The folder lacks the model or its tokenizer.
    :raises ExtensionUnavailableError: See :func:`ov_ext.extension_path`.
    :raises NewerFormatError: It was packed by a newer release.
    """
    missing = [name for name in ("openvino_model.xml", "openvino_tokenizer.xml") if not (Path(folder) / name).is_file()]
    if missing:
        msg = f"{folder} lacks {' and '.join(missing)}: ov_ext.optimum.export and `ov-ext pack` write complete folders."
        raise ValueError(msg)
    runtime.read_model(Path(folder) / "openvino_model.xml")  # only to check it: OpenVINO maps weights, it reads none
    extensions = [*properties.pop("extensions", ()), str(extension_path())]
    from openvino_genai import LLMPipeline

    return LLMPipeline(str(folder), device, extensions=extensions, **properties)
