"""
Skips, and the real models that tests of several folders use.

A skip names the hardware that is missing, the real model that cannot be downloaded, or the server of a data base that
is not installed. Any other skip is a failure: a test that never runs says nothing.
"""

import os
import re
from collections.abc import Generator
from pathlib import Path

import pytest

# openvino sends messages from a process that it forks, which crashes beside other threads and fills the log.
os.environ.setdefault("NNCF_EXT_NO_TELEMETRY", "1")
# What is packed must not depend on how fast this machine is today.
os.environ.setdefault("OV_EXT_CALIBRATE", "0")
# NNCF compiles functions of its own once, for which a busy machine may need longer than a minute.
os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")
import ov_ext  # noqa: E402, F401  before openvino

_HARDWARE = re.compile(
    r"Skipped: .*(\bCPU has no\b|no AVX-512 code on|no GPU|cannot be downloaded|no PostgreSQL server)"
)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SmolLM2-135M-Instruct in bfloat16. Tests that ask for it are marked ``real``."""
    from samples.real_models import smollm2
    from samples.real_models.packages import UnavailableError

    folder = tmp_path_factory.mktemp("smollm2")
    try:
        smollm2.write(folder)
    except UnavailableError as error:
        pytest.skip(str(error))
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not _HARDWARE.search(reason):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped, and not for lack of hardware: {reason}"
    return report
