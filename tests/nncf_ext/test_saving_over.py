"""Saving into a folder that is there: old model or new model, no weights of another one, the user's files untouched."""

import errno
import os
import shutil
import stat

import nncf
import pytest
import torch
from transformers import AutoModelForCausalLM

import nncf_ext
from nncf_ext.algorithms.sparse_weights.parameters import AdvancedSparseWeightsParameters
from nncf_ext.structure.plan import StructurePlan
from tests.killing import contents, kill_points, largest_file

MINE = {"README.md": b"mine", "logs": {"1": {"loss.txt": b"1.5"}}, "tokenizer.json": b"{}", "notes.bin": b"mine"}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """A kill loses nothing that was written."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def make(tiny_llama, token_dataset):
    """Makers of a model on the grid, one with layers of different sizes, and one that is neither."""

    def int4():
        settings = AdvancedSparseWeightsParameters(quantization=nncf.CompressWeightsMode.INT4_SYM, group_size=64)
        mode = nncf_ext.CompressMode.SPARSE_MAGNITUDE
        return nncf_ext.compress(tiny_llama(), mode, ratio=0.5, dataset=token_dataset, advanced_parameters=settings)

    def cut():
        model = tiny_llama()
        return nncf_ext.extract(model, StructurePlan.dense(model).keep("layers.0.mlp", (1, 5, 8)))

    return {"int4": int4, "cut": cut, "plain": lambda: tiny_llama(intermediate_size=192)}


def put_mine(folder):
    for name, content in MINE.items():
        if isinstance(content, dict):
            (folder / name / "1").mkdir(parents=True)
            (folder / name / "1" / "loss.txt").write_bytes(b"1.5")
        else:
            (folder / name).write_bytes(content)


OLD_FILES = {
    "one file": lambda model, folder: model.save_pretrained(folder),
    "shards": lambda model, folder: model.save_pretrained(folder, max_shard_size="100KB"),
    "variant": lambda model, folder: model.save_pretrained(folder, variant="fp16"),
    "pickled": lambda model, folder: (
        model.config.save_pretrained(folder),
        torch.save(model.state_dict(), folder / "pytorch_model.bin"),
    ),
    "pickled shards": lambda model, folder: (
        model.config.save_pretrained(folder),
        torch.save(model.state_dict(), folder / "pytorch_model-00001-of-00001.bin"),
        (folder / "pytorch_model.bin.index.json").write_text("{}"),
    ),
    "other frameworks": lambda model, folder: (
        model.config.save_pretrained(folder),
        (folder / "tf_model.h5").write_bytes(b""),
        (folder / "flax_model.msgpack").write_bytes(b""),
    ),
    "notes on how it was made": lambda model, folder: (
        model.save_pretrained(folder),
        (folder / "structure_plan.json").write_text("{}"),
        (folder / "compression_report.json").write_text("{}"),
        (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 64}'),
        (folder / "quant_config.json").write_text('{"w_bit": 4, "q_group_size": 64}'),
    ),
}
NEW_FILES = {
    "int4": {"model.safetensors"},
    "cut": {"nncf_model.safetensors", "modeling_nncf_structured.py", "skipping.py", "gated_convolution.py"},
    "plain": {"model.safetensors"},
}


@pytest.mark.parametrize("new", NEW_FILES)
def test_no_file_of_the_old_model_stays(make, tiny_llama, logits_of, tmp_path, new) -> None:
    model, dense = make[new](), tiny_llama()
    others = {kind: lambda dense, folder, kind=kind: nncf_ext.save_pretrained(make[kind](), folder) for kind in make}
    for old, save in (OLD_FILES | others).items():
        folder = tmp_path / old
        folder.mkdir()
        save(dense, folder)
        put_mine(folder)
        nncf_ext.save_pretrained(model, folder)
        names = {path.name for path in folder.iterdir()}
        always = {"config.json", "generation_config.json", "compression_report.json"}
        assert names == always | NEW_FILES[new] | MINE.keys(), old
        assert {name: contents(folder / name) for name in MINE} == MINE
    assert torch.equal(logits_of(nncf_ext.load_pretrained(folder)), logits_of(model))
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder)), logits_of(model))


def test_models_are_saved_where_permissions_cannot_be_set(make, tmp_path, monkeypatch) -> None:
    def refused(*arguments, **options):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refused)
    for model in ("plain", "int4"):
        nncf_ext.save_pretrained(make[model](), tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_an_adapter_is_not_put_beside_a_model(tiny_llama, tmp_path) -> None:
    """transformers would put it on the model; it may be all that is left of a training, so it is not removed."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    nncf_ext.save_pretrained(adapted, tmp_path / "adapter")
    before = contents(tmp_path)
    with pytest.raises(nncf.ValidationError, match="holds an adapter.*Name another folder"):
        nncf_ext.save_pretrained(tiny_llama(), tmp_path / "adapter")
    assert contents(tmp_path) == before
    nncf_ext.save_pretrained(tiny_llama(), tmp_path / "model")
    weights = contents(tmp_path / "model")["model.safetensors"]
    nncf_ext.save_pretrained(adapted, tmp_path / "model")  # PEFT's way: the adapter joins what is there
    assert contents(tmp_path / "model")["model.safetensors"] == weights
    assert (tmp_path / "model" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_a_killed_command_leaves_the_old_folder_or_the_new_one(make, folder, tmp_path) -> None:
    """The end of ``nncf-ext compress --overwrite`` and its like."""
    from transformers import AutoTokenizer

    from nncf_ext.cli.folders import save_model

    tokenizer, model, out = AutoTokenizer.from_pretrained(folder), make["int4"](), tmp_path / "out"
    nncf_ext.save_pretrained(make["plain"](), tmp_path / "old")
    put_mine(tmp_path / "old")
    save_model(model, tokenizer, tmp_path / "new", False)
    known = [contents(tmp_path / "old"), contents(tmp_path / "new")]

    def prepare() -> None:
        for path in tmp_path.glob(".out.draft-*"):
            shutil.rmtree(path)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "old", out)

    ends = {known.index(contents(out)) for _ in kill_points(lambda: save_model(model, tokenizer, out, True), prepare)}
    assert ends == {0, 1} and contents(out) == known[1]


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), [("plain", "int4"), ("int4", "cut"), ("cut", "plain")])
def test_a_killed_save_leaves_the_old_model_or_the_new_one(make, logits_of, tmp_path, old, new) -> None:
    folder, models = tmp_path / "out", {"old": make[old](), "new": make[new]()}
    nncf_ext.save_pretrained(models["old"], tmp_path / "old")
    put_mine(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    nncf_ext.save_pretrained(models["new"], tmp_path / "new")
    known = {name: contents(tmp_path / name) for name in models}
    for name, model in models.items():
        assert torch.equal(logits_of(nncf_ext.load_pretrained(tmp_path / name)), logits_of(model))

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)

    ends = []
    for point in kill_points(lambda: nncf_ext.save_pretrained(models["new"], folder), prepare):
        found = contents(folder)
        ends += [name for name in known if found == known[name]]
        assert len(ends) == point + 1, f"killed at {point}: {found.keys()}"
        if point % 8 == 0:  # the next save finds it, and leaves nothing behind
            nncf_ext.save_pretrained(models["new"], folder)
            assert contents(folder) == known["new"]
            assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old", "out"]
        else:
            for path in tmp_path.glob(".out.draft-*"):
                shutil.rmtree(path)
    assert {*ends} == {"old", "new"}


@pytest.mark.parametrize("kind", NEW_FILES)
def test_weights_are_as_readable_as_other_files(make, tmp_path, kind) -> None:
    old = os.umask(0o027)
    try:
        nncf_ext.save_pretrained(make[kind](), tmp_path / "out")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o640}


@pytest.mark.parametrize("kind", NEW_FILES)
def test_a_full_disk_is_said_and_leaves_the_old_model(make, tmp_path, kind) -> None:
    folder, model = tmp_path / "out", make[kind]()
    nncf_ext.save_pretrained(make["plain"](), folder)
    before = contents(folder)
    with pytest.raises(OSError, match="Free some space") as caught, largest_file(100_000):
        nncf_ext.save_pretrained(model, folder)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(folder)
    assert contents(folder) == before and [path.name for path in tmp_path.iterdir()] == ["out"]
