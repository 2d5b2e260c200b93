"""Text files as windows of tokens."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Samples = Annotated[int, typer.Option(help="Windows of text to use, spread over the file.")]
Window = Annotated[int | None, typer.Option(help="Tokens in a window; default: the model's, 2048 at most.")]


def read_windows(
    path: Path, tokenizer: Any, samples: int, window: int | None, model: Any, purpose: str = "calibration"
) -> list[dict[str, Any]]:
    """
    Cuts a text into windows of equal length, as many as asked for, evenly spread over the text.

    :param path: UTF-8 text, or JSON Lines (``.jsonl``) with a ``text`` in every line.
    :param tokenizer: The model's tokenizer.
    :param samples: Number of windows, at least 1.
    :param window: Their length, tokens; None: the longest the model takes, 2048 at most.
    :param model: The model.
    :param purpose: What the text is for, for messages.
    :return: Model inputs: ``input_ids`` ``[1, window]`` int64 each.
    :raises nncf.ValidationError: The file is not there, is no such text, too short, or holds a token that the model
        has no row for.
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
    tokens = tokenizer(_read(path, purpose), add_special_tokens=False, verbose=False)["input_ids"]
    count = min(samples, len(tokens) // length)
    if count < 1:
        msg = f"{path} gives {len(tokens)} tokens, less than one window of {length}. Use a longer text or --window."
        raise nncf.ValidationError(msg)
    stride = (len(tokens) - length) // max(count - 1, 1)
    starts = [index * max(stride, length) for index in range(count)]
    windows = [tokens[start : start + length] for start in starts]
    rows: int = model.get_input_embeddings().weight.shape[0]
    unknown = next((token for each in windows for token in each if token >= rows), None)
    if unknown is not None:
        msg = (
            f"{path} holds the token {tokenizer.convert_ids_to_tokens(unknown)!r}, number {unknown}, and the model's "
            f"embedding has {rows} rows. Take that token out of the text, or use the model's own tokenizer."
        )
        raise nncf.ValidationError(msg)
    return [{"input_ids": torch.tensor([each])} for each in windows]


def _read(path: Path, purpose: str) -> str:
    import nncf

    if not path.is_file():
        msg = f"There is no {purpose} text {path}."
        raise nncf.ValidationError(msg)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return "\n\n".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
        return text
    except UnicodeDecodeError as error:
        msg = f"{path} is not UTF-8 text: {error}."
        raise nncf.ValidationError(msg) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        msg = f"{path} is no JSON Lines file with a text in every line ({type(error).__name__}: {error})."
        raise nncf.ValidationError(msg) from error
