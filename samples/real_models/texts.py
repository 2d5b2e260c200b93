"""English text that is there without a data set: Python's language reference, and what packages say of themselves."""

import re
from collections.abc import Collection
from importlib import metadata
from pydoc_data.topics import topics


def english() -> tuple[str, str]:
    """
    :return: Text to calibrate on and text to measure on. No topic is in both; every third is to measure on.
    """
    # Several topics may show one section of the reference: each section once.
    sections = list(dict.fromkeys(topics[name] for name in sorted(topics)))
    held_out = sections[::3]
    return "\n\n".join(text for text in sections if text not in held_out), "\n\n".join(held_out)


def prose(without: Collection[str] = ()) -> str:
    """
    :param without: Names of packages.
    :return: The descriptions of the packages that are installed, by name: mostly English, in Markdown or reST.
    """
    pages = {
        _plain(each.name): str(each.metadata.get_payload() or "") for each in metadata.distributions() if each.name
    }
    left_out = {_plain(name) for name in without}
    return "\n\n".join(pages[name] for name in sorted(pages) if pages[name] and name not in left_out)


def _plain(name: str) -> str:
    """The one spelling of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()
