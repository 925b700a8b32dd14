"""A judge and meta-judge on loopback, whose replies are functions of the question."""

import json
import re
from collections import Counter

RESPONSE = re.compile(r"#(\w{16}) response\n(.*)\n#\1 (?:end|analysis)", re.DOTALL)
ITEM = re.compile(r"^\d+\. (.*)$", re.M)


def kind_of(text: str) -> str:
    """Of a question."""
    if '"scores": ' in text:
        return "score"
    if '"score": ' in text:
        return "number"
    return "analysis" if "Analyse how well" in text else "refinement" if "Improve the rubric" in text else "merge"


def items_of(text: str) -> list[str]:
    """Of the rubric that a question is about."""
    return ITEM.findall(text[re.search(r"#\w{16} end", text).end() :])  # type: ignore[union-attr]


def rubric_reply(fence: str, *items: str) -> str:
    return f'Here it is.\n<rubric id="{fence}">\n' + "".join(f"<item>{i}</item>\n" for i in items) + "</rubric>\n"


def answer(text: str) -> str:
    """Scores items by a hash of their text and the response; each revision adds an item and merges all there are."""
    kind, fence, items = kind_of(text), re.findall(r"#(\w{16}) end", text)[0], items_of(text)
    if kind == "analysis":
        return "It rewards what is long."
    if kind == "refinement":
        match = RESPONSE.search(text)
        assert match and "#" + fence + " analysis\nIt rewards what is long." in text
        return rubric_reply(fence, *items, f"It is better than {sum(match[2].encode()) % 97}.")
    if kind == "merge":
        return rubric_reply(fence, *sorted(ITEM.findall(text)))
    match = RESPONSE.search(text)
    assert match, text
    length = len(match[2].encode())
    if kind == "number":
        return json.dumps({"id": fence, "score": 1 + length % 10})
    return json.dumps({"id": fence, "scores": [(sum(item.encode()) + length) % 6 for item in items]})


def asked(texts: list[str]) -> dict[str, int]:
    return dict(Counter(map(kind_of, texts)))
