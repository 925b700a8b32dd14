"""Text from outside in a terminal."""

import re

from rich.text import Text

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]+")


def shown(text: str) -> Text:
    """On one line: never read as markup, and without characters that a terminal obeys."""
    return Text(" ".join(_CONTROL.sub(" ", text).split()))
