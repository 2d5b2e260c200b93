"""Is the extension here, is it the right build, what can this CPU run? And: give it to an OpenVINO Core."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import openvino as ov

from ov_ext.cpu_plugin.sparse_matmul.pack import VERSION

logger = logging.getLogger("ov_ext")

_LIBRARY = {"darwin": "libov_ext_cpu.dylib", "win32": "ov_ext_cpu.dll"}.get(sys.platform, "libov_ext_cpu.so")

InstructionSet = Literal["reference", "avx2", "avx2_vnni", "avx512", "amx"]
TARGETS: tuple[InstructionSet, ...] = get_args(InstructionSet)  # what packed IRs name, weakest first
_warned_targets: set[str] = set()


class ExtensionUnavailableError(RuntimeError):
    """The compiled extension is missing or belongs to another OpenVINO release."""


class NewerFormatError(ValueError):
    """An IR packed by a newer release, in a format that this one cannot read."""


def extension_path() -> Path:
    """Where the compiled extension lies, checked *before* anything loads it.

    :return: Path for ``Core.add_extension`` or the ``extensions=`` argument of OpenVINO GenAI pipelines.
    :raises ExtensionUnavailableError: Not built or not installed on this platform, or built against another OpenVINO.
    """
    path = Path(__file__).with_name(_LIBRARY)
    built_for = _built_for()
    if built_for is None or not path.is_file():
        msg = (
            f"The compiled extension {path.name} is needed, but {path.parent} does not hold it. Wheels with it exist "
            "for Linux on x86-64; elsewhere, or in a source tree, build it: pip install --no-deps -e . (needs a C++ "
            "compiler)."
        )
        raise ExtensionUnavailableError(msg)
    running = ov.get_version()
    if _release(built_for) != _release(running):
        built, here = _release(built_for), _release(running)
        msg = (
            f"The extension was built for OpenVINO {built}, but OpenVINO {here} is running: their binary interfaces "
            f"differ. Install openvino=={built}, or the build of nncf-ext for {here}."
        )
        raise ExtensionUnavailableError(msg)
    return path


def package_version() -> str:
    """:return: Version of nncf-ext, "unknown" in a source tree that is not installed."""
    try:
        return version("nncf-ext")
    except PackageNotFoundError:
        return "unknown"


def _built_for() -> str | None:
    """:return: The OpenVINO version string of the build, or None when no build was made."""
    try:
        from ov_ext._build_info import OPENVINO_VERSION
    except ImportError:
        return None
    return str(OPENVINO_VERSION)


def _release(full: str) -> str:
    """:return: major.minor.patch of a full OpenVINO version string such as 2026.4.1-22982-e213a147257."""
    return full.split("-")[0]


def add_extension(core: ov.Core) -> ov.Core:
    """Teach a Core the operations of this package. Doing it twice is harmless.

    :param core: The Core that will read and compile packed IRs.
    :return: The same Core.
    :raises ExtensionUnavailableError: See :func:`extension_path`.
    """
    core.add_extension(str(extension_path()))
    return core


def read_model(path: str | os.PathLike[str]) -> ov.Model:
    """Read an IR, packed or not, and check that it fits: its format (an error) and its target (a warning).

    :param path: The .xml file.
    :return: The model; any Core can compile it.
    :raises ExtensionUnavailableError: See :func:`extension_path`.
    :raises NewerFormatError: It was packed by a newer release.
    """
    model = add_extension(ov.Core()).read_model(path)
    check_format(model)
    check_target(model)
    return model


def cpu_info() -> dict[str, Any]:
    """What this CPU offers and which kernel will run.

    :return: ``features`` (name to bool), ``amx_permission``, ``kernels`` (best first), ``choice`` (for each kind of
        weight a list of [number of rows from which it runs, kernel]), ``selected`` (the kernel of one row),
        ``override`` (the value of the environment variable OV_EXT_ISA, or None), ``openvino`` and ``built_for``
        (versions), ``library``.
    :raises ExtensionUnavailableError: See :func:`extension_path`.
    :raises ValueError: OV_EXT_ISA names a kernel that does not exist or cannot run here.
    """
    path = extension_path()
    from ov_ext.cpu_plugin.sparse_matmul.native import kernel_choice  # it loads the library, so not at import
    from ov_ext.cpu_plugin.support import native

    choice = kernel_choice()
    kernels = {"choice": choice, "selected": choice["int4"][0][1]}
    versions = {"openvino": ov.get_version(), "built_for": _built_for(), "library": str(path)}
    return {**native.cpu_info(), **kernels, **versions}


def this_cpu() -> InstructionSet:
    """:return: The entry of :data:`TARGETS` that names the best instruction set this CPU and build can run."""
    kernels = cpu_info()["kernels"]
    return next(target for target in reversed(TARGETS) if target in kernels)


def check_format(model: ov.Model) -> None:
    """Refuse an IR whose packed weights this release cannot read.

    :param model: Any model.
    :raises NewerFormatError: Its format version is newer than ours.
    """
    if not model.has_rt_info(["ov_ext", "format_version"]):
        return
    found = int(model.get_rt_info(["ov_ext", "format_version"]).value)
    if found > VERSION:
        msg = f"The IR has packed weights of format version {found}, this release reads {VERSION}: update nncf-ext."
        raise NewerFormatError(msg)


def check_target(model: ov.Model) -> bool:
    """Does a packed IR fit this CPU? It always runs, but on a weaker CPU it may be slower than the stock IR.

    :param model: Any model; one without packed weights fits.
    :return: False, after one warning per process and target, when it was packed for a stronger instruction set.
    """
    if not model.has_rt_info(["ov_ext", "target"]):
        return True
    target = str(model.get_rt_info(["ov_ext", "target"]).value)
    here = this_cpu()
    if target not in TARGETS or TARGETS.index(target) <= TARGETS.index(here):
        return True
    if target not in _warned_targets:
        _warned_targets.add(target)
        logger.warning(
            "This model was packed for %s, but the best kernel on this CPU is %s. It gives the same results and may be "
            "slower than the stock IR: `ov-ext unpack` restores that one.",
            target,
            here,
        )
    return False
