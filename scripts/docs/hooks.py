"""MkDocs hooks: pages made at build time, of the classes, of ``--help`` and of the files at the top level."""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from scripts.docs.command_line import command_line  # noqa: E402
from scripts.docs.configuration import configuration  # noqa: E402
from scripts.docs.pages import GENERATED  # noqa: E402
from scripts.docs.python_api import python_api  # noqa: E402


def top_level(name: str) -> str:
    """A page of the top level, with links that lead from docs/."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/", "](", text)


WRITERS = {
    "reference/config.md": configuration,
    "reference/cli.md": command_line,
    "reference/api.md": python_api,
    "contributing.md": lambda: top_level("CONTRIBUTING.md"),
    "changelog.md": lambda: top_level("CHANGELOG.md"),
}
"""Page → what writes it."""


def on_page_markdown(markdown: str, **options: Any) -> str:
    """Links to files of the top level, which work in a checkout, lead to their pages."""
    return re.sub(
        r"\]\(\.\./((?:\.\./)*)(CONTRIBUTING|CHANGELOG)\.md", lambda m: f"]({m[1]}{m[2].lower()}.md", markdown
    )


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for path in GENERATED:
        files.append(File.generated(config, path, content=WRITERS[path]()))
    return files
