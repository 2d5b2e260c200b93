"""With moving averages, thresholds and outputs are those of ``nncf.experimental.torch.sparsify_activations``."""

import importlib

import nncf
import pytest
import torch
from nncf.experimental.torch.sparsify_activations import TargetScope
from nncf.experimental.torch.sparsify_activations import sparsify_activations as nncf_sparsify_activations

import nncf_ext
from nncf_ext.weights.activation_sparsity import activation_sparsity_of
from tests.properties.cases import Logits, llama


def sparsifier_class():
    """Of a module that NNCF does not document."""
    module = importlib.import_module("nncf.experimental.torch.sparsify_activations.torch_backend")
    assert hasattr(module, "ActivationsSparsifier"), "NNCF's class of activation sparsifiers has another name now."
    return module.ActivationsSparsifier


def thresholds_of_nncf(model):
    return [hook.running_threshold.item() for hook in model.modules() if isinstance(hook, sparsifier_class())]


@pytest.fixture
def items():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 90, (2, length), generator=generator) for length in (9, 4, 13, 7)]


def test_thresholds_and_logits_equal_those_of_nncf(items):
    torch.manual_seed(1)
    ours = Logits(llama()).eval()
    torch.manual_seed(1)
    theirs = Logits(llama()).eval()
    share = {"gate_proj": 0.3, "up_proj": 0.3, "down_proj": 0.6}
    wrapped = nncf_sparsify_activations(
        theirs, nncf.Dataset(items), {TargetScope(patterns=[f".*{name}.*"]): part for name, part in share.items()}
    )
    nncf_ext.sparsify_activations(
        ours,
        nncf.Dataset(items),
        {TargetScope(patterns=[f".*{name}"]): part for name, part in share.items()},
        advanced_parameters=nncf_ext.AdvancedActivationSparsityParameters(moving_average=True),
    )
    found = [known for module in ours.modules() if (known := activation_sparsity_of(module)) is not None]
    wanted = thresholds_of_nncf(wrapped)
    assert len(wanted) == 6 and sorted(each.threshold for each in found) == pytest.approx(sorted(wanted), abs=1e-6)
    assert {each.target for each in found} == {0.3, 0.6} and all(0.2 < each.achieved < 0.7 for each in found)
    with torch.no_grad():
        for item in items:
            torch.testing.assert_close(ours(item), wrapped(item), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sequential", [True, False])
def test_the_average_by_hand(sequential):
    """NNCF's own example: quantiles 2.2 and 4.1 count 0.8 and 1."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)).eval()
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.eye(4))
    items = [torch.tensor([[1.0, 3.0, 2.0, 4.0]]), torch.tensor([[4.0, 5.0, 4.5, -3.0]])]
    result = nncf_ext.compress(
        model,
        nncf_ext.CompressMode.ACTIVATION_SPARSITY,
        ratio=0.4,
        dataset=nncf.Dataset(items),
        advanced_parameters=nncf_ext.AdvancedActivationSparsityParameters(moving_average=True, sequential=sequential),
    )
    first, second = (activation_sparsity_of(layer) for layer in result)
    assert first.threshold == pytest.approx((0.8 * 2.2 + 4.1) / 1.8, abs=1e-6)
    # What the second layer reads: 0, 3, 0, 4, then 4, 5, 4.5, 0, with the first threshold as it is by then.
    behind = (0.8 * 0.6 + 4.1) / 1.8
    assert second.threshold == pytest.approx(behind if sequential else first.threshold, abs=1e-6)


@pytest.mark.parametrize("other", [{"centering": "median"}, {"weight_norms": True}], ids=str)
def test_what_nncf_has_not_is_refused(items, other):
    parameters = nncf_ext.AdvancedActivationSparsityParameters(moving_average=True, **other)
    scopes = {TargetScope(patterns=[".*down_proj"]): 0.5}
    with pytest.raises(nncf.ParameterNotSupportedError, match="no centre, norms or allocation"):
        nncf_ext.sparsify_activations(llama(), nncf.Dataset(items), scopes, advanced_parameters=parameters)
