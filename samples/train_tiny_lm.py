"""Train the small language model that the tests and the samples of this project use.

It proves that the committed model is what it says: a Llama of 6.3 million parameters, trained on the Python source of
packages under permissive licences, that predicts unseen packages better than a Kneser-Ney 5-gram model of the same
text. Output: ``samples/assets`` (weights, tokenizer, calibration and held-out text, provenance).

    python samples/train_tiny_lm.py all --minutes 70

Each step leaves its results in the work folder and is skipped when they are there; an interrupted training continues
where it stopped. One hour on two CPU cores with AMX is enough; a CUDA device is used when there is one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tiny_lm import corpus as text
from tiny_lm.kneser_ney import KneserNey
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import ov_ext

VOCAB_SIZE = 3072
WINDOW = 256  # tokens the model sees at once
MAX_PACKAGE_BYTES = 8_000_000
CALIBRATION_BYTES = 200_000
HELD_OUT_BYTES = 190_000
ASSETS = Path(__file__).parent / "assets"
PROVENANCE = """# Where these files come from

Written by `python samples/train_tiny_lm.py export`. `provenance.json` holds these facts and more, for programs.

`tiny_lm/` is a Llama of {parameters:,} parameters with a byte-level BPE tokenizer. It learned from {tokens:,} tokens
({steps:,} steps, the first {muon_steps:,} with Muon; {minutes} minutes on a {device}) of the {text_tokens:,} tokens
of Python source that the packages below give, in windows of 256 tokens. The 5-gram model counted all of them. The
weights are licensed under Apache-2.0, as this project is.

| model | bits per byte of heldout.txt |
|---|--:|
| tiny_lm, weights in bfloat16, 128 to 256 tokens of context | {model_bits_per_byte} |
| Kneser-Ney 5-gram (interpolated, modified), same training text and tokenizer | {kneser_ney_bits_per_byte} |

`calibration.txt` quotes files of training packages. `heldout.txt` quotes files of packages that are held out whole,
less files that mostly repeat lines of the training text. In both, `<|endoftext|>` follows each file, and comment blocks
at the top of files are left out; their copyright notices are in `provenance.json`, file by file. Quoted text stays
under the licence of its package: see `licenses/`.

| package | version | licence | use | files | bytes |
|---|---|---|---|--:|--:|
{packages}
"""

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
console = Console()
WorkDir = Annotated[Path, typer.Option(help="Folder for the text, the tokens and the checkpoints (about 300 MB).")]
WORK_DIR = Path("build/tiny_lm")


@dataclass(frozen=True)
class Plan:
    """
    How long and how fast to learn.

    The learning rate rises linearly over the first ``warmup`` of the run and falls as a cosine to ``final`` of its
    peak. Give ``steps`` for a reproducible run, ``minutes`` for one that ends on time whatever else the machine does.

    :param steps: optimizer steps; 0 when ``minutes`` counts.
    :param minutes: training time over all interruptions; 0 when ``steps`` counts.
    :param batch: windows a step.
    :param window: tokens a window.
    :param learning_rate: peak.
    :param weight_decay: of matrices, relative to the learning rate.
    :param warmup: fraction 0..1 of the run.
    :param muon: fraction 0..1 of the run after which AdamW takes the decoder's matrices over from Muon.
    :param final: fraction 0..1 of the peak.
    :param seed: of the initial weights and of the order of the text.
    """

    steps: int = 0
    minutes: float = 0.0
    batch: int = 32
    window: int = WINDOW
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    warmup: float = 0.02
    muon: float = 0.55
    final: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps > 0) == (self.minutes > 0):
            raise ValueError(f"Give either steps or minutes, got steps={self.steps} and minutes={self.minutes}.")

    def progress(self, step: int, seconds: float) -> float:
        """
        :param step: optimizer steps done.
        :param seconds: training time spent.
        :return: fraction of the run that is over, at most 1.
        """
        return min(step / self.steps if self.steps else seconds / (60 * self.minutes), 1.0)

    def rate(self, progress: float) -> float:
        """
        :param progress: fraction of the run that is over.
        :return: the learning rate there.
        """
        if progress < self.warmup:
            return self.learning_rate * max(progress / self.warmup, 0.01)
        fall = (progress - self.warmup) / (1 - self.warmup)
        return self.learning_rate * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * fall)))


def model_config(
    vocab_size: int = VOCAB_SIZE, hidden_size: int = 256, layers: int = 6, window: int = WINDOW
) -> LlamaConfig:
    """
    :param vocab_size: number of tokens.
    :param hidden_size: width of the residual stream, a multiple of 128; heads have 64 channels.
    :param layers: decoder layers.
    :param window: longest trained context in tokens.
    :return: the architecture. Input and output embeddings are separate, so that the head can be compressed.
    """
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 64,
        "num_key_value_heads": hidden_size // 128,
        "head_dim": 64,
        "max_position_embeddings": window,
        "tie_word_embeddings": False,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    }
    return LlamaConfig(**settings)


class Training:
    """
    A model, its optimizers and its position in the run, all of which a checkpoint holds.

    Embeddings, norms and convolutions learn with AdamW. Matrices of the decoder begin with Muon, which needs far fewer
    tokens (Jordan et al., "Muon", 2024; learning rates matched as in Liu et al., arXiv:2502.16982, section 2.2), and
    end with AdamW:
    Muon moves all directions of a matrix alike, and what comes out is not like the models that people compress. Of its
    weights, magnitude tells more than Wanda's score does.

    :param config: the architecture.
    :param plan: the run.
    :param tokens: uint16 [tokens], the training stream.
    :param compiled: compile the forward pass and the loss.
    :param build: makes the model of its configuration.
    :raises ValueError: if the text is shorter than one batch.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        plan: Plan,
        tokens: NDArray[np.uint16],
        compiled: bool = True,
        build: Callable[[Any], PreTrainedModel] = AutoModelForCausalLM.from_config,
    ) -> None:
        if len(tokens) <= plan.batch * plan.window:
            raise ValueError(f"One step needs more than {plan.batch * plan.window} tokens, the text has {len(tokens)}.")
        torch.manual_seed(plan.seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.plan = plan
        self.tokens = tokens
        with self.device:
            self.model: Any = build(config)
        matrices = [p for name, p in self.model.named_parameters() if p.ndim == 2 and "layers" in name]
        others = [p for name, p in self.model.named_parameters() if p.ndim != 2 or "layers" not in name]
        embeddings, small = [p for p in others if p.ndim == 2], [p for p in others if p.ndim != 2]
        decay: dict[str, Any] = {"lr": plan.learning_rate, "weight_decay": plan.weight_decay}
        groups = [{"params": embeddings, **decay}, {"params": small, **decay, "weight_decay": 0.0}]
        groups.append({"params": matrices, **decay})
        self.muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **decay)
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.step = self.muon_steps = 0
        self.seconds = 0.0
        # Without instructions for bfloat16 a CPU takes twice as long for it.
        self._half = self.device.type == "cuda" or ov_ext.cpu_info()["features"]["avx512_bf16"]
        self._loss = torch.compile(self._plain_loss, dynamic=False) if compiled else self._plain_loss

    def _plain_loss(self, windows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._half):
            logits = self.model(input_ids=windows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    def windows(self, step: int) -> torch.Tensor:
        """
        :param step: number of the step, from 0.
        :return: int64 [batch, window + 1], a pure function of the step: the stream is cut into windows, whose order is
            drawn anew for each pass.
        """
        batch, window = self.plan.batch, self.plan.window
        count = (len(self.tokens) - 1) // window
        steps = count // batch
        order = np.random.default_rng([self.plan.seed, step // steps]).permutation(count)
        chosen = order[step % steps * batch : (step % steps + 1) * batch]
        rows = np.stack([self.tokens[i * window : (i + 1) * window + 1] for i in chosen]).astype(np.int64)
        return torch.from_numpy(rows).to(self.device)

    def run(self, checkpoint: Path, save_every: float = 60.0) -> Iterator[float]:
        """
        Learn until the plan is fulfilled.

        :param checkpoint: file that is replaced every ``save_every`` seconds, and when the run ends or is interrupted.
        :param save_every: seconds.
        :return: the loss of each step, in nats a token.
        """
        started = time.monotonic() - self.seconds
        saved = time.monotonic()
        between_steps = True
        try:
            while (progress := self.plan.progress(self.step, self.seconds)) < 1.0:
                for group in self.muon.param_groups + self.adamw.param_groups:
                    group["lr"] = self.plan.rate(progress)
                loss = self._loss(self.windows(self.step))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                between_steps = False
                if progress < self.plan.muon:
                    self.muon.step()
                    self.muon_steps += 1
                    self.muon.zero_grad(set_to_none=True)  # AdamW passes over matrices without gradients
                self.adamw.step()
                self.adamw.zero_grad(set_to_none=True)
                self.step += 1
                self.seconds = time.monotonic() - started
                between_steps = True
                yield loss.item()
                if time.monotonic() - saved > save_every:
                    self.save(checkpoint)
                    saved = time.monotonic()
        finally:
            if between_steps:  # an update that was cut short is lost, not saved
                self.save(checkpoint)

    def save(self, path: Path) -> None:
        """
        :param path: checkpoint file, replaced at once.
        """
        state = {
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adamw": self.adamw.state_dict(),
            "step": self.step,
            "muon_steps": self.muon_steps,
            "seconds": self.seconds,
            "plan": asdict(self.plan),
        }
        temporary = path.with_suffix(".part")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """
        :param path: checkpoint file of a run with the same architecture. Its length and rates may have been others.
        :raises ValueError: if its order of the text was another, so that the position in it means nothing here.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name in ("batch", "window", "seed"):
            if state["plan"][name] != getattr(self.plan, name):
                raise ValueError(
                    f"Asked to resume {path} with {name}={getattr(self.plan, name)}, but it was started with "
                    f"{name}={state['plan'][name]}: repeat that value, or delete the checkpoint to start anew."
                )
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        self.step, self.muon_steps, self.seconds = state["step"], state["muon_steps"], state["seconds"]


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, stream: NDArray[np.uint16], size: int, window: int = WINDOW) -> float:
    """
    Every token but the separators is predicted once, from at least half a window of text before it where there is any.

    :param model: the model.
    :param stream: uint16 [tokens], as ``held_out_stream`` gives it.
    :param size: bytes of text in it.
    :param window: longest context in tokens.
    :return: bits a byte of text.
    """
    tokens = torch.from_numpy(stream.astype(np.int64)).to(model.device)
    half = window // 2
    bits = 0.0
    for start in range(0, len(tokens) - 1, half):
        rows = tokens[start : start + window + 1]
        logits = model(input_ids=rows[None, :-1], use_cache=False).logits[0].float()
        loss = F.cross_entropy(logits, rows[1:], reduction="none") * (rows[1:] != model.config.eos_token_id)
        bits += float(loss[half if start else 0 :].sum()) / math.log(2)
        if start + window + 1 >= len(tokens):
            break
    return bits / size


@app.command("corpus")
def corpus_step(work_dir: WorkDir = WORK_DIR) -> None:
    """Collect the text: training.txt, calibration.txt, heldout.txt, and corpus.json, which says what is in them."""
    work_dir.mkdir(parents=True, exist_ok=True)
    if (work_dir / "corpus.json").exists():
        return
    with console.status("Reading packages"):
        corpus = text.build_corpus(MAX_PACKAGE_BYTES)
    quoted = {
        "calibration.txt": text.quote(corpus.training, CALIBRATION_BYTES, text.QUOTED_PACKAGES),
        "heldout.txt": text.quote(corpus.held_out, HELD_OUT_BYTES, (*text.HELD_OUT_PACKAGES, text.STDLIB)),
    }
    for name, documents in {"training.txt": corpus.training, **quoted}.items():
        _write(work_dir / name, text.join(documents).encode())
    record = {
        "max_package_bytes": MAX_PACKAGE_BYTES,
        "training_text": {"files": len(corpus.training), "sha256": _sha256((work_dir / "training.txt").read_bytes())},
        "packages": corpus.describe(),
        "quoted": {name: [document.describe() for document in documents] for name, documents in quoted.items()},
    }
    shutil.rmtree(work_dir / "licenses", ignore_errors=True)
    (work_dir / "licenses").mkdir()
    for name in {document.package for documents in quoted.values() for document in documents}:
        _write(work_dir / "licenses" / f"{name}.txt", corpus.packages[name].licence_text())
    _write(work_dir / "corpus.json", json.dumps(record, indent=1).encode())


@app.command("tokenizer")
def tokenizer_step(work_dir: WorkDir = WORK_DIR) -> None:
    """Train the tokenizer on a quarter of the files and encode all of them: tokenizer.json and tokens.npy."""
    if (work_dir / "tokens.npy").exists():
        return
    documents = _done(work_dir / "training.txt", "corpus").read_text(encoding="utf-8").split(text.SEPARATOR)[:-1]
    with console.status("Training the tokenizer"):
        tokenizer = text.train_tokenizer(documents[::4], VOCAB_SIZE)
        _write(work_dir / "tokenizer.json", tokenizer.to_str().encode())
    with console.status("Encoding"):
        tokens = np.concatenate(list(text.encode(tokenizer, documents)))
        with open(work_dir / "tokens.part", "wb") as file:
            np.save(file, tokens)
        os.replace(work_dir / "tokens.part", work_dir / "tokens.npy")


@app.command("train")
def train_step(
    work_dir: WorkDir = WORK_DIR,
    minutes: Annotated[float, typer.Option(help="Training time over all interruptions; 0 if --steps is given.")] = 0.0,
    steps: Annotated[int, typer.Option(help="Optimizer steps, for a run that can be repeated exactly.")] = 0,
    learning_rate: float = Plan.learning_rate,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes all cores.")] = 0,
) -> None:
    """Train the model, or continue an interrupted training: checkpoint.pt and losses.jsonl."""
    if threads:
        torch.set_num_threads(threads)
    try:
        plan = Plan(steps=steps, minutes=minutes, learning_rate=learning_rate)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    tokens = np.load(_done(work_dir / "tokens.npy", "tokenizer"), mmap_mode="r")
    training = Training(model_config(), plan, tokens)
    checkpoint = work_dir / "checkpoint.pt"
    if checkpoint.exists():
        training.load(checkpoint)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    recent: list[float] = []
    with Progress(*columns, console=console) as bar, open(work_dir / "losses.jsonl", "a", encoding="utf-8") as log:
        task = bar.add_task("compiling", total=1.0)
        for loss in training.run(checkpoint):
            recent.append(loss)
            speed = training.step * plan.batch * plan.window / training.seconds
            description = f"step {training.step}, loss {np.mean(recent[-50:]):.3f}, {speed:.0f} tokens/s"
            bar.update(task, completed=plan.progress(training.step, training.seconds), description=description)
            if training.step % 50 == 0:
                entry = {
                    "step": training.step,
                    "seconds": round(training.seconds),
                    "loss": float(np.mean(recent[-50:])),
                }
                print(json.dumps(entry), file=log, flush=True)


@app.command("ngram")
def ngram_step(work_dir: WorkDir = WORK_DIR) -> None:
    """Count the 5-grams of the training text and measure them on the held-out text (2 GB of memory): ngram.json."""
    if (work_dir / "ngram.json").exists():
        return
    tokens = np.load(_done(work_dir / "tokens.npy", "tokenizer"))
    tokenizer = Tokenizer.from_file(str(work_dir / "tokenizer.json"))
    stream, size = text.held_out_stream(tokenizer, (work_dir / "heldout.txt").read_text(encoding="utf-8"))
    scored = stream != tokenizer.token_to_id(text.SEPARATOR)
    with console.status("Counting n-grams"):
        model = KneserNey(tokens, VOCAB_SIZE)
        bits = -np.log2(model.probabilities(stream)[scored]).sum() / size
    _write(work_dir / "ngram.json", json.dumps({"order": model.order, "bits_per_byte": bits}).encode())


@app.command("export")
def export_step(work_dir: WorkDir = WORK_DIR, output: Path = ASSETS) -> None:
    """Write the model in bfloat16, its tokenizer, the two texts and their provenance."""
    ngram = json.loads(_done(work_dir / "ngram.json", "ngram").read_text())
    state = torch.load(_done(work_dir / "checkpoint.pt", "train"), map_location="cpu", weights_only=True)
    model = LlamaForCausalLM(model_config())
    model.load_state_dict(state["model"])
    model.bfloat16()
    model.generation_config = GenerationConfig(max_new_tokens=64, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(work_dir / "tokenizer.json")),
        bos_token=text.SEPARATOR,
        eos_token=text.SEPARATOR,
        pad_token=text.SEPARATOR,
        clean_up_tokenization_spaces=False,
    )
    folder = output / "tiny_lm"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("calibration.txt", "heldout.txt"):
        _write(output / name, (work_dir / name).read_bytes())
    shutil.copytree(work_dir / "licenses", output / "licenses", dirs_exist_ok=True)

    stream, size = text.held_out_stream(
        tokenizer.backend_tokenizer, (output / "heldout.txt").read_text(encoding="utf-8")
    )
    plan = state["plan"]
    record = {
        "licence_of_weights": "Apache-2.0",
        "model": {
            "parameters": model.num_parameters(),
            "steps": state["step"],
            "muon_steps": state["muon_steps"],
            "tokens": state["step"] * plan["batch"] * plan["window"],
            "text_tokens": len(np.load(work_dir / "tokens.npy", mmap_mode="r")),
            "minutes": round(state["seconds"] / 60, 1),
            "device": "CUDA" if torch.cuda.is_available() else "CPU",
            "finished": Plan(**plan).progress(state["step"], state["seconds"]) >= 1.0,
            "plan": plan,
            "torch": torch.__version__,
        },
        "held_out": {
            "bytes": size,
            "scored_tokens": int((stream != 0).sum()),
            "model_bits_per_byte": round(bits_per_byte(model.float(), stream, size), 4),
            "kneser_ney_bits_per_byte": round(ngram["bits_per_byte"], 4),
        },
        "sha256": {path.relative_to(output).as_posix(): _sha256(path.read_bytes()) for path in _assets(output)},
        **json.loads((work_dir / "corpus.json").read_text(encoding="utf-8")),
    }
    _write(output / "provenance.json", (json.dumps(record, indent=1) + "\n").encode())
    _write(output / "PROVENANCE.md", _provenance_text(record).encode())
    console.print(record["held_out"])


@app.command("all")
def all_steps(work_dir: WorkDir = WORK_DIR, output: Path = ASSETS, minutes: float = 0.0, steps: int = 0) -> None:
    """Run every step that has not been done."""
    corpus_step(work_dir)
    tokenizer_step(work_dir)
    train_step(work_dir, minutes=minutes, steps=steps)
    ngram_step(work_dir)
    export_step(work_dir, output)


def _assets(output: Path) -> list[Path]:
    files = [output / "calibration.txt", output / "heldout.txt"]
    return sorted(files + [path for path in (output / "tiny_lm").iterdir() if path.is_file()])


def _provenance_text(record: dict[str, Any]) -> str:
    rows = [
        f"| {p['name']} | {p['version']} | {p['licence']} | {'held out' if p['held_out'] else 'training'} "
        f"| {p['files']} | {p['bytes']} |"
        for p in record["packages"]
    ]
    return PROVENANCE.format(**record["model"], **record["held_out"], packages="\n".join(rows))


def _done(path: Path, step: str) -> Path:
    if not path.exists():
        raise typer.BadParameter(f"{path} is missing: run the step {step!r} first, or 'all'.")
    return path


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    app()
