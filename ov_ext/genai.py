"""OpenVINO GenAI: a text generation pipeline that can read packed IRs."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_ext import runtime
from ov_ext.extension import extension_path
from ov_ext.sparse_activation.passes import skips_inputs
from ov_ext.sparse_attention.passes import is_sparse

if TYPE_CHECKING:
    from openvino_genai import LLMPipeline


class PackedAdapterError(ValueError):
    """A LoRA adapter for a model with packed weights, which GenAI would ignore without a word."""

    def __init__(self) -> None:
        super().__init__(
            "This model has packed weights, and OpenVINO GenAI adds adapters to stock weights only: the adapter would "
            "do nothing. Merge it before packing (nncf_ext.merge, nncf-ext merge), or use it with the stock model "
            "(ov-ext unpack)."
        )


def pipeline(folder: str | os.PathLike[str], device: str = "CPU", **properties: Any) -> LLMPipeline:
    """Make an ``openvino_genai.LLMPipeline`` that knows the operations of this package.

    With packed weights it refuses LoRA adapters, wherever they are given: here, in a generation config, or to
    ``generate``.

    :param folder: Model folder with openvino_model.xml and the tokenizer IRs.
    :param device: OpenVINO device; packed weights run on CPU.
    :param properties: Pipeline and OpenVINO properties, such as ``ATTENTION_BACKEND="SDPA"`` or ``scheduler_config``.
        Your own ``extensions`` are kept, and the one of this package is added.
    :return: The pipeline.
    :raises ValueError: The folder lacks the model or its tokenizer.
    :raises ValueError: Continuous batching is asked for, and attention keeps pruned keys and values.
    :raises PackedAdapterError: ``adapters`` are given, and weights are packed.
    :raises ExtensionUnavailableError: See :func:`ov_ext.extension_path`.
    :raises NewerFormatError: It was packed by a newer release.
    """
    missing = [name for name in ("openvino_model.xml", "openvino_tokenizer.xml") if not (Path(folder) / name).is_file()]
    if missing:
        msg = f"{folder} lacks {' and '.join(missing)}: ov_ext.optimum.export and `ov-ext pack` write complete folders."
        raise ValueError(msg)
    model = runtime.read_model(Path(folder) / "openvino_model.xml")  # OpenVINO maps weights, it reads none
    packed = model.has_rt_info(["ov_ext", "format"]) or skips_inputs(model)
    if packed:
        _refuse_adapters(None, properties)
    if is_sparse(model):
        asked = [f"ATTENTION_BACKEND={properties['ATTENTION_BACKEND']}"] if "ATTENTION_BACKEND" in properties else []
        asked += [name for name in ("scheduler_config", "draft_model") if name in properties]
        if asked not in ([], ["ATTENTION_BACKEND=SDPA"]):
            msg = (
                f"{' and '.join(asked)}: paged attention keeps keys and values itself; so does this model's. It runs "
                'with ATTENTION_BACKEND="SDPA", its default here; `ov-ext unpack` restores stock attention.'
            )
            raise ValueError(msg)
        properties["ATTENTION_BACKEND"] = "SDPA"
    extensions = [*properties.pop("extensions", ()), str(extension_path())]
    from openvino_genai import LLMPipeline

    kind = _packed_pipeline() if packed else LLMPipeline
    return kind(str(folder), device, extensions=extensions, **properties)


@cache
def _packed_pipeline() -> type[LLMPipeline]:
    from openvino_genai import LLMPipeline

    class PackedPipeline(LLMPipeline):
        """The pipeline of a model with packed weights: it refuses adapters."""

        def generate(self, inputs: Any, generation_config: Any = None, *rest: Any, **options: Any) -> Any:
            _refuse_adapters(generation_config, options)
            return super().generate(inputs, generation_config, *rest, **options)

        def __call__(self, inputs: Any, generation_config: Any = None, *rest: Any, **options: Any) -> Any:
            return self.generate(inputs, generation_config, *rest, **options)

        def set_generation_config(self, config: Any) -> None:
            _refuse_adapters(config, {})
            super().set_generation_config(config)

    return PackedPipeline


def _refuse_adapters(config: Any, options: dict[str, Any]) -> None:
    """:raises PackedAdapterError: There is an adapter in a generation config, or among the options of a call."""
    configs = (config, options.get("generation_config"))
    given = (options.get("adapters"), dict(options.get("config") or {}).get("adapters"))
    if any((*given, *(getattr(each, "adapters", None) for each in configs))):
        raise PackedAdapterError
