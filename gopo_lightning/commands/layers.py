"""Where the fields of a command stand: in which file and line of its configs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

BESIDE_CLASS = ("class_path", "init_args", "dict_kwargs")
"""Keys of a mapping that names a class."""


@dataclass(frozen=True)
class Field:
    """A key of a config."""

    path: tuple[str, ...]
    """Keys from the top, without init_args, and without numbers of list items."""
    shown: str
    """As one writes it: `model.init_args.rewards.sources`."""
    place: str
    """`config.yaml, line 3`."""
    owner: str | None
    """Class path of the nearest mapping around it that names a class."""
    inside: tuple[str, ...]
    """The last of ``path``: what stands within ``owner``."""
    value: str | None
    """Where it is a text or a number."""
    stray: bool
    """Whether it stands beside class_path, where an argument of a class has no place."""


def options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every argument with its value, which stands behind an equals sign or is the next argument."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        option, equals, value = argument.partition("=")
        yield option, value if equals else following


def files(arguments: Sequence[str]) -> list[Path]:
    """Configs that ``arguments`` name and that are files."""
    named = [Path(value) for option, value in options(arguments) if option in ("--config", "-c") and value]
    return [path for path in named if path.is_file()]


def check_yaml(arguments: Sequence[str]) -> None:
    """ValueError, with file and line, for a config that is no YAML or no mapping."""
    for path in files(arguments):
        try:
            node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
            line = path.read_text(encoding="utf-8").splitlines()[mark.line : mark.line + 1] if mark else []
            if line and "\t" in line[0][: len(line[0]) - len(line[0].lstrip())]:
                raise ValueError(f"{place}: a tab indents this line, and YAML takes spaces only.") from error
            raise ValueError(f"{place}: this is no YAML: {error.problem or error.context}. Correct it.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no YAML: {error}".splitlines()[0]) from error
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{path} is empty or no mapping; a config has trainer:, model: and data: at its top.")


def fields(arguments: Sequence[str]) -> list[Field]:
    """Of all configs, in the order in which they are given."""
    found = []
    for path in files(arguments):
        node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
        found += list(_walk(node, path, (), "", None, ()))
    return found


def _walk(
    node: yaml.Node | None, file: Path, path: tuple[str, ...], shown: str, owner: str | None, inside: tuple[str, ...]
) -> Iterator[Field]:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _walk(item, file, path, shown, owner, inside)
    if not isinstance(node, yaml.MappingNode):
        return
    texts = {key.value: item.value for key, item in node.value if isinstance(item, yaml.ScalarNode)}
    names_class = "class_path" in texts
    if names_class:
        owner, inside = texts["class_path"], ()
    for key, value in node.value:
        name, is_group = str(key.value), key.value in BESIDE_CLASS
        below, within = (path, inside) if is_group else ((*path, name), (*inside, name))
        text = f"{shown}.{name}".lstrip(".")
        place = f"{file}, line {key.start_mark.line + 1}"
        yield Field(below, text, place, owner, within, texts.get(name), names_class and not is_group)
        yield from _walk(value, file, below, text, owner, within)
