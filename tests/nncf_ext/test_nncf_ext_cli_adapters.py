"""The commands search, extract and merge: the same results as the functions, from folder to folder, and refusals."""

import copy
import json
import math

import nncf
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from typer.testing import CliRunner

import nncf_ext
from nncf_ext import AdvancedSparseWeightsParameters, CompressMode, MergeMode, RankGroup
from nncf_ext.cli import app
from tests.nncf_ext.adapters import randomized

TARGETS = ["q_proj", "v_proj", "up_proj"]


def run(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def load(folder):
    return nncf_ext.load_pretrained(folder)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20).unsqueeze(0)).logits


@pytest.fixture
def text(folder, tmp_path):
    return tmp_path / "text.txt"


@pytest.fixture
def adapter(folder, tmp_path):
    """A random LoRA adapter of rank 6 on the model of the folder."""
    model = randomized(get_peft_model(load(folder), LoraConfig(r=6, lora_alpha=9, target_modules=TARGETS)))
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    return tmp_path / "adapter"


def perplexity(model, path, tokenizer, window, samples):
    """Token by token, over as many windows as fit, spread from the first to the last token."""
    tokens = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    stride = (len(tokens) - window) // (samples - 1)
    means = []
    for index in range(samples):
        ids = torch.tensor(tokens[index * stride :][:window])
        with torch.no_grad():
            scores = model(input_ids=ids[None]).logits[0, :-1].double()
        means.append(F.cross_entropy(scores, ids[1:]).item())
    return math.exp(sum(means) / samples)


def test_found_ranks_become_an_ordinary_adapter(folder, adapter, text, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report, out = tmp_path / "deep" / "report.json", tmp_path / "small"
    arguments = [
        "search", folder, report, "--adapter", adapter, "--dataset", text, "--window", "32", "--samples", "4",
        "--group", r".*\.[qv]_proj$=6,4,1", "--group", ".*up_proj=6,2", "--sampler", "random", "--budget", "5",
        "--test", text, "--storage", tmp_path / "storage.log", "--seed", "3",
    ]  # fmt: skip
    code, output = run(*arguments)
    assert code == 0, output
    assert "5 points measured" in output and "chosen" in output
    found = json.loads(report.read_text())
    assert found["complete"] and len(found["evaluations"]) == 5 and found["gap"] == pytest.approx(0)
    values = [each["values"]["perplexity"] for each in found["evaluations"]]
    assert found["chosen"]["values"]["perplexity"] == min(values)

    code, output = run("extract", folder, out, "--adapter", adapter, "--report", report)
    assert code == 0, output
    base = AutoModelForCausalLM.from_pretrained(folder)
    small = PeftModel.from_pretrained(base, out)
    ranks = {name: layer.r["default"] for name, layer in small.named_modules() if hasattr(layer, "lora_A")}
    for block in range(2):
        for name, group in (("q_proj", "q_proj+v_proj"), ("v_proj", "q_proj+v_proj"), ("up_proj", "up_proj")):
            rank = next(rank for path, rank in ranks.items() if f"layers.{block}." in path and path.endswith(name))
            assert rank == found["chosen"]["point"][f"model.layers.{block}.{group}"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert perplexity(small, text, tokenizer, 32, 4) == pytest.approx(min(values), rel=1e-4)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    # A worker adds to the storage, and has nothing to write.
    place = arguments.index("--storage")
    shared = [each for each in arguments if each != report]
    shared[shared.index("--storage")] = "--worker"
    del shared[shared.index("--test") : shared.index("--test") + 2]
    code, output = run(*shared)
    assert code == 0 and arguments[place + 1].exists(), output

    # The storage continues: nothing is measured again, and the report is the same.
    assert run(*arguments)[0] == 2
    code, output = run(*arguments, "--overwrite")
    assert code == 0 and json.loads(report.read_text()) == found, output

    code, output = run("extract", folder, tmp_path / "other", "--adapter", adapter, "--report", report, "--point", "1")
    assert code == 0, output
    other = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "other")
    assert perplexity(other, text, tokenizer, 32, 4) == pytest.approx(values[1], rel=1e-4)


def test_search_for_small_adapters_draws_a_front(folder, adapter, text, tmp_path):
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": text.read_text()[:500]}) for _ in range(3)))
    arguments = [
        "search", folder, tmp_path / "report.json", "--adapter", adapter, "--dataset", tmp_path / "lines.jsonl",
        "--window", "32", "--samples", "3", "--ranks", "6,3,1", "--sampler", "nsga2", "--budget", "20", "--parameters",
        "--constraint", "parameters <= 4000", "--plot", tmp_path / "front.png",
    ]  # fmt: skip
    code, output = run(*arguments)
    assert code == 0, output
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["groups"][0]["patterns"] == [".*"] and found["objectives"]["parameters"] == "minimize"
    assert found["chosen"] is None or found["chosen"]["values"]["parameters"] <= 4000
    assert (tmp_path / "front.png").stat().st_size > 1000
    net = nncf_ext.make_elastic(PeftModel.from_pretrained(load(folder), adapter), groups=[RankGroup([".*"], [6, 3, 1])])
    for each in found["evaluations"]:
        assert each["values"]["parameters"] == net.adapter_parameters(each["point"])


def test_a_plan_becomes_a_model(folder, tmp_path):
    dense = nncf_ext.StructurePlan.dense(load(folder))
    plan = dense.keep("layers.0.mlp", range(64)).keep("layers.1.attention", ())
    plan.save(tmp_path / "plan.json")
    code, output = run("extract", folder, tmp_path / "small", "--plan", tmp_path / "plan.json")
    assert code == 0, output
    assert torch.equal(logits(load(tmp_path / "small")), logits(nncf_ext.extract(load(folder), plan)))
    assert nncf_ext.StructurePlan.load(tmp_path / "small" / "structure_plan.json") == plan
    report = json.loads((tmp_path / "small" / "compression_report.json").read_text())
    assert {each["name"]: each["shape"] for each in report["weights"]}["model.layers.0.mlp.up_proj.weight"] == [64, 128]


@pytest.fixture
def sparse_folder(folder, tmp_path):
    """The same model with half of its weights zero."""
    assert run("compress", folder, tmp_path / "sparse", "--mode", "sparse_magnitude")[0] == 0
    return tmp_path / "sparse"


def zeros(model):
    return {name: value == 0 for name, value in model.state_dict().items() if "proj" in name}


def test_merged_adapters_keep_what_they_promise(sparse_folder, adapter, tmp_path):
    adapted = PeftModel.from_pretrained(load(sparse_folder), adapter)
    plain = copy.deepcopy(adapted).merge_and_unload()
    masked = nncf_ext.merge(adapted, MergeMode.SPARSE)
    before = zeros(load(sparse_folder))
    for options, expected in (((), masked), (("--mode", "plain"), plain), (("--masked",), masked)):
        out = tmp_path / "_".join(["out", *options])
        code, output = run("merge", sparse_folder, out, "--adapter", adapter, *options)
        assert code == 0, output
        merged = load(out)
        assert torch.equal(logits(merged), logits(expected))
        kept = all(bool(now[before[name]].all()) for name, now in zeros(merged).items())
        assert kept == (options != ("--mode", "plain"))
        notes = [row["note"] for row in json.loads((out / "compression_report.json").read_text())["weights"]]
        assert ("trained without a mask: its delta was masked" in notes) == (options == ())
    with pytest.raises(nncf.ValidationError, match="no packed INT4 weight"):
        nncf_ext.prerounding(merged)


@pytest.mark.parametrize("trained", [False, True])
def test_adapters_on_a_grid_are_merged_into_codes(folder, text, tmp_path, trained):
    """From the folders of the partner, of the grid and of the adapter: the logits of the trained model, bit for bit."""
    items = [{"input_ids": torch.randint(0, 320, (1, 20), generator=torch.Generator().manual_seed(7))}]
    advanced = AdvancedSparseWeightsParameters(
        quantization=nncf.CompressWeightsMode.INT4_SYM, group_size=64, keep_prerounding=True
    )
    grid = nncf_ext.compress(
        load(folder), CompressMode.SPARSE_WANDA, ratio=0.5, dataset=nncf.Dataset(items), advanced_parameters=advanced
    )
    partner = nncf_ext.prerounding(grid)
    for model, name in ((partner, "partner"), (grid, "grid")):
        nncf_ext.save_pretrained(model, tmp_path / name)
    for file in folder.glob("*token*"):
        (tmp_path / "partner" / file.name).write_bytes(file.read_bytes())
    model = randomized(get_peft_model(partner, LoraConfig(r=6, lora_alpha=2, target_modules=TARGETS)))
    settings = nncf_ext.AdvancedSqftParameters(trainable_scales=trained)
    nncf_ext.make_mergeable(model, MergeMode.QUANT_AWARE, grid=grid, advanced_parameters=settings)
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_scales" in name:
                parameter.data.mul_(1.25)
    model.save_pretrained(str(tmp_path / "qa"), save_embedding_layers=False)
    out = tmp_path / "out"
    arguments = ["merge", tmp_path / "partner", out, "--adapter", tmp_path / "qa", "--mode", "quant_aware"]
    assert "needs the grid" in run(*arguments)[1] and not out.exists()
    code, output = run(*arguments, "--grid", tmp_path / "grid")
    assert code == 0, output
    assert torch.equal(logits(load(out)), logits(model))
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "nncf_ext"

    report = tmp_path / "report.json"
    code, output = run(
        "search", tmp_path / "partner", report, "--adapter", tmp_path / "qa", "--dataset", text, "--window", "32",
        "--samples", "2", "--ranks", "6,2", "--budget", "2", "--mode", "quant_aware", "--grid", tmp_path / "grid",
    )  # fmt: skip
    assert code == 0, output
    code, output = run(
        "extract", tmp_path / "partner", tmp_path / "cut", "--adapter", tmp_path / "qa", "--report", report,
        "--mode", "quant_aware", "--grid", tmp_path / "grid",
    )  # fmt: skip
    assert code == 0, output
    code, output = run(
        "merge", tmp_path / "partner", tmp_path / "smaller", "--adapter", tmp_path / "cut", "--mode", "quant_aware",
        "--grid", tmp_path / "grid",
    )  # fmt: skip
    assert code == 0, output
    net = nncf_ext.make_elastic(model, groups=[RankGroup([".*"], [6, 2])])
    net.activate(json.loads(report.read_text())["chosen"]["point"])
    assert torch.equal(logits(load(tmp_path / "smaller")), logits(model))


def test_packed_base_cannot_be_merged_plainly(folder, adapter, text, tmp_path):
    code, output = run(
        "compress", folder, tmp_path / "packed", "--mode", "sparse_magnitude", "--quantization", "int4_sym",
        "--dataset", text, "--window", "32", "--samples", "2",
    )  # fmt: skip
    assert code == 0, output
    code, output = run("merge", tmp_path / "packed", tmp_path / "out", "--adapter", adapter, "--mode", "plain")
    assert code == 2 and "a delta cannot be added to codes" in output
    assert not (tmp_path / "out").exists()


SEARCH = ["search", "FOLDER", "OUT", "--adapter", "ADAPTER", "--dataset", "TEXT", "--window", "32"]
EXTRACT = ["extract", "FOLDER", "OUT"]
MERGE = ["merge", "FOLDER", "OUT", "--adapter", "ADAPTER"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (SEARCH, "Say which ranks there are"),
        ([*SEARCH, "--ranks", "6,4", "--worker", "storage.log"], "or with --worker nothing to write"),
        ([*SEARCH[:2], *SEARCH[3:], "--ranks", "6,4"], "Name a report OUT to write"),
        ([*SEARCH, "--ranks", "6,4", "--group", ".*=6,4"], "either --ranks"),
        ([*SEARCH, "--ranks", "six"], "whole numbers with commas"),
        ([*SEARCH, "--group", "6,4"], "after PATTERN= of a group; got 6,4"),
        ([*SEARCH, "--ranks", "8,4"], "has rank 6; the ranks of its group are [8, 4]"),
        ([*SEARCH, "--group", ".*k_proj=6,4"], "matches no layer with an adapter"),
        ([*SEARCH, "--ranks", "6,4", "--per", "layer"], "must be 'block' or 'model'"),
        ([*SEARCH, "--ranks", "6,4", "--plot", "x.png"], "Add --parameters"),
        ([*SEARCH, "--ranks", "6,4", "--parameters"], "Hill climbing needs one objective"),
        ([*SEARCH, "--ranks", "6,4", "--constraint", "accuracy >= 1"], "constraint on 'accuracy'"),
        ([*SEARCH, "--ranks", "6,4", "--constraint", "perplexity"], "A constraint is NAME <= NUMBER"),
        ([*SEARCH, "--ranks", "6,4", "--budget", "0"], "at least 1; got 0"),
        ([*SEARCH, "--ranks", "6,4", "--samples", "0"], "--samples is a number of windows"),
        ([*SEARCH, "--ranks", "6,4", "--dataset", "absent.txt"], "no validation text absent.txt"),
        ([*SEARCH, "--ranks", "6,4", "--dataset", "BAD.jsonl"], "has no text or messages or conversations, but: words"),
        ([*SEARCH, "--ranks", "6,4", "--dataset", "DEEP.jsonl"], "no JSON Lines file"),
        ([*SEARCH, "--ranks", "6,4", "--adapter", "FOLDER"], "is no folder of an adapter"),
        ([*SEARCH, "--ranks", "6,4", "--grid", "FOLDER"], "--grid belongs to --mode quant_aware"),
        (EXTRACT, "either --plan structure_plan.json, or --adapter"),
        ([*EXTRACT, "--adapter", "ADAPTER"], "with --report FILE"),
        ([*EXTRACT, "--plan", "TEXT"], "is no structure plan"),
        ([*EXTRACT, "--plan", "absent.json"], "No such file"),
        ([*EXTRACT, "--adapter", "ADAPTER", "--report", "TEXT"], "is no report of nncf-ext search"),
        ([*EXTRACT, "--adapter", "ADAPTER", "--report", "DEEP"], "is no report of nncf-ext search"),
        ([*EXTRACT, "--adapter", "ADAPTER", "--report", "POINTS"], "is no report of nncf-ext search"),
        ([*EXTRACT, "--adapter", "ADAPTER", "--report", "REPORT"], "no point keeps the constraints"),
        ([*EXTRACT, "--adapter", "ADAPTER", "--report", "REPORT", "--point", "7"], "a number from 0 to 0; got '7'"),
        ([*MERGE, "--adapter", "absent"], "is no folder of an adapter"),
        ([*MERGE, "--mode", "quant_aware", "--start", "random"], "start must be one of"),
        ([*MERGE, "--grid", "FOLDER"], "--grid belongs to --mode quant_aware"),
    ],
)
def test_arguments_are_refused(folder, adapter, tmp_path, arguments, text):
    files = {"FOLDER": folder, "OUT": tmp_path / "out", "ADAPTER": adapter, "TEXT": tmp_path / "text.txt"}
    files |= {"BAD.jsonl": tmp_path / "bad.jsonl", "REPORT": tmp_path / "report.json"}
    files["BAD.jsonl"].write_text('{"words": "none"}\n')
    group = {"patterns": [".*"], "ranks": [6, 4], "per": "block", "name": None}
    evaluation = {"point": {"model.layers.0.q_proj": 4}, "values": {"perplexity": 1.0}}
    files["REPORT"].write_text(json.dumps({"groups": [group], "chosen": None, "evaluations": [evaluation]}))
    files |= {"DEEP": tmp_path / "deep.json", "POINTS": tmp_path / "points.json", "DEEP.jsonl": tmp_path / "deep.jsonl"}
    for deep in ("DEEP", "DEEP.jsonl"):
        files[deep].write_text("[" * 100_000)
    files["POINTS"].write_text(json.dumps({"groups": [group], "chosen": {"point": 5}, "evaluations": [evaluation]}))
    code, output = run(*[files.get(each, each) for each in arguments])
    assert code == 2 and "Error: " in output and text in output, output
    assert not files["OUT"].exists()


@pytest.mark.parametrize("command", ["search", "extract", "merge"])
def test_what_is_there_stays(folder, adapter, text, tmp_path, command):
    out = tmp_path / "out"
    out.write_text("mine")
    arguments = {
        "search": ["--adapter", adapter, "--ranks", "6,4", "--dataset", text],
        "extract": ["--plan", "plan.json"],
        "merge": ["--adapter", adapter],
    }[command]
    remedy = "exists. Name a new file, or pass --overwrite." if command == "search" else "exists and holds no model"
    code, output = run(command, folder, out, *arguments)
    assert code == 2 and output.startswith(f"Error: {out} {remedy}"), output
    assert out.read_text() == "mine"


def test_pickled_adapter_is_refused(folder, adapter, tmp_path):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    code, output = run("merge", folder, tmp_path / "out", "--adapter", adapter)
    assert code == 2 and "adapter_model.safetensors" in output
