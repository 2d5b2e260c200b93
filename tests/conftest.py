"""A skip names the hardware that is missing; any other skip is a failure: a test that never runs says nothing."""

import re
from collections.abc import Generator

import pytest

_HARDWARE = re.compile(r"Skipped: .*(\bCPU has no\b|no AVX-512 code on|no GPU)")


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
