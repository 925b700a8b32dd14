"""``python -m gopo_lightning``. The top-level help answers without importing torch."""

import os
import sys
from importlib import import_module

from gopo_lightning import __version__
from gopo_lightning.commands.errors import reported
from gopo_lightning.commands.named_configs import resolve
from gopo_lightning.commands.usage import COMMANDS, FIELDS, OWN, check_command


def main() -> None:
    """Entry point of ``python -m gopo_lightning`` and of the ``gopo-lightning`` script."""
    with reported(sys.argv):
        _run()


def _run() -> None:
    if len(sys.argv) == 1 or sys.argv[1] in ("-h", "--help"):
        print(COMMANDS + FIELDS, end="")
        return
    if sys.argv[1] == "--version":
        print(f"gopo-lightning {__version__}")
        return
    check_command(sys.argv[1])
    if os.getcwd() not in sys.path and not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, so that functions of one's own are found
    if sys.argv[1] in OWN:
        import_module(OWN[sys.argv[1]]).main(resolve(sys.argv[2:]))
        return
    from gopo_lightning.commands.lightning_cli import run

    run()


if __name__ == "__main__":
    main()
