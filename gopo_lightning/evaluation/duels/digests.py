"""What files, functions and our own code are, by content: the keys under which answers and samples are kept."""

import hashlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import Any

from gopo_lightning.objectives.named import load_callable

PACKAGE = Path(__file__).parents[2]


def digest(value: Any) -> str:
    """SHA-256 of plain values; the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def content_of(path: Path) -> str:
    """SHA-256 of a file; of a folder, of the names and contents of all files under it."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return digest([[file.relative_to(path).as_posix(), _file(file)] for file in files])
    return _file(path)


@lru_cache
def code_of(part: str = "") -> str:
    """SHA-256 of our own Python files, all or those of one part of the package."""
    files = sorted((PACKAGE / part).rglob("*.py"))
    return digest([[file.relative_to(PACKAGE).as_posix(), _file(file)] for file in files])


def judge_identity(config: Any) -> str:
    """Of all that a judge's answers depend on and that can be seen: config, files it names, functions, classes.

    Folders that it writes to (`…_dir`) do not count.
    """
    return digest([config, code_of("rewards"), list(_named(config))])


def config_identity(config: Any) -> list[list[str]]:
    """Names and contents of the files that ``config`` names, of its models, and of its data, a folder or a pattern too.

    Folders that it writes to do not count.
    """
    found: list[list[str]] = []
    for key, text in _texts(config):
        if key == "path" and any(sign in text for sign in "*?["):
            found += [[file, content_of(Path(file))] for file in sorted(glob(text, recursive=True))]
        elif _is_file(text) or _is_folder_of(key, text):
            found.append([text, content_of(Path(text))])
    return found


def _is_folder_of(key: str, text: str) -> bool:
    """A folder of data or of a model; `name` may be that of a run too."""
    if key == "name":
        return any(_is_file(f"{text}/{name}") for name in ("config.json", "adapter_config.json"))
    return key in ("path", "model", "tokenizer") and Path(text).is_dir()


def _named(config: Any) -> Iterator[list[str]]:
    for key, text in _texts(config):
        if key.endswith("_dir"):
            continue
        ours = key == "class_path" and text.startswith("gopo_lightning.")
        if key in ("function", "class_path") and "." in text and not ours:
            yield [text, _source_file(load_callable(text))]
        elif _is_file(text) or _is_folder_of(key, text):
            yield [text, content_of(Path(text))]


def _source_file(thing: Any) -> str:
    """Content of the file that defines ``thing``; empty for what has none, as in C."""
    try:
        module = sys.modules[inspect.unwrap(thing).__module__]
        return content_of(Path(inspect.getfile(module)))
    except (TypeError, KeyError, OSError, AttributeError):
        return ""


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item, str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, str):
        yield key, value


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for a name: a template, or a text
        return False


def _file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
