"""The model card of a folder: what was done to the model, and how to load it, for people and for the hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from nncf_ext.report import CompressionReport, WeightReport

CARD = "README.md"
_TAG = "nncf-ext"
_CARRIED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")


def write_card(model: nn.Module, folder: Path, report: CompressionReport, cut: bool) -> None:
    """
    Licence, language and base model are those of the card of the model it was made from, where that is on this disk.

    :param model: The model that was saved, with the place it came from in its configuration.
    :param folder: Its folder.
    :param report: What was done to its weights.
    :param cut: Whether parts of its structure were removed.
    """
    config: Any = model.config
    source = str(getattr(config, "_name_or_path", "") or "")
    data = ModelCardData(library_name="transformers", tags=[_TAG, *_tags(report, cut)], **_carried(source))
    text = f"""---
{data.to_yaml()}
---

# {type(model).__name__}{f" from {Path(source).name}" if source else ""}, compressed

Made with nncf-ext, a plugin suite for OpenVINO and NNCF.

{_done(report, cut)}

## How to load it

```python
import nncf_ext

model = nncf_ext.load_pretrained("path/of/this/folder")
```

After `import nncf_ext`, the classes of transformers read it, too.

For OpenVINO, packed so that zeros are neither stored nor read: `nncf-ext export FOLDER OUT --pack`.
"""
    (folder / CARD).write_text(text, encoding="utf-8")


def is_ours(folder: Path) -> bool:
    """
    :param folder: A model folder.
    :return: Whether its card may be replaced: there is none, or it is one of this package.
    """
    return not (folder / CARD).exists() or _TAG in (_front_matter(folder / CARD).get("tags") or ())


def _front_matter(card: Path) -> dict[str, Any]:
    try:
        return dict(ModelCard.load(card, ignore_metadata_errors=True).data.to_dict())
    except (OSError, ValueError):  # not text, or YAML of somebody's own
        return {}


def _carried(source: str) -> dict[str, Any]:
    """What holds for a model that was made from another: as that one's card says."""
    if not source:
        return {}
    if not Path(source).is_dir():
        return {"base_model": source}  # its name on the hub
    known = _front_matter(Path(source) / CARD)
    return {name: value for name, value in known.items() if name in (*_CARRIED, "base_model")}


def _tags(report: CompressionReport, cut: bool) -> list[str]:
    tags = {weight.precision for weight in report.compressed if weight.precision.startswith("int")}
    if any(weight.sparsity > 0.05 for weight in report.compressed):
        tags.add("sparse")
    return sorted(tags | ({"pruned"} if cut else set()))


def _done(report: CompressionReport, cut: bool) -> str:
    lines = ["* Parts of the structure were removed: layers differ in size (`per_layer_config` in `config.json`)."]
    lines = lines if cut else []
    kinds: dict[tuple[str, str], list[WeightReport]] = {}
    for weight in report.compressed:
        kinds.setdefault((str(weight.mode), weight.precision), []).append(weight)
    for (mode, precision), weights in kinds.items():
        zeros = CompressionReport(tuple(weights)).sparsity
        errors = [weight.error for weight in weights if weight.error is not None and weight.error_of == "output"]
        error = f", mean error of the layers' outputs {sum(errors) / len(errors):.3f}" if errors else ""
        lines.append(f"* {len(weights)} weights by `{mode}`: {precision}, {zeros:.1%} zeros{error}.")
    if report.untouched:
        lines.append(f"* {len(report.untouched)} weights as they were.")
    lines.append(f"* {report.bytes_before / 1e6:.1f} MB of weights before, {report.bytes_after / 1e6:.1f} MB now.")
    return "\n".join(lines)
