"""
The command ``nncf-ext``: the public functions on folders of Hugging Face models. One file for each command.

Nothing here needs torch before a command runs, so that ``--help`` works where only the base package is installed.
"""

from typing import Annotated

import typer

import nncf_ext
from nncf_ext.cli.compress import compress_folder
from nncf_ext.cli.export import export_folder
from nncf_ext.cli.extract import extract_folder
from nncf_ext.cli.merge import merge_folder
from nncf_ext.cli.optimize import optimize_folder
from nncf_ext.cli.search import search_folder
from nncf_ext.noise import own_lines

# Without rich markup, which would eat patterns such as [qkv] and N:M in the help.
app = typer.Typer(
    help="Compress PyTorch language models for OpenVINO and NNCF.", no_args_is_help=True, rich_markup_mode=None
)
app.command("compress")(compress_folder)
app.command("search")(search_folder)
app.command("extract")(extract_folder)
app.command("merge")(merge_folder)
app.command("export")(export_folder)
app.command("optimize")(optimize_folder)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nncf-ext {nncf_ext.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Show every weight, what the libraries say, and where an error came from."
        ),
    ] = False,
) -> None:
    context.with_resource(own_lines(verbose))
