"""Every causal language model that transformers makes of a tiny configuration comes back bit for bit."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import nncf_ext
from nncf_ext.weights.int4 import pack

SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64},
    **{"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "is_decoder": True, "rotary_dim": 8},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "first_k_dense_replace": 1},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1},
}
WITHOUT = {"falcon": ["head_dim"], "prophetnet": ["num_hidden_layers"]}
KINDS = sorted({each.model_type for each in transformers.MODEL_FOR_CAUSAL_LM_MAPPING})
# What these need to be made or run at this size is not in the table above.
NOT_TINY = set()  # type: set[str]


def made(kind: str) -> nn.Module | None:
    """A random model in evaluation mode; None where the settings above make none that runs."""
    config_class = transformers.CONFIG_MAPPING[kind]
    try:
        stock = config_class()
        left_out = WITHOUT.get(kind, [])
        settings = {key: each for key, each in SIZES.items() if hasattr(stock, key) and key not in left_out}
        settings |= OWN.get(kind, {})
        if getattr(stock, "layer_types", None) and kind not in OWN:
            settings["layer_types"] = [stock.layer_types[0], stock.layer_types[-1]]
        config = config_class(**settings)
        architecture = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        with torch.device("meta"):
            if sum(each.numel() for each in architecture(config).parameters()) > 3_000_000:
                return None
        torch.manual_seed(0)
        model = architecture(config).eval()
        logits(model)
    except Exception:
        return None
    return model


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 90, (1, 7), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    with torch.no_grad():
        return model(input_ids=ids).logits


def same(one: nn.Module, other: nn.Module, *, buffers: bool) -> None:
    assert type(one) is type(other)
    own, theirs = one.state_dict(), other.state_dict()
    assert own.keys() == theirs.keys()
    for name, each in own.items():
        assert each.dtype == theirs[name].dtype and torch.equal(each, theirs[name]), name
    ids = [{}, {}]  # type: list[dict[int, list[str]]]
    for model, groups in zip((one, other), ids, strict=True):
        for name, each in model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(each), []).append(name)
    assert [*ids[0].values()] == [*ids[1].values()], "ties"
    if buffers:
        mine, others = dict(one.named_buffers()), dict(other.named_buffers())
        assert mine.keys() == others.keys()
        for name, each in mine.items():
            assert each.dtype == others[name].dtype and torch.equal(each, others[name]), name
        assert torch.equal(logits(one), logits(other))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, tmp_path) -> None:
    model = made(kind)
    assert (model is None) == (kind in NOT_TINY)
    if model is None:
        return
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        turned = copy.deepcopy(model).to(dtype)
        plain = tmp_path / f"plain {dtype}"
        nncf_ext.save_pretrained(turned, plain)
        first = nncf_ext.load_pretrained(plain)
        # A plain folder holds no passing buffers: the first model from it has those of transformers.
        same(turned, first, buffers=dtype is torch.float32)
        nncf_ext.save_pretrained(first, plain / "again")
        same(first, nncf_ext.load_pretrained(plain / "again"), buffers=True)
        layer = next(
            (
                path
                for path, each in turned.named_modules()
                if type(each) is nn.Linear and each.in_features % 64 == 0 and each is not turned.get_output_embeddings()
            ),
            None,
        )
        if layer is None:
            continue
        rows, columns = turned.get_parameter(f"{layer}.weight").shape
        codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
        pack(turned, f"{layer}.weight", codes, torch.full((rows, columns // 64), 2**-7).half())
        nncf_ext.save_pretrained(turned, tmp_path / f"int4 {dtype}")
        same(turned, nncf_ext.load_pretrained(tmp_path / f"int4 {dtype}"), buffers=True)
