"""``gopo-lightning config``: the configs that come with the package."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from gopo_lightning.commands.errors import Parser
from gopo_lightning.commands.named_configs import LIST, find, names, purpose

DESCRIPTION = """\
The configs that come with the package. Every command takes them by name: fit --config quickstart/gopo.
A file of that path wins over the name.
"""


def main(arguments: Sequence[str]) -> None:
    """List, show or copy."""
    options = _parser().parse_args(arguments)
    options.run(options)


def _list(options: argparse.Namespace) -> None:
    """Names and what each is for."""
    known = names()
    width = max(map(len, known))
    for name, file in known.items():
        print(f"{name:<{width}}  {purpose(file)}")


def _show(options: argparse.Namespace) -> None:
    print(_text(options.name), end="")


def _copy(options: argparse.Namespace) -> None:
    """Write a copy; nothing is overwritten."""
    text, target = _text(options.name), Path(options.file)
    if target.is_dir():
        raise ValueError(f"{target} is a folder. Name a file in it, such as {target / 'my.yaml'}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ValueError(f"{target} exists and is left as it is. Name another file.") from error
    print(f"{target} is a copy of {options.name}: edit it, then name it by --config {target}")


def _text(name: str) -> str:
    try:
        return Path(find(name)).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error}. `{LIST}` lists the names.") from error


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gopo-lightning config", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("list", help="names, and what each is for").set_defaults(run=_list)
    show = commands.add_parser("show", help="print one")
    show.set_defaults(run=_show)
    copy = commands.add_parser("copy", help="write one to a file, to edit it; never overwrites")
    copy.set_defaults(run=_copy)
    for command in (show, copy):
        command.add_argument("name", metavar="NAME", help=f"see `{LIST}`")
    copy.add_argument("file", metavar="FILE", help="such as my.yaml")
    return parser
