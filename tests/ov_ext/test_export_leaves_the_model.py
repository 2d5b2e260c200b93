"""An export changes nothing of what it exports, in every floating type, also when it fails half way."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from torch import nn

import ov_ext
import ov_ext.optimum
from ov_ext.stand_in import stand_in
from ov_ext.state_space import convert_state_space_model
from tests.structure_models import make

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]

IDS = torch.arange(5, 12)[None]
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(dtype: torch.dtype) -> Any:
    return make("llama_biases", vocab_size=3072, num_hidden_layers=2).to(torch.bfloat16).to(dtype)


def int4(dtype: torch.dtype) -> Any:
    """INT4 layers with biases, an INT8 embedding and head, and one layer left in floating point."""
    model = make("llama_biases", vocab_size=3072, num_hidden_layers=2, hidden_size=64, head_dim=8, intermediate_size=64)
    return nncf.compress_weights(
        model.to(torch.bfloat16).to(dtype),
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=32,
        dataset=nncf.Dataset([{"input_ids": IDS}]),
        ignored_scope=nncf.IgnoredScope(patterns=[".*down_proj.*"]),
    )


def mamba(dtype: torch.dtype) -> Any:
    return make("mamba2", vocab_size=3072, num_hidden_layers=2).to(dtype)


MODELS = {"plain": plain, "int4": int4, "mamba": mamba}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that could be seen of a model, and of the process around it."""
    seen: dict[str, Any] = {"bmm": torch.bmm, "logging": logging.root.manager.disable, "grad": torch.is_grad_enabled()}
    for path, module in model.named_modules():
        seen[f"{path}: class"] = type(module)
        for name, value in vars(module).items():
            if name == "_modules":
                seen[f"{path}.{name}"] = {key: id(child) for key, child in value.items()}
            elif name in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    seen[f"{path}.{key}"] = tensor is not None and (id(tensor), tensor.dtype, tensor.requires_grad)
                    seen[f"{path}.{key}: values"] = None if tensor is None else tensor.detach().clone()
                    seen[f"{path}.{key}: gradient"] = None if tensor is None else tensor.grad
            elif isinstance(value, dict):
                seen[f"{path}.{name}"] = dict(value)
            else:
                seen[f"{path}.{name}"] = value if isinstance(value, bool | int | float | str) else id(value)
    for name in ("config", "generation_config"):
        if hasattr(model, name):
            seen[name] = {**vars(getattr(model, name))}
    with torch.no_grad():
        seen["output"] = getattr(output := model(IDS), "logits", output).clone()
    return seen


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def check_untouched(model: nn.Module, work: Callable[[], Any], error: type[Exception] | None = None) -> None:
    model.train()
    last = [*model.children()][-1]
    last.eval()
    for place, parameter in enumerate(model.parameters()):
        if parameter.is_floating_point():
            parameter.requires_grad_(place % 2 == 0)
            parameter.grad = torch.ones_like(parameter) if place == 0 else None
    before = snapshot(model)
    if error is None:
        work()
    else:
        with pytest.raises(error, match="half way"):
            work()
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert not [name for name in before if not same(before[name], after[name])]


def fail_half_way(module: nn.Module, *_: Any) -> None:
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise RuntimeError("half way")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fails", [False, True], ids=["whole", "fails"])
@pytest.mark.parametrize("name", MODELS)
def test_optimum_export(name: str, fails: bool, dtype: torch.dtype, tokenizer: Any, tmp_path: Path) -> None:
    model = MODELS[name](dtype)
    if fails:
        model.lm_head.register_forward_pre_hook(fail_half_way)
    error = RuntimeError if fails else None
    check_untouched(model, lambda: ov_ext.optimum.export(model, tokenizer, tmp_path / "ir"), error)
    assert [path.name for path in tmp_path.iterdir()] == ([] if fails else ["ir"])


class Network(nn.Module):
    """Has a buffer that counts calls, and dropout and batch normalization, which depend on the mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.0)
        self.register_buffer("calls", torch.zeros(1, dtype=torch.long))
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(16, 50))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.norm(self.embed(ids).transpose(1, 2)).transpose(1, 2)))


@pytest.mark.parametrize("fails", [False, True], ids=["whole", "fails"])
@pytest.mark.parametrize("method", ["trace", "export"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convert_model(dtype: torch.dtype, method: str, fails: bool) -> None:
    model = Network().to(dtype)
    model.norm.track_running_stats = False
    if fails:
        model.head.register_forward_pre_hook(fail_half_way)
    work = lambda: ov_ext.convert_model(model, example_input=IDS, method=method)  # noqa: E731
    check_untouched(model, work, RuntimeError if fails else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convert_state_space_model(dtype: torch.dtype) -> None:
    model = mamba(dtype)
    check_untouched(model, lambda: convert_state_space_model(model))


def exported(model: Any, tokenizer: Any, folder: Path) -> tuple[np.ndarray, list[Any]]:
    """Logits of the exported model, and the element types and shapes of its large constants."""
    ir = ov.Core().read_model(ov_ext.optimum.export(model, tokenizer, folder, rest=None) / "openvino_model.xml")
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "position_ids": torch.arange(7)[None]}
    inputs = {name: value.numpy() for name, value in inputs.items()} | {"beam_idx": np.zeros(1, np.int32)}
    large = [op for op in ir.get_ops() if op.get_type_name() == "Constant" and np.prod(op.get_output_shape(0)) >= 128]
    grid = sorted((op.get_element_type().get_type_name(), *op.get_output_shape(0)) for op in large)
    return ov.Core().compile_model(ir, "CPU", EXACT)(inputs)["logits"], grid


def test_int4_in_16_bits_is_int4_in_32(tokenizer: Any, tmp_path: Path) -> None:
    """The same codes and scales, and the same numbers; what was left alone stays 16 bits wide."""
    expected, grid = exported(int4(torch.float32), tokenizer, tmp_path / "f32")
    assert [entry[0] for entry in grid].count("i4") == 6 * 2  # all layers of the blocks but down_proj
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float16, "f16")):
        found, types = exported(int4(dtype), tokenizer, tmp_path / short)
        assert types == sorted((short if entry == ("bf16", 64, 64) else entry[0], *entry[1:]) for entry in grid)
        np.testing.assert_array_equal(found, expected)


class Twice(nn.Module):
    """A hook of another make, with a tensor of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(2.0, dtype=dtype))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.factor


def test_other_hooks_still_read_their_weights(tokenizer: Any, tmp_path: Path) -> None:
    from nncf.torch.function_hook import register_post_function_hook, wrap_model

    model = wrap_model(plain(torch.bfloat16))
    name = "model.layers.0.mlp.down_proj.weight"
    register_post_function_hook(model, name, 0, Twice(torch.bfloat16))
    found, _ = exported(model, tokenizer, tmp_path / "ir")
    oracle = plain(torch.bfloat16).float()
    oracle.get_parameter(name).data *= 2
    np.testing.assert_allclose(found, oracle(IDS).logits.detach().numpy(), rtol=1e-4, atol=1e-4)


def test_a_script_keeps_its_mode() -> None:
    with torch.no_grad():
        script = torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0)), torch.ones(1, 4))
    script.train()
    getattr(script, "1").eval()
    before = [module.training for module in script.modules()]
    ov_ext.convert_model(script, example_input=torch.ones(2, 4))
    assert [module.training for module in script.modules()] == before == [True, True, False]


def test_what_cannot_be_copied_is_named() -> None:
    model = Network()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="Network holds something that cannot be copied.*lock"):
        ov_ext.convert_model(model, example_input=IDS)


def test_a_stand_in_shares_weights_and_ties() -> None:
    model = make("llama_tied")
    own = stand_in(model)
    assert own.lm_head.weight is own.model.embed_tokens.weight is not model.lm_head.weight
    pairs = zip(own.parameters(), model.parameters(), strict=True)
    assert all(mine.data_ptr() == theirs.data_ptr() and not mine.requires_grad for mine, theirs in pairs)
    assert own.config is not model.config


def test_offloaded_weights_are_named(tokenizer: Any, tmp_path: Path) -> None:
    model = plain(torch.float32)
    model.model.embed_tokens.to("meta")
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is not in memory.*Load the whole model"):
        ov_ext.optimum.export(model, tokenizer, tmp_path / "ir")
    with pytest.raises(ValueError, match="embed_tokens"):
        ov_ext.convert_model(model, example_input=IDS)
