"""``nncf-ext optimize``: from a Hugging Face folder to a packed OpenVINO folder within an accepted loss."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from typer.testing import CliRunner

import nncf_ext
import ov_ext
from nncf_ext.cli import app
from nncf_ext.cli.export import in_openvino
from nncf_ext.structure.blocks import survey
from nncf_ext.weights.int8 import pack_int8, round_to_int8
from ov_ext.cli import app as ov_ext_app

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
ASSETS = Path(__file__).parents[2] / "samples" / "assets"
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


def run(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["optimize", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["bytes", "latency"])
def test_a_folder_becomes_a_smaller_one(tmp_path: Path, objective: str) -> None:
    text = ["--dataset", ASSETS / "calibration.txt", "--samples", 6, "--window", 64]
    few = ["--form", "int8", "--form", "int4-g64", "--budget", 4]
    further = ["--max-drop", "5%", "--objective", objective, "--plot", tmp_path / "front.png"]
    code, output = run(ASSETS / "tiny_lm", tmp_path / "fast", *text, *few, *further)
    if objective == "latency" and code:  # so small a model is in some CPUs' caches, where no form is faster
        assert re.search(r"Nothing that costs less .* latency [\d.]+ \(dense: [\d.]+\)", output), output
        assert not (tmp_path / "fast").exists()
        return
    assert code == 0, output
    assert "chosen" in output and "ov-ext generate" in output
    plan = nncf_ext.FormPlan.load(tmp_path / "fast" / "forms.json")
    assert {*plan.forms.values()} <= {"float16", "int8", "int4-g64"} and len(plan.forms) > 20
    report = json.loads((tmp_path / "fast" / "accuracy_control.json").read_text())
    chosen = next(each for each in report["candidates"] if each["name"] == report["chosen"])
    assert chosen["drop"] <= np.log(1.05)
    assert (tmp_path / "front.png").stat().st_size > 1000
    core = ov_ext.add_extension(ov.Core())
    stored = [node.get_byte_size() for node in core.read_model(tmp_path / "fast" / "openvino_model.xml").get_ops()
              if node.get_type_name() == "Constant"]  # fmt: skip
    assert sum(stored) < 0.8 * (ASSETS / "tiny_lm" / "model.safetensors").stat().st_size
    arguments = ["generate", str(tmp_path / "fast"), "--prompt", "def read(", "--max-new-tokens", "4"]
    assert CliRunner().invoke(ov_ext_app, arguments).exit_code == 0


@pytest.mark.slow
def test_int8_of_torch_is_int8_in_openvino() -> None:
    model = nncf_ext.load_pretrained(ASSETS / "tiny_lm", dtype=torch.float32).eval()
    for name, layer in survey(model).targets.items():
        pack_int8(model, f"{name}.weight", *round_to_int8(layer.weight))
    token = torch.tensor([[17]])
    with torch.no_grad():
        expected = model(token, use_cache=False).logits.numpy()
    ir = in_openvino(copy.deepcopy(model), {"input_ids": token})
    codes = [n for n in ir.get_ops() if n.get_type_name() == "Constant" and n.get_element_type() == ov.Type.i8]
    packed = [n for n in ir.get_ops() if n.get_type_name() == "SparseMatMul"]
    assert len(codes) + len(packed) > len(survey(model).targets)  # the embedding, too
    found = ov_ext.add_extension(ov.Core()).compile_model(ir, "CPU", EXACT)({0: token.numpy()})[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.05 * float(np.abs(expected).max()))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--max-drop", "0"], "percentage of perplexity"),
        (["--max-drop", "one"], "percentage of perplexity"),
        (["--form", "int5"], "int5"),
        (["--form", "float16"], "two forms"),
        (["--budget", "0"], "budget"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, options: list[str], message: str) -> None:
    text = ["--dataset", ASSETS / "calibration.txt", "--samples", 4, "--window", 32]
    code, output = run(ASSETS / "tiny_lm", tmp_path / "out", *text, *options)
    assert code == 2 and message in output
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "openvino_model.xml").write_text("mine")
    code, output = run(ASSETS / "tiny_lm", tmp_path / "out", "--dataset", ASSETS / "calibration.txt")
    assert code == 2 and "out" in output
    assert (tmp_path / "out" / "openvino_model.xml").read_text() == "mine"
