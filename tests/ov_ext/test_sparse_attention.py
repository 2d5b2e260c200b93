"""sparsify_attention on the committed model: results, states, beams, undoing, folders, refusals, GenAI and Optimum."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops
from typer.testing import CliRunner

import ov_ext
from ov_ext import runtime
from ov_ext.cli import app
from ov_ext.sparse_attention.pattern import NotReplaceable, find

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
HEADS, GROUP, DIM = 2, 3, 32
EXACT = ov_ext.SparseAttentionPolicy(k=0, v=0, recent=0, sink=0)


def attention(heads: int = HEADS, group: int = GROUP, dim: int = DIM, **changes: Any) -> ov.Model:
    """One layer of stateful attention as Optimum-Intel exports it, with two outputs: y, and tokens of the past."""
    i64 = ov.Type.i64
    element = changes.get("element", ov.Type.f32)
    inputs = {
        "q": ops.parameter([-1, heads * group, -1, dim], element),
        "k": ops.parameter([-1, heads, -1, dim], element),
        "v": ops.parameter([-1, heads, -1, dim], element),
        "beam_idx": ops.parameter([-1], ov.Type.i32),
        "mask": ops.parameter(changes.get("mask", [-1, 1, -1, -1]), changes.get("mask_type", element)),
    }
    for name, node in inputs.items():
        node.output(0).set_names({name})
        node.set_friendly_name(name)
    operands, sinks, past = [], [], None
    for name in ("k", "v"):
        first = ops.gather(ops.shape_of(inputs["q"]), ops.constant([0], i64), ops.constant(0, i64))
        shape = ops.concat([first, ops.constant([heads], i64), ops.constant([0], i64), ops.constant([dim], i64)], 0)
        info = ov.op.util.VariableInfo()
        info.variable_id, info.data_type = f"past.{name}", element
        info.data_shape = ov.PartialShape([-1, heads, -1, dim])
        variable = ov.op.util.Variable(info)
        read = ops.read_value(ops.broadcast(ops.constant(0.0, element), shape), variable)
        gather = ops.gather(read, inputs["beam_idx"], ops.constant(0, i64))
        whole = ops.concat([gather, inputs[name]], 2)
        sinks.append(ops.assign(whole, variable))
        past = past or ops.gather(ops.shape_of(gather), ops.constant(2, i64), ops.constant(0, i64))
        if group > 1:
            sizes = [
                ops.gather(ops.shape_of(whole), ops.constant(at, i64), ops.constant(0, i64)) for at in ([0, 1], [2, 3])
            ]
            target = ops.concat([sizes[0], ops.constant([group], i64), sizes[1]], 0)
            many = ops.broadcast(ops.unsqueeze(whole, ops.constant(2, i64)), target, broadcast_spec="BIDIRECTIONAL")
            whole = ops.reshape(many, ops.constant([0, heads * group, -1, dim], i64), True)
        operands.append(whole)
    y = ops.scaled_dot_product_attention(inputs["q"], *operands, inputs["mask"], ops.constant(0.25, element))
    y.set_friendly_name("attention")
    return ov.Model([ops.result(y), ops.result(past)], sinks, list(inputs.values()), "m")


def feed(
    rng: np.random.Generator, count: int, past: int, batch: int = 1, beams: list[int] | None = None
) -> dict[str, Any]:
    sizes = {"q": HEADS * GROUP, "k": HEADS, "v": HEADS}
    tokens = {name: rng.standard_normal((batch, size, count, DIM)).astype(np.float32) for name, size in sizes.items()}
    future = np.arange(past + count) > past + np.arange(count)[:, None]
    mask = np.where(future, np.float32(-65504), np.float32(0))[None, None].repeat(batch, 0)
    beam_idx = np.array(range(batch) if beams is None else beams, np.int32)
    return {**tokens, "beam_idx": beam_idx, "mask": mask}


@pytest.fixture(scope="module")
def stock(core: ov.Core) -> ov.CompiledModel:
    return core.compile_model(attention(), "CPU", F32 | {"KV_CACHE_PRECISION": "f32"})


@pytest.fixture(scope="module")
def ours(core: ov.Core) -> ov.CompiledModel:
    return core.compile_model(ov_ext.sparsify_attention(attention(), EXACT)[0], "CPU", F32)


def both(stock: ov.InferRequest, ours: ov.InferRequest, inputs: dict[str, Any]) -> None:
    """Without pruning only the rounding of keys and values to 8 bits is between them."""
    expected, found = stock.infer(inputs), ours.infer(inputs)
    assert found[1] == expected[1]
    assert np.abs(found[0] - expected[0]).max() < 0.03


def test_it_equals_stock_attention_through_prompts_tokens_and_resets(
    stock: ov.CompiledModel, ours: ov.CompiledModel
) -> None:
    rng, requests = np.random.default_rng(0), (stock.create_infer_request(), ours.create_infer_request())
    for first in (70, 1):
        past = 0
        for count in (first, 1, 57, 1, 64, 1, 130, 1):
            both(*requests, feed(rng, count, past))
            past += count
        for request in requests:
            request.reset_state()


def test_beams_and_batches_equal_stock(stock: ov.CompiledModel, ours: ov.CompiledModel) -> None:
    rng, requests = np.random.default_rng(1), (stock.create_infer_request(), ours.create_infer_request())
    both(*requests, feed(rng, 100, 0, 2))
    for step, beams in enumerate(([0, 0, 1, 1], [1, 0, 3, 3], [2, 2, 2, 0], *([[3, 1, 0, 2]] * 60), [0, 3])):
        inputs = feed(rng, 1, 100 + step, len(beams), beams)
        inputs["mask"][0, :, :, :30] = -65504  # padding on the left
        both(*requests, inputs)


def test_a_boolean_mask_and_none_of_its_rows(core: ov.Core) -> None:
    model = ov_ext.sparsify_attention(attention(mask_type=ov.Type.boolean), EXACT)[0]
    rng = np.random.default_rng(2)
    request = core.compile_model(model, "CPU", F32).create_infer_request()
    request.infer(feed(rng, 100, 0) | {"mask": np.tril(np.ones((1, 1, 100, 100), bool))})
    inputs = feed(rng, 2, 100)
    attended = np.ones((1, 1, 2, 102), bool)
    attended[0, 0, 0] = False
    found = request.infer(inputs | {"mask": attended})[0]
    assert (found[:, :, 0] == 0).all() and np.isfinite(found).all() and (found[:, :, 1] != 0).all()


def test_requests_run_side_by_side(ours: ov.CompiledModel) -> None:
    def run(seed: int) -> list[np.ndarray]:
        rng, request = np.random.default_rng(seed), ours.create_infer_request()
        return [
            request.infer(feed(rng, count, past))[0].copy() for past, count in ((0, 90), (90, 1), (91, 40), (131, 1))
        ]

    alone = [run(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(run, range(3)))
    assert all(
        np.array_equal(a, b) for one, two in zip(alone, together, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_streams_run_it_too(core: ov.Core, ours: ov.CompiledModel) -> None:
    model = ov_ext.sparsify_attention(attention(), EXACT)[0]
    compiled = core.compile_model(model, "CPU", F32 | {"NUM_STREAMS": 2})
    queue = ov.AsyncInferQueue(compiled, 2)
    results: dict[int, np.ndarray] = {}
    queue.set_callback(lambda request, key: results.setdefault(key, request.get_output_tensor(0).data.copy()))
    inputs = feed(np.random.default_rng(3), 90, 0)
    for key in range(2):
        queue.start_async(inputs, key)
    queue.wait_all()
    expected = ours.create_infer_request().infer(inputs)[0]
    assert all(np.array_equal(result, expected) for result in results.values())


def test_a_saved_ir_and_a_cached_model_give_the_same_bits(ours: ov.CompiledModel, tmp_path: Path) -> None:
    ov_ext.save_model(ov_ext.sparsify_attention(attention(), EXACT)[0], tmp_path / "m.xml")
    requests = [ours.create_infer_request()]
    for _ in range(2):  # compiled, and from the cache
        core = ov_ext.add_extension(ov.Core())
        core.set_property({"CACHE_DIR": str(tmp_path / "cache")})
        compiled = core.compile_model(tmp_path / "m.xml", "CPU", F32)
        requests.append(compiled.create_infer_request())
    assert compiled.get_property("LOADED_FROM_CACHE")
    rng = np.random.default_rng(8)
    for count, past in ((150, 0), (1, 150), (3, 151)):
        inputs = feed(rng, count, past)
        results = [request.infer(inputs)[0] for request in requests]
        assert all(np.array_equal(each, results[0]) for each in results)


def test_a_state_that_is_not_its_own_is_refused(ours: ov.CompiledModel) -> None:
    """Saved, foreign, old and damaged states: each is an error, none is followed, a reset makes the request well."""
    rng = np.random.default_rng(4)
    request, other = ours.create_infer_request(), ours.create_infer_request()
    request.infer(feed(rng, 70, 0))
    (state,) = request.query_state()
    saved = state.state.data.copy()
    other.infer(feed(rng, 5, 0))
    request.infer(feed(rng, 1, 70))
    now = state.state.data.copy()
    assert now.dtype == np.int32 and now.shape == (16,) and now[5] == 71 and now[4] == saved[4] + 1

    def changed(word: int, value: int) -> np.ndarray:
        return np.where(np.arange(16) == word, np.int32(value), now)

    bad = [saved, changed(0, 1), changed(1, 2), changed(2, 5), changed(5, 2**31 - 1), changed(6, 2), changed(15, 1)]
    bad += [np.full(16, -1, np.int32), rng.integers(-(2**31), 2**31, 16).astype(np.int32)]
    for each in bad:
        state.state = ov.Tensor(each)
        with pytest.raises(RuntimeError, match=r"SparseKVAttention.*reset_state\(\)"):
            request.infer(feed(rng, 1, 71))
    request.reset_state()
    request.infer(feed(rng, 3, 0))
    assert state.state.data[5] == 3


def test_wrong_inputs_are_refused_and_a_reset_makes_the_request_well(ours: ov.CompiledModel) -> None:
    rng, request = np.random.default_rng(5), ours.create_infer_request()
    request.infer(feed(rng, 70, 0))
    with pytest.raises(RuntimeError, match=r"the mask must have shape \[1 or 1, 1, 1 or 1, 71\], got \[1,1,1,60\]"):
        request.infer(feed(rng, 1, 70) | {"mask": np.zeros((1, 1, 1, 60), np.float32)})
    request.reset_state()
    request.infer(feed(rng, 70, 0))
    with pytest.raises(RuntimeError, match="beam_idx names sequence 3, there are 1"):
        request.infer(feed(rng, 1, 70, beams=[3]))
    request.reset_state()
    assert np.isfinite(request.infer(feed(rng, 70, 0))[0]).all()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dim": 24}, "multiple of 16 up to 256 elements needed, these have 24"),
        ({"element": ov.Type.f64}, "f32 queries needed"),
        ({"element": ov.Type.f16}, "f32 queries needed"),
        ({"mask": [-1, -1]}, "mask need four axes"),
        ({"mask": [-1, HEADS * GROUP, -1, -1]}, "the mask differs between heads"),
    ],
)
def test_other_attention_stays_stock_with_a_reason(changes: dict[str, Any], reason: str) -> None:
    model = attention(**changes)
    before = Counter(node.get_type_name() for node in model.get_ops())
    model, report = ov_ext.sparsify_attention(model)
    assert not report.replaced and reason in report.layers[0].note and reason in str(report.summary())
    assert before == Counter(node.get_type_name() for node in model.get_ops())
    assert not model.has_rt_info(["ov_ext", "attention"])


def test_a_past_with_another_reader_and_a_window_stay_stock() -> None:
    model = attention()
    (sdpa,) = (node for node in model.get_ops() if node.get_type_name() == "ScaledDotProductAttention")
    (gather,) = (find(sdpa, model).k.gather,)
    model.add_results([ops.result(ops.relu(gather))])
    with pytest.raises(NotReplaceable, match="reads its past, too"):
        find(sdpa, model)
    model = attention()
    (sdpa,) = (node for node in model.get_ops() if node.get_type_name() == "ScaledDotProductAttention")
    near = ops.greater(sdpa.input_value(3), ops.constant(-1.0, ov.Type.f32))
    sdpa.input(3).replace_source_output(ops.convert(near, ov.Type.f32).output(0))
    with pytest.raises(NotReplaceable, match="sliding window"):
        find(sdpa, model)


@pytest.mark.parametrize(("cpu", "warned"), [("reference", True), ("avx2", False), ("avx512", False)])
def test_a_cpu_without_a_kernel_is_said(
    cpu: str, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtime, "this_cpu", lambda: cpu)
    with caplog.at_level("WARNING", "ov_ext"):
        ov_ext.sparsify_attention(attention())
    assert ("reference kernel" in caplog.text) == warned


def test_models_without_such_attention_are_errors() -> None:
    x = ops.parameter([1, 4], np.float32)
    with pytest.raises(ValueError, match="no ScaledDotProductAttention"):
        ov_ext.sparsify_attention(ov.Model([ops.result(ops.relu(x))], [x], "m"))
    model = ov_ext.sparsify_attention(attention())[0]
    with pytest.raises(ValueError, match="already"):
        ov_ext.sparsify_attention(model)
    with pytest.raises(ValueError, match=r"names layers \[1\], the model has 1"):
        ov_ext.sparsify_attention(attention(), ov_ext.SparseAttentionPolicy(layers={1: None}))


@pytest.mark.parametrize("wrong", [{"k": 0.95}, {"v": -0.1}, {"values": "u8"}, {"sink": -1}, {"layers": {0: (0.5, 2)}}])
def test_a_policy_names_what_is_wrong(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        ov_ext.SparseAttentionPolicy(**wrong)


def test_levels_of_single_layers_and_bytes() -> None:
    policy = ov_ext.SparseAttentionPolicy(layers={0: (0.25, 0.75)}, values="int4")
    model, report = ov_ext.sparsify_attention(attention(), policy)
    (node,) = (node for node in model.get_ops() if node.get_type_name() == "SparseKVAttention")
    assert (node.get_attributes()["k_level"], node.get_attributes()["v_level"]) == (0.25, 0.75)
    assert report.layers[0].token_bytes == HEADS * (2 * DIM / 8 + (24 + 8) / 2 + 8)
    assert report.layers[0].stock_token_bytes == HEADS * 2 * (DIM + 8)
    assert json.dumps(report.to_dict())
    assert not ov_ext.sparsify_attention(attention(), ov_ext.SparseAttentionPolicy(layers={0: None}))[1].replaced


def test_undoing_gives_the_stock_model(core: ov.Core, stock: ov.CompiledModel, tmp_path: Path) -> None:
    model = ov_ext.sparsify_attention(attention())[0]
    for path in ("m.xml", "with_weights.xml"):
        ov_ext.save_model(model, tmp_path / path)
        model.set_rt_info("SPW1", ["ov_ext", "format"])  # as pack_sparse_weights leaves it
    packed = ov_ext.restore_attention(core.read_model(tmp_path / "with_weights.xml"))
    assert packed.has_rt_info(["ov_ext", "format"]) and not packed.has_rt_info(["ov_ext", "attention"])
    model = ov_ext.restore_attention(core.read_model(tmp_path / "m.xml"))
    names = {node.get_friendly_name() for node in attention().get_ops() if not node.get_type_name() == "Constant"}
    assert {"attention", "q", "mask"} <= names & {node.get_friendly_name() for node in model.get_ops()}
    assert {"past.k", "past.v"} == {sink.get_attributes()["variable_id"] for sink in model.get_sinks()}
    assert "ov_ext" not in model.get_rt_info()
    request = core.compile_model(model, "CPU", F32 | {"KV_CACHE_PRECISION": "f32"}).create_infer_request()
    rng, expected, past = np.random.default_rng(6), stock.create_infer_request(), 0
    for count in (20, 1, 5):
        inputs = feed(rng, count, past)
        assert np.array_equal(request.infer(inputs)[0], expected.infer(inputs)[0])
        past += count


@pytest.mark.parametrize("source", ["", "{}", "[1]", '{"v": 2}', '{"v": 1, "k": {}, "v_": {}}'])
def test_a_damaged_record_leaves_the_model_as_it_was(core: ov.Core, tmp_path: Path, source: str) -> None:
    ov_ext.save_model(ov_ext.sparsify_attention(attention())[0], tmp_path / "m.xml")
    text = (tmp_path / "m.xml").read_text()
    start = text.index('source="') + len('source="')
    text = text[:start] + source.replace('"', "&quot;") + text[text.index('"', start) :]
    (tmp_path / "m.xml").write_text(text)
    model = core.read_model(tmp_path / "m.xml")
    with pytest.raises(ov_ext.RecordError, match="attention: its record"):
        ov_ext.restore_attention(model)
    assert any(node.get_type_name() == "SparseKVAttention" for node in model.get_ops())


def test_caches_of_requests_that_are_gone_do_not_pile_up(ours: ov.CompiledModel) -> None:
    """What a cache takes is told by resident memory: 40 requests of 8 MB each."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    rng, request = np.random.default_rng(7), ours.create_infer_request()
    inputs = feed(rng, 1024, 0)
    for _ in range(3):
        request.infer(inputs)
        request.reset_state()
    before = resident()
    for _ in range(40):
        request.infer(inputs)
        request.reset_state()
    assert resident() - before < 40 * 1024 * HEADS * 2 * DIM / 4


@pytest.fixture(scope="module")
def folder(int4_lm: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed model, half of its weights zero, INT4, with packed weights and sparse attention, by the command."""
    import ov_ext.optimum

    stock_folder, out = tmp_path_factory.mktemp("stock") / "ir", tmp_path_factory.mktemp("sparse") / "ir"
    ov_ext.optimum.export(int4_lm, tokenizer, stock_folder)
    options = [
        "--min-sparsity",
        "0.3",
        "--no-calibrate",
        "--kv-sparsity",
        "0.5",
        "--report",
        str(out.parent / "r.json"),
    ]
    result = CliRunner().invoke(app, ["pack", str(stock_folder), str(out), *options])
    assert result.exit_code == 0, result.output
    assert "6 of 6 layers keep pruned keys and values" in result.output
    layers = json.loads((out.parent / "r.json").read_text())["openvino_model.xml"]["attention"]
    assert len(layers) == 6 and all(layer["replaced"] for layer in layers)
    assert "Sparse attention" in (out / "README.md").read_text()
    return out


@pytest.mark.slow
def test_genai_and_optimum_generate_the_same_and_the_command_undoes_it(folder: Path, tokenizer: Any) -> None:
    import ov_ext.genai
    import ov_ext.optimum

    prompt = (Path(__file__).parents[2] / "samples" / "assets" / "heldout.txt").read_text()[:400]
    pipeline = ov_ext.genai.pipeline(folder)
    text = pipeline.generate(prompt, max_new_tokens=64, do_sample=False, apply_chat_template=False)
    assert text == pipeline.generate(prompt, max_new_tokens=64, do_sample=False, apply_chat_template=False)
    model = ov_ext.optimum.load(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    found = model.generate(**ids, max_new_tokens=64, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(found, skip_special_tokens=True) == text
    beams = model.generate(**ids, max_new_tokens=20, num_beams=3, do_sample=False)
    assert beams.shape[1] > ids["input_ids"].shape[1]
    with pytest.raises(ValueError, match='ATTENTION_BACKEND="SDPA"'):
        ov_ext.genai.pipeline(folder, ATTENTION_BACKEND="PA")

    out = folder.parent / "undone"
    result = CliRunner().invoke(app, ["unpack", str(folder), str(out)])
    assert result.exit_code == 0, result.output
    model = ov.Core().read_model(out / "openvino_model.xml")  # a Core that knows no extension
    assert Counter(node.get_type_name() for node in model.get_ops())["ReadValue"] == 12
    assert "Sparse attention" not in (out / "README.md").read_text()


def kept_by_the_rule(x: Any, level: float) -> Any:
    """What format.md makes of ``[1, heads, tokens, head_dim]``, with 4 first and 64 last tokens dense, in 8 bits."""
    import torch

    result = x.clone()
    packed = slice(4, 4 + max(0, x.shape[2] - 68) // 64 * 64)
    part = x[:, :, packed].numpy()
    size = (part.view(np.uint32) >> 16 & 0x7FFF).astype(int)
    order = np.argsort(-size, -1, kind="stable")[..., part.shape[-1] - int(part.shape[-1] * level) :]
    step = np.abs(part).max(-1, keepdims=True) / 127
    codes = np.round(part / step)
    np.put_along_axis(codes, order, 0, -1)
    result[:, :, packed] = torch.from_numpy(codes * step)
    return result


@pytest.mark.slow
def test_64_tokens_equal_torch_with_the_same_rule(tokenizer: Any, core: ov.Core, tmp_path: Path) -> None:
    import torch
    from transformers import DynamicCache

    import ov_ext.optimum
    from tests.ov_ext.conftest import load_sparse_lm

    lm, policy = load_sparse_lm(), ov_ext.SparseAttentionPolicy(k=0.7, v=0.7)
    text = (Path(__file__).parents[2] / "samples" / "assets" / "heldout.txt").read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"][:150])[None]
    layers = lm.config.num_hidden_layers
    expected: list[int] = []
    changed = 0
    with torch.no_grad():
        out = lm(input_ids=ids, past_key_values=DynamicCache(config=lm.config))
        raw = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
        dense = DynamicCache([*raw])
        while len(expected) < 64:
            expected.append(int(out.logits[0, -1].argmax()))
            token = torch.tensor([[expected[-1]]])
            cache = DynamicCache([tuple(kept_by_the_rule(x, 0.7) for x in pair) for pair in raw])
            out = lm(input_ids=token, past_key_values=cache)
            new = [(layer.keys[:, :, -1:], layer.values[:, :, -1:]) for layer in cache.layers]
            raw = [
                tuple(torch.cat(both, 2) for both in zip(old, one, strict=True))
                for old, one in zip(raw, new, strict=True)
            ]
            changed += int(
                lm(input_ids=token, past_key_values=dense).logits[0, -1].argmax() != out.logits[0, -1].argmax()
            )
    assert len(raw) == layers and changed  # pruning does something to what comes out

    ov_ext.optimum.export(lm, tokenizer, tmp_path / "ir", rest=None)
    model = core.read_model(tmp_path / "ir" / "openvino_model.xml")
    assert len(ov_ext.sparsify_attention(model, policy)[1].replaced) == layers
    request = core.compile_model(model, "CPU", F32).create_infer_request()
    found: list[int] = []
    step = ids.numpy()
    while len(found) < 64:
        past = ids.shape[1] + len(found) - 1 if found else 0
        inputs = {
            "input_ids": step,
            "attention_mask": np.ones((1, past + step.shape[1]), np.int64),
            "position_ids": np.arange(past, past + step.shape[1])[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        logits = request.infer(inputs)[0]
        found.append(int(logits[0, -1].argmax()))
        step = np.array([[found[-1]]])
    assert found == expected
