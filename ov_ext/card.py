"""Model cards (README.md in the hub's format) of OpenVINO folders: a section of ours at the end of what is there."""

from __future__ import annotations

from pathlib import Path

CARD = "README.md"
_NEW = """---
library_name: openvino
tags:
- nncf-ext
- openvino
---

# A model for OpenVINO
"""
EXPORTED = (
    "In OpenVINO",
    """This folder holds an OpenVINO IR with its tokenizer, exported by nncf-ext. What stands above is about the
model that was exported. Unless its weights are packed, which a section below would say, it loads in OpenVINO,
Optimum-Intel (`OVModelForCausalLM.from_pretrained(FOLDER)`) and OpenVINO GenAI
(`openvino_genai.LLMPipeline(FOLDER, "CPU")`), and `ov-ext pack FOLDER OUT` packs its sparse weights.
""",
)
PACKED = (
    "Packed weights",
    """The weights are packed: zeros are neither stored nor read. OpenVINO reads them with the extension of
nncf-ext (`pip install 'nncf-ext[genai]'` or `'nncf-ext[optimum]'`). Without it, the message is
"unsupported opset: ov_ext".

```python
import openvino, ov_ext, ov_ext.genai, ov_ext.optimum

pipeline = ov_ext.genai.pipeline("FOLDER")  # OpenVINO GenAI
model = ov_ext.optimum.load("FOLDER")  # Optimum-Intel
core = ov_ext.add_extension(openvino.Core())  # OpenVINO
```

`ov-ext unpack FOLDER OUT` restores the stock model, for other tools and devices.
""",
)

SKIPPED_INPUTS = (
    "Inputs that are skipped",
    """Linear layers skip inputs below their thresholds: the weights of those are not read. OpenVINO needs the extension
of nncf-ext for it (`ov_ext.add_extension(core)`, `ov_ext.genai.pipeline("FOLDER")`, `ov_ext.optimum.load("FOLDER")`).
`ov-ext unpack FOLDER OUT` restores the stock model.
""",
)

SPARSE_ATTENTION = (
    "Sparse attention",
    """Keys and values of older tokens are pruned and packed while the model runs. OpenVINO needs the extension of
nncf-ext for it (`ov_ext.add_extension(core)`), and GenAI its SDPA back end, which `ov_ext.genai.pipeline("FOLDER")`
takes by itself. `ov-ext unpack FOLDER OUT` restores stock attention.
""",
)


def write_card(folder: Path, section: tuple[str, str], source: Path | None = None) -> None:
    """Add a section to the card of a folder, in place of an older one with its heading.

    :param folder: The folder that is written.
    :param section: Heading and text.
    :param source: Folder of the model it is made from, whose card is carried on where `folder` has none: licence, base
        model and all.
    """
    text = next((text for text in map(_read, filter(None, (folder, source))) if text), _NEW)
    heading, body = section
    (folder / CARD).write_text(f"{without_section(text, heading).rstrip()}\n\n## {heading}\n\n{body}", encoding="utf-8")


def remove_section(folder: Path, section: tuple[str, str]) -> None:
    """Take a section out of the card of a folder, where it is."""
    text = _read(folder)
    if (shorter := without_section(text, section[0])) != text:
        (folder / CARD).write_text(f"{shorter.rstrip()}\n", encoding="utf-8")


def without_section(text: str, heading: str) -> str:
    """:return: A card without the section of that heading."""
    before, found, after = text.partition(f"\n## {heading}\n")
    following = after.find("\n## ")
    return text if not found else before + (after[following:] if following >= 0 else "")


def _read(folder: Path) -> str:
    try:
        return (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
