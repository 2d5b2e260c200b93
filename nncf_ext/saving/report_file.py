"""What compression noted about the layers of a model, kept beside its weights: mode, error, bytes before, and why."""

import json
import logging
from pathlib import Path

import nncf
from torch import nn

from nncf_ext.report import CompressionReport, reason_untouched
from nncf_ext.saving.folder import read_object
from nncf_ext.structure.blocks import survey
from nncf_ext.weights.int4 import decompressors, weight_hooks
from nncf_ext.weights.records import LayerRecord, record_of, set_record

logger = logging.getLogger("nncf_ext")

REPORT = "compression_report.json"


def write_report(report: CompressionReport, folder: Path) -> None:
    """
    :param report: The report of a model.
    :param folder: The folder of that model.
    """
    (folder / REPORT).write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")


def read_report(folder: Path) -> CompressionReport:
    """
    :param folder: A model folder with a report.
    :return: The report.
    :raises nncf.ValidationError: The file holds something else.
    """
    try:
        return CompressionReport.from_dict(read_object(folder / REPORT))
    except nncf.ValidationError as error:
        msg = f"{folder / REPORT} is damaged, or of another release: {error}"
        raise nncf.ValidationError(msg) from error


def restore_records(model: nn.Module, folder: Path) -> None:
    """
    Gives each layer back what was noted about it. Where there is no report that fits, a layer has no notes.

    :param model: A model as it was loaded.
    :param folder: Its folder.
    """
    if not (folder / REPORT).is_file():
        return
    try:
        rows = {row.name: row for row in read_report(folder).weights}
    except (nncf.ValidationError, OSError) as error:
        logger.warning("The model's report is left out, which the model does not need: %s", error)
        return
    weights, hooks = survey(model).weights, weight_hooks(model)
    packed = {name: tuple(hook.result_shape) for name, hook in decompressors(model).items()}
    for name, parameter in ((weight.name, weight.parameter) for weight in weights if weight.name in rows):
        there = rows[name].shape, rows[name].precision == "int4"
        here = packed.get(name, tuple(parameter.shape)), name in packed
        if there != here:
            said, is_now = (f"{'INT4' if int4 else 'floating'} {list(shape)}" for shape, int4 in (there, here))
            msg = "%s is of another model and left out: it says that %s is %s, and the model has %s there."
            logger.warning(msg, folder / REPORT, name, said, is_now)
            return
    for weight in weights:
        row = rows.get(weight.name)
        if row is None:
            continue
        if row.mode is not None:
            record = LayerRecord(row.mode, None, row.bytes_before, row.error, row.error_of, row.note)
            set_record(weight.module, record)
        elif record_of(weight.module) is None and row.note != reason_untouched(weight, hooks.get(weight.name)):
            set_record(weight.module, LayerRecord(untouched=row.note, bytes_before=row.bytes_before))
