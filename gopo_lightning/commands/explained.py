"""What jsonargparse says of a wrong field or class, as one sentence: which, what was meant, and where it stands."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from importlib import import_module
from inspect import isclass, signature
from typing import Any, get_args, get_type_hints

from gopo_lightning.commands.layers import Field, options
from gopo_lightning.commands.named_configs import LIST

PACKAGES = (
    "gopo_lightning",
    "gopo_lightning.rewards",
    "gopo_lightning.rollout",
    "gopo_lightning.objectives",
    "gopo_lightning.callbacks",
    "gopo_lightning.reward_model",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.strategies",
    "torch.optim",
)
"""Where classes that configs name are looked for, by their public paths."""
Fields = dict[str, Any]
"""Name → its class or dataclass; None where it is a plain value."""

_KEY = re.compile(r'Parser key "([\w.]+)":\s*')
_UNKNOWN = re.compile(r"(?:(Group|Subcommand) '([\w.]+)' does not accept option|Option) '([^']+)'")
_FLAG = re.compile(r"unrecognized arguments: (--?[\w.+-]+)")
_CLASS = re.compile(
    r"class_path '(?P<a>[^']*)'|dot import path string: (?P<b>\S+)|Import path (?P<c>\S+) does not"
    r"|expects a function or a callable class: .*Got value: (?:Namespace\(class_path=)?'?(?P<d>[\w.]+)",
    re.DOTALL,
)
_SUBCLASS = re.compile(r"does not correspond to a subclass of (\w+)")
_REQUIRED = re.compile(r"the following arguments are required: (.*)")
_LONGEST = 400
"""Characters of what is left of the parser's own words."""


def explain(message: str, arguments: Sequence[str], written: Sequence[Field], root: Fields) -> str:
    """One sentence for ``message`` of the parser.

    Args:
        message: of jsonargparse.
        arguments: of the command line, the command's name first, or without it.
        written: fields of the configs.
        root: fields of the command.
    """
    command = "" if not arguments or arguments[0].startswith("-") else arguments[0]
    path, leaf = _innermost(message, ())
    if match := _FLAG.search(leaf):
        name = match[1].lstrip("-")
        given = next((option for option, _ in options(arguments) if option.endswith(name)), match[1])
        return _unknown((*path, *name.split(".")), given, written, root)
    if stray := [field for field in written if field.stray and _inside(field.path, path)]:
        if get_close_matches(stray[0].path[-1], ["init_args"]):
            return f"{stray[0].shown}: did you mean 'init_args'?{_at(stray[0])}"
        return f"{stray[0].shown} stands beside class_path; arguments of a class stand in its init_args{_at(stray[0])}"
    if match := _UNKNOWN.search(leaf):
        keys = [*path, *(match[2].split(".") if match[1] == "Group" else []), *match[3].split(".")]
        flag = next((option for option, _ in options(arguments) if option.endswith(f".{keys[-1]}")), None)
        return _unknown(keys, None if _field(keys, written) else flag, written, root)
    field = _field(path, written) if path else None
    shown, place = (field.shown, _at(field)) if field else (".".join(path), "")
    if match := _REQUIRED.search(leaf):
        names = [name.removeprefix(f"{command}.") for name in match[1].split(", ")]
        return f"{shown} lacks {', '.join(names)}{place}" if path else _missing(names, command, arguments)
    if (match := _CLASS.search(leaf)) and (name := next(filter(None, match.groups()), "")):
        named = [f for f in written if f.value == name and f.path == path]
        wanted = " or ".join(dict.fromkeys(_SUBCLASS.findall(message)))
        said = no_class(name, wanted, leaf.partition(":\n")[2].strip())
        return f"{shown}: {said}{_at(named[-1]) if named else place}"
    return f"{shown}: {_plain(leaf)}{place}".removeprefix(": ")


def no_class(name: str, wanted: str = "", reason: str = "") -> str:
    """What is wrong with the class path ``name`` where a ``wanted`` stands, and which was meant."""
    if reason and name.partition(".")[0] not in {package.partition(".")[0] for package in PACKAGES}:
        return f"{name} cannot be imported: {reason}"
    known = _known_classes()
    last = name.rpartition(".")[2]
    if name in known or (exact := [path for path in known if path.rpartition(".")[2] == last]) == [name]:
        return f"{name} is no {wanted or 'class of the kind that is wanted here'}"
    if exact:
        return f"there is no {name}; did you mean {exact[0]}?"
    near = get_close_matches(last, [path.rpartition(".")[2] for path in known], 3)
    paths = [next(path for path in known if path.rpartition(".")[2] == name) for name in dict.fromkeys(near)]
    if paths:
        return f"there is no {name}; did you mean {' or '.join(paths)}?"
    return f"{name} cannot be imported. Give the dotted path of a class, such as gopo_lightning.rewards.FunctionReward"


def _known_classes() -> list[str]:
    """Public dotted paths; the first of a class that has several."""
    found: dict[Any, str] = {}
    for package in PACKAGES:
        module = _imported(package)
        for name in getattr(module, "__all__", None) or dir(module):
            value = getattr(module, name, None)
            if isclass(value):
                found.setdefault(value, f"{package}.{name}")
    return list(found.values())


# ------------------------------------------------------------------------------------------------ jsonargparse's words


def _innermost(message: str, path: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The keys down to the cause, without init_args, and what is said of it: of alternatives, what names a field."""
    message = message.strip()
    if match := _KEY.match(message):
        keys = [key for key in match[1].split(".") if key != "init_args"]
        return _innermost(message[match.end() :], path if list(path) == keys else (*path, *keys))
    if not re.match(r"(- Expected a path .*\n *- )?Does not validate against any of the Union subtypes", message):
        return path, re.split(r"\n *Given value type:", message)[0]
    text = message.partition("Errors:\n")[2]
    ends = [match.start() for match in re.finditer(r"\n *Given value type:", text)]
    text = text[: ends[-1]] if ends else text
    indent = len(text) - len(text.lstrip())
    errors = re.split(rf"^ {{{indent}}}- ", text, flags=re.MULTILINE)[1:]
    found = [_innermost(error, path) for error in errors if not error.startswith("Expected a <class 'NoneType'>")]
    found = [item for item in found if not _SUBCLASS.search(item[1])] or found
    named = [item for item in found if _UNKNOWN.search(item[1]) or _FLAG.search(item[1])]
    return max(named or found or [(path, message)], key=lambda item: len(item[0]))


def _plain(leaf: str) -> str:
    """Without Python's way to show types."""
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", leaf).replace("Expected a Sequence", "Expected a list")
    text = re.sub(r"Expected an? (.+?)\. Got value: ", r"expected \1, got ", " ".join(text.split()))
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


# -------------------------------------------------------------------------------------------------------------- fields


def _unknown(path: Sequence[str], flag: str | None, written: Sequence[Field], root: Fields) -> str:
    """Which part of ``path`` is no field, and which is meant."""
    keys = tuple(part for part in path if part != "init_args")
    known, done = root, 0
    while done < len(keys) - 1 and keys[done] in known:
        known = _fields(_class_at(keys[: done + 1], written) or known[keys[done]])
        done += 1
    field = next((f for n in range(done + 1, len(keys) + 1) if (f := _field(keys[:n], written))), None)
    wrong, parent, place = keys[done], ".".join(keys[:done]), ""
    if field is not None and flag is None:
        parent, place = field.shown.rpartition(".")[0], _at(field)
    said = f"{flag} is unknown" if flag else f"{parent or 'a config'} has no field {wrong!r}"
    near = [name for name in known if wrong in name.split("_")]  # `column`, of prompt_column and others
    near = near or get_close_matches(wrong, [*known, "init_args"] if done else known, 1)
    if not near or near[0] == wrong:
        near = [path for path in _all(root, written) if path.rpartition(".")[2] == keys[-1]][:1]
    if near:
        return f"{said}; did you mean {' or '.join(map(repr, near[:3]))}?{place}"
    return f"{said}; it has {', '.join(known) or 'none'}{place}" if done else f"{said}{place}"


def _all(root: Fields, written: Sequence[Field]) -> Iterator[str]:
    """Every field, as one writes it."""
    for name, kind in root.items():
        yield name
        cls = _class_at((name,), written) or kind
        middle = f"{name}." if cls is None or is_dataclass(cls) or name == "trainer" else f"{name}.init_args."
        yield from (middle + below for below in _below(cls))


def _below(kind: Any) -> Iterator[str]:
    for name, inner in _fields(kind).items():
        yield name
        if inner is not None and is_dataclass(inner):
            yield from (f"{name}.{below}" for below in _below(inner))


def _fields(kind: Any) -> Fields:
    """Arguments of a class, or fields of a dataclass, with the class that each takes."""
    if kind is None:
        return {}
    try:
        hints = get_type_hints(kind if is_dataclass(kind) else kind.__init__)
        names = [name for name in signature(kind).parameters if name not in ("self", "args", "kwargs")]
    except (TypeError, ValueError, NameError):  # of C code, or with a type that cannot be looked up
        return {}
    return {name: _class_in(hints.get(name)) for name in names}


def _class_in(hint: Any) -> Any:
    """`SamplingConfig` of `SamplingConfig | None` and of `list[SamplingConfig]`."""
    if isclass(hint) and hint.__module__ != "builtins":
        return hint
    return next((found for inner in get_args(hint) if (found := _class_in(inner))), None)


def _class_at(keys: Sequence[str], written: Sequence[Field]) -> Any:
    """The class that a config names at ``keys``; None where it names none that can be imported."""
    named = [field.owner for field in written if field.path == tuple(keys) and not field.inside and field.owner]
    for path in reversed(named):
        if (found := class_named(path)) is not None:
            return found
    return None


def class_named(path: str) -> Any:
    """The class of a dotted path, or of a short name of a known one; None where there is none."""
    if "." not in path:
        path = next((known for known in _known_classes() if known.endswith(f".{path}")), path)
    return _imported(path)


def _imported(path: str) -> Any:
    """A module, or what one has; None where there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None) if module else import_module(path)
    except (ImportError, TypeError, ValueError):  # the latter two for what is no dotted path
        return None


def _field(path: Sequence[str], written: Sequence[Field]) -> Field | None:
    """Where the last of the configs says it."""
    return next((f for f in reversed(written) if f.path == tuple(path) and f.shown.endswith(path[-1])), None)


def _inside(path: Sequence[str], outer: Sequence[str]) -> bool:
    return tuple(path[: len(outer)]) == tuple(outer)


def _at(field: Field) -> str:
    return f" ({field.place})"


def _missing(names: Sequence[str], command: str, arguments: Sequence[str]) -> str:
    if not any(option in ("--config", "-c") for option, _ in options(arguments)):
        return (
            f"{command or 'this command'} needs a config: --config FILE.yaml, or a name such as quickstart/gopo "
            f"(several are layers; `{LIST}` lists the names)."
        )
    need = " and ".join(f"{name}: {{class_path: …, init_args: {{…}}}}" for name in names if name in ("model", "data"))
    return f"the config lacks {need or ', '.join(names)}."
