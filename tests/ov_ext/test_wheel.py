"""What is published: a source distribution, the wheel that is built from it, and an environment that only serves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, **kwargs: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source distribution, wheel), made by the commands of the Makefile in a clean copy of the sources."""
    clean = tmp_path_factory.mktemp("published") / "clean"
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith("samples/assets/"):
            (clean / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clean / name)
    run("make", "wheel", f"VENV={sys.prefix}", f"--old-file={sys.prefix}/.installed", cwd=clean)
    (source,), (wheel,) = (clean / "dist").glob("*.tar.gz"), (clean / "dist").glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def serving(published: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment made by the Dockerfile's own commands."""
    folder = tmp_path_factory.mktemp("serving")
    venv.create(folder, with_pip=True)
    steps = re.findall(r"^RUN (.*)$", (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(steps) == 2
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    for step in steps:
        run("sh", "-c", step.replace("/wheels", str(published[1].parent)), env=environment, cwd=folder)
    return folder / "bin"


def test_the_wheel_holds_the_two_packages_and_has_a_tag_that_indexes_take(published: tuple[Path, Path]) -> None:
    source, wheel = published
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"nncf_ext", "ov_ext", "optimum"}
    plugin = "optimum/commands/register/register_nncf_ext.py"  # Optimum's namespace for commands of other packages
    assert [name for name in names if name.startswith("optimum/") and not name.endswith("/")] == [plugin]
    assert "ov_ext/libov_ext_cpu.so" in names and not [name for name in names if name.endswith((".cpp", ".hpp"))]
    assert re.fullmatch(r"nncf_ext-[\d.]+-py3-none-manylinux_2_\d+_x86_64\.whl", wheel.name), wheel.name
    with tarfile.open(source) as archive:  # no model in it
        assert sum(member.size for member in archive.getmembers()) < 6e6


def test_a_serving_environment_has_no_torch_and_generates_the_same_text(
    serving: Path, folders: dict[str, Path]
) -> None:
    import ov_ext.genai

    installed = run(serving / "pip", "list", "--format=freeze").lower()
    assert "openvino-genai" in installed and not re.search(
        r"^(torch|nncf|transformers|optimum)\b(?!-ext)", installed, re.M
    )
    assert "ok" in run(serving / "ov-ext", "info", cwd="/")
    folder = folders["int4-packed"]
    text = run(serving / "ov-ext", "generate", folder, "--prompt", "def read_file(path):", cwd="/")
    here = ov_ext.genai.pipeline(folder).generate("def read_file(path):", max_new_tokens=64, do_sample=False)
    assert text.strip() == str(here).strip() and len(text) > 20


def test_commands_that_need_more_say_what_to_install(serving: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    done = subprocess.run(
        [serving / "nncf-ext", "compress", folders["plain"], tmp_path / "out"], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 2 and "pip install 'nncf-ext[llm]'" in done.stderr and "Traceback" not in done.stderr
