"""Arms of stock OpenVINO: NNCF's weight compression on the dense IR."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from side_by_side.subject import GROUP, Subject


def dense(subject: Subject, folder: Path) -> None:
    """Writes the model in bfloat16."""
    shutil.copytree(subject.dense, folder, dirs_exist_ok=True)


def int8(subject: Subject, folder: Path) -> None:
    """Writes the model with all weights in INT8, one scale for each output."""
    import nncf

    _compress(subject, folder, mode=nncf.CompressWeightsMode.INT8_SYM)


def int4(subject: Subject, folder: Path, *, asymmetric: bool = False, **methods: bool) -> None:
    """
    Writes the model with weights in INT4, embedding and head in INT8.

    :param subject: What is compressed.
    :param folder: An empty folder.
    :param asymmetric: Groups have a zero point.
    :param methods: ``awq``, ``scale_estimation``, ``gptq``: what needs calibration.
    """
    import nncf

    mode = nncf.CompressWeightsMode.INT4_ASYM if asymmetric else nncf.CompressWeightsMode.INT4_SYM
    options: dict[str, Any] = {"mode": mode, "group_size": GROUP, "ratio": 1.0, **methods}
    if any(methods.values()):
        options |= {"dataset": nncf.Dataset(_items(subject)), "subset_size": len(subject.calibration)}
    _compress(subject, folder, **options)


def _compress(subject: Subject, folder: Path, **options: Any) -> None:
    import nncf
    import openvino as ov

    import ov_ext
    import ov_ext.optimum

    ignored = shutil.ignore_patterns("openvino_model.*", "README.md")
    shutil.copytree(subject.dense, folder, ignore=ignored, dirs_exist_ok=True)
    ir = ov.Core().read_model(subject.dense / ov_ext.optimum.MODEL)
    ov_ext.save_model(nncf.compress_weights(ir, **options), folder / ov_ext.optimum.MODEL)


def _items(subject: Subject) -> list[dict[str, Any]]:
    """:return: Inputs of the stateful IR."""
    import numpy as np

    length = subject.length
    constant = {
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    return [{"input_ids": row[None].numpy(), **constant} for row in subject.calibration]
