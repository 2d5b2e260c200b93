"""What a pipeline's result is in OpenVINO: bytes on disk, kernel, speed, and how many answers are right there."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import nncf
import openvino as ov
import torch
from peft import PeftModel
from torch import Tensor, nn

import ov_ext
import ov_ext.genai
import ov_ext.optimum

PROMPT = "def read_file(self, path, encoding=None):\n    return"
TOKENS = 128
ADAPTER = "adapter_model.safetensors"


def export_merged(model: nn.Module, tokenizer: Any, folder: Path) -> Path:
    """
    One model without an adapter: floating weights in bfloat16, or INT4 with embeddings and head in INT8; then packed.

    :param model: Merged model. Floating weights are rounded to bfloat16 in place.
    :param tokenizer: Its tokenizer.
    :param folder: Folder to write; replaced.
    :return: The folder.
    """
    shutil.rmtree(folder, ignore_errors=True)
    int4 = any(parameter.dtype == torch.uint8 for parameter in model.parameters())
    ov_ext.optimum.export(model if int4 else model.bfloat16(), tokenizer, folder)
    core = ov_ext.add_extension(ov.Core())
    ir = core.read_model(folder / ov_ext.optimum.MODEL)
    if int4:
        ir = nncf.compress_weights(ir, mode=nncf.CompressWeightsMode.INT8_SYM)
    ir, _ = ov_ext.pack_sparse_weights(ir)
    ov_ext.save_model(ir, folder / ov_ext.optimum.MODEL)
    return folder


def export_separate(base: nn.Module, adapted: PeftModel, tokenizer: Any, folder: Path) -> Path:
    """
    A base and its adapter apart, as OpenVINO GenAI takes them. GenAI adds an adapter to matrix multiplications of stock
    OpenVINO only, so the base is not packed.

    :param base: The base without the adapter; rounded to bfloat16 in place where it is floating.
    :param adapted: The base with its adapter.
    :param tokenizer: The tokenizer.
    :param folder: Folder to write; replaced.
    :return: The folder.
    """
    shutil.rmtree(folder, ignore_errors=True)
    int4 = any(parameter.dtype == torch.uint8 for parameter in base.parameters())
    ov_ext.optimum.export(base if int4 else base.bfloat16(), tokenizer, folder)
    if int4:
        ir = ov.Core().read_model(folder / ov_ext.optimum.MODEL)
        ir = nncf.compress_weights(ir, mode=nncf.CompressWeightsMode.INT8_SYM)
        ov_ext.save_model(ir, folder / ov_ext.optimum.MODEL)
    adapted.save_pretrained(folder)
    return folder


def measure(folder: Path, alpha: float) -> dict[str, Any]:
    """
    :param folder: From `export_merged` or `export_separate`.
    :param alpha: Scaling of the adapter, alpha / rank; GenAI does not read it from the adapter's configuration.
    :return: Bytes of weights on disk, tokens a second (median of 3), and the operations of the linear layers.
    """
    import openvino_genai

    files = [folder / "openvino_model.bin", folder / ADAPTER]
    options = {}
    if files[1].is_file():
        options["adapters"] = openvino_genai.AdapterConfig(openvino_genai.Adapter(str(files[1])), alpha)
    pipe = ov_ext.genai.pipeline(folder, "CPU", **options)
    config = openvino_genai.GenerationConfig(max_new_tokens=TOKENS, ignore_eos=True, do_sample=False)
    pipe.generate(PROMPT, config)
    speeds = []
    for _ in range(3):
        start = time.perf_counter()
        pipe.generate(PROMPT, config)
        speeds.append(TOKENS / (time.perf_counter() - start))
    return {
        "bytes": sum(file.stat().st_size for file in files if file.is_file()),
        "tokens_per_s": sorted(speeds)[1],
        "kernels": kernels(folder),
    }


def kernels(folder: Path) -> dict[str, Any]:
    """
    :param folder: Model folder.
    :return: Number of sparse layers by value kind in the model, how many of them stand in the graph that OpenVINO
        compiled, and the kernel that this CPU runs for one token.
    """
    core = ov_ext.add_extension(ov.Core())
    model = core.read_model(folder / ov_ext.optimum.MODEL)
    packed = {op.get_friendly_name(): op for op in model.get_ops() if op.get_type_name() == "SparseMatMul"}
    kinds = [op.get_attributes()["kind"] for op in packed.values()]
    run = core.compile_model(model, "CPU").get_runtime_model().get_ops()
    originals = [node.get_rt_info()["originalLayersNames"].astype(str).split(",") for node in run]
    choice = ov_ext.cpu_info()["choice"]
    return {
        "packed": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "compiled": sum(any(name in packed for name in names) for names in originals),
        "kernel": {kind: choice[kind][0][1] for kind in sorted(set(kinds))},
    }


def logits_in_openvino(folder: Path) -> Any:
    """
    :param folder: From `export_merged`.
    :return: The compiled model as a function for `scoring.right_answers`.
    """
    model = ov_ext.optimum.load(folder)

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        return torch.as_tensor(model(input_ids=ids, attention_mask=mask).logits)

    return forward
