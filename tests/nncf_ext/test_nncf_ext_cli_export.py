"""``nncf-ext export``: from a Hugging Face folder, compressed or not, to a folder that OpenVINO runs."""

import subprocess
import sys
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import nncf_ext
import ov_ext
from nncf_ext.cli import app
from ov_ext.cli import app as ov_ext_app
from tests.structure_models import make

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

TOKENIZER = Path(__file__).parents[2] / "samples" / "assets" / "tiny_lm"
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


def run(*arguments):
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def logits(folder, ids):
    core = ov_ext.add_extension(ov.Core())
    compiled = core.compile_model(folder / "openvino_model.xml", "CPU", EXACT)
    ids = ids.numpy()
    places = np.arange(ids.shape[1])[None]
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": places}
    return compiled(inputs | {"beam_idx": np.zeros(1, np.int32)})["logits"]


@pytest.mark.slow
def test_a_compressed_folder_becomes_a_packed_one_that_chats(tmp_path):
    ids = torch.arange(5, 12)[None]
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "head_dim": 8, "intermediate_size": 64}
    grid = nncf_ext.compress(
        make("llama", vocab_size=3072, **sizes),
        nncf_ext.CompressMode.SPARSE_MAGNITUDE,
        ratio=0.5,
        dataset=nncf.Dataset([{"input_ids": ids}]),
        advanced_parameters=nncf_ext.AdvancedSparseWeightsParameters(
            quantization=nncf.CompressWeightsMode.INT4_SYM, group_size=64
        ),
    )
    nncf_ext.save_pretrained(grid, tmp_path / "int4")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.chat_template = "{% for message in messages %}<<{{ message['content'] }}>>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "int4")
    for name, options in (("stock", []), ("packed", ["--pack"])):
        code, output = run(tmp_path / "int4", tmp_path / name, "--rest", "none", *options)
        assert code == 0, output
        assert ("weights packed" in output) == bool(options) and "ov-ext generate" in output
    np.testing.assert_allclose(logits(tmp_path / "stock", ids), grid(ids).logits.detach().numpy(), rtol=0, atol=2e-2)
    assert {"config.json", "tokenizer_config.json", "openvino_tokenizer.xml"} <= {
        path.name for path in (tmp_path / "packed").iterdir()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int4", "packed", "stock"]

    def generate(*options):
        arguments = ["generate", str(tmp_path / "stock"), "--max-new-tokens", "8", *options]
        return CliRunner().invoke(ov_ext_app, arguments).stdout

    asked = generate("--prompt", "hello")
    assert asked == generate("--raw", "--prompt", "<<hello>>") != generate("--raw", "--prompt", "hello")


def test_refusals_come_before_the_work(folder, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear")
    for arguments, message in (
        ((folder, tmp_path / "letters"), "exists. Choose another folder"),
        ((folder, tmp_path / "letters", "--overwrite"), "holds no OpenVINO model, so it is not overwritten"),
        ((tmp_path / "letters", tmp_path / "out"), "holds no config.json"),
        ((folder, tmp_path / "out", "--dtype", "int8"), "Unknown dtype 'int8'"),
    ):
        code, output = run(*arguments)
        assert code == 2 and message in output and "Traceback" not in output, output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_optimum_has_a_command_for_it(tmp_path):
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "head_dim": 8, "intermediate_size": 512}
    model = nncf_ext.compress(
        make("llama", vocab_size=3072, **sizes).bfloat16(), nncf_ext.CompressMode.SPARSE_MAGNITUDE, ratio=0.8
    )
    nncf_ext.save_pretrained(model, tmp_path / "dense")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "dense")
    command = [Path(sys.executable).parent / "optimum-cli", "export", "openvino-packed", "-m", tmp_path / "dense"]
    first = subprocess.run([*command, tmp_path / "packed"], capture_output=True, text=True, cwd="/")
    assert first.returncode == 0, first.stderr
    kinds = {
        node.get_type_name()
        for node in ov_ext.add_extension(ov.Core()).read_model(tmp_path / "packed" / "openvino_model.xml").get_ops()
    }
    assert "SparseMatMul" in kinds
    again = subprocess.run([*command, tmp_path / "packed"], capture_output=True, text=True, cwd="/")
    assert again.returncode == 2 and "exists" in again.stderr and "Traceback" not in again.stderr
