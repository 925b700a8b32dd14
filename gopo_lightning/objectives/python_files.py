"""Names in a Python file: `./rewards.py:brevity` stands wherever the dotted path of a function or class does."""

import re
import sys
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_IN_FILE = re.compile(r"(?P<file>\S(?:.*\S)?\.py):(?P<name>[^\W\d]\w*(?:\.[^\W\d]\w*)*)")
_loaded: dict[str, str] = {}
"""Name of the module that was made from a file → the file, as it was given."""


def file_of(path: str) -> str | None:
    """FILE.py of `FILE.py:NAME`; None for any other text."""
    match = _IN_FILE.fullmatch(path)
    return match and match["file"]


def dotted(path: str, folder: Path | None = None) -> str:
    """`FILE.py:NAME` as a dotted path that can be imported in this process; any other text unchanged.

    The file is executed once, as a module named after its place.

    Args:
        path: of a file and a name in it, or any other text.
        folder: what a relative path begins at, the working folder when None.

    Raises:
        ValueError: there is no such file, or it cannot be executed.
    """
    match = _IN_FILE.fullmatch(path)
    if match is None:
        return path
    folder = folder or Path.cwd()
    file = folder / Path(match["file"]).expanduser()
    if not file.is_file():
        raise ValueError(f"'{path}': there is no such file in {folder}. Correct the path, or the working folder.")
    place = str(file.resolve())
    module = re.sub(r"\W", "_", f"{file.stem}_at_{sha256(place.encode()).hexdigest()[:8]}")
    if module not in _loaded:
        _execute(module, file)
        _loaded[module] = match["file"]
    return f"{module}.{match['name']}"


def as_given(text: str) -> str:
    """``text`` with what `dotted` made of names in files as it was given."""
    for module, file in _loaded.items():
        text = text.replace(f"{module}.", f"{file}:")
    return text


def _execute(module: str, file: Path) -> None:
    spec = spec_from_file_location(module, file)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    made = sys.modules[module] = module_from_spec(spec)
    try:
        spec.loader.exec_module(made)
    except BaseException as error:
        del sys.modules[module]
        if isinstance(error, ImportError | SyntaxError):
            raise ValueError(
                f"{file} cannot be imported: {error}. Correct the file, or install what it needs."
            ) from error
        raise
