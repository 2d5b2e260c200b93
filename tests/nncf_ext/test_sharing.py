"""Which tensors are one: the same memory seen the same way, whatever the parameter objects are."""

import nncf
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import nncf_ext
from nncf_ext.weights.sharing import names_of_parameters, place_of, tie

SPARSE = nncf_ext.MergeMode.SPARSE


class Views(nn.Module):
    """Three views of one memory, a parameter with two names, and one that another object sees as well."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.arange(12.0)
        self.q, self.k, self.v = (nn.Parameter(part) for part in whole.chunk(3))
        self.tied = self.q
        self.same = nn.Parameter(self.k.detach())
        self.turned = nn.Parameter(self.v.detach().view(2, 2))


def test_equal_memory_is_not_an_equal_tensor() -> None:
    model = Views()
    names = names_of_parameters(model)
    found = {name: names[id(each)] for name, each in model.named_parameters(remove_duplicate=False)}
    assert found["q"] == found["tied"] == ["q", "tied"] and found["k"] == found["same"] == ["k", "same"]
    assert found["v"] == ["v"] and found["turned"] == ["turned"]
    empty, meta = torch.empty(0), torch.empty(3, device="meta")
    assert place_of(empty) != place_of(torch.empty(0)) and place_of(meta) != place_of(torch.empty(3, device="meta"))
    tie(model, {"same": "k", "no such": "k", "v": "neither"})
    assert model.same is model.k


@pytest.mark.parametrize("how", ["configuration", "by hand", "other object"])
def test_an_adapter_on_a_tied_head_is_refused(tiny_llama, how) -> None:
    model = tiny_llama(tie_word_embeddings=how == "configuration")
    if how == "by hand":
        model.lm_head.weight = model.model.embed_tokens.weight
    elif how == "other object":
        model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach())
    with pytest.warns(UserWarning) if how == "configuration" else torch.no_grad():
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    before = model.model.embed_tokens.weight.clone()
    with pytest.raises(nncf.ValidationError, match="lm_head is shared .model.embed_tokens.weight, lm_head.weight."):
        nncf_ext.merge(adapted, SPARSE)
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_an_untied_head_is_merged_and_the_embedding_stays(tiny_llama, logits_of) -> None:
    model = tiny_llama()
    embedding = model.model.embed_tokens.weight.clone()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)).eval()
    merged = nncf_ext.merge(adapted, SPARSE)
    torch.testing.assert_close(logits_of(merged), logits_of(adapted), rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.model.embed_tokens.weight, embedding)


def test_one_layer_in_two_places_is_merged_once(tiny_llama, logits_of) -> None:
    model = tiny_llama(layers=3)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    adapted = get_peft_model(model, LoraConfig(target_modules=["up_proj"], init_lora_weights=False)).eval()
    merged = nncf_ext.merge(adapted, SPARSE)
    torch.testing.assert_close(logits_of(merged), logits_of(adapted), rtol=1e-4, atol=1e-4)
    assert merged.model.layers[2].mlp is merged.model.layers[0].mlp
