"""Real English text that every Python carries: the language reference, as ``help()`` shows it."""

from pydoc_data.topics import topics


def english() -> tuple[str, str]:
    """
    :return: Text to calibrate on and text to measure on. No topic is in both; every third is to measure on.
    """
    # Several topics may show one section of the reference: each section once.
    sections = list(dict.fromkeys(topics[name] for name in sorted(topics)))
    held_out = sections[::3]
    return "\n\n".join(text for text in sections if text not in held_out), "\n\n".join(held_out)
