"""Dimensions as data: made by hand for a network that no record describes, and for adapters; points and plans."""

import copy
import json
from pathlib import Path

import nncf
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nncf_ext
from nncf_ext.standalone.skipping import SkippedNorm
from nncf_ext.structure.counting import lost_numbers
from nncf_ext.structure.dimensions import Cut, Dimension, DimensionKind, Dimensions
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.masking import mask_dimension
from nncf_ext.structure.order import units_at
from nncf_ext.structure.plan import Costs, Step, StructurePlan
from nncf_ext.structure.surgery import cut_tensors
from tests.structure_models import CAUSAL, ENCODERS, HYBRIDS, STATE_SPACE, logits, make, tokens

PLANS = Path(__file__).with_name("plans")
ASSETS = Path(__file__).parents[2] / "samples" / "assets"


class Convolutions(nn.Module):
    """A stem, a branch of its own (expand, depthwise, project), and a classifier on two heads of features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(6)
        self.branch = nn.Sequential(
            nn.Conv2d(6, 10, 1, bias=False),
            nn.BatchNorm2d(10),
            nn.ReLU(),
            nn.Conv2d(10, 10, 3, padding=1, groups=10),
            nn.BatchNorm2d(10),
            nn.ReLU(),
            nn.Conv2d(10, 6, 1),
        )
        self.classifier = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        return self.classifier((x + self.branch(x)).mean(dim=(2, 3)))


def convolutions() -> nn.Module:
    torch.manual_seed(5)
    model = Convolutions().double().eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.1, 1.0)
    return model


def batch_norm(path: str) -> list[Cut]:
    return [Cut(f"{path}.{name}", 0) for name in ("weight", "bias", "running_mean", "running_var")]


EXPANSION = Dimension(
    "expansion",
    DimensionKind.WIDTH,
    10,
    cuts=(
        Cut("branch.0.weight", 0),
        *batch_norm("branch.1"),
        Cut("branch.3.weight", 0),
        Cut("branch.3.bias", 0),
        *batch_norm("branch.4"),
        Cut("branch.6.weight", 1),
    ),
)
# Pairs of channels of the residual stream: the stem and the end of the branch write them, the branch and the
# classifier read them. The weights of branch.0 and branch.6 are cut on both axes.
STREAM = Dimension(
    "stream",
    DimensionKind.WIDTH,
    3,
    granularity=2,
    cuts=(
        Cut("stem.weight", 0, ((0, 2),)),
        Cut("stem.bias", 0, ((0, 2),)),
        *(Cut(cut.tensor, 0, ((0, 2),)) for cut in batch_norm("stem_norm")),
        Cut("branch.6.weight", 0, ((0, 2),)),
        Cut("branch.6.bias", 0, ((0, 2),)),
        Cut("branch.0.weight", 1, ((0, 2),)),
        Cut("classifier.weight", 1, ((0, 2),)),
    ),
)
PRESENT = Dimension("branch", DimensionKind.DEPTH, 1, replacements={0: {"branch": SkippedNorm}})


@settings(max_examples=25, deadline=None)
@given(
    expansion=st.lists(st.integers(0, 9), min_size=1, unique=True),
    stream=st.lists(st.integers(0, 2), min_size=1, unique=True),
)
def test_convolutions_masked_are_convolutions_cut(expansion, stream) -> None:
    model, x = convolutions(), torch.rand(2, 3, 5, 4, dtype=torch.float64)
    dimensions = Dimensions([EXPANSION, STREAM])
    kept = {"expansion": expansion, "stream": stream}
    undo = [mask_dimension(model, each, kept[name]) for name, each in dimensions.items()]
    tried = model(x)
    for each in reversed(undo):
        each()
    small = copy.deepcopy(model)
    cut_tensors(small, kept, dimensions)
    torch.testing.assert_close(small(x), tried, rtol=1e-12, atol=1e-12)
    assert torch.equal(convolutions()(x), model(x))
    # Counted without cutting, also where one weight is cut on both axes.
    lost = lost_numbers(model, kept, dimensions)
    assert sum(each.numel() - lost[id(each)] for each in model.parameters()) == sum(
        each.numel() for each in small.parameters()
    )
    depthwise, norm, width = small.branch[3], small.branch[1], len(expansion)
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (width, width, width)
    assert norm.num_features == width and small.stem_norm.running_var.shape == (2 * len(stream),)
    assert small.classifier.in_features == 2 * len(stream) == small.branch[0].in_channels


def test_a_branch_is_replaced_where_nothing_of_it_stays() -> None:
    model, x = convolutions(), torch.rand(2, 3, 5, 4, dtype=torch.float64)
    stem = torch.relu(model.stem_norm(model.stem(x)))
    undo = mask_dimension(model, PRESENT, ())
    tried = model(x)
    undo()
    torch.testing.assert_close(tried, model.classifier((2 * stem).mean(dim=(2, 3))), rtol=1e-12, atol=1e-12)
    cut_tensors(model, {"branch": ()}, Dimensions([PRESENT]))
    assert torch.equal(model(x), tried) and isinstance(model.branch, SkippedNorm)


def test_unit_weights_by_hand() -> None:
    model = convolutions()
    (writer, project) = Dimensions([STREAM]).unit_weights(model, "stream")
    assert torch.equal(writer[1, 1], model.stem.weight[3].flatten()) and writer.shape == (3, 2, 27)
    assert torch.equal(project[2, 0], model.branch[6].weight[4].flatten())


@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS, *STATE_SPACE, *HYBRIDS])
def test_dimensions_hold_for_copies_and_name_what_is_there(name) -> None:
    model = make(name)
    dimensions = dimensions_of(model)
    assert list(dimensions) == [f"layers.{each.block}.{each.part}" for each in dimensions.values()]
    assert [each for parts in dimensions.by_block for each in parts] == list(dimensions.values())
    state = dict(copy.deepcopy(model).named_parameters(remove_duplicate=False))
    for each in dimensions.values():
        for cut in each.cuts:
            # Every index along the axis belongs to exactly one unit.
            indices = cut.indices(each.all_units)
            assert sorted(indices.tolist()) == list(range(state[cut.tensor].shape[cut.axis]))
        assert not each.cuts or each.size * each.granularity == state[each.readers[0].tensor].shape[1]
        assert each.gone is None
    plan = StructurePlan.dense(model)
    assert plan == StructurePlan.dense(model, dimensions) and plan.point == {
        name: each.size for name, each in dimensions.items()
    }


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_point_with_an_order_is_a_plan_and_back(data) -> None:
    sizes = data.draw(st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(1, 9), min_size=1))
    units = {name: tuple(range(size)) for name, size in sizes.items()}
    order = {name: data.draw(st.permutations(each)) for name, each in units.items()}
    point = {name: data.draw(st.integers(0, size)) for name, size in sizes.items()}
    kept = units_at(units, point, order)
    for name, size in point.items():
        assert set(kept[name]) == set(order[name][:size]) and list(kept[name]) == sorted(kept[name])
    dense = StructurePlan(nncf_ext.structure.plan.Fingerprint("", "", None), units)
    plan = dense.at(point, order)
    assert plan.kept == kept and plan.point == point
    assert dense.at(plan.point, order) == plan  # both ways
    assert dense.at(point).kept == {name: tuple(range(size)) for name, size in point.items()}


def test_points_that_do_not_fit() -> None:
    plan = StructurePlan.dense(make("llama"))
    for point, order, message in (
        ({"layers.9.mlp": 1}, None, "names 'layers.9.mlp'"),
        ({"layers.1.mlp": 41}, None, "41 units of layers.1.mlp; 0 to 40"),
        ({"layers.1.mlp": -1}, None, "-1 units"),
        ({"layers.1.attention": 1}, {"layers.1.attention": (0, 1, 1, 3)}, "each of its 4 units once"),
    ):
        with pytest.raises(nncf.ValidationError, match=message):
            plan.at(point, order)


def test_files_of_version_1_still_load(tmp_path) -> None:
    """Written by the release before this one, from the committed models; the tests of plans read what they mean."""
    llama = StructurePlan.load(PLANS / "tiny_lm.version_1.json")
    assert [(step.dimension, step.kept) for step in llama.steps] == [
        ("layers.4.mlp", 0),
        ("layers.0.mlp", 640),
        ("layers.0.mlp", 512),
    ]
    assert llama.kept["layers.4.mlp"] == () and len(llama.kept["layers.0.mlp"]) == 512
    assert llama.kept["layers.5.attention"] == (0, 1) and llama.costs_after.parameters == 5_508_096
    mamba = StructurePlan.load(PLANS / "tiny_mamba2.version_1.json")
    assert {name: units for name, units in mamba.kept.items() if units != (0, 1)} == {
        "layers.1.mamba": (0,),
        "layers.6.mamba": (0,),
        "layers.8.mamba": (),
    }
    assert mamba.steps[-1] == Step("layers.1.mamba", 1, 33.110101191187745, 0.003190945338296558)
    for folder, plan in (("tiny_lm", llama), ("tiny_mamba2", mamba)):
        model = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / folder, dtype=torch.float32)
        small = nncf_ext.extract(model, plan)
        assert nncf_ext.count_costs(small) == plan.costs_after == nncf_ext.count_costs(model, plan)
        assert isinstance(plan.costs_after, Costs)
        plan.save(tmp_path / "plan.json")
        assert json.loads((tmp_path / "plan.json").read_text())["version"] == 2
        assert StructurePlan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("runs", [[[0, 10**12]], [[0, 2**22]] * 3, [[3, 1]], [[-1, 2]], [[0, 1.5]], [[0, True]]])
def test_files_that_name_absurd_units_are_refused_at_once(runs, tmp_path) -> None:
    content = json.loads((PLANS / "tiny_mamba2.version_1.json").read_text())
    for layer in content["layers"]:
        layer["mamba"] = runs
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(nncf.ValidationError, match="no structure plan .*no units"):
        StructurePlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("version", [0, -3, True, "2", None, 1.0])
def test_files_of_no_version_are_no_plans(version, tmp_path) -> None:
    content = json.loads((PLANS / "tiny_mamba2.version_1.json").read_text()) | {"version": version}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(nncf.ValidationError, match="no structure plan .*version"):
        StructurePlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("mode", [nncf.CompressWeightsMode.INT4_SYM, nncf.CompressWeightsMode.INT8_SYM])
def test_models_on_a_grid_are_masked_and_counted(mode) -> None:
    """NNCF stores two codes in a byte, in one column; what a layer computes has the sizes that the layer says."""
    model, ids = make("llama", head_dim=8, intermediate_size=48), tokens()
    plan = StructurePlan.dense(model).at({"layers.1.mlp": 17, "layers.2.attention": 1})
    settings = {"group_size": 16} if mode is nncf.CompressWeightsMode.INT4_SYM else {}
    packed = nncf.compress_weights(copy.deepcopy(model), mode=mode, dataset=nncf.Dataset([ids]), **settings)
    stored = sum(each.numel() for each in packed.parameters())
    with nncf_ext.masked(packed, StructurePlan(StructurePlan.dense(packed).model, plan.kept)):
        tried = logits(packed, ids)
    dense = logits(packed, ids)
    assert not torch.equal(tried, dense)
    down, attention = packed.model.layers[1].mlp.down_proj, packed.model.layers[2].self_attn.o_proj
    hooks = [
        each.register_forward_pre_hook(lambda _module, inputs, width=width: (inputs[0].index_fill(2, width, 0.0),))
        for each, width in ((down, torch.arange(17, 48)), (attention, torch.arange(16, 64)))
    ]
    torch.testing.assert_close(logits(packed, ids), tried)
    for each in hooks:
        each.remove()
    costs = nncf_ext.count_costs(packed, StructurePlan(StructurePlan.dense(packed).model, plan.kept))
    share = 2 if mode is nncf.CompressWeightsMode.INT4_SYM else 1  # numbers in a byte
    assert stored - costs.parameters == (31 * 3 * 32 + 3 * (2 * 16 + 2 * 8) * 32) // share


@pytest.mark.parametrize("name", ["opt", "llama_biases", "bert", "mamba2", "zamba2"])
def test_the_extracted_model_shares_no_tensor(name) -> None:
    model = make(name)
    dense = StructurePlan.dense(model)
    halves = {
        each: max(1, len(units) // 2)
        for each, units in dense.kept.items()
        if not each.startswith(("layers.2", "layers.4"))
    }
    small = nncf_ext.extract(model, dense.at(halves))
    theirs = {each.data_ptr() for each in model.parameters() if each.numel()}
    assert not theirs & {each.data_ptr() for each in small.parameters() if each.numel()}


@pytest.mark.parametrize("name", [*STATE_SPACE, *HYBRIDS])
def test_uniform_state_space_models_keep_their_state_spaces(name) -> None:
    model = make(name)
    plan = StructurePlan.dense(model).keep("layers.0.mamba", (0,)).keep("layers.1.mamba", (0,))
    even = nncf_ext.snap_to_uniform(model, plan)
    assert even == StructurePlan.dense(model)


def test_nothing_cannot_be_made_uniform() -> None:
    model = make("bert")
    nothing = StructurePlan.dense(model).at(dict.fromkeys(dimensions_of(model), 0))
    with pytest.raises(nncf.ValidationError, match="keeps nothing"):
        nncf_ext.snap_to_uniform(model, nothing)


def test_depthwise_with_a_multiplier() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Conv1d(4, 8, 3, groups=4), nn.Conv1d(8, 3, 1)).double()
    x = torch.rand(1, 2, 7, dtype=torch.float64)
    one = Dimension(
        "one",
        DimensionKind.WIDTH,
        4,
        cuts=(
            *(Cut(f"0.{name}", 0) for name in ("weight", "bias")),
            *(Cut(f"1.{name}", 0, ((0, 2),)) for name in ("weight", "bias")),
            Cut("2.weight", 1, ((0, 2),)),
        ),
    )
    undo = mask_dimension(model, one, (0, 3, 2))
    tried = model(x)
    undo()
    cut_tensors(model, {"one": (0, 3, 2)}, Dimensions([one]))
    torch.testing.assert_close(model(x), tried, rtol=1e-12, atol=1e-12)
    grouped = Dimension("grouped", DimensionKind.WIDTH, 2, cuts=(Cut("1.weight", 1),))
    with pytest.raises(nncf.UnsupportedModelError, match="convolution in groups"):
        mask_dimension(model, grouped, (0,))
