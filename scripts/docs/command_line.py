"""The page of the command line, from ``--help`` of every command."""

import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from importlib import import_module
from unittest.mock import patch

from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.commands.usage import COMMANDS, FIELDS, OF_LIGHTNING, OWN

INTRODUCTION = """\
# Command line

All commands and their options, written by `--help` when this site is built. `python -m gopo_lightning` is the same as
`gopo-lightning`. Options in configuration files: [Configuration](config.md).

"""


def command_line() -> str:
    """The page."""
    parts = [INTRODUCTION, "```text\n", COMMANDS, FIELDS, "```\n"]
    for command in OWN:
        parts += [f"\n## {command}\n\n", _block(_help(import_module(OWN[command]).main, command))]
    for command in OF_LIGHTNING:
        text = _help(lambda _: run(), command)
        parts += [f'\n## {command}\n\n??? note "All options of `{command}`"\n\n', _indented(_block(text))]
    return "".join(parts)


def _help(main: Callable[[list[str]], object], command: str) -> str:
    arguments = ["--help"] if command in OWN else [command, "--help"]
    printed = io.StringIO()
    with (
        patch.object(sys, "argv", ["gopo-lightning", *arguments]),
        patch.dict(os.environ, {"COLUMNS": "110"}),
        redirect_stdout(printed),
        suppress(SystemExit),
    ):
        main(arguments)
    return printed.getvalue()


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" if line else "\n" for line in text.splitlines())
