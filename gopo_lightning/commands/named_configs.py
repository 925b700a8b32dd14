"""The configs that come with the package, by name: `--config quickstart/gopo`. A file of that path wins."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import gopo_lightning

LIST = "gopo-lightning config list"
_NAME = re.compile(r"[\w./-]*\w")
"""What may be a name or a path, and not a config itself, such as `{trainer: {max_steps: 3}}`."""


def folder() -> Path:
    """Where they are: within the installed package; in a checkout beside it."""
    package = Path(gopo_lightning.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> dict[str, Path]:
    """Name → file, sorted; `quickstart/gopo` is quickstart/gopo.yaml."""
    files = sorted(folder().rglob("*.yaml"))
    return {file.relative_to(folder()).with_suffix("").as_posix(): file for file in files}


def purpose(file: Path) -> str:
    """What a config is for: its first line, a comment."""
    return file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def find(given: str) -> str:
    """The path of the packaged config called ``given``; a path of a file, or a text that is no name, unchanged.

    Raises:
        ValueError: neither a file nor a name.
    """
    path = Path(given).expanduser()
    if not _NAME.fullmatch(given) or (path.exists() and not path.is_dir()):
        return given
    known, name = names(), given.removesuffix(".yaml")
    if name in known:
        return str(known[name])
    near = _near(name.removeprefix("configs/"), list(known))
    meant = f" Do you mean {' or '.join(near)}?" if near else ""
    raise ValueError(
        f"config '{given}' is neither a file nor the name of a packaged config.{meant} `{LIST}` lists them."
    )


def _near(name: str, known: Sequence[str]) -> list[str]:
    """The one of ``known`` that is like ``name``; failing that, up to three whose last part is like its last part."""
    if name in known:
        return [name]
    ends = sorted({one.rpartition("/")[2] for one in known})
    of_that_end = [
        one
        for end in get_close_matches(name.rpartition("/")[2], ends, n=1)
        for one in known
        if one.rpartition("/")[2] == end
    ]
    return get_close_matches(name, known, n=1, cutoff=0.8) or of_that_end[:3]


def resolve(arguments: Sequence[str]) -> list[str]:
    """``arguments`` of a command with the path of each packaged config that `--config` or `-c` names.

    Raises:
        ValueError: neither a file nor a name.
    """
    resolved: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if equals and option in ("--config", "-c"):
            argument = f"{option}={find(value)}"
        elif resolved and resolved[-1] in ("--config", "-c") and not argument.startswith("-"):
            argument = find(argument)
        resolved.append(argument)
    return resolved
