"""What openvino and nncf would send is not sent where the user says so by an environment variable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# No test sends anything: whatever looks for a server fails, and is told of.
PROGRAM = """
import sys
def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.connect"):
        print("looks for a server", file=sys.stderr, flush=True)
        raise OSError("not in tests")
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
"""
COMMANDS = {
    "ov-ext": (PROGRAM + "from ov_ext.cli import app; app()", ["ov-ext", "info"]),
    "nncf-ext": (
        PROGRAM + "from nncf_ext.cli import app; app()",
        ["nncf-ext", "merge", "no", "out", "--adapter", "no"],
    ),
    "conversion": (
        PROGRAM + "import ov_ext, openvino, torch\n"
        "ov_ext.convert_model(torch.nn.Linear(2, 2), example_input=torch.ones(1, 2))",
        ["conversion"],
    ),
}


def traces(home: Path, command: str, **environment: str) -> bool:
    """:return: Whether a command looked for a server or made an identifier."""
    program, arguments = COMMANDS[command]
    outside = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    outside = {name: value for name, value in outside.items() if not name.startswith("NNCF")}
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=outside | {"HOME": str(home)} | environment,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return "looks for a server" in done.stderr or (home / "intel").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_sent_where_the_user_says_so(tmp_path: Path, command: str) -> None:
    assert not traces(tmp_path / "quiet", command, NNCF_EXT_NO_TELEMETRY="1")
    assert traces(tmp_path / "default", command)  # this would see it
    if command == "ov-ext":
        assert traces(tmp_path / "zero", command, NNCF_EXT_NO_TELEMETRY="0")
