"""Half-precision models on CPUs without instructions for half precision: products in float32, the same results."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nncf_ext.calibration import float_products
from nncf_ext.calibration.float_products import FloatProducts
from nncf_ext.calibration.stream import evaluation

HALF = (torch.bfloat16, torch.float16)
PRODUCTS = {
    "linear": lambda x, y: functional.linear(x, y),
    "matmul": torch.matmul,
    "operator": lambda x, y: x @ y.mT,
    "bmm": lambda x, y: torch.bmm(x.expand(2, -1, -1), y.mT.expand(2, -1, -1)),
    "by name": lambda x, y: functional.linear(input=x, weight=y),
    "attention": lambda x, y: functional.scaled_dot_product_attention(x[None, None], y[None, None], y[None, None]),
}


class Seen(TorchFunctionMode):
    """Notes the types that products are given. Below the mode under test, so it sees what that one calls."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in float_products._PRODUCTS:
            self.dtypes.append(next(iter((*args, *(kwargs or {}).values()))).dtype)
        return function(*args, **(kwargs or {}))


def _pair(dtype, seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 16, generator=generator).to(dtype).requires_grad_(requires_grad) for _ in range(2)]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_rounded_once(name, dtype):
    x, y = _pair(dtype)
    exact = PRODUCTS[name](x.double(), y.double())
    with Seen() as seen, FloatProducts():
        found = PRODUCTS[name](x, y)
    assert found.dtype == dtype and set(seen.dtypes) == {torch.float32}
    # Half a unit in the last place, and as much again for sums in float32 that end beside a tie.
    spacing = torch.finfo(dtype).eps
    assert ((found.double() - exact).abs() <= 0.51 * spacing * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_are_those_of_float32(dtype):
    x, y = _pair(dtype, requires_grad=True)
    with FloatProducts():
        functional.linear(x, y).float().square().sum().backward()
    a, b = (each.detach().double().requires_grad_(True) for each in (x, y))
    functional.linear(a, b).square().sum().backward()
    for found, exact in ((x.grad, a.grad), (y.grad, b.grad)):
        assert found.dtype == dtype
        assert torch.linalg.norm(found.double() - exact) <= 2 * torch.finfo(dtype).eps * torch.linalg.norm(exact)


def test_a_given_result_is_written_into():
    x, y = _pair(torch.bfloat16)
    with FloatProducts():
        found = torch.matmul(x, y, out=(given := torch.zeros(16, 16, dtype=torch.bfloat16)))
    assert found is given and torch.equal(given, x @ y)


def test_other_types_and_other_functions_are_left_alone():
    x, y = _pair(torch.float64)
    with Seen() as seen, FloatProducts():
        assert torch.equal(functional.linear(x, y), x @ y.mT)
        assert (x.half() + 1).dtype == torch.float16
    assert set(seen.dtypes) == {torch.float64}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_only_what_the_cpu_is_slow_at_is_widened(monkeypatch, dtype, fast):
    monkeypatch.setattr(float_products, "has_fast_products", lambda asked: fast or asked == torch.float32)
    model = nn.Linear(16, 16).to(dtype)
    x, _ = _pair(dtype)
    with Seen() as seen, evaluation(model):
        assert model(x).dtype == dtype
    assert seen.dtypes == [dtype if fast else torch.float32]


def test_pytorch_still_answers():
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        assert isinstance(getattr(torch.ops.mkldnn, name)(), bool)
