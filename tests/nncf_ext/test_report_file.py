"""A report is the same before a model is saved and after it is loaded; one that does not fit does no harm."""

import json
import logging

import nncf
import pytest
import torch
from typer.testing import CliRunner

import nncf_ext
from nncf_ext import AdvancedSparseWeightsParameters, CompressMode
from nncf_ext.cli import app
from nncf_ext.report import CompressionReport
from nncf_ext.structure.plan import StructurePlan
from nncf_ext.weights.records import LayerRecord, set_record

REPORT = "compression_report.json"
FEW_COLUMNS = {"intermediate_size": 160}  # no multiple of 64 or 128


def compress(model, dataset, mode=CompressMode.SPARSE_WANDA, **settings):
    return nncf_ext.compress(
        model,
        mode,
        ratio=0.5,
        dataset=dataset,
        ignored_scope=nncf.IgnoredScope(patterns=[r".*o_proj"]),
        advanced_parameters=AdvancedSparseWeightsParameters(**settings),
    )


def sparse(make, dataset):
    model = compress(make(tie_word_embeddings=True), dataset)
    idle = model.model.layers[1].mlp.up_proj  # as of a layer that no token reached
    set_record(idle, LayerRecord(untouched="saw no calibration token", bytes_before=idle.weight.nbytes))
    return model


def int4(make, dataset):
    return compress(
        make(**FEW_COLUMNS).bfloat16(),
        dataset,
        CompressMode.SPARSE_GPT,
        quantization=nncf.CompressWeightsMode.INT4_SYM,
        group_size_fallback_mode=nncf.GroupSizeFallbackMode.IGNORE,
        keep_prerounding=True,
    )


def cut(make, dataset):
    model = make()
    return compress(nncf_ext.extract(model, StructurePlan.dense(model).keep("layers.0.mlp", (1, 5, 8))), dataset)


def cut_int4(make, dataset):
    model = make()
    small = nncf_ext.extract(model, StructurePlan.dense(model).keep("layers.0.mlp", range(128)))
    return compress(small, dataset, quantization=nncf.CompressWeightsMode.INT4_SYM)


def dense(make, dataset):
    return make()


@pytest.mark.parametrize("make", [sparse, int4, cut, cut_int4, dense])
def test_the_same_before_and_after(tiny_llama, token_dataset, tmp_path, make, caplog):
    model = make(tiny_llama, token_dataset)
    before = nncf_ext.compression_report(model)
    assert make is dense or {row.mode for row in before.compressed} == {
        "sparse_gpt" if make is int4 else "sparse_wanda"
    }
    for step in ("one", "two"):  # what was loaded can be saved again
        nncf_ext.save_pretrained(model, tmp_path / step)
        model = nncf_ext.load_pretrained(tmp_path / step)
        assert nncf_ext.compression_report(model) == before
    assert not caplog.records
    if make in (sparse, int4):
        notes = {row.note for row in before.weights}
        assert ("saw no calibration token" if make is sparse else "not quantized: 160 inputs are no multiple of group "
                "size 128") in notes  # fmt: skip
    # As another floating type, what was noted stays.
    wide = nncf_ext.compression_report(nncf_ext.load_pretrained(tmp_path / "two", dtype=torch.float64))
    assert [(row.mode, row.error, row.note) for row in wide.weights] == [
        (row.mode, row.error, row.note) for row in before.weights
    ]


def test_plain_data_and_back(tiny_llama, token_dataset):
    report = nncf_ext.compression_report(int4(tiny_llama, token_dataset))
    assert CompressionReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def damage(change):
    def edit(file):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    ("edit", "warning"),
    [
        (lambda file: file.write_text("{ torn"), "damaged"),
        (lambda file: file.write_text("[]"), "A JSON object is needed"),
        (lambda file: file.write_bytes(b"\xff\xfe"), "damaged"),
        (damage(lambda content: content.pop("weights")), "something else"),
        (damage(lambda content: content["weights"][3].update(error="much")), "something else"),
        (damage(lambda content: content["weights"][3].update(shape=[1, "x"])), "something else"),
        (damage(lambda content: content["weights"][3].pop("note")), "something else"),
        (damage(lambda content: content["weights"][3].update(shape=[1, 2])), "of another model"),
        (damage(lambda content: content["weights"][3].update(precision="int4")), "of another model"),
    ],
    ids=["torn", "list", "no text", "no weights", "text for a number", "shape", "field missing", "other shape", "int4"],
)
def test_a_report_that_does_not_fit_is_left_out(tiny_llama, token_dataset, tmp_path, edit, warning, caplog):
    model = sparse(tiny_llama, token_dataset)
    nncf_ext.save_pretrained(model, tmp_path)
    edit(tmp_path / REPORT)
    with caplog.at_level(logging.WARNING, "nncf_ext"):
        loaded = nncf_ext.load_pretrained(tmp_path)
    assert warning in caplog.text and str(tmp_path / REPORT) in caplog.text
    assert not nncf_ext.compression_report(loaded).compressed
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_folder_without_a_report_loads_silently(tiny_llama, token_dataset, tmp_path, caplog):
    nncf_ext.save_pretrained(int4(tiny_llama, token_dataset), tmp_path)
    (tmp_path / REPORT).unlink()
    report = nncf_ext.compression_report(nncf_ext.load_pretrained(tmp_path))
    assert not report.compressed and not caplog.records


def test_names_of_another_model_are_not_looked_up(tiny_llama, tmp_path):
    nncf_ext.save_pretrained(tiny_llama(), tmp_path)
    rows = json.loads((tmp_path / REPORT).read_text())
    rows["weights"] = [{**rows["weights"][0], "name": "model.config.weight", "mode": "sparse_gpt"}]
    (tmp_path / REPORT).write_text(json.dumps(rows))
    assert not nncf_ext.compression_report(nncf_ext.load_pretrained(tmp_path)).compressed


def test_an_adapter_has_no_report(tiny_llama, tmp_path):
    from peft import LoraConfig, get_peft_model

    nncf_ext.save_pretrained(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])), tmp_path)
    assert (tmp_path / "adapter_config.json").is_file() and not (tmp_path / REPORT).exists()


def test_command_line_keeps_the_notes_of_its_input(folder, tmp_path):
    text = ["--dataset", tmp_path / "text.txt", "--window", "32", "--samples", "4"]

    def run(*arguments):
        result = CliRunner().invoke(app, ["compress", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return json.loads((arguments[1] / REPORT).read_text())["weights"]

    first = run(folder, tmp_path / "sparse", "--mode", "sparse_wanda", "--ignore", r".*\.0\.", *text)
    second = run(
        tmp_path / "sparse", tmp_path / "packed", "--ratio", "0", "--quantization", "int4_sym", "--ignore", r".*\.1\.",
        *text,
    )  # fmt: skip
    assert {row["mode"] for row in second if ".0." in row["name"]} == {"sparse_admm"}
    for one, other in zip(first, second, strict=True):
        if ".1." in one["name"]:
            assert one == other and other["mode"] == "sparse_wanda" and other["error"] is not None
