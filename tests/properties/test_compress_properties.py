"""
What every one-shot method must have, over the table in :mod:`tests.properties.cases`. A new method is a new row there.
"""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from torch import nn

import nncf_ext
import ov_ext
from nncf_ext import CompressMode
from nncf_ext.journal import Journal
from nncf_ext.structure.masking import masked
from nncf_ext.weights.activation_sparsity import activation_sparsity_of
from ov_ext.state_space import convert_state_space_model
from tests.properties.cases import CASES, Case, Logits, cast, compressed, load, save

ROOT = Path(__file__).parents[2]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_with_data = pytest.mark.parametrize("case", [case for case in CASES if case.needs_data], ids=str)
each_of_same_shape = pytest.mark.parametrize("case", [case for case in CASES if not case.removes], ids=str)
each_removal = pytest.mark.parametrize("case", [case for case in CASES if case.removes], ids=str)
# The first row of every method, and of every method on a grid.
FIRST = {(case.mode, "quantization" in case.advanced): case for case in reversed(CASES)}.values()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows_of(model: nn.Module) -> dict[str, Any]:
    return {row.name: row for row in nncf_ext.compression_report(model).weights}


def thresholds(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the layers of a model do with their inputs, as numbers."""
    found = ((name, activation_sparsity_of(module)) for name, module in model.named_modules())
    return {
        f"{name} {part}": torch.as_tensor(getattr(sparsity, part))
        for name, sparsity in found
        if sparsity is not None
        for part in ("threshold", "centre", "replacement")
    }


def same_state(one: nn.Module, other: nn.Module) -> bool:
    left, right = (each.state_dict() | thresholds(each) for each in (one, other))
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def test_every_mode_stands_in_the_table():
    assert {case.mode for case in CASES} == {*CompressMode}


@each_of_same_shape
def test_shapes_are_kept(case):
    model = case.fresh()
    shapes = {name: row.shape for name, row in rows_of(model).items()}
    output = case.run(model)
    case.compress(model)
    assert {name: row.shape for name, row in rows_of(model).items()} == shapes
    assert case.run(model).shape == output.shape
    assert bool(case.run(model).isfinite().all())


@each_of_same_shape
def test_ratio_is_reached_within_one_unit(case):
    rows = nncf_ext.compression_report(compressed(case)).compressed
    assert rows
    for row in rows:
        if case.inputs:  # as a fraction of all inputs in the calibration data
            assert row.sparsity < 0.1 and row.input_sparsity == pytest.approx(case.ratio, abs=2 / row.shape[1]), (
                row.name
            )
            continue
        surplus = row.sparsity - case.ratio
        assert -1 / row.shape[1] <= surplus <= case.unit / row.shape[1] + 1e-9, row.name


@each_removal
def test_ratio_of_parameters_is_reached_by_the_last_step(case):
    """Against the parameters of the models before and after; without its last step the plan is above the ratio."""
    small = compressed(case)
    plan, dense = nncf_ext.structure_plan(small), case.fresh()
    whole = sum(each.numel() for each in dense.parameters())
    assert 1 - sum(each.numel() for each in small.parameters()) / whole >= case.ratio
    # The last units go first here, whichever went there: their number is what counts.
    before = nncf_ext.StructurePlan.dense(dense).at({step.dimension: step.kept for step in plan.steps[:-1]})
    assert 1 - sum(each.numel() for each in nncf_ext.extract(dense, before).parameters()) / whole < case.ratio


@each_case
def test_ignored_scope_is_respected(case):
    model = case.fresh()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layer = case.model.some_layer
    model = case.compress(model, ignored_scope=nncf.IgnoredScope(names=[layer]))
    kept = before[f"{layer}.weight"]
    if case.removes:
        # Layers before it may be gone, and its name with them.
        assert any(torch.equal(each, kept) for each in model.parameters())
        assert sum(each.numel() for each in model.parameters()) < sum(each.numel() for each in before.values())
        return
    rows = rows_of(model)
    assert torch.equal(model.get_submodule(layer).weight, kept)
    assert rows[f"{layer}.weight"].note == "ignored scope"
    assert sum(row.mode is not None for row in rows.values()) >= 2


@each_case
def test_same_seed_gives_the_same_model(case):
    assert same_state(case.compress(case.fresh()), compressed(case))


@each_case
def test_copy_leaves_the_input(case):
    model = case.fresh()
    other = case.compress(model, do_copy=True)
    assert same_state(model, case.fresh()) and same_state(other, compressed(case))
    assert not torch.equal(case.run(other), case.run(model))


@each_case
@pytest.mark.parametrize("device", DEVICES)
def test_device_and_type_are_kept(case, device):
    model = case.fresh().to(device, torch.bfloat16)
    before = case.run(model)
    parameter = next(model.parameters())
    model = case.compress(model, dataset=nncf.Dataset([cast(item, parameter) for item in case.model.items]))
    floating = [each for each in model.parameters() if each.is_floating_point()]
    assert floating and {each.dtype for each in floating} == {torch.bfloat16}
    assert {each.device.type for each in (*model.parameters(), *model.buffers())} == {device}
    output = case.run(model)
    assert output.dtype is before.dtype and output.device.type == device and bool(output.isfinite().all())


@each_case
@pytest.mark.parametrize("training", [False, True])
def test_training_state_is_kept(case, training):
    model = case.fresh().train(training)
    first = next(name for name, module in model.named_modules() if not [*module.children()])
    model.get_submodule(first).train(not training)
    next(iter(model.parameters())).requires_grad_(False)
    frozen = next(name for name, _ in model.named_parameters())
    states = {name: module.training for name, module in model.named_modules()}
    model = case.compress(model)
    assert model.training == training
    for name, module in model.named_modules():
        assert name not in states or module.training == states[name], name
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name != frozen and parameter.is_floating_point()), name


@each_case
def test_report_names_every_weight(case):
    model = compressed(case)
    rows = rows_of(model)
    # Packed weights have other shapes than the forward sees.
    holders = model if case.removes else case.fresh()
    assert rows.keys() == {name for name, each in holders.named_parameters() if each.dim() >= 2}
    for row in rows.values():
        assert row.mode == case.mode.value or (row.mode is None and row.note), row.name
        assert row.bytes_after > 0 and 0 <= row.sparsity <= 1
    if case.removes:
        assert {name: row.shape for name, row in rows.items()} == {
            name: model.get_parameter(name).shape for name in rows
        }


class Interrupted(BaseException):
    """Ends a run as a signal would."""


def interrupt(monkeypatch: pytest.MonkeyPatch, entry: int) -> None:
    """Ends the run instead of keeping this entry of its journal, counted from 0."""
    write, done = Journal.write, []

    def stop(self, name, writer):
        if len(done) == entry:
            raise Interrupted
        done.append(name)
        write(self, name, writer)

    monkeypatch.setattr(Journal, "write", stop)


def kept(folder: Path) -> int:
    """Number of entries in a journal; each has a seal beside it."""
    return len([*folder.glob("*.sha256")])


@each_case
def test_interrupted_and_resumed_is_the_same_model(case, tmp_path):
    """Interrupted half-way; resumed on what the interruption left, and on the original."""
    expected = case.compress(case.fresh(), resume=tmp_path / "whole")
    assert same_state(expected, compressed(case))
    entries = kept(tmp_path / "whole")
    model = case.fresh()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, entries // 2)
        case.compress(model, resume=tmp_path / "half")
    assert kept(tmp_path / "half") == entries // 2 < entries
    assert bool(case.run(model).isfinite().all())
    again = case.compress(case.fresh(), do_copy=True, resume=tmp_path / "half")
    assert same_state(again, expected)
    assert same_state(case.compress(model, resume=tmp_path / "half"), expected)
    assert str(nncf_ext.compression_report(model)) == str(nncf_ext.compression_report(expected))


@each_case
@pytest.mark.parametrize("ratio", [-0.1, 1.0, 40, float("nan")])
def test_bad_ratio_is_refused(case, ratio, tmp_path):
    model = case.fresh()
    with pytest.raises(nncf.ValidationError) as refusal:
        case.compress(model, ratio=ratio, resume=tmp_path / "journal")
    text = str(refusal.value)
    assert f"ratio is the fraction of {case.mode.method.ratio}" in text and f"[0, 1); got {ratio}" in text
    assert ("weight" in text) != (case.removes or case.inputs)
    assert same_state(model, case.fresh()) and not (tmp_path / "journal").exists()


@each_with_data
@pytest.mark.parametrize(
    ("dataset", "text"),
    [
        (nncf.Dataset([]), "dataset is empty"),
        (None, "needs a dataset"),
        (["text"], "must be an nncf.Dataset; got list"),
    ],
    ids=["empty", "none", "list"],
)
def test_bad_dataset_is_refused(case, dataset, text, tmp_path):
    model = case.fresh()
    with pytest.raises(nncf.ValidationError, match=text) as refusal:
        case.compress(model, dataset=dataset, resume=tmp_path / "journal")
    assert "weight" not in str(refusal.value)
    assert same_state(model, case.fresh()) and not (tmp_path / "journal").exists()


class OtherParameters:
    """Of no method."""


@each_case
def test_bad_model_and_parameters_are_refused(case, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = case.fresh()
    adapted = get_peft_model(case.fresh(), LoraConfig(target_modules=[case.model.some_layer]))
    for wrong, changes, error, text in (
        (object(), {}, nncf.UnsupportedModelError, r"torch\.nn\.Module"),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 3)), {}, (nncf.ValidationError, nncf.UnsupportedModelError), "."),
        (adapted, {}, nncf.UnsupportedModelError, "carries adapters"),
        (
            model,
            {"advanced_parameters": OtherParameters()},
            nncf.ParameterNotSupportedError,
            "class Advanced.*got Other",
        ),
        (model, {"subset_size": 0}, nncf.ValidationError, "at least 1; got 0"),
        (model, {"ignored_scope": nncf.IgnoredScope(names=["none"])}, nncf.ValidationError, "match no layer"),
    ):
        with pytest.raises(error, match=text):
            case.compress(wrong, **changes, resume=tmp_path / "journal")
    assert same_state(model, case.fresh()) and not (tmp_path / "journal").exists()


@each_case
def test_saved_and_loaded_gives_the_same_output(case, tmp_path):
    model = compressed(case)
    save(model, tmp_path / "model")
    assert torch.equal(case.run(load(case, tmp_path / "model")), case.run(model))


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of all models, saved here and loaded by one fresh process."""
    folder = tmp_path_factory.mktemp("saved")
    for number, case in enumerate(CASES):
        save(compressed(case), folder / str(number))
    program = (
        f"from pathlib import Path; from tests.properties.cases import reload_all; reload_all(Path({str(folder)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@each_case
def test_fresh_process_gives_the_same_output(case, reloaded):
    found = torch.load(reloaded / f"{CASES.index(case)}.output.pt")
    assert torch.equal(found, case.run(compressed(case)))


@each_removal
def test_extraction_is_masking(case):
    small, dense = compressed(case), case.fresh()
    plan = nncf_ext.structure_plan(small)
    with masked(dense, plan):
        expected = case.run(dense)
    torch.testing.assert_close(case.run(small), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(case.run(nncf_ext.extract(dense, plan)), case.run(small))


def in_openvino(case: Case, model: nn.Module) -> np.ndarray:
    """The output of an exported model on the first item."""
    item, exact = case.model.items[0], {"INFERENCE_PRECISION_HINT": "f32"}
    if case.model.name == "mamba2":
        ids = item["input_ids"].numpy()
        compiled = ov.Core().compile_model(convert_state_space_model(model), "CPU", exact)
        rows = np.arange(len(ids), dtype=np.int32)
        named = {"input_ids": ids, "attention_mask": np.ones_like(ids), "beam_idx": rows}
        return compiled.create_infer_request().infer(named)["logits"]
    if isinstance(item, dict):
        model, item = Logits(model), item["input_ids"]
    inputs = item if isinstance(item, tuple) else (item,)
    ir = ov_ext.convert_model(model, example_input=inputs, method="trace")
    return ov.Core().compile_model(ir, "CPU", exact)([each.numpy() for each in inputs])[0]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_exported_model_is_close(case):
    """The torch form of a grid rounds code times scale to float16, 2^-11 of each weight; OpenVINO does not."""
    model = compressed(case)
    close = 2e-3 if "quantization" in case.advanced else 1e-4
    expected = case.run(model).numpy()
    np.testing.assert_allclose(in_openvino(case, copy.deepcopy(model)), expected, rtol=close, atol=close)
