"""The classic proxies, each beside a naive version or a closed form."""

import math

import nncf
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import nncf_ext
from nncf_ext.algorithms.zero_cost.classic import CLASSIC, NEED_LABELS

CLASSES = 3


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 2, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


def convolutional(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 3 * 2, CLASSES),
    ).double()
    for each in model.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.weight.data.uniform_(0.5, 1.5)
            each.bias.data.uniform_(-0.5, 0.5)
            each.running_mean.uniform_(-1, 1)
    return model.eval()


def linear(seed: int = 2) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(4, CLASSES, bias=False).double()


VECTORS = torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def residuals(model: nn.Linear, x: Tensor, labels: Tensor) -> np.ndarray:
    """Of the mean cross-entropy, the gradient by logits, in numpy."""
    logits = x.numpy() @ model.weight.detach().numpy().T
    exp = np.exp(logits - logits.max(1, keepdims=True))
    return (exp / exp.sum(1, keepdims=True) - np.eye(CLASSES)[labels.numpy()]) / len(x)


def proxy(name: str, model: nn.Module, x: Tensor, labels: Tensor | None = LABELS) -> float:
    before = {key: each.clone() for key, each in model.state_dict().items()}
    found = nncf_ext.Proxy(name, x, labels)(model)
    assert found == nncf_ext.Proxy(name, x, labels)(model)  # the same twice
    assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())
    assert all(each.grad is None for each in model.parameters())
    assert not any(each._forward_hooks for each in model.modules())
    return found


def close(found: float, wanted: float, tolerance: float = 1e-9) -> None:
    assert math.isclose(found, float(wanted), rel_tol=tolerance), (found, float(wanted))


def test_counts() -> None:
    model = convolutional()
    close(proxy("params", model, images()), 2 * 4 * 9 + 8 + 4 * 5 * 9 + 5 + 10 + 30 * 3 + 3)
    # Multiplications of six images: 35 positions, then 3 x 2.
    close(proxy("macs", model, images()), 6 * (35 * 2 * 4 * 9 + 6 * 4 * 5 * 9 + 30 * 3))


def test_grad_norm() -> None:
    model, x = convolutional(), images()
    for each in model.modules():
        each.training = isinstance(each, nn.BatchNorm2d)
    cross_entropy(model(x), LABELS).backward()
    wanted = sum(each.grad.square().sum().sqrt() for each in model.parameters())
    close(proxy("grad_norm", convolutional(), x), wanted)


def test_snip_and_fisher_of_a_linear_layer() -> None:
    model = linear()
    error = residuals(model, VECTORS, LABELS)
    gradient = error.T @ VECTORS.numpy()
    close(proxy("snip", model, VECTORS), np.abs(gradient * model.weight.detach().numpy()).sum())
    logits = VECTORS.numpy() @ model.weight.detach().numpy().T
    close(proxy("fisher", model, VECTORS), ((logits * error) ** 2).mean(0).sum())


def test_fisher_sums_over_positions() -> None:
    model, x = nn.Sequential(nn.Conv2d(2, CLASSES, (7, 2), bias=False)).double(), images()
    head = nn.Sequential(*model, nn.Flatten(2), Mean())
    weight = model[0].weight.detach()
    total = 0.0
    outputs = nn.functional.conv2d(x, weight)  # [6, 3, 1, 4]
    logits = outputs.mean((2, 3))
    error = (logits.softmax(1) - torch.eye(CLASSES, dtype=torch.float64)[LABELS]) / len(x)
    for sample in range(6):
        for channel in range(CLASSES):
            along = sum(outputs[sample, channel, 0, at] * error[sample, channel] / 4 for at in range(4))
            total += float(along) ** 2 / 6
    close(proxy("fisher", head, x), total)


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 2, 3, 4)])
def test_channels_of_linear_layers_stand_last(shape) -> None:
    model = linear()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    outputs = x.flatten(1, -2) @ model.weight.detach().T  # [6, positions, 3]
    error = (outputs.mean(1).softmax(1) - torch.eye(CLASSES, dtype=torch.float64)[LABELS]) / 6 / outputs.shape[1]
    wanted = sum(float((outputs[n, :, c] * error[n, c]).sum()) ** 2 / 6 for n in range(6) for c in range(CLASSES))
    close(proxy("fisher", nn.Sequential(model, Middle()), x), wanted)


class Middle(nn.Module):
    """The mean over positions, whose channels stand last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).mean(1)


def test_a_sample_that_does_not_matter_has_no_score() -> None:
    assert proxy("jacob_cov", nn.Sequential(linear(), nn.ReLU()), -torch.zeros_like(VECTORS)) == -math.inf


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1)


def test_grasp_by_finite_differences() -> None:
    model = nn.Sequential(linear(), nn.Tanh(), nn.Linear(CLASSES, CLASSES, bias=False)).double()
    weights = [model[0].weight, model[2].weight]

    def gradients(shift: float, along: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            for weight, each in zip(weights, along, strict=True):
                weight += shift * each
        found = torch.autograd.grad(cross_entropy(model(VECTORS), LABELS), weights)
        with torch.no_grad():
            for weight, each in zip(weights, along, strict=True):
                weight -= shift * each
        return list(found)

    own = gradients(0.0, weights)
    up, down = gradients(1e-4, own), gradients(-1e-4, own)
    wanted = -sum(float((w * (u - d)).sum()) for w, u, d in zip(weights, up, down, strict=True)) / 2e-4
    close(proxy("grasp", model, VECTORS), wanted, 1e-5)


def test_synflow_of_a_chain_counts_its_paths() -> None:
    """For every layer of a chain without biases sum w * dR/dw is R itself: the sum over all paths."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3, bias=False))
    first, last = model[0].weight.detach().double().abs(), model[3].weight.detach().double().abs()
    paths = sum(last[k, j] * first[j, i] for i in range(4) for j in range(5) for k in range(3))
    close(proxy("synflow", model, VECTORS.float()), 2 * paths)


def test_jacob_cov() -> None:
    model = nn.Sequential(linear(), nn.Tanh(), nn.Linear(CLASSES, 2)).double()
    rows = []
    for sample in VECTORS:
        row = []
        for at in range(4):
            shift = torch.zeros(4, dtype=torch.float64)
            shift[at] = 1e-6
            row.append(float((model(sample + shift) - model(sample - shift)).detach().sum()) / 2e-6)
        rows.append(row)
    values = np.linalg.eigvalsh(np.corrcoef(np.array(rows))) + 1e-5
    # Six samples and four inputs: of two eigenvalues only the small constant is left.
    close(proxy("jacob_cov", model, VECTORS), -(np.log(values) + 1 / values).sum(), 1e-3)


def test_naswot() -> None:
    model, x = convolutional(), images()
    own = convolutional()
    for each in own.modules():
        each.training = isinstance(each, nn.BatchNorm2d)
    with torch.no_grad():
        first = own[:3](x)
        states = [
            [bool(value > 0) for value in torch.cat([a.flatten(), b.flatten()])]
            for a, b in zip(first, own[3:6](first), strict=True)
        ]
    kernel = [[sum(p == q for p, q in zip(one, other, strict=True)) for other in states] for one in states]
    close(proxy("naswot", model, x), np.linalg.slogdet(np.array(kernel, float))[1])


def test_zen() -> None:
    model, x = convolutional(), images()
    draw = torch.Generator().manual_seed(0)
    one, shift = (torch.randn(x.shape, generator=draw, dtype=x.dtype) for _ in range(2))

    def run(given: Tensor) -> tuple[np.ndarray, float]:
        deviations = 0.0
        for layer in model:
            if isinstance(layer, nn.BatchNorm2d):
                values = given.detach().numpy()
                mean = values.mean((0, 2, 3), keepdims=True)
                count = values.size // values.shape[1]
                variance = ((values - mean) ** 2).sum((0, 2, 3), keepdims=True)
                deviations += 0.5 * math.log((variance / (count - 1)).mean())
                normal = (values - mean) / np.sqrt(variance / count + layer.eps)
                scale, bias = (each.detach().numpy()[None, :, None, None] for each in (layer.weight, layer.bias))
                given = torch.from_numpy(normal * scale + bias)
            else:
                given = layer(given)
        return given.detach().numpy(), deviations

    whole, deviations = run(one)
    moved, _ = run(one + 0.01 * shift)
    close(proxy("zen", model, x), math.log(np.sqrt(((whole - moved) ** 2).sum())) + deviations)


def test_zico() -> None:
    model = linear()
    parts = [
        residuals(model, VECTORS[at : at + 2], LABELS[at : at + 2]).T @ VECTORS.numpy()[at : at + 2] for at in (0, 2, 4)
    ]
    sizes = np.abs(np.stack(parts))
    ratio = sizes.mean(0) / sizes.std(0)
    close(proxy("zico", model, VECTORS), math.log(ratio.sum()))


@pytest.mark.parametrize("name", CLASSIC)
def test_fresh_weights_do_not_depend_on_the_trained_ones(name) -> None:
    found = [nncf_ext.Proxy(name, images(), LABELS, fresh=True, seed=5)(convolutional(seed)) for seed in (1, 7)]
    assert found[0] == found[1] and math.isfinite(found[0])
    if name not in ("params", "macs"):
        assert nncf_ext.Proxy(name, images(), LABELS, fresh=True, seed=6)(convolutional()) != found[0]
        assert nncf_ext.Proxy(name, images(), LABELS)(convolutional()) != found[0]


@pytest.mark.parametrize("name", ["grad_norm", "snip", "grasp", "fisher", "zico"])
def test_encoders(name) -> None:
    import transformers

    from tests.structure_models import tokens

    sizes = {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=24, num_labels=3, attn_implementation="eager")
    model = transformers.BertForSequenceClassification(config)
    inputs = {"input_ids": tokens(6, 5)}
    assert math.isfinite(nncf_ext.Proxy(name, inputs, LABELS)(model))
    with pytest.raises(nncf.ValidationError, match="changes the input"):
        nncf_ext.Proxy("synflow", inputs)(model)


def test_bad_input() -> None:
    with pytest.raises(nncf.ParameterNotSupportedError, match="Unknown proxy 'magic'.*synflow.*eznas-a"):
        nncf_ext.Proxy("magic", images())
    with pytest.raises(nncf.ValidationError, match="give inputs="):
        nncf_ext.Proxy("synflow")
    for name in NEED_LABELS:
        with pytest.raises(nncf.ValidationError, match="give labels="):
            nncf_ext.Proxy(name, images())
    with pytest.raises(nncf.ValidationError, match=r"got shape \(6,\)"):
        nncf_ext.Proxy("snip", images(4), LABELS)
    with pytest.raises(nncf.ValidationError, match="labels are 0 to 9.* 3 classes"):
        nncf_ext.Proxy("snip", images(2), torch.tensor([0, 9]))(convolutional())
    with pytest.raises(nncf.UnsupportedModelError, match="nn.ReLU modules"):
        nncf_ext.Proxy("naswot", VECTORS)(linear())
    with pytest.raises(nncf.ValidationError, match="at least two samples"):
        nncf_ext.Proxy("zico", images(1), LABELS[:1])(convolutional())
    with pytest.raises(nncf.ValidationError, match="about images"):
        nncf_ext.Proxy("eznas-a", VECTORS)
