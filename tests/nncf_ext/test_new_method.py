"""A new method is its folder, one row of the table of modes, and one export line: a copy of the package gets one."""

import shutil
import subprocess
import sys
from pathlib import Path

import nncf_ext

FILES = {
    "__init__.py": '"""Halves weights."""\n',
    "parameters.py": '''
from dataclasses import dataclass


@dataclass
class AdvancedHalvingParameters:
    """:param offset: Added to every weight."""

    offset: float = 0.0
''',
    "algorithm.py": '''
import nncf
from nncf_ext.method import Request
from nncf_ext.weights.records import LayerRecord, set_record


class Halving:
    """Multiplies weights by 1 - ratio."""

    def __init__(self, request: Request) -> None:
        self._request = request
        if request.dataset is not None:
            raise nncf.ValidationError("halving takes no dataset.")

    def check(self, model, survey) -> None:
        if not survey.targets:
            raise nncf.ValidationError("There is nothing to halve.")

    def apply(self, model, survey) -> None:
        for layer in survey.targets.values():
            layer.weight.data.mul_(1 - self._request.ratio).add_(self._request.parameters.offset)
            set_record(layer, LayerRecord(mode=self._request.mode.value, bytes_before=layer.weight.nbytes))
''',
}
# What is edited outside the folder: the file, what is there, and what comes before or after it.
ROW = """    HALVING = (
        "halving",
        OneShotMethod(
            "halving.algorithm:Halving", "halving.parameters:AdvancedHalvingParameters", ratio="each value to take away"
        ),
    )
"""
EXPORT = (
    "    from nncf_ext.algorithms.halving.parameters import AdvancedHalvingParameters as AdvancedHalvingParameters\n"
)
PROGRAM = """
import sys
from pathlib import Path

# The finder of an editable installation would find the original.
sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
root, folder = map(Path, sys.argv[1:])
sys.path.insert(0, str(root))
import nncf_ext

assert Path(nncf_ext.__file__).is_relative_to(root)
import nncf
import pytest
import torch
from torch import nn

assert nncf_ext.CompressMode("halving") is nncf_ext.CompressMode.HALVING
torch.manual_seed(1)
model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
before = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
scope = nncf.IgnoredScope(names=["2"])
parameters = nncf_ext.AdvancedHalvingParameters(offset=1.0)
same = nncf_ext.compress(model, "halving", ratio=0.25, ignored_scope=scope, advanced_parameters=parameters)
assert same is model
torch.testing.assert_close(model[0].weight, 0.75 * before[0] + 1)
assert torch.equal(model[2].weight, before[1])
assert [row.mode for row in nncf_ext.compression_report(model).weights] == ["halving", None]
copied = nncf_ext.compress(model, nncf_ext.CompressMode.HALVING, ratio=0.5, do_copy=True)
assert torch.equal(copied[0].weight, 0.5 * model[0].weight)
# No other method was imported.
loaded = {name.split(".")[2] for name in sys.modules if name.startswith("nncf_ext.algorithms.")}
assert loaded == {"halving"}, loaded

other = nncf_ext.AdvancedSparseWeightsParameters()
for changes, error, text in (
    ({"advanced_parameters": other}, nncf.ParameterNotSupportedError, "halving takes .* AdvancedHalvingParameters;"),
    ({"ratio": 1.0}, nncf.ValidationError, r"fraction of each value to take away and must be in \\[0, 1\\); got 1.0"),
    ({"dataset": nncf.Dataset([1])}, nncf.ValidationError, "takes no dataset"),
):
    with pytest.raises(error, match=text):
        nncf_ext.compress(model, "halving", **{"ratio": 0.5, **changes})
with pytest.raises(nncf.ParameterNotSupportedError, match=r"Unknown mode 'thirds'.*CompressMode\\.HALVING"):
    nncf_ext.compress(model, "thirds", ratio=0.5)

from typer.testing import CliRunner
from nncf_ext.cli import app


def run(*arguments):
    result = CliRunner().invoke(app, ["compress", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


assert "each value to take away (halving)" in run("--help")[1]
refused = "Error: Asked for --pattern with mode halving, which does not take it; sparse_magnitude, sparse_wanda, "
code, output = run(folder, root / "out", "--mode", "halving", "--pattern", "2:4")
assert code == 2 and refused in output, output
code, output = run(folder, root / "out", "--mode", "halving", "--ratio", "0.5")
assert code == 0 and "14 of 16 treated" in output, output
small, dense = nncf_ext.load_pretrained(root / "out"), nncf_ext.load_pretrained(folder)
layer = "model.layers.1.mlp.up_proj.weight"
assert torch.equal(small.get_parameter(layer), 0.5 * dense.get_parameter(layer))
"""


def test_a_new_method_is_a_folder_a_row_and_an_export(folder, tmp_path):
    root = tmp_path / "copy"
    package = root / "nncf_ext"
    shutil.copytree(Path(nncf_ext.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    before = {path: path.read_text() for path in package.rglob("*.py")}
    added = package / "algorithms" / "halving"
    added.mkdir()
    for name, text in FILES.items():
        (added / name).write_text(text)
    edit(package / "parameters.py", "\n\nclass ElasticMode(Flag):", ROW)
    edit(package / "__init__.py", "    from nncf_ext.algorithms.mamba_shedder.parameters import", EXPORT)
    changed = {path for path, text in before.items() if path.read_text() != text}
    assert changed == {package / "parameters.py", package / "__init__.py"}

    command = [sys.executable, "-c", PROGRAM, str(root), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def edit(path: Path, place: str, line: str) -> None:
    """Puts a line before the first occurrence of a text."""
    start, found, end = path.read_text().partition(place)
    assert found
    path.write_text(start + line + found + end)
