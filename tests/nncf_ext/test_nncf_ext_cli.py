"""The command line: a folder in, a folder out that loads again, and clear refusals."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import nncf_ext
from nncf_ext.cli import app
from tests.killing import contents, largest_file


def run(*arguments):
    result = CliRunner().invoke(app, ["compress", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def test_sparse_model_is_an_ordinary_folder(folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "deep" / "out"
    code, output = run(
        folder, out, "--mode", "sparse_wanda", "--ratio", "0.5", "--dataset", tmp_path / "text.txt", "--window", "32",
        "--samples", "5", "--ignore", r".*\.k_proj",
    )  # fmt: skip
    assert code == 0, output
    assert "12 of 16 treated" in output
    model = AutoModelForCausalLM.from_pretrained(out)
    assert float((model.model.layers[1].mlp.up_proj.weight == 0).float().mean()) == 0.5
    assert float((model.model.layers[1].self_attn.k_proj.weight == 0).float().mean()) == 0
    assert AutoTokenizer.from_pretrained(out)("dog")["input_ids"]
    assert json.loads((out / "compression_report.json").read_text())["sparsity"] == 0.5
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


def test_smaller_model_reloads(folder, tmp_path):
    out = tmp_path / "out"
    arguments = [
        folder, out, "--mode", "multipruner", "--ratio", "0.2", "--dataset", tmp_path / "text.txt", "--window", "32",
        "--samples", "4",
    ]  # fmt: skip
    assert run(*arguments, "--pattern", "2:4")[0] == 2
    code, output = run(*arguments)
    assert code == 0, output
    plan = nncf_ext.StructurePlan.load(out / "structure_plan.json")
    model = nncf_ext.load_pretrained(out)
    assert sum(each.numel() for each in model.parameters()) == plan.costs_after.parameters
    assert plan.costs_after.parameters <= 0.8 * plan.costs_before.parameters and plan.steps


def test_quantized_model_reloads(folder, tmp_path):
    out = tmp_path / "out"
    arguments = [
        folder, out, "--mode", "sparse_gpt", "--ratio", "0.5", "--quantization", "int4_sym", "--group-size", "64",
        "--dataset", tmp_path / "text.txt", "--window", "32", "--samples", "5", "--resume", tmp_path / "journal",
    ]  # fmt: skip
    code, output = run(*arguments)
    assert code == 0, output
    model = nncf_ext.load_pretrained(out)
    report = nncf_ext.compression_report(model)
    assert {row.precision for row in report.weights if "proj" in row.name} == {"int4"}
    assert all(row.sparsity >= 0.5 for row in report.weights if "proj" in row.name)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(10).unsqueeze(0)).logits
    assert bool(logits.isfinite().all())

    assert run(*arguments) == (2, f"Error: {out} exists. Name a new folder, or pass --overwrite.")
    before = (out / "model.safetensors").read_bytes()
    code, output = run(*arguments, "--overwrite")
    assert code == 0, output
    assert (out / "model.safetensors").read_bytes() == before


def test_only_a_model_is_overwritten(folder, tmp_path):
    out, arguments = tmp_path / "out", ["--mode", "sparse_magnitude"]
    out.mkdir()
    assert run(folder, out, *arguments)[0] == 0  # an empty folder is as good as none
    (out / "notes.txt").write_text("of the old model")
    assert run(folder, out, *arguments, "--overwrite")[0] == 0
    assert not (out / "notes.txt").exists() and (out / "config.json").is_file()
    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for place in (letters, tmp_path / "file"):
        refusal = f"Error: {place} exists and holds no model, so it is not overwritten. Remove it first, or name a new"
        code, output = run(folder, place, *arguments, "--overwrite")
        assert code == 2 and output.startswith(refusal), output
    assert contents(letters) == {"letter.txt": b"dear"} and contents(tmp_path / "file") == b"dear"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_full_disk_is_said_and_leaves_the_old_folder(folder, tmp_path):
    out, arguments = tmp_path / "out", ["--mode", "sparse_magnitude"]
    assert run(folder, out, *arguments)[0] == 0
    before = contents(out)
    for size in (3000, 100_000):  # the tokenizer's library says it in its own way
        with largest_file(size):
            code, output = run(folder, out, *arguments, "--overwrite", "--ratio", "0.25")
        assert code == 2 and "File too large. Nothing was written. Free some space" in output, output
        assert "Traceback" not in output and contents(out) == before


def change_index(folder, shard):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickle_only(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def other_tokenizer(folder):
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["vocab"] |= {f"word{index}": 300 + index for index in range(200)}
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (pickle_only, "only pickled files (pytorch_model.bin), which can run code"),
        (no_weights, "holds no weights"),
        (
            lambda folder: change_index(folder, "../secret.safetensors"),
            "Shards must be .safetensors files of the folder",
        ),
        (lambda folder: change_index(folder, "/etc/secret.safetensors"), "Shards must be"),
        (lambda folder: change_index(folder, "pytorch_model.bin"), "Shards must be"),
        (lambda folder: change_index(folder, "model-00002.safetensors"), "which is missing"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "A JSON object is needed"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (other_tokenizer, "has 500 tokens and the embedding has 320 rows"),
    ],
    ids=[
        "pickle",
        "no weights",
        "parent",
        "absolute",
        "pickled shard",
        "missing shard",
        "no index",
        "no config",
        "tokenizer",
    ],
)
def test_folder_is_refused(folder, tmp_path, prepare, text):
    prepare(folder)
    code, output = run(folder, tmp_path / "out", "--mode", "sparse_magnitude")
    assert code == 2 and text in output, output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--mode", "sparse_wanda"], "needs a dataset"),
        (["--dataset", "absent.txt"], "no calibration text absent.txt"),
        (["--dataset", "TEXT", "--window", "5000"], "from 1 to the model's 64; got 5000"),
        (["--dataset", "SHORT"], "gives 3 tokens, less than one window of 64"),
        (["--dataset", "LATIN"], "not UTF-8"),
        (["--ratio", "1.5", "--mode", "sparse_magnitude"], "[0, 1); got 1.5"),
        (["--pattern", "2:3", "--mode", "sparse_magnitude"], "keeps 2 of 3"),
        (["--quantization", "int5", "--dataset", "TEXT"], "Unknown quantization 'int5'"),
        (["--dtype", "int8"], "Unknown dtype"),
    ],
)
def test_arguments_are_refused(folder, tmp_path, arguments, text):
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xe8" * 200)
    files = {"TEXT": tmp_path / "text.txt", "SHORT": tmp_path / "short.txt", "LATIN": tmp_path / "latin.txt"}
    code, output = run(folder, tmp_path / "out", *[files.get(each, each) for each in arguments])
    assert code == 2 and text in output, output
    assert not (tmp_path / "out").exists()


def test_a_token_without_a_row_is_refused_where_it_occurs(folder, tmp_path):
    """The tokenizer has five tokens more than the embedding has rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<fill{index}>" for index in range(320 - len(tokenizer))])  # these have rows
    tokenizer.add_tokens([f"<unused{index}>" for index in range(5)])
    tokenizer.save_pretrained(folder)
    arguments = ["--mode", "sparse_wanda", "--window", "32", "--samples", "4", "--dataset"]
    code, output = run(folder, tmp_path / "out", *arguments, tmp_path / "text.txt")
    assert code == 0, output
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 325
    (tmp_path / "known.txt").write_text("A fox. <fill7> " * 40)
    code, output = run(folder, tmp_path / "known", *arguments, tmp_path / "known.txt")
    assert code == 0, output
    (tmp_path / "other.txt").write_text("A fox. <unused3> " * 40)
    code, output = run(folder, tmp_path / "other", *arguments, tmp_path / "other.txt")
    assert code == 2, output
    assert "other.txt holds the token '<unused3>', number 323, and the model's embedding has 320 rows" in output


def change_config(folder, **entries):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize("method", ["gptq", "auto-round", "awq", "bitsandbytes", "torchao"])
def test_quantized_folder_is_refused_before_it_is_loaded(folder, tmp_path, method):
    change_config(folder, quantization_config={"quant_method": method, "bits": 4})
    (folder / "model.safetensors").write_bytes(b"never read")
    code, output = run(folder, tmp_path / "out", "--mode", "sparse_magnitude")
    assert code == 2 and f"quantized already (quantization_config in config.json: {method})" in output, output
    assert "floating model it was made of" in output
    assert ("nncf_ext.load_gptq" in output) is (method in ("gptq", "auto-round"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{ damaged", "[1]", '{"model": 1}', '{"tokenizer_class": 1}'])
def test_what_ails_a_tokenizer_is_said_in_a_line(folder, tmp_path, name, text):
    """Errors of any type may come out of libraries; and code of the folder is advised only where there is some."""
    (folder / name).write_text(text)
    code, output = run(folder, tmp_path / "out", "--mode", "sparse_magnitude")
    assert code == 2 and "Error:" in output and "Traceback" not in output, output
    assert "trust" not in output.replace("trust_remote_code=True", "")


def test_code_in_the_folder_runs_only_on_request(folder, tmp_path, monkeypatch):
    """A config that points to code in the folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own_model", "auto_map": classes}))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_model'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    code, output = run(folder, tmp_path / "out", "--mode", "sparse_magnitude")
    assert code == 2 and not (tmp_path / "ran").exists(), output
    assert "--trust-remote-code" in output
    code, output = run(folder, tmp_path / "out", "--mode", "sparse_magnitude", "--trust-remote-code")
    assert code == 0 and (tmp_path / "ran").exists(), output


def test_package_and_help_need_no_torch():
    """A machine that only serves has neither torch nor nncf: importing and --help must work there."""
    program = (
        "import sys\n"
        "for name in ('torch', 'nncf', 'transformers', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "import nncf_ext\n"
        "assert nncf_ext.CompressMode.SPARSE_GPT == 'sparse_gpt' and 'compress' in dir(nncf_ext)\n"
        "from typer.testing import CliRunner\n"
        "from nncf_ext.cli import app\n"
        "result = CliRunner().invoke(app, ['compress', '--help'])\n"
        "assert result.exit_code == 0 and 'quantization' in result.output, result.output\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
