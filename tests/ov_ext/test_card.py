"""Model cards of OpenVINO folders."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from ov_ext.card import CARD, EXPORTED, PACKED, remove_section, write_card

SOURCE = """---
license: mit
base_model: somebody/something
---

# Something

## Licence

MIT.
"""


def test_a_new_card(tmp_path: Path) -> None:
    write_card(tmp_path, EXPORTED)
    write_card(tmp_path, PACKED)
    card = ModelCard.load(tmp_path / CARD)
    assert card.data.library_name == "openvino" and "nncf-ext" in card.data.tags
    assert [line for line in card.text.splitlines() if line.startswith("## ")] == [
        "## In OpenVINO",
        "## Packed weights",
    ]


def test_the_card_of_the_source_is_carried_on(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "source" / CARD).write_text(SOURCE)
    write_card(tmp_path / "out", PACKED, tmp_path / "source")
    write_card(tmp_path / "out", EXPORTED, tmp_path / "source")
    write_card(tmp_path / "out", PACKED, tmp_path / "source")  # once more: not twice in it
    card = ModelCard.load(tmp_path / "out" / CARD)
    assert card.data.license == "mit" and card.data.base_model == "somebody/something"
    headings = [line for line in card.text.splitlines() if line.startswith("## ")]
    assert headings == ["## Licence", "## In OpenVINO", "## Packed weights"]
    assert (tmp_path / "source" / CARD).read_text() == SOURCE


def test_a_section_goes(tmp_path: Path) -> None:
    write_card(tmp_path, EXPORTED)
    before = (tmp_path / CARD).read_text()
    write_card(tmp_path, PACKED)
    remove_section(tmp_path, PACKED)
    assert (tmp_path / CARD).read_text() == before
    remove_section(tmp_path / "nowhere", PACKED)


def test_a_card_that_is_no_text_is_replaced(tmp_path: Path) -> None:
    (tmp_path / CARD).write_bytes(b"\xff\xfe\x00")
    write_card(tmp_path, PACKED)
    assert (tmp_path / CARD).read_text(encoding="utf-8").startswith("---\n")
