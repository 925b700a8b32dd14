"""Text from outside, with what cannot be seen in it made visible. Pure."""

import re

_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Characters that are not seen, or turn the text around them, by their names.

    >>> visible("a\u202eb")
    'a[U+202E]b'
    """
    return _UNSEEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)
