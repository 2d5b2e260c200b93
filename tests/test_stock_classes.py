"""
Every folder that this project writes, in every stock class that a user would try: it runs, with the logits of the model
that was written, or the error says what to do. Both packages are imported, and nothing is registered by hand.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino as ov
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import nncf_ext
import ov_ext
import ov_ext.optimum
from nncf_ext.structure.plan import StructurePlan
from nncf_ext.structure.surgery import extract_structure
from nncf_ext.weights.int4 import decompressors, pack
from tests.structure_models import make

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

TOKENIZER = Path(__file__).parent.parent / "samples" / "assets" / "tiny_lm"
SIZES = {"vocab_size": 3072, "hidden_size": 64, "head_dim": 8, "intermediate_size": 128, "num_hidden_layers": 2}
IDS = torch.arange(5, 17)[None]
PROMPT = "def read_file(path):"
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@dataclass
class Says:
    """
    A stock class refuses the folder.

    :param error: What its error must say.
    :param card: What the model card in the folder must say, where the error is that of a stranger.
    """

    error: str
    card: str = ""


NO_WEIGHTS = Says("no file named model.safetensors", "OVModelForCausalLM")
NO_IR = Says("Could not open|Could not find a model in the directory|openvino_model")
PACKED = Says("unsupported opset: ov_ext", r"unsupported opset: ov_ext(.|\n)*ov_ext.optimum.load")
UNKNOWN = Says("nncf_structured.*custom or unsupported architecture")
STATE_SPACE = Says("mamba2 model.*custom or unsupported architecture")
IN_FLOAT32 = Says('torch_dtype="float32" in OVModelForCausalLM.from_pretrained')

COLUMNS = (
    "AutoModelForCausalLM", "AutoModel", "AutoTokenizer", "pipeline", "OVModelForCausalLM", "export=True",
    "export=True in float32", "read_model", "LLMPipeline",
)  # fmt: skip
TORCH: dict[str, Says | None] = dict.fromkeys(COLUMNS[:4])
IR: dict[str, Says | None] = {"read_model": NO_IR, "LLMPipeline": NO_IR}
EXPORTS: dict[str, Says | None] = {"export=True": None}
STRANGE = {"AutoModelForCausalLM": NO_WEIGHTS, "AutoModel": NO_WEIGHTS, "AutoTokenizer": None, "pipeline": NO_WEIGHTS}
TABLE: dict[str, dict[str, Says | None]] = {
    "sparse": TORCH | EXPORTS | IR,
    "sparse bfloat16": TORCH | EXPORTS | IR,
    "int4": TORCH | EXPORTS | IR,
    "int4 bfloat16": TORCH
    | {"OVModelForCausalLM": IN_FLOAT32, "export=True": IN_FLOAT32, "export=True in float32": None}
    | IR,
    "cut": TORCH | dict.fromkeys(COLUMNS[4:6], UNKNOWN) | IR,
    "cut int4": TORCH | dict.fromkeys(COLUMNS[4:6], UNKNOWN) | IR,
    "block-pruned": TORCH | EXPORTS | IR,
    "merged": TORCH | EXPORTS | IR,
    "state space": TORCH | dict.fromkeys(COLUMNS[4:6], STATE_SPACE) | IR,
    "IR": STRANGE | {"OVModelForCausalLM": None, "export=True": NO_WEIGHTS, "read_model": None, "LLMPipeline": None},
    "packed IR": STRANGE
    | {"OVModelForCausalLM": PACKED, "export=True": NO_WEIGHTS, "read_model": PACKED, "LLMPipeline": PACKED},
    "state space IR": STRANGE
    | {"OVModelForCausalLM": None, "export=True": STATE_SPACE, "read_model": None, "LLMPipeline": None},
}


def sparse(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data[torch.rand(parameter.shape, generator=generator) < 0.5] = 0
    return model


def on_grid(model: nn.Module) -> nn.Module:
    """With its projections on a random grid, half of the codes zero."""
    generator = torch.Generator().manual_seed(2)
    paths = [path for path, each in model.named_modules() if isinstance(each, nn.Linear) and "proj" in path]
    for path in paths:
        rows, columns = model.get_parameter(f"{path}.weight").shape
        codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=generator)
        codes[torch.rand(codes.shape, generator=generator) < 0.5] = 0
        pack(model, f"{path}.weight", codes, (torch.rand(rows, columns // 64, generator=generator) / 32 + 0.01).half())
    return model


def cut(model: nn.Module) -> nn.Module:
    return extract_structure(model, StructurePlan.dense(model).keep("layers.0.mlp", range(64)))


def shorter(model: nn.Module) -> nn.Module:
    plan = StructurePlan.dense(model).keep("layers.1.mlp", ()).keep("layers.1.attention", ())
    return extract_structure(model, plan)


def merged(model: nn.Module) -> nn.Module:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    return nncf_ext.merge(adapted, nncf_ext.MergeMode.SPARSE)


def llama() -> nn.Module:
    return sparse(make("llama", **SIZES))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="module")
def written(tokenizer, tmp_path_factory) -> dict[str, tuple[Path, nn.Module]]:
    """By row of the table the folder, and the model that was written."""
    root = tmp_path_factory.mktemp("folders")
    half = torch.bfloat16
    state_space = make("mamba2", vocab_size=SIZES["vocab_size"])
    models = {
        **{"sparse": llama(), "sparse bfloat16": llama().to(half), "int4": on_grid(llama())},
        **{"int4 bfloat16": on_grid(llama().to(half)), "cut": cut(llama()), "cut int4": on_grid(cut(llama()))},
        **{"block-pruned": shorter(llama()), "merged": merged(llama()), "state space": state_space},
    }
    for name, model in models.items():
        nncf_ext.save_pretrained(model, root / name)
        tokenizer.save_pretrained(root / name)
    ov_ext.optimum.export(models["int4"], tokenizer, root / "IR", rest=None)
    ov_ext.optimum.export(state_space, tokenizer, root / "state space IR", rest=None)
    shutil.copytree(root / "IR", root / "packed IR")
    from ov_ext.card import PACKED as packed_section
    from ov_ext.card import write_card

    ir = ov_ext.add_extension(ov.Core()).read_model(root / "IR" / "openvino_model.xml")
    small, _ = ov_ext.pack_sparse_weights(ir)
    ov_ext.save_model(small, root / "packed IR" / "openvino_model.xml")
    write_card(root / "packed IR", packed_section)
    models |= {"IR": models["int4"], "packed IR": models["int4"], "state space IR": state_space}
    return {name: (root / name, model) for name, model in models.items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def check(found: torch.Tensor, wanted: torch.Tensor, coarse: float = 0.0) -> None:
    if wanted.dtype is torch.bfloat16:
        coarse = 0.05  # an ordinary folder has float32 frequencies of positions; OpenVINO computes in float32
    torch.testing.assert_close(found.float(), wanted.float(), rtol=coarse, atol=coarse)


def causal(folder: Path, model: nn.Module, _tokenizer: Any) -> None:
    check(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))


def base(folder: Path, model: nn.Module, _tokenizer: Any) -> None:
    loaded = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        last = loaded(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
        check(last, model(input_ids=IDS, output_hidden_states=True).hidden_states[-1])


def tokens(folder: Path, _model: nn.Module, tokenizer: Any) -> None:
    assert AutoTokenizer.from_pretrained(folder)(PROMPT).input_ids == tokenizer(PROMPT).input_ids


def expected(model: Any, tokenizer: Any, use_cache: bool = False) -> str:
    """What torch writes: without a cache, each token from scratch. Its cached Mamba-2 differs from that a little."""
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    made = model.generate(ids, use_cache=use_cache, **GREEDY)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def pipeline(folder: Path, model: nn.Module, tokenizer: Any) -> None:
    made = transformers.pipeline("text-generation", str(folder))(PROMPT, return_full_text=False, **GREEDY)
    assert made[0]["generated_text"] == expected(model, tokenizer, use_cache=True)


def optimum(**options: Any) -> Callable[[Path, nn.Module, Any], None]:
    def run(folder: Path, model: nn.Module, _tokenizer: Any) -> None:
        from optimum.intel import OVModelForCausalLM

        exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}
        loaded = OVModelForCausalLM.from_pretrained(folder, ov_config=exact, **options)
        # In torch, a number on the grid is rounded to float16; OpenVINO computes with code times scale.
        check(logits(loaded), logits(model), coarse=0.01 if decompressors(model) else 1e-4)

    return run


def read(folder: Path, _model: nn.Module, _tokenizer: Any) -> None:
    assert ov.Core().read_model(folder / "openvino_model.xml").get_ops()


def genai(folder: Path, model: nn.Module, tokenizer: Any) -> None:
    import openvino_genai

    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    made = openvino_genai.LLMPipeline(str(folder), "CPU", **exact).generate(PROMPT, apply_chat_template=False, **GREEDY)
    assert str(made) == expected(model, tokenizer)


CLASSES: dict[str, Callable[[Path, nn.Module, Any], None]] = {
    **{"AutoModelForCausalLM": causal, "AutoModel": base, "AutoTokenizer": tokens, "pipeline": pipeline},
    **{"OVModelForCausalLM": optimum(), "export=True": optimum(export=True)},
    "export=True in float32": optimum(export=True, torch_dtype="float32"),
    **{"read_model": read, "LLMPipeline": genai},
}


# In a process of their own: here, another test may have taught these libraries the operations of ov_ext.
STRANGERS = {
    "OVModelForCausalLM": "from optimum.intel import OVModelForCausalLM; OVModelForCausalLM.from_pretrained({!r})",
    "LLMPipeline": "import openvino_genai; openvino_genai.LLMPipeline({!r}, 'CPU')",
}


@pytest.mark.parametrize(("row", "column"), [(row, column) for row in TABLE for column in TABLE[row]])
def test_cell(row, column, written, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(f"asked: {question}"))
    (folder, model), cell = written[row], TABLE[row][column]
    if cell is None:
        CLASSES[column](folder, model, tokenizer)
        return
    if cell is PACKED and column in STRANGERS:
        command = [sys.executable, "-c", STRANGERS[column].format(str(folder))]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode and re.search(cell.error, done.stderr, re.DOTALL), done.stderr
    else:
        with pytest.raises((OSError, ValueError, RuntimeError)) as caught:
            CLASSES[column](folder, model, tokenizer)
        assert re.search(cell.error, str(caught.value), re.DOTALL), caught.value
    if cell.card:
        assert re.search(cell.card, (folder / "README.md").read_text())
