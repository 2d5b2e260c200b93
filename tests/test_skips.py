"""The rule of tests/conftest.py, on tests of its own in a process of their own."""

import subprocess
import sys
from pathlib import Path

RULE = Path(__file__).with_name("conftest.py")


def test_a_skip_that_names_no_hardware_fails_the_run(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(RULE.read_text())
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_one():\n    pytest.skip('this CPU has no AMX')\n"
        "def test_two():\n    pytest.skip('not today')\n"
        "@pytest.mark.skipif(True, reason='no AVX-512 code on aarch64')\n"
        "def test_three():\n    pass\n"
        "def test_six():\n    pytest.skip('there is no PostgreSQL server here')\n"
        "def test_four():\n    pytest.importorskip('no_such_package')\n"
        "@pytest.mark.xfail\n"
        "def test_five():\n    raise ValueError\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", tmp_path / "test_some.py"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "2 failed, 3 skipped, 1 xfailed" in run.stdout
    assert "test_two was skipped, and not for lack of hardware: Skipped: not today" in run.stdout
