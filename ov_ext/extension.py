"""Where is the compiled extension, and was it built for the OpenVINO that is running? Nothing is loaded here."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import openvino as ov

_LIBRARY = {"darwin": "libov_ext_cpu.dylib", "win32": "ov_ext_cpu.dll"}.get(sys.platform, "libov_ext_cpu.so")


class ExtensionUnavailableError(RuntimeError):
    """The compiled extension is missing, or it was built for another OpenVINO release."""


def extension_path() -> Path:
    """Find the compiled extension and check it before anything loads it.

    :return: Path for ``Core.add_extension`` or the ``extensions=`` argument of OpenVINO GenAI pipelines.
    :raises ExtensionUnavailableError: Not built or not installed on this platform, or built for another OpenVINO.
    """
    path = Path(__file__).with_name(_LIBRARY)
    target = built_for()
    if target is None or not path.is_file():
        msg = (
            f"The compiled extension {path.name} is needed, but {path.parent} does not hold it. Wheels with it exist "
            "for Linux on x86-64; elsewhere, or in a source tree, build it: pip install --no-deps -e . (needs a C++ "
            "compiler)."
        )
        raise ExtensionUnavailableError(msg)
    built, here = _release(target), _release(ov.get_version())
    if built != here:
        msg = (
            f"The extension was built for OpenVINO {built}, but OpenVINO {here} is running: their binary interfaces "
            f"differ. Install openvino=={built}, or the build of nncf-ext for {here}."
        )
        raise ExtensionUnavailableError(msg)
    return path


def built_for() -> str | None:
    """:return: The full version of the OpenVINO that the extension was built for; None when it was not built."""
    try:
        from ov_ext._build_info import OPENVINO_VERSION
    except ImportError:
        return None
    return str(OPENVINO_VERSION)


def package_version() -> str:
    """:return: Version of nncf-ext; "unknown" in a source tree that is not installed."""
    try:
        return version("nncf-ext")
    except PackageNotFoundError:
        return "unknown"


def _release(full: str) -> str:
    """:return: major.minor.patch of a full OpenVINO version string such as 2026.4.1-22982-e213a147257."""
    return full.split("-")[0]
