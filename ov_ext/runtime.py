"""Teaches a Core the operations of this package; says what this CPU can run, and whether a packed IR fits it."""

from __future__ import annotations

import logging
import os
from typing import Any, Literal, get_args

import openvino as ov

from ov_ext.cpu_plugin.sparse_matmul import native as sparse_matmul
from ov_ext.cpu_plugin.sparse_matmul.pack import VERSION
from ov_ext.cpu_plugin.support import native
from ov_ext.extension import built_for, extension_path

logger = logging.getLogger("ov_ext")

InstructionSet = Literal["reference", "avx2", "avx2_vnni", "avx512_core", "avx512_core_vnni", "avx512", "amx"]
TARGETS: tuple[InstructionSet, ...] = get_args(InstructionSet)  # a packed IR names one of them; weakest first
_warned_targets: set[str] = set()


class NewerFormatError(ValueError):
    """An IR packed by a newer release, in a format that this one cannot read."""


def add_extension(core: ov.Core, verify: bool | None = None) -> ov.Core:
    """Teach a Core the operations of this package. It does no harm to do it twice.

    Compiling a model always checks that its packed weights are well formed, so a damaged file is an error or has other
    values. The second case needs a checksum: ``verify`` costs about a second for each GB.

    :param core: The Core that will read and compile packed IRs.
    :param verify: Compare checksums when models are compiled. It holds for the whole process. None: as it was; at first
        as the environment variable OV_EXT_VERIFY says (1: compare).
    :return: The same Core.
    :raises ExtensionUnavailableError: See :func:`ov_ext.extension_path`.
    """
    core.add_extension(str(extension_path()))
    if verify is not None:
        sparse_matmul.verify(verify)
    return core


def read_model(path: str | os.PathLike[str]) -> ov.Model:
    """Read an IR, packed or not. A format that is too new is an error, a target that is too strong a warning.

    :param path: The .xml file.
    :return: The model. Any Core can compile it, also one that was not taught the operations.
    :raises ExtensionUnavailableError: See :func:`ov_ext.extension_path`.
    :raises NewerFormatError: It was packed by a newer release.
    """
    model = add_extension(ov.Core()).read_model(path)
    check_format(model)
    check_target(model)
    return model


def cpu_info() -> dict[str, Any]:
    """Tell what this CPU offers and which kernel will run.

    :return: ``features`` (name to bool), ``amx_permission``, ``kernels`` (best first), ``choice`` (for each kind of
        weight a list of [number of rows from which it runs, kernel]), ``selected`` (the kernel of one row),
        ``override`` (the value of the environment variable OV_EXT_ISA, or None), ``openvino`` and ``built_for``
        (versions), ``library``.
    :raises ExtensionUnavailableError: See :func:`ov_ext.extension_path`.
    :raises ValueError: OV_EXT_ISA names a kernel that does not exist or cannot run here.
    """
    path = extension_path()
    choice = sparse_matmul.kernel_choice()
    kernels = {"choice": choice, "selected": choice["int4"][0][1]}
    versions = {"openvino": ov.get_version(), "built_for": built_for(), "library": str(path)}
    return {**native.cpu_info(), **kernels, **versions}


def this_cpu() -> InstructionSet:
    """:return: The strongest of :data:`TARGETS` that this CPU and this build of the extension have, and OV_EXT_ISA
    allows."""
    info = cpu_info()
    return _strongest([info["override"]] if info["override"] else info["kernels"])


def stock_cpu() -> InstructionSet:
    """:return: The strongest of :data:`TARGETS` that this CPU has and ONEDNN_MAX_CPU_ISA allows: what stock OpenVINO
    runs with, whatever our kernels use."""
    here = _strongest(cpu_info()["kernels"])
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return min(here, _ONEDNN[cap], key=TARGETS.index) if cap in _ONEDNN else here


# The values of ONEDNN_MAX_CPU_ISA that hold something back.
_ONEDNN: dict[str, InstructionSet] = {
    "SSE41": "reference",
    "AVX": "reference",
    "AVX2": "avx2",
    "AVX2_VNNI": "avx2_vnni",
    "AVX2_VNNI_2": "avx2_vnni",
    "AVX512_CORE": "avx512_core",
    "AVX512_CORE_VNNI": "avx512_core_vnni",
    "AVX512_CORE_BF16": "avx512",
    "AVX10_1_512": "avx512",
    "AVX512_CORE_FP16": "avx512",
}


def _strongest(kernels: list[str]) -> InstructionSet:
    aliases = {"avx512_bf16": "avx512"}
    names = {aliases.get(kernel, kernel) for kernel in kernels}
    return next((target for target in reversed(TARGETS) if target in names), "reference")


def check_format(model: ov.Model) -> None:
    """Refuse an IR whose packed weights this release cannot read.

    :param model: Any model.
    :raises NewerFormatError: Its format version is newer than the one that this release reads.
    """
    if not model.has_rt_info(["ov_ext", "format_version"]):
        return
    found = int(model.get_rt_info(["ov_ext", "format_version"]).value)
    if found > VERSION:
        msg = f"The IR has packed weights of format version {found}, this release reads {VERSION}: update nncf-ext."
        raise NewerFormatError(msg)


def check_target(model: ov.Model) -> bool:
    """Tell whether a packed IR fits this CPU. It always runs, but on a weaker CPU it may be slower than the stock IR.

    :param model: Any model. A model without packed weights fits.
    :return: False when it was packed for a stronger instruction set. The first time in a process that a target does not
        fit, a warning says so.
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
