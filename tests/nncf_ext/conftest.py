"""Tiny models and data, made anew for every test that asks for them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import nncf
import pytest
import torch
from torch import nn

from nncf_ext.pruning.greedy import Elimination

VOCABULARY = 320


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices run faster on one thread, and other tests keep the second core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_llama() -> Callable[..., nn.Module]:
    """Maker of a seeded random Llama: hidden 128, MLP 256, 2 heads, 1 key/value head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(layers: int = 2, **settings) -> nn.Module:
        torch.manual_seed(1)
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
        config = LlamaConfig(
            num_hidden_layers=layers,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            **{**sizes, "tie_word_embeddings": False, **settings},
        )
        model = LlamaForCausalLM(config).eval()
        # Large weights: with the usual 0.02 a random block hardly changes its input, and all methods look alike.
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.mul_(4)
        return model

    return make


@pytest.fixture
def folder(tiny_llama, tmp_path) -> Path:
    """A model folder with a byte-level tokenizer of the embedding's size, and a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    source = tmp_path / "model"
    tiny_llama().save_pretrained(source)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(source)
    (tmp_path / "text.txt").write_text("A quick brown fox jumps over lazy dogs. " * 40)
    return source


@pytest.fixture
def token_items() -> list[dict[str, torch.Tensor]]:
    """Six inputs of different lengths for a language model."""
    generator = torch.Generator().manual_seed(2)
    lengths = (24, 17, 32, 9, 28, 21)
    return [{"input_ids": torch.randint(0, VOCABULARY, (1, length), generator=generator)} for length in lengths]


@pytest.fixture
def token_dataset(token_items) -> nncf.Dataset:
    return nncf.Dataset(token_items)


@pytest.fixture
def logits_of(token_items) -> Callable[[nn.Module], torch.Tensor]:
    """The logits of a model on the first item."""

    def run(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(**token_items[0]).logits

    return run


class Stopped(BaseException):
    """Ends a search as a signal would."""


@pytest.fixture
def stopped_search() -> Callable[[int], AbstractContextManager[None]]:
    """A context in which a search for what to remove ends after so many steps."""

    @contextmanager
    def stopped(after: int) -> Iterator[None]:
        step, done = Elimination.step, []

        def stop(self, *arguments):
            if len(done) == after:
                raise Stopped
            done.append(step(self, *arguments))
            return done[-1]

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(Elimination, "step", stop)
            yield

    return stopped
