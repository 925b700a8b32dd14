"""What the pages hold: fenced blocks, the marks above them, and the commands in them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(
    r"^(?:<!-- needs: (?P<needs>[^>]+?) -->\n)?"
    r"```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)

GENERATED = ("reference/config.md", "reference/cli.md", "reference/api.md", "contributing.md", "changelog.md")
"""Pages of the site that are made when it is built (hooks.py)."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``needs`` is what the mark above it names, such as `gpu`, or empty."""

    language: str
    title: str
    text: str
    needs: str
    start: int
    end: int


def pages() -> list[Path]:
    """README and the pages of the site."""
    return [Path("README.md"), Path("CONTRIBUTING.md"), *sorted(Path("docs").rglob("*.md"))]


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, in their order.

    >>> [block] = blocks('<!-- needs: gpu -->\\n```console\\n$ make test\\n```\\n')
    >>> block.language, block.text, block.needs
    ('console', '$ make test\\n', 'gpu')
    """
    for match in FENCE.finditer(page):
        language, title, text, needs = (match[name] or "" for name in ("language", "title", "text", "needs"))
        yield Block(language, title, text, needs, *match.span())


def commands(block: Block) -> list[str]:
    """The lines behind a `$`, continued where they end in a backslash, without comments.

    >>> commands(Block("console", "", "$ a --b \\\\\\n   --c   # a comment\\nprinted\\n", "", 0, 0))
    ['a --b --c']
    """
    joined = re.sub(r" *\\\n *", " ", block.text)
    return [re.sub(r"\s+# .*", "", line[2:]).strip() for line in joined.splitlines() if line.startswith("$ ")]
