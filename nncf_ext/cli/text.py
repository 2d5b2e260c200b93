"""Text as windows of tokens: from files, folders of datasets, and the Hugging Face hub."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

SOURCES = "UTF-8 text; JSON Lines (.jsonl), .parquet or .arrow; the folder of a dataset; or its name on the hub"
Samples = Annotated[int, typer.Option(help="Windows of text to use, spread over the text.")]
Window = Annotated[int | None, typer.Option(help="Tokens in a window; default: the model's, 2048 at most.")]
DatasetConfig = Annotated[str | None, typer.Option(help="Configuration of a dataset of the hub, such as en.")]
Split = Annotated[str | None, typer.Option(help="Split of a dataset; default: train, or the only one.")]
Column = Annotated[
    str | None,
    typer.Option(help="Where a dataset or JSON Lines have their text, or chats; default: text, messages."),
]

MOST_UNKNOWN = 0.1
"""Share of tokens: more of them is text in another script, not a rare sign here and there."""

_COLUMNS = ("text", "messages", "conversations")  # looked for in this order
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """
    Where text comes from.

    :param name: A file, a folder that holds a dataset, or a name on the hub.
    :param config: Of a dataset with several configurations, which.
    :param split: Which part of a dataset; None: ``train``, or the only one.
    :param column: Which column, or field of JSON Lines; None: the first that is there of text, messages, conversations.
        Strings are text, lists of ``{"role": .., "content": ..}`` are chats, written by the tokenizer's chat template.
    :param purpose: What the text is for, for messages.
    """

    name: str
    config: str | None = None
    split: str | None = None
    column: str | None = None
    purpose: str = "calibration"


def read_windows(source: Source, tokenizer: Any, samples: int, window: int | None, model: Any) -> list[dict[str, Any]]:
    """
    Cuts a text into windows of equal length, as many as asked for. They are spread evenly over a file of text or JSON
    Lines; of a dataset, rows in random order (seed 0) are read until there are enough.

    :param source: Where the text is.
    :param tokenizer: The model's tokenizer.
    :param samples: Number of windows, at least 1.
    :param window: Their length, tokens; None: the longest the model takes, 2048 at most.
    :param model: The model.
    :return: Model inputs: ``input_ids`` ``[1, window]`` int64 each.
    :raises nncf.ValidationError: There is no such text, it is too short, it holds a token that the model has no row
        for, or the tokenizer has no token for much of it.
    """
    import nncf
    import torch

    if samples < 1:
        msg = f"--samples is a number of windows, at least 1; got {samples}."
        raise nncf.ValidationError(msg)
    longest = getattr(model.config, "max_position_embeddings", 2048)
    length = min(longest, 2048) if window is None else window
    if not 1 <= length <= longest:
        msg = f"--window is a number of tokens from 1 to the model's {longest}; got {length}."
        raise nncf.ValidationError(msg)
    tokens: list[int] = []
    for text in _texts(source, tokenizer):
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) >= samples * length:
            break
    count = min(samples, len(tokens) // length)
    if count < 1:
        msg = f"{source.name} gives {len(tokens)} tokens, less than one window of {length}. "
        msg += "Use a longer text or --window."
        raise nncf.ValidationError(msg)
    stride = (len(tokens) - length) // max(count - 1, 1)
    starts = [index * max(stride, length) for index in range(count)]
    windows = [tokens[start : start + length] for start in starts]
    rows: int = model.get_input_embeddings().weight.shape[0]
    unknown = next((token for each in windows for token in each if token >= rows), None)
    if unknown is not None:
        msg = (
            f"{source.name} holds the token {tokenizer.convert_ids_to_tokens(unknown)!r}, number {unknown}, and the "
            f"model's embedding has {rows} rows. Take that token out of the text, or use the model's own tokenizer."
        )
        raise nncf.ValidationError(msg)
    _check_language(windows, source, tokenizer)
    return [{"input_ids": torch.tensor([each])} for each in windows]


def _check_language(windows: Sequence[Sequence[int]], source: Source, tokenizer: Any) -> None:
    """What a tokenizer has no token for, all its windows say the same about."""
    import nncf

    if tokenizer.unk_token_id is None:  # one that spells everything, byte by byte where it must
        return
    unknown = sum(list(each).count(tokenizer.unk_token_id) for each in windows)
    share = unknown / sum(map(len, windows))
    if share > MOST_UNKNOWN:
        msg = (
            f"The tokenizer has no token for {share:.0%} of {source.name}: there stands {tokenizer.unk_token}. At most "
            f"{MOST_UNKNOWN:.0%} may be unknown. Take {source.purpose} text in a language that the model knows."
        )
        raise nncf.ValidationError(msg)


def _texts(source: Source, tokenizer: Any) -> Iterator[str]:
    """All of a file at once, or the rows of a dataset."""
    import nncf

    path = Path(source.name)
    is_table = path.is_dir() or path.suffix in _TABLES
    if path.exists() and not is_table:
        rows_only = {"--split": source.split, "--dataset-config": source.config}
        if path.suffix != ".jsonl":
            rows_only["--column"] = source.column
        if given := [name for name, value in rows_only.items() if value is not None]:
            msg = f"{', '.join(given)}: for datasets only; {path} is a file of {path.suffix or 'text'}."
            raise nncf.ParameterNotSupportedError(msg)
        yield _file(path, source, tokenizer)
        return
    is_name = _HUB_NAME.fullmatch(source.name) and path.suffix not in (".txt", ".jsonl", *_TABLES)
    if not path.exists() and not is_name:
        msg = f"There is no {source.purpose} text {path}."
        raise nncf.ValidationError(msg)
    for row in _rows(path, source):
        yield _row_text(row, source, tokenizer)


def _file(path: Path, source: Source, tokenizer: Any) -> str:
    import nncf

    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return text
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        msg = f"{path} is not UTF-8 text: {error}."
        raise nncf.ValidationError(msg) from error
    except (ValueError, RecursionError) as error:
        msg = f"{path} is no JSON Lines file ({type(error).__name__}: {error})."
        raise nncf.ValidationError(msg) from error
    return "".join(_row_text(row, source, tokenizer) for row in rows)


@contextmanager
def _readable(source: Source) -> Iterator[None]:
    """Errors of any kind come from files, from the network, and from what is on the hub."""
    import nncf

    try:
        yield
    except Exception as error:
        reason = f"({type(error).__name__}: {error})"
        msg = f"{source.name} cannot be read as a dataset {reason}."
        if not Path(source.name).exists():
            msg = (
                f"There is no {source.purpose} text {source.name} here, and no dataset of this name could be read from "
                f"the Hugging Face hub, which needs a network {reason}."
            )
        raise nncf.ValidationError(msg) from error


def _rows(path: Path, source: Source) -> Iterator[Any]:
    """The rows of one split of a dataset, in random order."""
    import datasets
    import nncf

    with _readable(source):
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # of Dataset.save_to_disk
            found: Any = datasets.load_from_disk(path)
        elif path.is_file():
            kind = _TABLES[path.suffix]
            found = datasets.load_dataset(kind, source.config, data_files=str(path), streaming=True)
        else:
            found = datasets.load_dataset(source.name, source.config, streaming=True)
    if isinstance(found, Mapping):
        split = source.split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
        if split not in found:
            msg = f"{source.name} has no split {split!r}; name one by --split: {', '.join(found)}."
            raise nncf.ValidationError(msg)
        found = found[split]
    elif source.split is not None:
        msg = f"--split {source.split}: the dataset of {source.name} has no splits."
        raise nncf.ValidationError(msg)
    quietly = {"keep_in_memory": True} if isinstance(found, datasets.Dataset) else {}  # writes nothing beside the files
    with _readable(source):
        yield from found.shuffle(seed=0, **quietly)


def _row_text(row: Any, source: Source, tokenizer: Any) -> str:
    """A row of text with the blank line behind it, or a chat as the tokenizer's template writes it."""
    import nncf

    names = (source.column,) if source.column is not None else _COLUMNS
    column = next((name for name in names if isinstance(row, Mapping) and name in row), None)
    if column is None:
        there = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        msg = f"A row of {source.name} has no {' or '.join(names)}, but: {there}. Name its text by --column."
        raise nncf.ValidationError(msg)
    value = row[column]
    if isinstance(value, str):
        return f"{value}\n\n"
    if not isinstance(value, list) or not all(isinstance(each, Mapping) and "content" in each for each in value):
        msg = f"{column} of a row of {source.name} is neither text nor a list of messages with role and content: "
        raise nncf.ValidationError(f"{msg}{str(value)[:60]}.")
    if not tokenizer.chat_template:
        msg = f"{source.name} holds chats, and the tokenizer of the model has no chat template. Use plain text."
        raise nncf.ValidationError(msg)
    try:
        return str(tokenizer.apply_chat_template(value, tokenize=False))
    except Exception as error:  # the template's own complaints are jinja2 errors
        msg = f"The model's chat template does not take a chat of {source.name}: {error}"
        raise nncf.ValidationError(msg) from error
