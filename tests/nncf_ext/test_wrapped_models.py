"""Models that are wrapped, compiled, sharded, offloaded or masked; callers who are in inference mode or autocast."""

import contextlib
import operator

import nncf
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import nncf_ext
from nncf_ext import AdvancedSparseWeightsParameters, CompressMode
from nncf_ext.structure.reference import plan_from_reference, plan_to_reference

INT4 = AdvancedSparseWeightsParameters(quantization=nncf.CompressWeightsMode.INT4_SYM)
SETTINGS = {
    "wanda": {"mode": CompressMode.SPARSE_WANDA, "ratio": 0.5},
    "sparse INT4": {"mode": CompressMode.SPARSE_GPT, "ratio": 0.5, "advanced_parameters": INT4},
    "multipruner": {"mode": CompressMode.MULTIPRUNER, "ratio": 0.1},
}
settings = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())


def same_state(left, right):
    one, other = left.state_dict(), right.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def one_process():
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


def distributed(model):
    return nn.parallel.DistributedDataParallel(model)


SHELLS = {
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "distributed": distributed,
    "both": lambda model: compiled(distributed(model)),
}


@pytest.mark.parametrize("wrap", SHELLS.values(), ids=SHELLS.keys())
@settings
def test_shells_are_taken_off(tiny_llama, token_dataset, one_process, wrap, options):
    model = tiny_llama()
    result = nncf_ext.compress(wrap(model), dataset=token_dataset, **options)
    assert result is model
    assert same_state(result, nncf_ext.compress(tiny_llama(), dataset=token_dataset, **options))


@pytest.mark.parametrize("wrap", SHELLS.values(), ids=SHELLS.keys())
def test_wrapped_models_are_cut_and_saved_as_the_model_inside(tiny_llama, token_dataset, tmp_path, one_process, wrap):
    plan = nncf_ext.structure_plan(
        nncf_ext.compress(tiny_llama(), CompressMode.MULTIPRUNER, ratio=0.1, dataset=token_dataset)
    )
    assert same_state(nncf_ext.extract(wrap(tiny_llama()), plan), nncf_ext.extract(tiny_llama(), plan))
    nncf_ext.save_pretrained(wrap(tiny_llama()), tmp_path)
    assert same_state(nncf_ext.load_pretrained(tmp_path), tiny_llama())


@pytest.mark.parametrize("wrap", SHELLS.values(), ids=SHELLS.keys())
def test_wrapped_models_are_read_as_the_model_inside(tiny_llama, one_process, wrap):
    model = tiny_llama()
    wrapped = wrap(model)
    plan = nncf_ext.StructurePlan.dense(model).keep("layers.1.mlp", range(8))
    assert nncf_ext.StructurePlan.dense(wrapped) == nncf_ext.StructurePlan.dense(model)
    assert nncf_ext.count_costs(wrapped) == nncf_ext.count_costs(model)
    assert nncf_ext.count_costs(wrapped, plan) == nncf_ext.count_costs(model, plan)
    assert nncf_ext.snap_to_uniform(wrapped, plan) == nncf_ext.snap_to_uniform(model, plan)
    assert plan_to_reference(plan, wrapped) == plan_to_reference(plan, model)
    counts = {"pruned_attn_idx": [0]}
    assert plan_from_reference(counts, wrapped) == plan_from_reference(counts, model)


@pytest.mark.parametrize("wrap", SHELLS.values(), ids=SHELLS.keys())
@settings
def test_results_that_were_wrapped_are_reported_as_the_model_inside(
    tiny_llama, token_dataset, one_process, wrap, options
):
    result = nncf_ext.compress(tiny_llama(), dataset=token_dataset, **options)
    result.lm_head.weight.requires_grad_()  # what is distributed must have something to train
    assert nncf_ext.compression_report(wrap(result)) == nncf_ext.compression_report(result)
    if options["mode"] is CompressMode.MULTIPRUNER:
        assert nncf_ext.structure_plan(wrap(result)) is nncf_ext.structure_plan(result)


def test_masks_are_not_put_behind_compiled_code(tiny_llama):
    """It was made without them, and would go on to compute the dense model."""
    model, ids = tiny_llama(), torch.arange(20)[None]
    plan = nncf_ext.StructurePlan.dense(model).keep("layers.1.mlp", range(8))
    fast = compiled(model)
    with torch.no_grad():
        dense = fast(ids, use_cache=False).logits
        with nncf_ext.masked(model, plan):
            assert torch.equal(fast(ids, use_cache=False).logits, dense)
            assert not torch.equal(model(ids, use_cache=False).logits, dense)
    with pytest.raises(nncf.UnsupportedModelError, match="wrapped.*'_orig_mod'"), nncf_ext.masked(fast, plan):
        pass


def adapted(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data[:, ::2] = 0
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))


@pytest.mark.parametrize("wrap", SHELLS.values(), ids=SHELLS.keys())
def test_adapters_of_wrapped_models_are_merged(tiny_llama, one_process, wrap):
    mergeable = nncf_ext.make_mergeable(wrap(adapted(tiny_llama())), nncf_ext.MergeMode.SPARSE)
    plain = nncf_ext.make_mergeable(adapted(tiny_llama()), nncf_ext.MergeMode.SPARSE)
    merged = nncf_ext.merge(wrap(mergeable), nncf_ext.MergeMode.SPARSE)
    assert same_state(merged, nncf_ext.merge(plain, nncf_ext.MergeMode.SPARSE))


def compiled_block(model):
    model.model.layers[1] = compiled(model.model.layers[1])
    return model


def compiled_in_place(model):
    model.model.layers[1].compile(backend="eager")
    return model


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def offloaded(model):
    from accelerate import cpu_offload

    return cpu_offload(model)


def masked(model):
    prune.l1_unstructured(model.model.layers[1].mlp.up_proj, "weight", 0.3)
    return model


def with_own_tensors(model):
    """Stands for the tensors of torchao and others, which pretend to be parameters."""

    class Packed(torch.Tensor):
        pass

    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))
    layer.weight.__class__ = Packed
    return model


def loaded_quantized(model):
    model.hf_quantizer = object()
    return model


REFUSED = {
    "compiled block": (compiled_block, r"'model\.layers\.1' is wrapped \(OptimizedModule\)"),
    "compiled in place": (compiled_in_place, r"'model\.layers\.1' is compiled in place"),
    "sharded": (sharded, "sharded over processes.*full state dict"),
    "offloaded": (offloaded, "offloaded by accelerate.*no device_map"),
    "masked": (masked, r"up_proj' has a mask of torch\.nn\.utils\.prune.*prune\.remove"),
    "own tensors": (with_own_tensors, "weight of 'model.layers.1.mlp.up_proj' is a Packed"),
    "loaded quantized": (loaded_quantized, "was loaded quantized.*floating"),
}


@pytest.mark.parametrize(("prepare", "text"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("do_copy", [False, True])
@settings
def test_what_is_not_plain_inside_is_refused_by_name(
    tiny_llama, token_dataset, one_process, prepare, text, options, do_copy
):
    model = prepare(tiny_llama())
    with pytest.raises(nncf.UnsupportedModelError, match=text):
        nncf_ext.compress(model, dataset=token_dataset, do_copy=do_copy, **options)


@pytest.mark.parametrize("kind", ["compiled block", "sharded", "masked"])
def test_a_state_dict_that_is_not_plain_is_not_saved(tiny_llama, tmp_path, one_process, kind):
    prepare, text = REFUSED[kind]
    with pytest.raises(nncf.UnsupportedModelError, match=text):
        nncf_ext.save_pretrained(prepare(tiny_llama()), tmp_path)


@pytest.mark.parametrize("kind", REFUSED.keys())
def test_what_is_not_plain_inside_is_not_cut(tiny_llama, token_dataset, one_process, kind):
    plan = nncf_ext.structure_plan(
        nncf_ext.compress(tiny_llama(), CompressMode.MULTIPRUNER, ratio=0.1, dataset=token_dataset)
    )
    prepare, text = REFUSED[kind]
    with pytest.raises(nncf.UnsupportedModelError, match=text):
        nncf_ext.extract(prepare(tiny_llama()), plan)


@settings
def test_hooks_of_accelerate_on_one_device_do_no_harm(tiny_llama, token_dataset, options):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tiny_llama()
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    result = nncf_ext.compress(model, dataset=token_dataset, **options)
    expected = nncf_ext.compress(tiny_llama(), dataset=token_dataset, **options)
    ids = torch.arange(20)[None]
    assert same_state(result, expected)
    assert torch.equal(result(ids).logits, expected(ids).logits)


REPARAMETRIZATIONS = {
    "old weight_norm": (nn.utils.weight_norm, r"utils\.weight_norm: undo it by torch\.nn\.utils\.remove_weight"),
    "old spectral_norm": (nn.utils.spectral_norm, r"undo it by torch\.nn\.utils\.remove_spectral_norm"),
    "weight_norm": (parametrizations.weight_norm, r"WeightNorm.*undo it by .*remove_parametrizations"),
    "orthogonal": (parametrizations.orthogonal, r"Orthogonal.*undo it by .*remove_parametrizations"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(("wrap", "text"), REPARAMETRIZATIONS.values(), ids=REPARAMETRIZATIONS.keys())
@settings
def test_computed_weights_are_refused(tiny_llama, token_dataset, wrap, text, options):
    model = tiny_llama()
    wrap(model.model.layers[1].mlp.up_proj)
    with pytest.raises(nncf.UnsupportedModelError, match=rf"layers\.1\.mlp\.up_proj.*{text}"):
        nncf_ext.compress(model, dataset=token_dataset, **options)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(("wrap", "text"), REPARAMETRIZATIONS.values(), ids=REPARAMETRIZATIONS.keys())
def test_computed_weights_elsewhere_do_not_matter(tiny_llama, token_dataset, wrap, text):
    """In the ignored scope, or outside the blocks; the report says what they are."""
    model = tiny_llama()
    wrap(model.model.layers[1].mlp.up_proj)
    model.more = wrap(nn.Linear(8, 8))
    scope = nncf.IgnoredScope(names=["model.layers.1.mlp.up_proj"])
    nncf_ext.compress(model, "sparse_wanda", ratio=0.5, dataset=token_dataset, ignored_scope=scope)
    notes = {row.name: row.note for row in nncf_ext.compression_report(model).untouched}
    assert {note for name, note in notes.items() if "up_proj" in name} == {"ignored scope"}
    assert {note for name, note in notes.items() if name.startswith("more")} == {"outside the repeated blocks"}


def test_what_cannot_be_copied_is_said(tiny_llama, token_dataset):
    model = tiny_llama()
    model.scaled = model.lm_head.weight * 2  # torch copies no tensor that has a history
    with pytest.raises(nncf.ValidationError, match="LlamaForCausalLM cannot be copied.*Without do_copy"):
        nncf_ext.compress(model, "sparse_wanda", ratio=0.5, dataset=token_dataset, do_copy=True)


MODES = {
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "both": lambda: both(),
}


@contextlib.contextmanager
def both():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        yield


def ordinary(model):
    return not any(each.is_inference() for each in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("caller", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("made", ["before", "inside"])
@settings
def test_the_mode_of_the_caller_does_not_matter(tiny_llama, make_items, caller, made, options):
    expected = nncf_ext.compress(tiny_llama(), dataset=nncf.Dataset(make_items()), **options)
    model, items = tiny_llama(), make_items()
    with caller():
        if made == "inside":
            model, items = tiny_llama(), make_items()
        result = nncf_ext.compress(model, dataset=nncf.Dataset(items), **options)
        assert result is model
    assert same_state(result, expected)
    assert ordinary(result)


@settings
def test_models_and_items_of_inference_mode(tiny_llama, make_items, options):
    expected = nncf_ext.compress(tiny_llama(), dataset=nncf.Dataset(make_items()), **options)
    for do_copy in (True, False):
        with torch.inference_mode():
            model, items = tiny_llama(), make_items()
        result = nncf_ext.compress(model, dataset=nncf.Dataset(items), do_copy=do_copy, **options)
        assert same_state(result, expected)
        assert ordinary(result)
        assert [each.requires_grad for each in result.parameters()] == [
            each.requires_grad for each in expected.parameters()
        ]


REFUSED_CALLS = {
    "ratio": {"mode": CompressMode.SPARSE_WANDA, "ratio": 2.0},
    "method": {"mode": CompressMode.SPARSE_WANDA, "ratio": 0.5, "advanced_parameters": object()},
    "scope": {"mode": "sparse_wanda", "ratio": 0.5, "ignored_scope": nncf.IgnoredScope(names=["nowhere"])},
    "out of reach": {"mode": CompressMode.MULTIPRUNER, "ratio": 0.999},
}


@pytest.mark.parametrize("options", REFUSED_CALLS.values(), ids=REFUSED_CALLS.keys())
def test_a_refused_call_leaves_parameters_of_inference_mode_in_place(tiny_llama, token_dataset, options):
    with torch.inference_mode():
        model = tiny_llama()
    before = list(model.parameters())
    with pytest.raises((nncf.ValidationError, nncf.ParameterNotSupportedError)):
        nncf_ext.compress(model, dataset=token_dataset, **options)
    assert all(map(operator.is_, model.parameters(), before))


def test_tied_weights_of_inference_mode_stay_tied(tiny_llama, make_items):
    with torch.inference_mode():
        model = tiny_llama(tie_word_embeddings=True)
    nncf_ext.compress(model, "sparse_wanda", ratio=0.5, dataset=nncf.Dataset(make_items()))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("caller", MODES.values(), ids=MODES.keys())
def test_extracted_and_merged_models_do_not_keep_the_mode_of_the_caller(tiny_llama, make_items, caller):
    dataset = nncf.Dataset(make_items())
    plan = nncf_ext.structure_plan(nncf_ext.compress(tiny_llama(), "multipruner", ratio=0.1, dataset=dataset))
    expected = nncf_ext.extract(tiny_llama(), plan), nncf_ext.merge(adapted(tiny_llama()), "sparse")
    dense, peft = tiny_llama(), adapted(tiny_llama())
    with caller():
        found = nncf_ext.extract(dense, plan), nncf_ext.merge(peft, "sparse")
    assert all(map(same_state, found, expected))
    assert all(map(ordinary, found))


@pytest.fixture
def make_items():
    def make():
        torch.manual_seed(5)
        return [{"input_ids": torch.randint(0, 320, (2, 24))} for _ in range(3)]

    return make


@pytest.mark.parametrize("options", [SETTINGS["wanda"], SETTINGS["sparse INT4"]], ids=["wanda", "sparse INT4"])
def test_transformer_encoder_with_a_padding_mask(options):
    """Its fast path makes nested tensors of padded text, and runs none of the modules that calibration watches."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(6)
            layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x, padding):
            return self.encoder(x, src_key_padding_mask=padding)

    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 5:] = True
    item = {"x": torch.randn(2, 9, 128), "padding": padding}
    model = nncf_ext.compress(Encoder(), dataset=nncf.Dataset([item]), **options)
    report = nncf_ext.compression_report(model)
    treated = {row.name: row.sparsity for row in report.compressed}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in treated} == {"linear1", "linear2"}
    assert min(treated.values()) >= 0.5
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("shell", ["compiled", "both"])
def test_ranks_are_not_made_elastic_behind_compiled_code(tiny_llama, one_process, shell):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    groups = [nncf_ext.RankGroup([r".*\.q_proj$"], (2, 1))]
    with pytest.raises(nncf.UnsupportedModelError, match="compile the result"):
        nncf_ext.make_elastic(SHELLS[shell](model), groups=groups)
