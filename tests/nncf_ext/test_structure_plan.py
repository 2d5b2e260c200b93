"""The plan as data: files, counts, published configurations, and every way to be wrong."""

import copy
import json

import nncf
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nncf_ext
from nncf_ext.importance.blocks import l1_norm
from nncf_ext.structure.counting import count_costs
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.masking import masked
from nncf_ext.structure.plan import Costs, Step, StructurePlan
from nncf_ext.structure.reference import plan_from_reference, plan_to_reference
from nncf_ext.structure.surgery import extract_structure
from tests.structure_models import CAUSAL, LAYERS, logits, make, tokens


@pytest.fixture(scope="module")
def llama():
    return make("llama")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.lists(st.integers(0, 39), unique=True), score=st.floats(allow_nan=False) | st.none())
def test_file_round_trip(kept, score, llama, tmp_path) -> None:
    plan = StructurePlan.dense(llama).keep("layers.2.mlp", kept).keep("layers.1.attention", (3, 0, 1))
    plan = StructurePlan(
        plan.model,
        plan.kept,
        steps=(Step("layers.2.mlp", len(kept), score=score, margin=None),),
        calibration={"dataset": "text", "tokens": 512},
        costs_before=count_costs(llama),
        costs_after=count_costs(llama, plan),
    )
    plan.save(tmp_path / "plan.json")
    assert nncf_ext.StructurePlan.load(tmp_path / "plan.json") == plan


def test_costs_by_hand(llama) -> None:
    # hidden 32, 8 heads of 6, 4 key/value heads, 40 channels, 96 tokens, 4 layers, output head not tied
    layer = 2 * 32 * 48 + 2 * 32 * 24 + 3 * 32 * 40 + 2 * 32
    assert count_costs(llama) == Costs(2 * 96 * 32 + 4 * layer + 32, 4 * layer + 32, 4 * (6144 + 4 * layer + 32), 768)
    plan = (
        StructurePlan.dense(llama)
        .keep("layers.0.attention", ())
        .keep("layers.1.attention", (2,))
        .keep("layers.1.mlp", (5, 6))
    )
    gone = (2 * 32 * 48 + 2 * 32 * 24 + 32) + 3 * (2 * 32 * 12 + 2 * 32 * 6) + 38 * 3 * 32
    assert count_costs(llama, plan).parameters == count_costs(llama).parameters - gone
    assert count_costs(llama, plan).kv_bytes_per_token == 2 * (1 + 4 + 4) * 6 * 4
    half = copy.deepcopy(llama).half()
    assert count_costs(half).kv_bytes_per_token == 384 and count_costs(half).bytes * 2 == count_costs(llama).bytes


LLAMA2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA2_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
LLAMA3_8B = {**LLAMA2_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
QWEN25_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
LLAMA32_3B = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
QWEN15_7B = {**LLAMA2_7B, "num_key_value_heads": 32, "vocab_size": 151936}
QWEN15_14B = {**LLAMA2_13B, "intermediate_size": 13696, "num_key_value_heads": 40, "vocab_size": 152064}
BAICHUAN2_7B = {**LLAMA2_7B, "vocab_size": 125696}  # in Llama's shapes
BAICHUAN2_13B = {**LLAMA2_13B, "intermediate_size": 13696, "vocab_size": 125696}
# All published results of MultiPruner: parameters after pruning, removed attention and MLP blocks, removed MLP
# channels, removed query channels. The publication counts the normalization of removed blocks, which nobody computes
# any more; for Qwen1.5 the biases of removed attention, too.
PUBLISHED = [
    ("Llama", LLAMA32_3B, 2_921_769_984, 2, 0, 26_112, 0, 768),
    ("Llama", LLAMA3_8B, 7_224_954_880, 6, 0, 45_056, 0, 1024),
    ("Llama", LLAMA3_8B, 6_423_842_816, 8, 1, 89_088, 0, 1024),
    ("Llama", LLAMA2_7B, 6_268_653_568, 4, 0, 15_360, 768, 1024),
    ("Llama", LLAMA2_7B, 5_258_874_880, 9, 1, 56_320, 2_944, 1024),
    ("Llama", LLAMA2_13B, 9_760_035_840, 13, 1, 101_376, 6_016, 1024),
    ("Qwen2", QWEN25_7B, 6_090_697_216, 6, 3, 68_608, 0, 1024),
    ("Llama", LLAMA3_8B, 6_654_529_536, 4, 0, 98_304, 0, 1024),  # both Llama 3 and 3.1
    ("Llama", LLAMA3_8B, 7_220_760_576, 4, 0, 52_224, 0, 1024),
    ("Llama", LLAMA3_8B, 6_423_842_816, 8, 0, 103_424, 0, 1024),
    ("Llama", LLAMA2_7B, 6_063_132_672, 5, 0, 25_600, 1_536, 1024),
    ("Llama", LLAMA2_7B, 5_931_012_096, 6, 0, 30_720, 1_664, 1024),
    ("Llama", LLAMA2_7B, 5_796_794_368, 7, 0, 35_840, 1_920, 1024),
    ("Llama", LLAMA2_7B, 5_727_588_352, 7, 0, 40_960, 2_304, 1024),
    ("Llama", LLAMA2_7B, 5_524_164_608, 8, 0, 51_200, 2_944, 1024),
    ("Qwen2", QWEN15_7B, 6_037_311_488, 8, 2, 66_560, 3_584, 1024),
    ("Qwen2", QWEN15_14B, 10_836_096_000, 9, 3, 106_496, 5_888, 1024),
    ("Qwen2", QWEN25_7B, 6_852_230_144, 5, 2, 19_456, 0, 1024),
    ("Llama", BAICHUAN2_7B, 5_824_057_344, 7, 2, 71_680, 3_712, 1024),
    ("Llama", BAICHUAN2_13B, 10_559_575_040, 9, 4, 93_184, 5_888, 1024),
]


@pytest.mark.parametrize(("kind", "sizes", "published", "attention", "mlp", "channels", "queries", "step"), PUBLISHED)
def test_published_totals_from_configurations(kind, sizes, published, attention, mlp, channels, queries, step) -> None:
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    layers, width = sizes["num_hidden_layers"], sizes["intermediate_size"]
    # How the removed units are spread over the layers that stay does not matter for the total.
    query_channels = sizes["num_attention_heads"] * 128
    config = {
        "pruned_attn_idx": list(range(attention)),
        "pruned_mlp_idx": list(range(mlp)),
        "pruned_attn_width": dict.fromkeys(map(str, range(layers)), query_channels),
        "pruned_mlp_width": dict.fromkeys(map(str, range(layers)), width),
    }
    for name, total, unit in (("pruned_mlp_width", channels, step), ("pruned_attn_width", queries, 128)):
        for index in range(total // unit):
            config[name][str(layers - 1 - index % (layers - 14))] -= unit
    plan = plan_from_reference(config, model)
    expected = published - (attention + mlp) * sizes["hidden_size"]
    if sizes in (QWEN15_7B, QWEN15_14B):
        expected -= 3 * (attention * query_channels + queries)
    assert count_costs(model, plan).parameters == expected
    small = extract_structure(model, plan)
    assert sum(each.numel() for each in small.parameters()) == expected
    assert plan_from_reference(plan_to_reference(plan, model), model) == plan


@pytest.mark.parametrize("score", [None, l1_norm])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "opt", "gemma2"])
def test_reference_round_trip(name, score) -> None:
    model = make(name)
    heads = dimensions_of(model)["layers.2.attention"]
    widths = dict.fromkeys(map(str, range(LAYERS)), heads.size * heads.granularity)
    config = {
        "pruned_attn_idx": [3, 1],
        "pruned_mlp_idx": [1],
        "pruned_attn_width": {**widths, "2": (heads.size - 1) * heads.granularity},
        "pruned_mlp_width": {"0": 40, "1": 40, "2": 17, "3": 40},
    }
    plan = plan_from_reference(config, model, score=score)
    assert plan_to_reference(plan, model, score=score) == config
    assert len(plan.kept["layers.2.attention"]) == heads.size - 1 and len(plan.kept["layers.2.mlp"]) == 17
    assert (plan.kept["layers.2.mlp"] == tuple(range(17))) == (score is None)


def test_the_importer_follows_a_shifted_index(llama) -> None:
    shifted = {"pruned_mlp_width": {str(4 + layer): 40 - layer for layer in range(4)}}
    plain = {"pruned_mlp_width": {str(layer): 40 - layer for layer in range(4)}}
    assert plan_from_reference(shifted, llama) == plan_from_reference(plain, llama)


def test_order_by_l1_norm_by_hand(llama) -> None:
    layer = llama.model.layers[1]
    q, k, v = (getattr(layer.self_attn, f"{each}_proj").weight.detach().double() for each in "qkv")
    expected = []
    for group in range(4):
        rows = [
            q[row].abs().sum() + k[(row // 12) * 6 + row % 6].abs().sum() + v[(row // 12) * 6 + row % 6].abs().sum()
            for row in range(group * 12, group * 12 + 12)
        ]
        expected.append(sum(rows) / 12)
    dimensions = dimensions_of(llama)
    found = l1_norm(dimensions.unit_weights(llama, "layers.1.attention"))
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=0)
    channels = layer.mlp.gate_proj.weight.abs().sum(1) + layer.mlp.up_proj.weight.abs().sum(1)
    torch.testing.assert_close(l1_norm(dimensions.unit_weights(llama, "layers.1.mlp")), channels.detach())


@pytest.mark.parametrize("name", CAUSAL)
def test_reordering_everything_changes_nothing(name) -> None:
    model = make(name).double()
    plan = StructurePlan.dense(model)
    generator = torch.Generator().manual_seed(5)
    for name, units in plan.kept.items():
        plan = plan.keep(name, torch.randperm(len(units), generator=generator).tolist())
    reordered = extract_structure(model, plan)
    before, after = model.state_dict(), reordered.state_dict()
    assert sum(not torch.equal(before[name], after[name]) for name in before) >= 2 * LAYERS
    torch.testing.assert_close(logits(reordered, tokens()), logits(model, tokens()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pruned_attn_width": {"1": 18}}, "key/value head with its 2 query heads, 12 channels"),
        ({"pruned_attn_width": {"1": 60}}, "the layer has 48"),
        ({"pruned_mlp_width": {"1": 0}}, "multiple from 1"),
        ({"pruned_attn_idx": [4]}, "layers 0 to 3"),
        ({"pruned_mlp_width": {"0": 40, "9": 40}}, "layers 0 to 3"),
    ],
)
def test_reference_files_that_do_not_fit(config, message, llama) -> None:
    with pytest.raises(nncf.ValidationError, match=message):
        plan_from_reference(config, llama)


def test_units_the_reference_format_cannot_name(llama) -> None:
    plan = StructurePlan.dense(llama).keep("layers.0.mlp", (0, 2))
    with pytest.raises(nncf.ValidationError, match="our own format"):
        plan_to_reference(plan, llama)


def test_the_last_user_of_a_shared_weight_takes_it_away() -> None:
    model = make("llama")
    model.model.layers[2].input_layernorm.weight = model.model.layers[1].input_layernorm.weight
    one = StructurePlan.dense(model).keep("layers.1.attention", ())
    both = one.keep("layers.2.attention", ())
    for plan in (one, both):
        small = extract_structure(model, plan)
        assert count_costs(model, plan) == count_costs(small)
    norm = model.model.layers[1].input_layernorm.weight.numel()
    lost = count_costs(model, one).parameters - count_costs(model, both).parameters
    alone = count_costs(model).parameters - count_costs(model, one).parameters
    assert lost - alone == norm


def test_plans_that_do_not_fit(llama) -> None:
    plan = StructurePlan.dense(llama)
    other = copy.deepcopy(llama)
    other.model.layers[0].mlp.up_proj.weight.data.mul_(1.1)
    cases = [
        (make("qwen3"), plan, nncf.ValidationError, "'llama' model of other shapes than this 'qwen3'"),
        (other, plan, nncf.ValidationError, "other weights"),
        (llama, plan.keep("layers.0.attention", (0, 4)), nncf.ValidationError, "0..3, once"),
        (llama, plan.keep("layers.0.mlp", (3, 3)), nncf.ValidationError, "once"),
        (llama, plan.keep("layers.0.ssm", (1,)), nncf.ValidationError, "names .*ssm"),
        (
            llama,
            StructurePlan(plan.model, dict([*plan.kept.items()][:6])),
            nncf.ValidationError,
            "6 dimensions, the model 8",
        ),
    ]
    bare = plan
    for layer in range(LAYERS):
        bare = bare.keep(f"layers.{layer}.attention", ())
    cases.append((llama, bare, nncf.ValidationError, "Keep one"))
    mixed = make("gemma2")
    cases.append(
        (
            mixed,
            StructurePlan.dense(mixed).keep("layers.0.attention", ()).keep("layers.2.attention", ()),
            nncf.ValidationError,
            "of kind sliding_attention",
        )
    )
    tied = make("llama")
    tied.model.layers[2].mlp.up_proj.weight = tied.model.layers[1].mlp.up_proj.weight
    cases.append((tied, StructurePlan.dense(tied).keep("layers.1.mlp", (0,)), nncf.UnsupportedModelError, "is shared"))
    for model, wrong, error, message in cases:
        with pytest.raises(error, match=message):
            extract_structure(model, wrong)
        with pytest.raises(error, match=message), masked(model, wrong):
            pass


def test_the_fingerprint_does_not_see_the_floating_type(llama) -> None:
    half = copy.deepcopy(llama).to(torch.bfloat16)
    plan = StructurePlan.dense(half).keep("layers.1.mlp", (1, 2))
    assert extract_structure(half.float(), plan).model.layers[1].mlp.up_proj.out_features == 2
    assert extract_structure(llama, plan).model.layers[1].mlp.up_proj.out_features == 2


def test_models_whose_structure_is_unknown(llama) -> None:
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96))
    with pytest.raises(nncf.UnsupportedModelError, match=r"'gpt2'.*missing.*structure/records"):
        StructurePlan.dense(gpt2)
    with pytest.raises(nncf.UnsupportedModelError, match="No repeated blocks"):
        StructurePlan.dense(torch.nn.Linear(2, 2))
    broken = copy.deepcopy(llama)
    broken.model.layers[1].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(nncf.UnsupportedModelError, match=r"layers.1.mlp.up_proj should be .*found Identity"):
        StructurePlan.dense(broken)
    shared = copy.deepcopy(llama)
    shared.model.layers[3] = shared.model.layers[2]
    with pytest.raises(nncf.UnsupportedModelError, match="same block several times"):
        StructurePlan.dense(shared)


@pytest.mark.parametrize("change", ["version", "no json", "no layers", "wrong step"])
def test_files_that_are_no_plans(change, llama, tmp_path) -> None:
    path = tmp_path / "plan.json"
    StructurePlan.dense(llama).save(path)
    content = json.loads(path.read_text())
    if change == "version":
        content["version"] = 3
    elif change == "no layers":
        del content["kept"]
    elif change == "wrong step":
        content["steps"] = [{"colour": "blue"}]
    path.write_text("{" if change == "no json" else json.dumps(content))
    with pytest.raises(
        nncf.ValidationError, match="version 3.*Upgrade" if change == "version" else "no structure plan"
    ):
        StructurePlan.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"model_type": "llama", "shapes": ["a"], "weights": None}},
        {"model": {"model_type": "llama", "shapes": "a", "weights": 3}},
        {"steps": [{"dimension": 3, "kept": 1}]},
        {"steps": [{"dimension": "layers.0.mlp", "kept": -1}]},
        {"steps": [{"dimension": "layers.0.mlp", "kept": 1.0}]},
        {"steps": [{"dimension": "layers.0.mlp", "kept": 1, "score": "high"}]},
        {"steps": {"dimension": "layers.0.mlp"}},
        {"calibration": [1]},
        {
            "costs_after": {
                "parameters": 1,
                "parameters_without_embeddings": 1,
                "bytes": "many",
                "kv_bytes_per_token": 0,
            }
        },
        {"kept": {"layers.0.mlp": "abc"}},
        {"kept": {"layers.0.mlp": {"0": 1}}},
        {"kept": {"layers.0.mlp": 7}},
        {"kept": {"layers.0.mlp": [[[0, 1], [1, 2]]]}},
        {"kept": {"layers.0.mlp": [[0, 1, 2]]}},
        {"kept": {"layers.0.mlp": [[0]]}},
        {"kept": {"layers.0.mlp": [[0, 10**400]]}},
        {"kept": [["layers.0.mlp", [[0, 1]]]]},
        {"kept": None},
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_plans_with_values_of_another_kind_are_no_plans(change, llama, tmp_path) -> None:
    path = tmp_path / "plan.json"
    StructurePlan.dense(llama).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(nncf.ValidationError, match=r"plan.json is no structure plan"):
        StructurePlan.load(path)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, "\xff", '{"version": ' + "9" * 5000 + "}", "[]", ""]
)
def test_damaged_plans_are_named(content, tmp_path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(nncf.ValidationError, match=r"plan.json is no structure plan"):
        StructurePlan.load(path)


@pytest.mark.parametrize(
    "content",
    [
        {"pruned_attn_idx": 3},
        {"pruned_attn_idx": [1.5]},
        {"pruned_attn_idx": [True]},
        {"pruned_attn_idx": ["one"]},
        {"pruned_mlp_width": [32]},
        {"pruned_mlp_width": {"0": None}},
        {"pruned_mlp_width": {"first": 32}},
        {"pruned_mlp_width": {"0": "9" * 5000}},
    ],
    ids=lambda content: json.dumps(content)[:40],
)
def test_published_files_with_values_of_another_kind_are_refused(content, llama) -> None:
    with pytest.raises(nncf.ValidationError, match=next(iter(content))):
        plan_from_reference(content, llama)
