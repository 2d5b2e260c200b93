"""
``optimum-cli export openvino-packed``: ``nncf-ext export --pack`` for users of Optimum's command line.

Optimum reads every module of the namespace ``optimum.commands.register``, which belongs to no package: the build puts
this file there. Optimum starts slowly if such a module imports much, hence the import in ``run``.
"""

from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class ExportPackedCommand(BaseOptimumCLICommand):
    """The command."""

    COMMAND = CommandInfo(name="openvino-packed", help="Export a model to OpenVINO IR with packed sparse weights.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """
        :param parser: Gets the arguments; those that ``optimum-cli export openvino`` has, too, bear its names.
        """
        parser.add_argument("-m", "--model", type=Path, required=True, help="Folder of a Hugging Face model.")
        parser.add_argument("--trust-remote-code", action="store_true", help="Run code from the folder.")
        parser.add_argument("--overwrite", action="store_true", help="Replace an OpenVINO folder that is there.")
        parser.add_argument("output", type=Path, help="Folder to write.")

    def run(self) -> None:
        """
        :raises SystemExit: The export failed; the reason stands on stderr.
        """
        import typer

        from nncf_ext.cli.export import export_folder

        try:
            export_folder(
                self.args.model,
                self.args.output,
                pack=True,
                rest="int8",
                dtype="auto",
                trust_remote_code=self.args.trust_remote_code,
                overwrite=self.args.overwrite,
            )
        except typer.Exit as stop:
            raise SystemExit(stop.exit_code) from None


REGISTER_COMMANDS = [(ExportPackedCommand, ExportCommand)]
