"""Interrupted and resumed: the model stays consistent, and the end is the same as without the interruption."""

import json

import nncf
import pytest
import torch
from torch import nn

import nncf_ext
from nncf_ext import AdvancedSparseWeightsParameters, CompressMode

INT4 = nncf.CompressWeightsMode.INT4_SYM


class Interrupting:
    """Raises KeyboardInterrupt on the `at`-th forward of one layer, as a user's Ctrl-C would."""

    def __init__(self, layer, at):
        self._left = at
        self._handle = layer.register_forward_pre_hook(self)

    def __call__(self, module, args):
        self._left -= 1
        if self._left < 0:
            self._handle.remove()
            raise KeyboardInterrupt


def settings(quantization, dataset, **more):
    return {
        "ratio": 0.5,
        "dataset": dataset,
        "advanced_parameters": AdvancedSparseWeightsParameters(quantization=quantization, **more),
    }


def same_state(left, right):
    one, other = left.state_dict(), right.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def interrupted(model, mode, at, **options):
    """
    Runs until block 2 of 4 has been run `at` times: six times for planning, six for statistics, six for advancing.

    :return: The message of the interrupt.
    """
    Interrupting(model.model.layers[2].mlp.down_proj, at)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        nncf_ext.compress(model, mode, **options)
    return str(interrupt.value)


@pytest.mark.parametrize(
    ("mode", "quantization"),
    [
        (CompressMode.SPARSE_MAGNITUDE, INT4),  # without quantization it runs no forward that could be interrupted
        (CompressMode.SPARSE_WANDA, None),
        (CompressMode.SPARSE_WANDA, INT4),
        (CompressMode.SPARSE_GPT, None),
        (CompressMode.SPARSE_GPT, INT4),
    ],
)
@pytest.mark.parametrize(
    ("at", "done"), [(3, 0), (9, 14), (15, 14)], ids=["while planning", "during statistics", "while advancing"]
)
def test_resumed_equals_uninterrupted(tiny_llama, token_dataset, tmp_path, mode, quantization, at, done):
    options = settings(quantization, token_dataset)
    whole = nncf_ext.compress(tiny_llama(4), mode, **options)
    model = tiny_llama(4)
    message = interrupted(model, mode, at, resume=tmp_path / "journal", **options)
    assert f"{done} of 28 layers" in message and "journal" in message
    # In the same process, on the half-compressed model ...
    nncf_ext.compress(model, mode, resume=tmp_path / "journal", **options)
    assert same_state(model, whole)
    # ... and in a new one, on the original.
    again = nncf_ext.compress(tiny_llama(4), mode, resume=tmp_path / "journal", **options)
    assert same_state(again, whole)
    assert str(nncf_ext.compression_report(again)) == str(nncf_ext.compression_report(whole))


def test_magnitude_resumes_layer_by_layer(tiny_llama, tmp_path):
    whole = nncf_ext.compress(tiny_llama(), CompressMode.SPARSE_MAGNITUDE, ratio=0.5)
    nncf_ext.compress(tiny_llama(), CompressMode.SPARSE_MAGNITUDE, ratio=0.5, resume=tmp_path)
    units = sorted(tmp_path.glob("unit-*.safetensors"))
    assert len(units) == 14
    for unit in units[::2]:
        unit.unlink()
    again = nncf_ext.compress(tiny_llama(), CompressMode.SPARSE_MAGNITUDE, ratio=0.5, resume=tmp_path)
    assert same_state(again, whole)


@pytest.mark.parametrize("quantization", [None, INT4])
def test_interrupted_model_is_consistent(tiny_llama, token_dataset, logits_of, quantization):
    """Finished blocks are compressed, the interrupted one and those after it are the original, and it still runs."""
    original, model = tiny_llama(4), tiny_llama(4)
    model.train()
    message = interrupted(model, CompressMode.SPARSE_GPT, 15, **settings(quantization, token_dataset))
    assert "14 of 28 layers" in message and "resume=FOLDER (--resume FOLDER on the command line)" in message
    rows = {row.name: row for row in nncf_ext.compression_report(model).weights}
    for name, value in original.state_dict().items():
        if "proj" not in name:
            continue
        if int(name.split(".")[2]) < 2:
            assert rows[name].sparsity >= 0.5 and rows[name].mode == "sparse_gpt"
        else:
            assert torch.equal(model.state_dict()[name], value)
            assert rows[name].mode is None
    assert model.training
    assert bool(logits_of(model).isfinite().all())


def test_interrupt_while_packing_takes_the_block_back(tiny_llama, token_dataset, monkeypatch):
    """The third layer of the first block cannot be packed: the two before it must not stay packed."""
    import nncf_ext.algorithms.sparse_weights.algorithm as algorithm

    calls, pack = [], algorithm.pack

    def failing(model, name, codes, scales):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pack(model, name, codes, scales)

    monkeypatch.setattr(algorithm, "pack", failing)
    model = tiny_llama()
    with pytest.raises(KeyboardInterrupt, match="0 of 14 layers"):
        nncf_ext.compress(model, CompressMode.SPARSE_GPT, **settings(INT4, token_dataset))
    state = tiny_llama().state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {row.mode for row in nncf_ext.compression_report(model).weights} == {None}


def test_prerounding_survives_the_journal(tiny_llama, token_dataset, tmp_path):
    from nncf_ext.weights.records import record_of

    options = settings(INT4, token_dataset, keep_prerounding=True)
    first = nncf_ext.compress(tiny_llama(), CompressMode.SPARSE_GPT, resume=tmp_path, **options)
    again = nncf_ext.compress(tiny_llama(), CompressMode.SPARSE_GPT, resume=tmp_path, **options)
    for one, other in zip(first.modules(), again.modules(), strict=True):
        if isinstance(one, nn.Linear) and record_of(one).mode is not None:
            assert torch.equal(record_of(one).prerounding, record_of(other).prerounding)


def test_compressed_model_with_another_journal_is_refused(tiny_llama, token_dataset, tmp_path):
    options = settings(INT4, token_dataset)
    model = nncf_ext.compress(tiny_llama(), CompressMode.SPARSE_GPT, **options)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(nncf.ValidationError, match="already compressed"):
        nncf_ext.compress(model, CompressMode.SPARSE_GPT, resume=tmp_path / "new", **options)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_copy_can_be_resumed(tiny_llama, token_dataset, tmp_path):
    options = settings(INT4, token_dataset)
    whole = nncf_ext.compress(tiny_llama(4), CompressMode.SPARSE_GPT, **options)
    interrupted(tiny_llama(4), CompressMode.SPARSE_GPT, 9, resume=tmp_path, **options)
    model = tiny_llama(4)
    again = nncf_ext.compress(model, CompressMode.SPARSE_GPT, do_copy=True, resume=tmp_path, **options)
    assert same_state(again, whole) and same_state(model, tiny_llama(4))


@pytest.mark.parametrize("change", ["ratio", "mode", "parameters", "data", "other weights", "layers"])
def test_journal_of_another_run_is_refused(tiny_llama, token_items, tmp_path, change):
    model, mode, items = tiny_llama(), CompressMode.SPARSE_WANDA, token_items
    options = {"ratio": 0.5, "resume": tmp_path}
    nncf_ext.compress(tiny_llama(), mode, dataset=nncf.Dataset(items), **options)
    if change == "ratio":
        options["ratio"] = 0.6
    if change == "mode":
        mode = CompressMode.SPARSE_GPT
    if change == "parameters":
        options["advanced_parameters"] = AdvancedSparseWeightsParameters(damping=0.02)
    if change == "data":
        items = [{"input_ids": item["input_ids"].flip(1)} for item in items]
    if change == "other weights":
        model.model.embed_tokens.weight.data[3, 3] += 1
    if change == "layers":
        options["ignored_scope"] = nncf.IgnoredScope(names=["model.layers.0.mlp.up_proj"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(nncf.ValidationError, match=f"begun by another compression.*{change}"):
        nncf_ext.compress(model, mode, dataset=nncf.Dataset(items), **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_journal_of_a_model_with_other_block_weights_is_refused(tiny_llama, token_dataset, tmp_path):
    options = {"ratio": 0.5, "dataset": token_dataset, "resume": tmp_path}
    nncf_ext.compress(tiny_llama(), CompressMode.SPARSE_WANDA, **options)
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(nncf.ValidationError, match="model.layers.1.mlp.up_proj"):
        nncf_ext.compress(model, CompressMode.SPARSE_WANDA, **options)


def test_damaged_or_foreign_folder_is_refused(tiny_llama, token_dataset, tmp_path):
    options = {"ratio": 0.5, "dataset": token_dataset}
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    with pytest.raises(nncf.ValidationError, match="neither a journal"):
        nncf_ext.compress(tiny_llama(), CompressMode.SPARSE_WANDA, resume=tmp_path / "foreign", **options)
    journal = tmp_path / "journal"
    nncf_ext.compress(tiny_llama(), CompressMode.SPARSE_WANDA, resume=journal, **options)
    assert not [path for path in journal.iterdir() if path.name.startswith(".")]
    next(journal.glob("unit-*")).write_bytes(b"torn")
    with pytest.raises(nncf.ValidationError, match="damaged"):
        nncf_ext.compress(tiny_llama(), CompressMode.SPARSE_WANDA, resume=journal, **options)
    header = json.loads((journal / "journal.json").read_text())
    (journal / "journal.json").write_text(json.dumps({**header, "version": 99}))
    with pytest.raises(nncf.ValidationError, match="version"):
        nncf_ext.compress(tiny_llama(), CompressMode.SPARSE_WANDA, resume=journal, **options)
