"""``ov-ext``: look at this machine and measure it, pack and unpack model folders, generate text, time models."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import openvino as ov
import typer
import typer.core
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ov_ext import runtime
from ov_ext.card import PACKED, SKIPPED_INPUTS, SPARSE_ATTENTION, remove_section, write_card
from ov_ext.convert import save_model
from ov_ext.cpu_plugin.sparse_matmul.pack import VERSION
from ov_ext.decode import measure
from ov_ext.extension import ExtensionUnavailableError, package_version
from ov_ext.folder import refuse_existing, whole_folder, write_whole
from ov_ext.genai import pipeline
from ov_ext.noise import own_lines
from ov_ext.optimum import TOKENIZER, WITHOUT_TOKENIZER, TokenizerError, load_tokenizer, save_tokenizer_ir
from ov_ext.runtime import TARGETS
from ov_ext.sparse_activation.passes import pack_sparse_activations, skips_inputs, unpack_sparse_activations
from ov_ext.sparse_activation.policy import SparseActivationPolicy
from ov_ext.sparse_activation.report import ActivationReport
from ov_ext.sparse_attention.calibration import calibrate_attention
from ov_ext.sparse_attention.costs import AttentionCosts
from ov_ext.sparse_attention.passes import is_sparse, restore_attention, sparsify_attention
from ov_ext.sparse_attention.policy import SparseAttentionPolicy
from ov_ext.sparse_attention.report import AttentionReport
from ov_ext.sparse_weights import calibration
from ov_ext.sparse_weights.cost import KINDS, CostTable, entry
from ov_ext.sparse_weights.passes import pack_sparse_weights, unpack_sparse_weights
from ov_ext.sparse_weights.policy import SparsePolicy
from ov_ext.sparse_weights.report import PackReport
from ov_ext.sparse_weights.workload import Workload


def _missing(error: ModuleNotFoundError) -> str:
    """What is not installed, and the smallest extra that brings it along."""
    extra = "genai" if str(error.name).startswith("openvino_") else "optimum"
    return f"{error.name} is not installed. This needs: pip install 'nncf-ext[{extra}]'."


class _PlainErrors(typer.core.TyperGroup):
    """A user's mistake becomes one line instead of a traceback, and so does an error that nobody expected."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # click's Context is typer's base class
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # no mistakes: the first two derive from RuntimeError
            raise
        except ModuleNotFoundError as error:
            typer.secho(f"Error: {_missing(error)}", err=True, fg="red")
        except (ImportError, ValueError, RuntimeError, OSError) as error:
            typer.secho(f"Error: {error}", err=True, fg="red")
        except Exception as error:
            if hasattr(error, "exit_code"):  # typer's own, for wrong options
                raise
            typer.secho(f"Error: {type(error).__name__}: {error}", err=True, fg="red")
            logging.getLogger("ov_ext").debug("Where it came from:", exc_info=True)
        raise typer.Exit(1)


app = typer.Typer(
    cls=_PlainErrors,
    help="Look at this machine, pack and unpack model folders, generate text, time models.",
    no_args_is_help=True,
    rich_markup_mode=None,  # as in nncf-ext
)
_ATTENTION = 0.15  # of the time of `calibrate`
UNLIMITED = 10_000  # columns of a file or a pipe, which has no width of its own; tables take what they need

SourceFolder = Annotated[Path, typer.Argument(help="Model folder with *.xml and *.bin.", metavar="IN")]
OutFolder = Annotated[Path, typer.Argument(help="Model folder to write.", metavar="OUT")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace all of OUT, a model folder, once the new one is complete.")
]
_TOKENIZERS = ("openvino_tokenizer", "openvino_detokenizer")  # reading them needs another extension


def _show(*what: Any) -> None:
    """Print tables and text: as wide as the terminal, or unbroken where there is none."""
    Console(width=None if sys.stdout.isatty() else UNLIMITED).print(*what)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ov-ext {package_version()}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what the libraries say, too, and where an error came from.")
    ] = False,
) -> None:
    context.with_resource(own_lines(verbose))


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Instruction set, kernels, AMX permission, versions, and whether the extension is the right build."""
    facts: dict[str, Any] = {"nncf_ext": package_version(), "format": "SPW1", "format_version": VERSION}
    try:
        facts |= {"extension": "ok", **runtime.cpu_info()}
    except ExtensionUnavailableError as error:
        facts |= {"extension": str(error), "openvino": ov.get_version()}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        for kind, kernels in facts.pop("choice", {}).items():
            ranges = [name if rows == 1 else f"{name} from {rows} rows on" for rows, name in kernels]
            facts[f"kernels for {kind}"] = ranges
        for key, value in facts.items():
            if isinstance(value, dict):
                value = ", ".join(name for name, present in value.items() if present) or "none"
            typer.echo(f"{key:{max(map(len, facts))}}  {', '.join(value) if isinstance(value, list) else value}")
    if facts["extension"] != "ok":
        raise typer.Exit(1)


@app.command()
def pack(
    source: SourceFolder,
    out: OutFolder,
    overwrite: Overwrite = False,
    min_sparsity: Annotated[
        float | None, typer.Option(help="Fraction of zeros needed; default: break-even per kind.")
    ] = None,
    min_weights: Annotated[int, typer.Option(help="Smaller matrices stay.")] = SparsePolicy.min_weights,
    target: Annotated[str, typer.Option(help=f"this-cpu, {', '.join(reversed(TARGETS))}.")] = "this-cpu",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompts whose time counts; 0: it does not.")] = 0,
    generated: Annotated[int, typer.Option(help="Tokens generated after each prompt.")] = 1,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    calibrating: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Use times measured on this CPU; measure where none are.")
    ] = True,
    max_growth: Annotated[float, typer.Option(help="Fraction by which the model may grow.")] = SparsePolicy.max_growth,
    activation_group: Annotated[int, typer.Option(help="128, 64, -1 (per token) or 0 (no quantization).")] = 128,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round asymmetric weights to a symmetric grid.")
    ] = False,
    ignore: Annotated[list[str] | None, typer.Option(help="Shell pattern of layers that stay; repeatable.")] = None,
    activations: Annotated[
        bool, typer.Option("--activations", help="Layers with thresholds for their inputs skip those below.")
    ] = False,
    skipped: Annotated[
        float, typer.Option(help="Fraction of inputs that such a layer is expected to skip.")
    ] = SparseActivationPolicy.skipped,
    kv_sparsity: Annotated[
        float | None,
        typer.Option(help="Fraction 0..0.9 of older keys and values that attention prunes; default: it stays stock."),
    ] = None,
    kv_values: Annotated[str, typer.Option(help="How the rest of them is stored: int8 or int4.")] = "int8",
    report: Annotated[Path | None, typer.Option(help="Write the report on every layer as JSON.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every layer, not only a summary.")] = False,
) -> None:
    """Pack the sparse weights of every model in IN and write the complete folder OUT. Attention and layers with
    thresholds for their inputs follow where wanted."""
    attention = None
    if kv_sparsity is not None:
        values: Any = kv_values  # checked by the policy
        measured = calibrating and target == "this-cpu"
        attention = SparseAttentionPolicy(
            k=kv_sparsity, v=kv_sparsity, values=values, pack_from=None if measured else 0
        )
    policy = SparsePolicy(
        min_sparsity=min_sparsity,
        target=target,  # type: ignore[arg-type]  # checked by SparsePolicy
        activation_group=activation_group,
        workload=Workload(prompt=prompt, generated=generated, batch=batch),
        calibrate=calibrating,
        max_growth=max_growth,
        min_weights=min_weights,
        requantize=requantize,
        ignored_patterns=tuple(ignore or ()),
    )
    skipping = SparseActivationPolicy(
        skipped=skipped,
        activation_group=0 if activation_group == 0 else 128,
        min_weights=min_weights,
        requantize=requantize,
        ignored_patterns=tuple(ignore or ()),
    )
    reports: dict[str, PackReport] = {}
    skips: dict[str, ActivationReport] = {}
    attentions: dict[str, AttentionReport] = {}
    more: tuple[dict[str, Any], ...] = (skips, attentions)

    def pack_one(name: str, model: ov.Model) -> bool:
        if activations:  # what is not expected to gain by it is left to the pass that follows
            skips[name] = pack_sparse_activations(model, skipping)[1]
        reports[name] = pack_sparse_weights(model, policy)[1]
        if attention is not None:
            attentions[name] = sparsify_attention(model, attention)[1]
        return any(of[name].replaced for of in (reports, *more) if name in of)

    with Console(stderr=True).status("Packing. The first time, this CPU is measured, too: ten seconds at most"):
        _rewrite(source, out, overwrite, pack_one)
    for name, each in reports.items():
        _show(f"{name}:", each if verbose else each.summary())
        for of in more:
            if name in of:
                _show(of[name] if verbose else of[name].summary())
    if not any(each.replaced for of in (reports, *more) for each in of.values()):
        _show("Nothing was packed: OUT is a copy of IN.")
    if report is not None:
        whole = {name: each.to_dict() for name, each in reports.items()}
        for of in more:
            for name, added in of.items():
                whole[name] |= added.to_dict()
        write_whole(report, json.dumps(whole, indent=2))


@app.command()
def calibrate(
    seconds: Annotated[float, typer.Option(help="At most so long.")] = calibration.LONGEST,
    activation_group: Annotated[int, typer.Option(help="As you will pack: 0, or any other.")] = 128,
    report: Annotated[Path | None, typer.Option(help="Write the times as JSON, too.")] = None,
) -> None:
    """Measure on this CPU what packing decides by: stock OpenVINO and our forms. Kept for later `pack`."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        measured = calibration.calibrate(
            (1 - _ATTENTION) * seconds,
            [entry(kind, activation_group) for kind in KINDS],
            lambda text, done: bar.update(task, description=text, completed=done),
        )
    _show(_cost_table(measured))
    times = measured.to_dict()
    try:
        attention = calibrate_attention(_ATTENTION * seconds)
        if attention is not None:
            _show(_attention_table(attention))
            times["attention"] = attention.to_dict()
    finally:  # an error there does not take the times of weights away
        if report is not None:
            write_whole(report, json.dumps(times, indent=2))
    if missing := [kind for kind in KINDS if entry(kind, activation_group) not in measured.kinds]:
        raise ValueError(
            f"{', '.join(missing)} could not be measured; packing takes the times of another CPU for them."
        )


def _cost_table(measured: CostTable) -> Table:
    table = Table(title=f"Picoseconds for one weight: {measured.cpu}, threads: {measured.threads}")
    table.caption = "In brackets: stock / this"
    for heading in ("kind", "rows", "stock", "ours, no bitmap"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for share in calibration.ZEROS:
        table.add_column(f"ours, {share:.0%} zeros", justify="right")
    for kind, costs in measured.kinds.items():
        for i, rows in enumerate(costs.rows):
            stock = costs.stock[i]
            ours = [
                f"{time:.4g} ({stock / time:.2f})" for time in (costs.dense[i], *(each[i] for each in costs.sparse))
            ]
            table.add_row("" if i else kind, str(rows), f"{stock:.4g}", *ours)
    return table


def _attention_table(measured: AttentionCosts) -> Table:
    table = Table(title="Microseconds of one token in a layer of attention")
    for heading in ("tokens before", "stock u8", "ours, 50 % int8", "stock / ours"):
        table.add_column(heading, justify="right")
    for tokens, stock, ours in zip(measured.tokens, measured.stock, measured.ours, strict=True):
        table.add_row(str(tokens), f"{stock:.4g}", f"{ours:.4g}", f"{stock / ours:.2f}")
    return table


@app.command()
def unpack(source: SourceFolder, out: OutFolder, overwrite: Overwrite = False) -> None:
    """Restore the stock model of a packed folder, for other devices and tools."""
    restored: list[str] = []

    def unpack_one(name: str, model: ov.Model) -> bool:
        packed = model.has_rt_info(["ov_ext", "format"]) or is_sparse(model) or skips_inputs(model)
        restore_attention(model)
        unpack_sparse_activations(model)
        unpack_sparse_weights(model)
        if packed:
            restored.append(name)
        return packed

    _rewrite(source, out, overwrite, unpack_one)
    _show(f"Restored {', '.join(restored)}." if restored else "Nothing was packed: OUT is a copy of IN.")


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="Model folder.")],
    prompt: Annotated[str, typer.Option(help="A message to the model; without a chat template, text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 64,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is: no chat template.")] = False,
) -> None:
    """Answer, or continue a text, with OpenVINO GenAI, greedily; by the tokenizer's chat template if it has one."""
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "apply_chat_template": not raw}
    typer.echo(pipeline(folder).generate(prompt, **options))


@app.command()
def bench(
    folder: Annotated[Path, typer.Argument(help="Model folder.")],
    against: Annotated[Path | None, typer.Option(help="Folder to compare with: the unpacked model.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Decode steps a round.")] = 32,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; models take turns in each.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Decode speed and resident memory, in turns with the unpacked model when it is given."""
    folders = [against, folder] if against is not None else [folder]
    records = measure(folders, tokens=tokens, prompt=prompt, rounds=rounds)
    if as_json:
        typer.echo(json.dumps([asdict(record) for record in records], indent=2))
        return
    table = Table()
    for heading in ("model", "tokens/s", "ms/token", "speed ratio", "resident MiB"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for record in records:
        resident = "?" if record.resident_mib is None else f"{record.resident_mib:.0f}"
        speed = (f"{1e3 / record.ms_per_token:.1f}", f"{record.ms_per_token:.2f}", f"{record.ratio:.2f}")
        table.add_row(record.folder, *speed, resident)
    _show(table)


def _rewrite(source: Path, out: Path, overwrite: bool, change: Any) -> None:
    """Copy a model folder. An IR for which ``change(name, model)`` returns True was changed and is saved anew."""
    models = sorted(path for path in source.glob("*.xml") if not path.stem.startswith(_TOKENIZERS))
    if not models:
        cure = (
            "`nncf-ext export IN OUT` makes one of a Hugging Face folder." if (source / "config.json").is_file() else ""
        )
        raise ValueError(f"{source} holds no OpenVINO model: NAME.xml and NAME.bin are needed. {cure}".rstrip())
    refuse_existing(out, overwrite)
    with whole_folder(out, overwrite) as draft:
        core = runtime.add_extension(ov.Core())
        done, packed, sparse, skipping = set(), False, False, False
        for path in models:
            model = core.read_model(path)
            if change(path.name, model):
                save_model(model, draft / path.name)
                done |= {path.name, path.with_suffix(".bin").name}
            packed = packed or model.has_rt_info(["ov_ext", "format"])
            sparse = sparse or is_sparse(model)
            skipping = skipping or skips_inputs(model)
            del model
        for path in source.iterdir():
            if path.name not in done and not path.name.startswith("."):
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, draft / path.name)
        for present, section in ((packed, PACKED), (skipping, SKIPPED_INPUTS), (sparse, SPARSE_ATTENTION)):
            if present:
                write_card(draft, section)
            else:
                remove_section(draft, section)
        _add_tokenizer(draft)


def _add_tokenizer(folder: Path) -> None:
    """Add the tokenizer IRs that GenAI needs if IN had only a Hugging Face tokenizer. OUT is of use without them."""
    if (folder / TOKENIZER).exists() or not (folder / "tokenizer.json").exists():
        return
    try:
        save_tokenizer_ir(load_tokenizer(folder), folder)
    except ModuleNotFoundError as error:
        reason = f"The tokenizer is not converted: {_missing(error)}"
    except ImportError as error:
        reason = f"The tokenizer is not converted: {error}."
    except TokenizerError as error:
        reason = str(error)
    else:
        return
    typer.secho(f"Warning: {reason} {WITHOUT_TOKENIZER}", err=True, fg="yellow")


if __name__ == "__main__":
    app()
