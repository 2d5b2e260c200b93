"""What compression noted about a layer: kept on the layer itself, so that it follows the model through copies."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_ATTRIBUTE = "nncf_ext_record"
_PLAN = "nncf_ext_plan"


@dataclass(frozen=True)
class LayerRecord:
    """
    :param mode: Compression mode that treated the layer, or None if it was left untouched.
    :param untouched: Why the layer was left untouched, or None.
    :param bytes_before: Size of the weight before compression, bytes.
    :param error: Relative error, dimensionless; see `error_of`.
    :param error_of: ``"output"``: of the layer's output on calibration tokens. ``"weight"``: of the weight itself.
    :param note: What the user asked for and did not get on this layer, or None.
    :param prerounding: With ``keep_prerounding``: the masked, error-compensated weight as it was just before rounding,
        ``[out_features, in_features]`` float32. ``round_to_grid(prerounding, scales)`` gives the codes exactly. It is
        not part of the state dict, and not saved with a model; all else is.
    """

    mode: str | None = None
    untouched: str | None = None
    bytes_before: int = 0
    error: float | None = None
    error_of: str | None = None
    note: str | None = None
    prerounding: Tensor | None = None


def set_record(module: nn.Module, record: LayerRecord | None) -> None:
    """
    :param module: The layer.
    :param record: What to keep on it; None removes.
    """
    if record is None:
        module.__dict__.pop(_ATTRIBUTE, None)
    else:
        module.__dict__[_ATTRIBUTE] = record


def record_of(module: nn.Module) -> LayerRecord | None:
    """
    :param module: Any module.
    :return: Its record, or None if compression never came by.
    """
    return module.__dict__.get(_ATTRIBUTE)


def set_plan(model: nn.Module, plan: Any) -> None:
    """
    :param model: A cut model.
    :param plan: The :class:`nncf_ext.structure.plan.StructurePlan` by which it was cut.
    """
    model.__dict__[_PLAN] = plan


def plan_of(model: nn.Module) -> Any:
    """
    :param model: Any model.
    :return: The plan by which it was cut in this process, or None.
    """
    return model.__dict__.get(_PLAN)
