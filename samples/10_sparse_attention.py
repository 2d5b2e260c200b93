"""What does attention over pruned keys and values cost a real model, by position in long documents, and does it still
find what was said long ago?

Takes a folder, such as one of `python -m samples.real_models smollm2 smollm2`, or the committed model with --quick. A
document is read densely, as our operation reads prompts; then keys and values are kept in each way by the rule of
`SparseKVAttention` (in torch, in float32), and the tokens that follow are predicted. Prints the loss above the dense
one, paired, for each position; the shares of codes that were planted in a text and are found again; the highest level
that costs less than 1 % and less than a 4-bit cache. Draws the loss over levels of keys and of values. What was
measured is kept, so an interrupted run goes on.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from evidence.show import quiet, table

SAMPLES = Path(__file__).parent
sys.path.insert(0, str(SAMPLES.parent))
LEVELS = (0.0, 0.3, 0.5, 0.7, 0.9)
VALUES = ("int8", "int4")
CALIBRATED = 2  # texts that levels by layer are found on
SINK, RECENT = 4, 64
STOCK = ("u8", "u4")
Arm = tuple[str, float, float]  # how it is stored, levels of keys and of values
SYLLABLES = ("ka", "lo", "mi", "ru", "te", "vo", "xi", "za", "ne", "bu", "dar", "fel", "gon", "hul")


def main(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder.")] = SAMPLES / "assets/tiny_lm",
    out: Annotated[Path, typer.Option(help="Folder for what was measured.")] = SAMPLES / "out" / "10",
    position: Annotated[list[int] | None, typer.Option(help="Tokens that are read before; repeatable.")] = None,
    documents: Annotated[int, typer.Option(help="Held-out documents.")] = 2,
    predicted: Annotated[int, typer.Option(help="Tokens that are predicted at each position.")] = 128,
    planted: Annotated[int, typer.Option(help="Codes planted in each text.")] = 10,
    texts: Annotated[int, typer.Option(help="Texts with codes.")] = 10,
    filler: Annotated[int, typer.Option(help="Tokens of other text around the codes.")] = 600,
    grid: Annotated[int, typer.Option(help="Position at which all pairs of levels are measured.")] = 2048,
    within: Annotated[
        float, typer.Option(help="Find levels of each layer that diverge by so many nats; 0: do not.")
    ] = 0,
    quick: Annotated[bool, typer.Option(help="A few hundred tokens: shows that it works.")] = False,
) -> None:
    quiet()
    positions = sorted(position or [512, 2048, 4096, 8192])
    if quick:
        positions, documents, predicted, planted, texts, filler, grid = [160, 320], 1, 48, 6, 1, 200, 160
    import torch
    from evidence.text import windows
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from samples.real_models.texts import english

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    most = lm.config.max_position_embeddings
    positions = sorted({min(each, most - predicted) for each in positions})
    tokenizer = AutoTokenizer.from_pretrained(model)
    same = sorted(
        {(values, level, level) for values in VALUES for level in LEVELS} | {(kind, 0.0, 0.0) for kind in STOCK}
    )
    pairs = [(values, k, v) for values in VALUES for k in LEVELS for v in LEVELS]
    weights = b"".join(hashlib.sha256(part.read_bytes()).digest() for part in sorted(model.glob("*.safetensors")))
    kept = Kept(out / f"{model.name}-{hashlib.sha256(weights).hexdigest()[:8]}-{predicted}-{filler}.json")

    rows = windows(tokenizer, english()[1], positions[-1] + predicted, documents)
    for number, ids in enumerate(rows):
        wanted = {(at, arm) for at in positions for arm in same} | {(grid, arm) for arm in pairs if grid in positions}
        missing = {each for each in wanted if not kept.has("loss", number, *each)}
        if missing:
            read = Reading(lm, ids[: positions[-1]])
            for at in positions:
                following = ids[at : at + predicted]
                kept.put(losses(lm, read.dense(at), following), "loss", number, at, DENSE)
                for arm, past in read.pasts(at, [arm for each, arm in missing if each == at]):
                    kept.put(losses(lm, past, following), "loss", number, at, arm)
    for number in range(texts):
        if not all(kept.has("found", number, filler, arm) for arm in (*same, DENSE)):
            ids, questions, answers = with_codes(tokenizer, english()[0], filler, planted, number)
            read = Reading(lm, ids)
            kept.put(hits(lm, read.dense(len(ids)), questions, answers), "found", number, filler, DENSE)
            for arm, past in read.pasts(len(ids), same):
                kept.put(hits(lm, past, questions, answers), "found", number, filler, arm)
    report(kept, model.name, positions, len(rows), texts, filler, same, lm.config)
    if grid in positions:
        draw(kept, out / f"{model.name}.png", grid, len(rows))
        print(f"Picture: {out / f'{model.name}.png'}")
    if within:
        by_layer(
            lm, windows(tokenizer, english()[0], positions[0] + 32, CALIBRATED), rows, positions[0], predicted, within
        )


DENSE: Arm = ("dense", 0.0, 0.0)


class Kept:
    """Results in a file, by what they are of."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._all: dict[str, list[float]] = json.loads(file.read_text()) if file.is_file() else {}

    @staticmethod
    def _key(what: str, number: int, at: int, arm: Arm) -> str:
        return f"{what} {number} {at} {arm[0]} {arm[1]:g} {arm[2]:g}"

    def has(self, what: str, number: int, at: int, arm: Arm) -> bool:
        return self._key(what, number, at, arm) in self._all

    def get(self, what: str, number: int, at: int, arm: Arm) -> list[float]:
        return self._all[self._key(what, number, at, arm)]

    def put(self, values: list[float], what: str, number: int, at: int, arm: Arm) -> None:
        self._all[self._key(what, number, at, arm)] = values
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.with_suffix(".part").write_text(json.dumps(self._all))
        self._file.with_suffix(".part").replace(self._file)


class Reading:
    """
    Keys and values of a text that was read densely, by layer.

    :param lm: The model.
    :param ids: ``[tokens]``.
    """

    def __init__(self, lm: Any, ids: Any) -> None:
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=lm.config)
        with torch.no_grad():
            for part in ids.split(1024):
                lm.model(input_ids=part[None], past_key_values=cache)
        self._k = [layer.keys for layer in cache.layers]
        self._v = [layer.values for layer in cache.layers]

    def dense(self, tokens: int) -> Any:
        """:return: A cache of the first tokens, as they are."""
        return past_of([k[:, :, :tokens] for k in self._k], [v[:, :, :tokens] for v in self._v])

    @property
    def shape(self) -> tuple[int, int]:
        """Heads, and elements of each."""
        return self._k[0].shape[1], self._k[0].shape[3]

    def by_layer(self, levels: Any) -> Any:
        """:return: A cache of all tokens, with levels of keys and values for each layer, in 8 bits."""
        layers = list(zip(self._k, self._v, levels, strict=True))
        return past_of(
            [stored(k, "int8", of_k) for k, _, (of_k, _) in layers],
            [stored(v, "int8", of_v) for _, v, (_, of_v) in layers],
        )

    def pasts(self, tokens: int, arms: list[Arm]) -> Iterator[tuple[Arm, Any]]:
        """:return: For each arm a cache of the first tokens; keys and values of one level are made once."""
        for kind in sorted({arm[0] for arm in arms}):
            mine = [arm for arm in arms if arm[0] == kind]
            of_keys, of_values = (
                {level: [stored(x[:, :, :tokens], kind, level) for x in layers] for level in {arm[at] for arm in mine}}
                for at, layers in ((1, self._k), (2, self._v))
            )
            for arm in mine:
                yield arm, past_of(of_keys[arm[1]], of_values[arm[2]])


def past_of(keys: list[Any], values: list[Any]) -> Any:
    from transformers import DynamicCache

    return DynamicCache(list(zip(keys, values, strict=True)))


def stored(x: Any, kind: str, level: float) -> Any:
    """
    :param x: ``[1, heads, tokens, head_dim]``.
    :param kind: ``"int8"`` or ``"int4"``: packed but for the first and the last tokens; ``"u8"`` or ``"u4"``: what
        stock OpenVINO's cache does, every token and head between its least and greatest element.
    :param level: Fraction of each token that is pruned.
    :return: What attention sees.
    """
    import nncf_ext

    if kind in STOCK:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        step = ((high - low) / (255 if kind == "u8" else 15)).clamp_min(1e-20)
        return ((x - low) / step).round() * step + low
    return nncf_ext.prune_tokens(x, level, values=kind, sink=SINK, recent=RECENT)


def losses(lm: Any, past: Any, following: Any) -> list[float]:
    """:return: Loss of each token but the first, nats: the first only says where the past ends."""
    import torch

    with torch.no_grad():
        logits = lm(input_ids=following[None], past_key_values=past).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], following[1:], reduction="none").tolist()


def with_codes(tokenizer: Any, text: str, filler: int, planted: int, seed: int) -> tuple[Any, list[Any], list[Any]]:
    """
    :return: The text with codes in it ``[tokens]``; for each code a question ``[tokens]`` and its answer ``[4]``.
    """
    import random

    import torch

    rng = random.Random(seed)
    ids = tokenizer(text)["input_ids"]
    start = rng.randrange(max(1, len(ids) - filler))
    body = ids[start : start + filler]
    made: list[int] = []
    questions, answers = [], []
    for number in range(planted):
        name = "".join(rng.sample(SYLLABLES, 3)).capitalize()
        made += body[number * filler // planted : (number + 1) * filler // planted]
        code = f" {rng.randrange(1000, 10000)}"
        said = tokenizer(f"\nThe code of {name} is", add_special_tokens=False)["input_ids"]
        digits = tokenizer(code, add_special_tokens=False)["input_ids"]
        made += [*said, *digits, *tokenizer(".\n", add_special_tokens=False)["input_ids"]]
        questions.append(torch.tensor(said + digits[:-1]))
        answers.append(torch.tensor(digits))
    return torch.tensor(made), questions, answers


def hits(lm: Any, past: Any, questions: list[Any], answers: list[Any]) -> list[float]:
    """:return: Of each question, asked right behind the text, whether all tokens of the answer are the likeliest."""
    import torch

    before = past.get_seq_length()
    ids = torch.cat(questions)
    mask = torch.full((len(ids), before + len(ids)), torch.finfo(torch.float32).min)
    mask[:, :before] = 0
    places, at = [], 0
    for each in questions:  # none sees another one
        size = len(each)
        mask[at : at + size, before + at : before + at + size].triu_(1)
        places.append(before + torch.arange(size))
        at += size
    options = {"attention_mask": mask[None, None], "position_ids": torch.cat(places)[None]}
    with torch.no_grad():
        likeliest = lm(input_ids=ids[None], past_key_values=past, **options).logits[0].argmax(-1)
    found, at = [], 0
    for each, answer in zip(questions, answers, strict=True):
        at += len(each)
        found.append(float(torch.equal(likeliest[at - len(answer) : at], answer)))
    return found


def report(
    kept: Kept, name: str, positions: list[int], documents: int, texts: int, filler: int, arms: list[Arm], config: Any
) -> None:
    """Prints the table, and what it says about a default."""
    import numpy as np

    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def above(arm: Arm, at: int) -> Any:
        pairs = [(kept.get("loss", n, at, arm), kept.get("loss", n, at, DENSE)) for n in range(documents)]
        return np.concatenate([np.subtract(*pair) for pair in pairs])

    dense = {at: float(np.mean([kept.get("loss", n, at, DENSE) for n in range(documents)])) for at in positions}

    def rate(arm: Arm) -> str:
        found = np.concatenate([kept.get("found", n, filler, arm) for n in range(texts)])
        return f"{int(found.sum())} of {len(found)}"

    rows, worst = [], {}
    for arm in sorted(arms, key=lambda each: (each[0] not in STOCK, each[0] != "int8", each[1])):
        cells = []
        for at in positions:
            each = above(arm, at)
            cells.append(f"{each.mean():+.4f} ±{1.96 * each.std(ddof=1) / len(each) ** 0.5:.4f}")
        everywhere = np.concatenate([above(arm, at) for at in positions]).mean()
        worst[arm] = everywhere / np.mean(list(dense.values()))
        label = f"stock {arm[0]}" if arm[0] in STOCK else f"{arm[0]}, {arm[1]:.0%}"
        rows.append([label, f"{token_bytes(arm, dim):.0f}", *cells, f"{worst[arm]:+.2%}", rate(arm)])
    rows.insert(0, ["dense", "", *(f"{dense[at]:.3f}" for at in positions), "", rate(DENSE)])
    headings = ["", "bytes", *(f"at {at}" for at in positions), "all", "codes found"]
    table(f"{name}: nats a token above the dense cache, by tokens read before", headings, rows)
    limit = min(0.01, worst[("u4", 0.0, 0.0)])
    good = [arm for arm in arms if arm[0] not in STOCK and worst[arm] < limit]
    if good:
        best = min(good, key=lambda arm: token_bytes(arm, dim))
        print(
            f"Below 1 % and below stock u4 ({limit:.2%}), with the fewest bytes: {best[0]} with {best[1]:.0%} pruned."
        )
    else:
        print(f"No level is below 1 % and below stock u4 ({limit:.2%}).")


def by_layer(lm: Any, items: Any, rows: Any, at: int, predicted: int, within: float) -> None:
    """Finds levels on other text than it judges them on, beside one level everywhere."""
    import nncf
    import numpy as np

    import nncf_ext

    dataset = nncf.Dataset([{"input_ids": ids[None]} for ids in items])
    found = nncf_ext.find_attention_levels(lm, dataset, max_divergence=within, predicted=32, sink=SINK, recent=RECENT)
    print(found)
    same = {f"{level:.0%} everywhere": [(level, level)] * len(found.layers) for level in LEVELS}
    texts = []
    for ids in rows:
        read, following = Reading(lm, ids[:at]), ids[at : at + predicted]
        dense = losses(lm, read.dense(at), following)
        texts.append(
            [
                np.subtract(losses(lm, read.by_layer(levels), following), dense)
                for levels in (*same.values(), found.layers.values())
            ]
        )
    heads, dim = read.shape
    lines = []
    for number, (name, levels) in enumerate({**same, f"found within {within:g}": list(found.layers.values())}.items()):
        size = sum(heads * token_bytes(("int8", *each), dim) for each in levels)
        lines.append([name, f"{size:.0f}", f"{np.concatenate([text[number] for text in texts]).mean():+.4f}"])
    table(f"Levels by layer, {len(items)} texts; at {at}", ["", "bytes of a token", "nats above dense"], lines)


def token_bytes(arm: Arm, dim: int) -> float:
    """:return: Bytes of a key and value of one head."""
    kind, k, v = arm
    if kind in STOCK:
        return 2 * (dim * (1 if kind == "u8" else 0.5) + 8)
    kept = sum(dim - int(dim * level) for level in (k, v))
    return 2 * dim / 8 + kept * (1 if kind == "int8" else 0.5) + 8


def draw(kept: Kept, file: Path, at: int, documents: int) -> None:
    """Heat maps of the loss above the dense one, keys against values."""
    import matplotlib
    import numpy as np

    matplotlib.use("agg")
    from matplotlib import pyplot

    dense = np.mean([kept.get("loss", n, at, DENSE) for n in range(documents)])
    figure, axes = pyplot.subplots(1, len(VALUES), figsize=(11, 5))
    for axis, values in zip(axes, VALUES, strict=True):
        shown = np.array(
            [
                [
                    100 * (np.mean([kept.get("loss", n, at, (values, k, v)) for n in range(documents)]) / dense - 1)
                    for v in LEVELS
                ]
                for k in LEVELS
            ]
        )
        axis.imshow(shown, cmap="viridis_r", vmin=0, vmax=10)
        for (row, column), value in np.ndenumerate(shown):
            axis.text(column, row, f"{value:+.1f}", ha="center", va="center", color="white" if value > 5 else "black")
        axis.set_xticks(range(len(LEVELS)), [f"{level:.0%}" for level in LEVELS])
        axis.set_yticks(range(len(LEVELS)), [f"{level:.0%}" for level in LEVELS])
        axis.set_xlabel("pruned of each value")
        axis.set_ylabel("pruned of each key")
        axis.set_title(f"{values}: loss above the dense one at {at} tokens, %")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
