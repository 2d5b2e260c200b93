"""What lies in a model folder, read without trusting it: every fault is an error that names the file."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import get_ident
from typing import Any

import nncf
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from nncf_ext.memory import is_out_of_memory

GRID_WEIGHTS = "nncf_model.safetensors"
GRID_CONFIG = "nncf_config.json"
ADAPTER_CONFIG = "adapter_config.json"
STRUCTURED = "nncf_structured"
STRUCTURE_VERSION = 1
QUANT_METHOD = "nncf_ext"
GRID_VERSION = 1

LAST = "~"
"""
Begins the names of hooks' tensors in a file of this package, so that they are the last by name: who is not told the
floating type of a model takes that of the first tensor, and scales are float16 in every model.
"""

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_REPEATED = re.compile(r"(layers?|experts?|blocks|depths?)$")
_FEW = 1000
_ALIGNMENT = 64  # bytes, as in memory that torch allocates


@dataclass(frozen=True)
class Stored:
    """
    A tensor as the header of its file describes it.

    :param file: The file.
    :param shape: Its shape.
    :param dtype: Its type, in the words of safetensors: ``"F32"``, ``"BF16"``, ``"I64"``.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def floating(self) -> bool:
        """:return: Whether it holds floating numbers."""
        return "F" in self.dtype


def read_object(path: Path) -> dict[str, Any]:
    """
    :param path: A file.
    :return: The JSON object in it.
    :raises nncf.ValidationError: It holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=_special_float)
    except (ValueError, RecursionError) as error:
        msg = f"{path} cannot be read ({type(error).__name__}: {error}). A JSON object is needed."
        raise nncf.ValidationError(msg) from error
    if not isinstance(content, dict):
        raise nncf.ValidationError(f"{path} holds a {type(content).__name__}. A JSON object is needed.")
    return content


def _special_float(content: dict[str, Any]) -> Any:
    """Numbers that JSON lacks, as transformers writes them: ``{"__float__": "Infinity"}``."""
    special = set(content) == {"__float__"} and content["__float__"] in ("Infinity", "-Infinity", "NaN")
    return float(content["__float__"]) if special else content


def read_config(folder: Path) -> dict[str, Any]:
    """
    :param folder: A model folder.
    :return: What its ``config.json`` says.
    :raises nncf.ValidationError: There is none, or the folder is one of an adapter as well.
    """
    if not (folder / "config.json").is_file():
        msg = f"{folder} holds no config.json, so it is not a Hugging Face model folder."
        raise nncf.ValidationError(msg)
    if (folder / ADAPTER_CONFIG).is_file():
        msg = (
            f"{folder} holds {ADAPTER_CONFIG} beside config.json, so it is not clear which model is meant. Move the "
            "files of the adapter to a folder of their own; nncf_ext.merge puts it into the model."
        )
        raise nncf.ValidationError(msg)
    return read_object(folder / "config.json")


def check_floating(folder: Path, content: Mapping[str, Any]) -> None:
    """
    :param folder: A model folder.
    :param content: What its ``config.json`` says.
    :raises nncf.UnsupportedModelError: Its weights were quantized by another tool.
    """
    described = content.get("quantization_config")
    if described is None:
        return
    method = described.get("quant_method", "unnamed") if isinstance(described, dict) else described
    msg = (
        f"{folder} holds weights that are quantized already (quantization_config in config.json: {method}). Give the "
        "floating model it was made of."
    )
    if method in ("gptq", "auto-round"):
        msg += " In Python, nncf_ext.load_gptq(FOLDER, floating_model) reads it as the grid of make_mergeable()."
    raise nncf.UnsupportedModelError(msg)


def check_weight_files(folder: Path) -> list[Path]:
    """
    Checks that a Hugging Face folder can be read without trusting it: safetensors only, and only files of its own.

    :param folder: The folder.
    :return: The files that transformers will read.
    :raises nncf.ValidationError: There is no model, its weights are pickled, or its index names a file elsewhere.
    """
    config = read_config(folder)
    if config.get("transformers_weights") is not None:
        msg = (
            f"{folder / 'config.json'} names {config['transformers_weights']!r} as the file of the weights. They are "
            "read from model.safetensors or its shards only."
        )
        raise nncf.ValidationError(msg)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not index.is_file():
        if single.is_file():
            return [single]
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
        found = f"only pickled files ({', '.join(pickled)}), which can run code when read" if pickled else "no weights"
        msg = f"{folder} holds {found}. Convert the weights to model.safetensors first; only safetensors are read."
        raise nncf.ValidationError(msg)
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        msg = f"{index} is no index of safetensors files: its weight_map is {type(shards).__name__}, or empty."
        raise nncf.ValidationError(msg)
    names = sorted({str(each) for each in shards.values()})
    for shard in names:
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            msg = f"{index} names the shard {shard!r}. Shards must be .safetensors files of the folder itself."
            raise nncf.ValidationError(msg)
        if not (folder / shard).is_file():
            raise nncf.ValidationError(f"{index} names the shard {shard!r}, which is missing.")
    # transformers reads the one file where there are both.
    return [single] if single.is_file() else [folder / shard for shard in names]


def stored_tensors(files: Iterable[Path]) -> dict[str, Stored]:
    """
    :param files: Safetensors files.
    :return: What they hold, by name, from their headers alone.
    :raises nncf.ValidationError: A file is damaged.
    """
    found = {}
    for file in files:
        with safetensors_of(file) as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dictionary
                part = opened.get_slice(name)
                found[name.removeprefix(LAST)] = Stored(file, tuple(part.get_shape()), part.get_dtype())
    return found


@contextmanager
def safetensors_of(file: Path) -> Iterator[Any]:
    """
    :param file: A safetensors file.
    :return: The file, opened by ``safe_open``.
    :raises nncf.ValidationError: It is damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        msg = f"{file} is damaged, or no safetensors file ({error}). Get it again."
        raise nncf.ValidationError(msg) from error


def check_counts(source: Path, content: Any, stored: Mapping[str, Stored]) -> None:
    """
    A configuration that asks for a million of layers is refused before anything is made of it.

    :param source: Where the configuration was read.
    :param content: The configuration, or a part of it.
    :param stored: The tensors beside it: no model has more layers than these, nor more experts than their longest axis.
    :raises nncf.ValidationError: A number of layers or experts cannot be that of these tensors.
    """
    most = max(_FEW, len(stored), *(max(each.shape, default=0) for each in stored.values()))
    parts = content.items() if isinstance(content, dict) else ()
    for key, value in parts:
        numbers = value if isinstance(value, list) else [value]
        too_many = [each for each in numbers if isinstance(each, int) and each > most]
        if too_many and _REPEATED.search(key):
            msg = f"{source} asks for {too_many[0]} {key}; the folder holds {len(stored)} tensors."
            raise nncf.ValidationError(msg)
        for each in numbers:
            check_counts(source, each, stored)


@contextmanager
def bounded_construction(source: Path, stored: Mapping[str, Stored]) -> Iterator[None]:
    """
    In it, a configuration makes a model for the tensors of its folder, or is refused.

    :param source: Where the configuration was read.
    :param stored: The tensors beside it.
    :raises nncf.ValidationError: Many more parameters are made than the folder holds, or no model can be made.
    """
    # Weights that the model ties, and fused ones that files hold in one piece, are made one by one.
    most, made, thread = 4 * len(stored) + _FEW, 0, get_ident()

    def count(_module: nn.Module, _name: str, parameter: Tensor | None) -> None:
        nonlocal made
        made += parameter is not None and get_ident() == thread
        if made > most:
            msg = f"{source} describes a model of more than {most} parameters; the folder holds {len(stored)} tensors."
            raise nncf.ValidationError(msg)

    handle = register_module_parameter_registration_hook(count)
    try:
        with blamed_on(source, even_for_memory=True):  # on the meta device, only what is described can need too much
            yield
    finally:
        handle.remove()


@contextmanager
def blamed_on(source: Path, *, even_for_memory: bool = False) -> Iterator[None]:
    """
    Whatever transformers makes of what a damaged file says becomes an error that names the file.

    :param source: The file or folder.
    :param even_for_memory: Whether it is to blame where memory is short, too.
    :raises nncf.ValidationError: In place of any other error, but those of the system and of missing packages.
    """
    try:
        yield
    except (OSError, ImportError, nncf.UnsupportedModelError, nncf.ParameterNotSupportedError):
        raise
    except nncf.ValidationError as error:
        if str(source) in str(error):
            raise
        raise nncf.ValidationError(f"{source}: {error}") from error
    except Exception as error:
        if is_out_of_memory(error) and not even_for_memory:
            raise
        msg = f"{source} describes no model that can be loaded ({type(error).__name__}: {error})."
        raise nncf.ValidationError(msg) from error


def check_size(source: Path, outline: nn.Module, stored: Mapping[str, Stored]) -> None:
    """
    :param source: Where the configuration was read.
    :param outline: What it describes, on the meta device.
    :param stored: The tensors beside it.
    :raises nncf.ValidationError: The model is much larger than the tensors.
    """
    wanted = sum(each.numel() for each in outline.parameters())
    held = sum(prod(each.shape) * (2 if each.dtype == "U8" else 1) for each in stored.values())  # two codes in a byte
    if wanted > 2 * held + 1_000_000:
        msg = f"{source} describes a model of {wanted:,} parameters; the folder holds {held:,} numbers."
        raise nncf.ValidationError(msg)


def check_tensor(name: str, stored: Stored, wanted: Tensor, *, first_axis: bool = True) -> None:
    """
    :param name: Name of a tensor.
    :param stored: What a file holds under that name.
    :param wanted: What the model has there; meta device will do.
    :param first_axis: Whether the first axis counts.
    :raises nncf.ValidationError: Shapes differ, or one of them holds floating numbers and the other does not.
    """
    shape = tuple(wanted.shape)
    if stored.shape != shape and (first_axis or len(stored.shape) != len(shape) or stored.shape[1:] != shape[1:]):
        msg = f"{stored.file}: {name} is {list(stored.shape)}; the configuration describes {list(shape)}."
        raise nncf.ValidationError(msg)
    if stored.floating != wanted.is_floating_point():
        kind = "floating numbers" if wanted.is_floating_point() else "none"
        msg = f"{stored.file}: {name} is {stored.dtype}; the model has {kind} there."
        raise nncf.ValidationError(msg)


def passing_buffers(model: nn.Module) -> dict[str, Tensor]:
    """
    :param model: Any torch model.
    :return: Its buffers that are no part of its state dict, such as frequencies of position embeddings, by name.
    """
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in kept}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """
    :param file: A safetensors file.
    :return: Its tensors by name; as in transformers, memory-mapped, but for floating numbers where they lie badly.
    :raises nncf.ValidationError: It is damaged.
    """
    with safetensors_of(file) as opened:
        return {name.removeprefix(LAST): _aligned(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118


def _aligned(tensor: Tensor) -> Tensor:
    """Kernels add up in another order, and slower, where memory is not aligned; in a file, a tensor begins anywhere."""
    return tensor.clone() if tensor.is_floating_point() and tensor.data_ptr() % _ALIGNMENT else tensor


def shared_names(files: Iterable[Path], tensors: Mapping[str, Any]) -> dict[str, str]:
    """
    :param files: Safetensors files.
    :param tensors: What they hold, by name.
    :return: The other names of tensors, as their metadata tells: by each of them the name under which it is stored.
    """
    shared: dict[str, str] = {}
    for file in files:
        with safetensors_of(file) as opened:
            metadata = {alias.removeprefix(LAST): name for alias, name in (opened.metadata() or {}).items()}
        metadata = {alias: name.removeprefix(LAST) for alias, name in metadata.items()}
        shared |= {alias: name for alias, name in metadata.items() if name in tensors and alias not in tensors}
    return shared
