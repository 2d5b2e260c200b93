"""Optimum-Intel: let its classes read packed IRs, load a packed model, export a model as a complete folder."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openvino as ov

from ov_ext import runtime, state_space
from ov_ext.card import EXPORTED, write_card
from ov_ext.convert import save_model
from ov_ext.folder import whole_folder
from ov_ext.leftovers import REST, narrow_constants, quantize_rest
from ov_ext.stand_in import computing_in_float32, stand_in

if TYPE_CHECKING:
    from optimum.intel import OVModelForCausalLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("ov_ext")

MODEL, TOKENIZER, DETOKENIZER = "openvino_model.xml", "openvino_tokenizer.xml", "openvino_detokenizer.xml"
WITHOUT_TOKENIZER = "The folder has no tokenizer IR: Optimum-Intel runs it, OpenVINO GenAI cannot read it."


class TokenizerError(ValueError):
    """A tokenizer that cannot be read, or that OpenVINO cannot convert."""


def register() -> int:
    """Let stock Optimum-Intel classes and pipelines read packed IRs, in this process.

    Each module of Optimum has its own Core. Those that are imported by now learn the operations: call this again after
    you import more model classes. It does no harm to repeat it.

    :return: Number of Cores that know the operations now.
    :raises ExtensionUnavailableError: See :func:`ov_ext.extension_path`.
    """
    import optimum.intel.openvino.modeling_decoder  # noqa: F401  imports modeling_base too, whose Core reads and compiles

    modules = [module for name, module in list(sys.modules.items()) if name.startswith("optimum.")]
    cores = {
        id(core): core for core in (getattr(module, "core", None) for module in modules) if isinstance(core, ov.Core)
    }
    for core in cores.values():
        runtime.add_extension(core)
    return len(cores)


def load(
    folder: str | os.PathLike[str],
    *,
    device: str = "CPU",
    ov_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> OVModelForCausalLM:
    """Load a packed (or stock) causal language model through the public functions of Optimum only.

    :param folder: Model folder with openvino_model.xml, config.json and perhaps generation_config.json.
    :param device: OpenVINO device; packed weights run on CPU.
    :param ov_config: OpenVINO properties for compilation.
    :param trust_remote_code: Passed to the configuration's loader; nothing here sets it.
    :param kwargs: Passed to OVModelForCausalLM.
    :return: The model, ready to generate.
    :raises ValueError: The folder holds no model.
    :raises ExtensionUnavailableError: See :func:`ov_ext.extension_path`.
    :raises NewerFormatError: It was packed by a newer release.
    """
    folder = Path(folder)
    if not (folder / MODEL).is_file() or not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no exported language model: {MODEL} and config.json are needed.")
    model = runtime.read_model(folder / MODEL)
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if (folder / "generation_config.json").is_file():
        kwargs.setdefault("generation_config", GenerationConfig.from_pretrained(folder))
    return OVModelForCausalLM(
        model, config=config, device=device, ov_config=ov_config, model_save_dir=folder, compile=True, **kwargs
    )


def load_tokenizer(folder: str | os.PathLike[str], *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the Hugging Face tokenizer of a model folder.

    :param folder: Model folder.
    :param trust_remote_code: Passed on; nothing here sets it.
    :return: The tokenizer.
    :raises TokenizerError: The folder holds none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ImportError:
        raise
    except Exception as error:  # damaged files give KeyError, TypeError, or what the library in Rust raises
        raise TokenizerError(f"The tokenizer of {folder} cannot be read ({_first_line(error)}).") from error


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: str | os.PathLike[str],
    *,
    task: str | None = None,
    rest: str | None = "int8",
    change: Callable[[ov.Model], bool] | None = None,
    overwrite: bool = False,
) -> Path:
    """Export a model of transformers, sparse or compressed by NNCF, as a complete OpenVINO folder.

    INT4 weights in NNCF's torch form keep their integers and scales bit for bit. Of a compressed model, the embedding
    and the head go on INT8 (or INT4) where they are not compressed (``rest``). Nothing else is rounded: floating
    weights keep their values, in 16 bits where these fit 16 bits exactly.
    Layers may differ in their number of key/value heads, or have no attention: each layer with attention gets a cache
    of its own shape. Mamba and Mamba-2 are exported with the states of their convolutions and state spaces. Layers
    without a state space keep the state of their convolution only.

    The model stays as it was, in every floating type. It may be in bf16 or f16, too: activations are computed in f32
    all the same. A tokenizer that OpenVINO cannot convert is saved for transformers only, with a warning. A few tokens
    more than the model embeds get a warning that names them.

    :param model: The torch model, all of it in memory.
    :param tokenizer: Its tokenizer; None for a model of something else than text.
    :param out: Folder for the IR (of a language model: stateful), tokenizer and detokenizer IR, tokenizer files, config
        and generation config.
    :param task: Optimum's name of the task, such as ``"text-classification"``; None: that of the model's class.
    :param rest: What to do with the embedding and the head of a model whose other layers are sparse or quantized:
        ``"int8"`` rounds them to INT8 with one scale for each token, as NNCF does in its 4-bit modes; ``"int4"`` to
        INT4 in groups, which is smaller and costs more loss; None keeps them.
    :param change: Changes the model in place before it is written, and returns whether it did: packing, for example.
    :param overwrite: Replace an existing model folder once the new one is complete.
    :return: The folder.
    :raises ValueError: The tokenizer has many more tokens than the model, the folder exists, or a layer without
        attention leaves a gap in the cache, or weights are not in memory.
    :raises OSError: The folder cannot be written; of a full disk the message says what to do.
    """
    if rest not in (*REST, None):
        raise ValueError(f"rest is 'int8', 'int4' or None, got {rest!r}.")
    if tokenizer is not None:
        _check_vocabulary(model, tokenizer)
    task = task or _task(model)
    out = Path(out)
    size = sum(parameter.nbytes for parameter in model.parameters())
    with whole_folder(out, overwrite, size) as draft:
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
            try:
                save_tokenizer_ir(tokenizer, draft)
            except TokenizerError as error:
                logger.warning("%s %s", error, WITHOUT_TOKENIZER)
        if model.config.model_type in state_space.MODEL_TYPES:
            # Optimum cannot export these models with the releases of transformers that it supports.
            save_model(state_space.convert_state_space_model(model), draft / MODEL)
            model.config.save_pretrained(draft)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(draft)
        else:
            _export_by_optimum(model, draft, task)
        for path in draft.glob("*.xml"):
            if path.name not in (TOKENIZER, DETOKENIZER):
                _finish(path, rest, change)
        source = getattr(model.config, "_name_or_path", "")
        write_card(draft, EXPORTED, Path(source) if source else None)
    return out


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse the tokenizer of another model; name tokens that this one has no row for, which are harmless unused."""
    rows = getattr(model.config.get_text_config(), "vocab_size", None)
    if rows is None:
        return
    numbers = {number: token for token, number in tokenizer.get_vocab().items()}
    beyond = sorted(number for number in numbers if number >= rows)
    if len(beyond) > max(64, rows // 20):
        msg = f"The tokenizer has {len(numbers)} tokens, the model embeds {rows}: they do not belong together."
        raise ValueError(msg)
    if beyond:
        some = ", ".join(f"{numbers[number]} ({number})" for number in beyond[:8])
        more = f" and {len(beyond) - 8} more" if len(beyond) > 8 else ""
        msg = "The model embeds %d tokens, and its tokenizer has more: %s%s. Text with these cannot be read."
        logger.warning(msg, rows, some, more)


def _task(model: PreTrainedModel) -> str:
    from optimum.exporters.tasks import TasksManager

    task = str(TasksManager.infer_task_from_model(model, library_name="transformers"))
    generates = task in ("text-generation", "text2text-generation", "automatic-speech-recognition")
    return f"{task}-with-past" if generates else task


def _finish(path: Path, rest: str | None, change: Callable[[ov.Model], bool] | None) -> None:
    """Write an IR anew: embedding and head quantized, 16-bit values in 16 bits, and the caller's change."""
    model = ov.Core().read_model(path)
    steps: list[Callable[[ov.Model], object]] = [narrow_constants]
    if rest:
        steps.insert(0, partial(quantize_rest, kind=rest))
    if change is not None:
        steps.append(change)
    if any([step(model) for step in steps]):  # all of them
        save_model(model, path)


def _export_by_optimum(model: PreTrainedModel, draft: Path, task: str) -> None:
    from optimum.exporters.openvino import export_from_model

    model = stand_in(model)
    configs = _export_configs(model, task)
    quiet = logging.root.manager.disable
    try:
        with computing_in_float32(model) as half:
            export_from_model(
                model,
                output=draft,
                task=task,
                stateful=True,
                patch_16bit_model=half,
                custom_export_configs=configs,
            )
    finally:
        logging.disable(quiet)  # Optimum switches it


def _export_configs(model: PreTrainedModel, task: str) -> dict[str, Any] | None:
    """:return: Optimum's export config with the cache shapes of this model; None where Optimum's own shapes are right.

    Optimum takes one number of key/value heads for all layers.
    """
    if task != "text-generation-with-past":
        return None
    import torch

    config = model.config.get_text_config()
    uniform = [getattr(config, "num_key_value_heads", None) or config.num_attention_heads] * config.num_hidden_layers
    # After one token the cache shows which layers write to it, and with how many heads.
    with torch.no_grad():
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        cache = model(input_ids=token, use_cache=True).get("past_key_values")
    layers = getattr(cache, "layers", None)
    if layers is None or not all(hasattr(layer, "keys") for layer in layers):
        return None
    filled = [layer.keys is not None for layer in layers]
    heads = [layer.keys.shape[1] for layer in layers if layer.keys is not None]
    if heads == uniform:
        return None
    if not all(filled[: len(heads)]):
        raise ValueError(
            f"The layers write to places {[place for place, used in enumerate(filled) if used]} of the cache. "
            "OpenVINO's states need them without gaps: keep attention in the layers of one kind (full or sliding) only "
            "if those of the other kind are complete."
        )
    return {"model": _with_cache(model, task, heads)}


def _with_cache(model: PreTrainedModel, task: str, heads: list[int]) -> Any:
    from optimum.exporters.tasks import TasksManager

    constructor = TasksManager.get_exporter_config_constructor(
        model=model, exporter="openvino", task=task, library_name="transformers"
    )
    base = constructor(model.config)

    class TrueCache(type(base)):  # type: ignore[misc]
        """The model family's export config with keys and values only for the layers that have attention."""

        def add_past_key_values(self, inputs_or_outputs: dict[str, dict[int, str]], direction: str) -> None:
            super().add_past_key_values(inputs_or_outputs, direction)
            for name in list(inputs_or_outputs):
                place = name.split(".")[1] if name.startswith(("past_key_values.", "present.")) else ""
                if place.isdigit() and int(place) >= len(heads):
                    del inputs_or_outputs[name]

        def overwrite_shape_and_generate_input(
            self, dummy_input_gen: Any, input_name: str, framework: str, input_shapes: dict[str, int]
        ) -> Any:
            made = super().overwrite_shape_and_generate_input(dummy_input_gen, input_name, framework, input_shapes)
            if input_name != "past_key_values":
                return made
            key, value = made[0]
            return [(key[:, :1].repeat(1, count, 1, 1), value[:, :1].repeat(1, count, 1, 1)) for count in heads]

    return TrueCache(
        model.config,
        task=base.task,
        use_past=True,
        use_past_in_inputs=True,
        int_dtype=base.int_dtype,
        float_dtype=base.float_dtype,
    )


def save_tokenizer_ir(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Convert a tokenizer to the two IRs that OpenVINO GenAI reads.

    :param tokenizer: The tokenizer.
    :param folder: Model folder.
    :raises TokenizerError: OpenVINO cannot convert it. Nothing was written.
    """
    from openvino_tokenizers import convert_tokenizer

    try:
        models = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # the converter knows some tokenizers only, and stumbles over others in its own ways
        msg = f"OpenVINO cannot convert {type(tokenizer).__name__} ({_first_line(error)})."
        raise TokenizerError(msg) from error
    for model, name in zip(models, (TOKENIZER, DETOKENIZER), strict=True):
        save_model(model, folder / name)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
