"""Classes in Python files: jsonargparse gets `./engines.py:Mine` as a dotted path, and prints it as given."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from gopo_lightning.objectives.python_files import dotted, file_of

_OF_FUNCTIONS = ("function", "advantage", "combine", "credit")
"""Keys whose values find such a file by themselves."""
_folder: ContextVar[Path | None] = ContextVar("folder", default=None)


@contextmanager
def from_here() -> Iterator[None]:
    """Relative files begin at the working folder of now: jsonargparse reads a config in the folder of the config."""
    token = _folder.set(_folder.get() or Path.cwd())
    try:
        yield
    finally:
        _folder.reset(token)


def in_value(value: Any, key: str = "") -> Any:
    """``value`` of ``key`` in a config, with a dotted path for every class in a file.

    Raises:
        ValueError: a `class_path` whose file does not exist, or a file that cannot be imported.
    """
    if isinstance(value, dict):
        return {name: in_value(part, str(name)) for name, part in value.items()}
    if isinstance(value, list):
        return [in_value(part, key) for part in value]
    if not isinstance(value, str) or key in _OF_FUNCTIONS:
        return value
    file, folder = file_of(value), _folder.get() or Path.cwd()
    if file is None or (key != "class_path" and not (folder / Path(file).expanduser()).is_file()):
        return value
    return dotted(value, folder)


def in_arguments(arguments: Sequence[str]) -> list[str]:
    """The same for the values of options."""
    given: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option.startswith("--") and equals:
            given.append(f"{option}={in_value(value, _key(option))}")
        elif given and given[-1].startswith("--"):
            given.append(in_value(argument, _key(given[-1])))
        else:
            given.append(argument)
    return given


def _key(option: str) -> str:
    return option.removeprefix("--").rpartition(".")[2].removesuffix("+")


def _yaml_with_files() -> None:
    load = get_loader("yaml")
    set_loader("yaml", lambda text: in_value(load(text)), exceptions=(yaml.YAMLError,))


_yaml_with_files()
