"""The operation of sparse attention in a model against float64: any course of requests; what is damaged is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ov_ext
from ov_ext.cpu_plugin.sparse_attention.native import CacheSettings
from tests.cpu_plugin.test_sparse_attention import KERNELS, Oracle, close
from tests.ov_ext.test_sparse_attention import DIM, F32, HEADS, attention, feed

SCALE = 0.25  # of attention()


@cache
def compiled(values: str, pack_from: int) -> ov.CompiledModel:
    policy = ov_ext.SparseAttentionPolicy(k=0.5, v=0.7, values=values, sink=3, recent=20, pack_from=pack_from)  # type: ignore[arg-type]
    model = ov_ext.sparsify_attention(attention(), policy)[0]
    return ov_ext.add_extension(ov.Core()).compile_model(model, "CPU", F32)


def oracle(values: str, pack_from: int, sequences: int) -> Oracle:
    return Oracle(CacheSettings(DIM, HEADS, 0.5, 0.7, values, 3, 20, pack_from), sequences)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_course_of_a_request_equals_float64(data: st.DataObject) -> None:
    """Prompts, tokens, several at a time, beams that part and meet, masks with empty rows, resets."""
    draw = data.draw
    which = draw(st.sampled_from(("int8", "int4"))), draw(st.sampled_from((0, 100)))
    request = compiled(*which).create_infer_request()
    rng, told = np.random.default_rng(draw(st.integers(0, 99))), None
    for _ in range(draw(st.integers(3, 8))):
        if told is None or draw(st.integers(0, 9)) == 0:
            request.reset_state()
            batch, told = draw(st.integers(1, 3)), None
            beams = list(range(batch))
        else:
            batch = draw(st.integers(1, 3))
            beams = draw(st.lists(st.integers(0, len(told.k) - 1), min_size=batch, max_size=batch))
            told.k, told.v = told.k[beams], told.v[beams]
        past, first = (told.k.shape[2], False) if told else (0, True)
        told = told or oracle(*which, batch)
        count = draw(st.sampled_from((1, 1, 2, 7, 63, 64, 65, 130)))
        inputs = feed(rng, count, past, batch, beams)
        if not first and draw(st.booleans()):  # stock attention of a prompt does not promise zeros for an empty row
            hidden = draw(st.integers(0, past + count))
            inputs["mask"][0, :, :, :hidden] = -np.inf
        found = request.infer(inputs)[0]
        close(found, told.attend(inputs["q"], inputs["k"], inputs["v"], SCALE, inputs["mask"][:, 0], causal=False))
        told.append(inputs["k"], inputs["v"])


def digest() -> str:
    """Of what some steps give, on the kernel of OV_EXT_ISA."""
    rng, request, whole = np.random.default_rng(0), compiled("int8", 0).create_infer_request(), hashlib.sha256()
    for count, past in ((150, 0), (1, 150), (3, 151), (1, 154)):
        y = request.infer(feed(rng, count, past, 2))[0]
        if past:  # a prompt is stock's
            whole.update(y.tobytes())
    return whole.hexdigest()


@pytest.mark.slow
def test_every_kernel_that_can_be_named_gives_the_same_bits() -> None:
    command = [sys.executable, "-c", f"from {__name__} import digest; print(digest())"]
    found = {}
    for isa in KERNELS:
        done = subprocess.run(command, env=os.environ | {"OV_EXT_ISA": isa}, capture_output=True, text=True, check=True)
        found[isa] = done.stdout.strip()
    assert set(found.values()) == {digest()}, found


ON_ONE_CPU = f"""
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import numpy as np, openvino as ov
from {__name__} import compiled, feed
request, rng = compiled("int8", 0).create_infer_request(), np.random.default_rng(0)
request.infer(feed(rng, 90, 0))
(state,) = request.query_state()
state.state = ov.Tensor(np.full(16, 7, np.int32))
for _ in range(2):
    try:
        y = request.infer(feed(rng, 1, 90))[0]
        assert np.isnan(y).all(), y
    except RuntimeError as error:
        assert "reset_state()" in str(error)
request.reset_state()
assert np.isfinite(request.infer(feed(rng, 90, 0))[0]).all() and state.state.data[5] == 90
print("well")
"""


@pytest.mark.slow
def test_on_one_cpu_an_error_that_openvino_loses_gives_no_numbers() -> None:
    done = subprocess.run([sys.executable, "-c", ON_ONE_CPU], capture_output=True, text=True)
    assert done.stdout == "well\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros(8, np.int32),
        np.zeros(0, np.int32),
        np.zeros((2, 16), np.int32),
        np.zeros(16, np.float32),
        np.zeros(16, np.int64),
    ],
    ids=lambda state: f"{state.dtype}{list(state.shape)}",
)
def test_a_state_of_another_form_is_refused_or_converted(wrong: np.ndarray) -> None:
    rng, request = np.random.default_rng(1), compiled("int8", 0).create_infer_request()
    request.infer(feed(rng, 90, 0))
    (state,) = request.query_state()
    try:
        state.state = ov.Tensor(wrong)
        found = request.infer(feed(rng, 5, 0))[0]
    except RuntimeError:
        pass
    else:
        assert np.isfinite(found).all()
    request.reset_state()
    assert np.isfinite(request.infer(feed(rng, 90, 0))[0]).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k_level", "0.95"),
        ("v_level", "-1"),
        ("v_level", "nan"),
        ("values", "int2"),
        ("sink", "-1"),
        ("recent", "99999999999"),
        ("pack_from", "-5"),
        ("heads", "0"),
        ("heads", "3"),
        ("head_dim", "24"),
        ("head_dim", "4096"),
    ],
)
def test_a_damaged_attribute_is_refused_when_the_model_is_read(tmp_path: Path, name: str, value: str) -> None:
    ov_ext.save_model(ov_ext.sparsify_attention(attention())[0], tmp_path / "m.xml")
    text = (tmp_path / "m.xml").read_text()
    start = text.index("SparseKVAttention")
    begin = text.index(f' {name}="', start) + len(f' {name}="')
    (tmp_path / "m.xml").write_text(text[:begin] + value + text[text.index('"', begin) :])
    with pytest.raises(RuntimeError, match="SparseKVAttention|(?i:attribute)"):
        ov_ext.add_extension(ov.Core()).read_model(tmp_path / "m.xml")


def test_an_ir_without_pack_from_packs_at_once(tmp_path: Path) -> None:
    """As releases before it wrote them."""
    ov_ext.save_model(ov_ext.sparsify_attention(attention())[0], tmp_path / "m.xml")
    text = (tmp_path / "m.xml").read_text()
    (tmp_path / "m.xml").write_text(text.replace(' pack_from="0"', ""))
    assert ' pack_from="0"' in text
    model = ov_ext.add_extension(ov.Core()).read_model(tmp_path / "m.xml")
    (node,) = (node for node in model.get_ops() if node.get_type_name() == "SparseKVAttention")
    attributes: dict[str, Any] = node.get_attributes()
    assert attributes["pack_from"] == 0 and attributes["k_level"] == 0.5
