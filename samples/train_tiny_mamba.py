"""Train the small Mamba-2 language model that the tests and the samples of this project use.

It proves that the committed state-space model is what it says: a Mamba-2 of 3.4 million parameters, trained on the text
that ``train_tiny_lm.py`` collects, with the committed tokenizer. Output: ``samples/assets/tiny_mamba2``.

    python samples/train_tiny_mamba.py

An interrupted training continues where it stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tiny_lm import corpus as text
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from train_tiny_lm import ASSETS, VOCAB_SIZE, Plan, Training, bits_per_byte, corpus_step
from transformers import GenerationConfig, Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

CHUNK = 64  # tokens that the scan takes at once
WORK_DIR = Path("build/tiny_mamba2")
PROVENANCE = """# Where these files come from

Written by `python samples/train_tiny_mamba.py`. A Mamba-2 of {parameters:,} parameters with the tokenizer of `tiny_lm`.
It learned from {tokens:,} tokens ({steps:,} steps, {minutes} minutes on a {device}) of {text_tokens:,} tokens of Python
source: the packages that `../PROVENANCE.md` lists, in the versions that were installed. The weights are licensed under
Apache-2.0, as this project is. Bits per byte of `../heldout.txt`: {bits_per_byte}.
"""


def model_config() -> Mamba2Config:
    """
    :return: The architecture: twelve layers of 12 heads with 32 channels and 32 states. Embeddings are tied.
    """
    return Mamba2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        num_hidden_layers=12,
        state_size=32,
        head_dim=32,
        num_heads=12,
        n_groups=1,
        chunk_size=16,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


class FastMixer(Mamba2Mixer):
    """
    The same function with the scan as matrix products over chunks, for training on a CPU: transformers' own scan, where
    it has no CUDA kernels, makes a tensor with a number for each pair of tokens, head and state.

    Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6.
    """

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """
        :param hidden_states: ``[sequences, tokens, hidden]``; tokens are a multiple of :data:`CHUNK`.
        :return: Of the same shape.
        """
        states, tokens = self.ssm_state_size, hidden_states.shape[1]
        width = self.intermediate_size
        gate, mixed, dt = self.in_proj(hidden_states).split([width, self.conv_dim, self.num_heads], dim=-1)
        mixed = self.act(self.conv1d(mixed.transpose(1, 2))[..., :tokens].transpose(1, 2))
        x, b, c = mixed.split([width, states, states], dim=-1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim)).float()
        dt = F.softplus(dt.float() + self.dt_bias)
        y = scan(x * dt.unsqueeze(-1), -dt * self.A_log.float().exp(), b.float(), c.float())
        y = (y + x * self.D.unsqueeze(-1)).flatten(2)
        return self.out_proj(self.norm(y, gate).to(hidden_states.dtype))


def scan(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """
    ``state = exp(log_decay) * state + outer(b, x); y = c @ state`` from token to token.

    :param x: ``[sequences, tokens, heads, channels]``.
    :param log_decay: ``[sequences, tokens, heads]``.
    :param b: What each token writes, ``[sequences, tokens, states]``.
    :param c: What it reads, likewise.
    :return: ``y``, like x.
    """
    x, log_decay, b, c = (each.unflatten(1, (-1, CHUNK)) for each in (x, log_decay, b, c))
    x, until = (
        x.permute(1, 0, 3, 2, 4),
        log_decay.permute(1, 0, 3, 2).cumsum(-1),
    )  # [chunks, sequences, heads, tokens, ...]
    b, c = b.transpose(0, 1).unsqueeze(2), c.transpose(0, 1).unsqueeze(2)
    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).triu(1)
    decay = (until.unsqueeze(-1) - until.unsqueeze(-2)).masked_fill(future, -torch.inf).exp()
    y = (c @ b.transpose(-1, -2) * decay) @ x
    written = (b * (until[..., -1:] - until).exp().unsqueeze(-1)).transpose(-1, -2) @ x
    state, states = torch.zeros_like(written[0]), []
    for whole, new in zip(until[..., -1].exp(), written, strict=True):
        states.append(state)
        state = state * whole[..., None, None] + new
    y = y + (c * until.exp().unsqueeze(-1)) @ torch.stack(states)
    return y.permute(1, 0, 3, 2, 4).flatten(1, 2)


@contextmanager
def fast(model: Any) -> Iterator[Any]:
    """
    Within the context the mixers of a Mamba-2 compute by matrix products, with the same weights, and cannot generate.

    :param model: The model, whole or cut.
    :return: The model.
    """
    blocks = [block for block in model.backbone.layers if isinstance(block.mixer, Mamba2Mixer)]
    slow = [block.mixer for block in blocks]
    for block, mixer in zip(blocks, slow, strict=True):
        block.mixer = FastMixer(model.config, mixer.layer_idx)
        for name, module in mixer.named_children():
            setattr(block.mixer, name, module)
        for name, parameter in mixer.named_parameters(recurse=False):
            setattr(block.mixer, name, parameter)
        block.mixer.train(mixer.training)
    try:
        yield model
    finally:
        for block, mixer in zip(blocks, slow, strict=True):
            block.mixer = mixer


def encode(work_dir: Path) -> np.ndarray:
    """
    :param work_dir: Where training.txt lies, and tokens.npy is kept.
    :return: The training text, uint16 ``[tokens]``.
    """
    file = work_dir / "tokens.npy"
    if not file.exists():
        tokenizer = Tokenizer.from_file(str(ASSETS / "tiny_lm" / "tokenizer.json"))
        documents = (work_dir / "training.txt").read_text(encoding="utf-8").split(text.SEPARATOR)[:-1]
        aside = work_dir / "tokens.part.npy"
        np.save(aside, np.concatenate(list(text.encode(tokenizer, documents))))
        aside.replace(file)
    return np.load(file, mmap_mode="r")


def export(training: Training, folder: Path) -> None:
    """
    :param training: A finished training.
    :param folder: Where the model in bfloat16, its tokenizer and their provenance go.
    """
    model = Mamba2ForCausalLM(model_config())
    model.load_state_dict(training.model.state_dict())
    model.bfloat16()
    model.generation_config = GenerationConfig(max_new_tokens=64, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "tiny_lm" / name, folder / name)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stream, size = text.held_out_stream(tokenizer, (ASSETS / "heldout.txt").read_text(encoding="utf-8"))
    facts = {
        "parameters": model.num_parameters(),
        "tokens": training.step * training.plan.batch * training.plan.window,
        "steps": training.step,
        "minutes": round(training.seconds / 60, 1),
        "device": "CUDA" if torch.cuda.is_available() else "CPU",
        "text_tokens": len(training.tokens),
    }
    with fast(model.float().eval()):
        facts["bits_per_byte"] = round(bits_per_byte(model, stream, size), 4)
    (folder / "provenance.json").write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "PROVENANCE.md").write_text(PROVENANCE.format(**facts))
    Console().print(facts)


def main(
    work_dir: Annotated[Path, typer.Option(help="Folder for the text and the checkpoint.")] = WORK_DIR,
    output: Annotated[Path, typer.Option(help="Folder for the model.")] = ASSETS / "tiny_mamba2",
    steps: Annotated[int, typer.Option(help="Optimizer steps over all interruptions, each of 4,096 tokens.")] = 1500,
) -> None:
    """Collect the text, train or continue, and write the model."""
    corpus_step(work_dir)
    tokens = encode(work_dir)
    training = Training(model_config(), Plan(steps=steps, batch=16, learning_rate=4e-3), tokens)
    checkpoint = work_dir / "checkpoint.pt"
    if checkpoint.exists():
        training.load(checkpoint)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with fast(training.model), Progress(*columns) as bar:
        task = bar.add_task("compiling", total=1.0)
        for loss in training.run(checkpoint):
            done = training.plan.progress(training.step, training.seconds)
            bar.update(task, completed=done, description=f"step {training.step}, loss {loss:.3f}")
    export(training, output)


if __name__ == "__main__":
    typer.run(main)
